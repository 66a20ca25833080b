"""Channels of the recipes' nets: found, named as masks of weights, and counted."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Masks
from ..names import prunable_parameters
from ..structured.channels import ChannelGroups
from ..structured.labels import along_axis
from ..structured.surgery import with_stays
from . import UsageError
from .rundir import RunFolder


def find_channels(model: nn.Module, images: Tensor) -> ChannelGroups:
    """Return the channels of a net that takes such images; UsageError if none can be removed."""
    try:
        return ChannelGroups.trace(model, images)
    except ValueError as error:
        raise UsageError(str(error)) from error


def measure_latency(run: RunFolder, model: nn.Module, groups: ChannelGroups) -> None:
    """Give channels the latency of this machine as a cost: measured once in a run, which keeps the times."""
    times = groups.measure_latency(model) if run.times is None and run.writes else None
    run.save_times(times)
    groups.measure_latency(model, times=run.times)


def silencing_parameters(model: nn.Module, groups: ChannelGroups) -> dict[str, nn.Parameter]:
    """Return the parameters that silence channels, by name."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in groups.channels.rows}


def weight_masks(model: nn.Module, groups: ChannelGroups, masks: Masks) -> Masks:
    """Return masks of all prunable weights, given those of what silences channels: what a narrow net is left with."""
    stays = with_stays(groups.kept_by(masks))
    whole = Masks({key: torch.ones_like(w, dtype=torch.bool) for key, w in prunable_parameters(model).items()})
    for (name, dim), units in groups.channels.slots.items():
        if name in whole:
            whole[name] &= along_axis(stays[units], dim, whole[name].ndim).to(whole[name].device)
    return whole


def costs(groups: ChannelGroups, masks: Masks, narrow: nn.Module) -> dict[str, Any]:
    """Return what a result says of channels: MACs, parameters and the widths of layers, dense and pruned."""
    kept = groups.kept_by(masks)
    stays, macs = with_stays(kept), groups.for_budget("macs")
    return {
        "macs": {"dense": int(macs.cost_of(torch.ones_like(kept))), "pruned": int(macs.cost_of(kept))},
        "parameters": {
            "dense": sum(map(math.prod, groups.shapes.values())),
            "pruned": sum(parameter.numel() for parameter in narrow.parameters()),
        },
        **_latencies(groups, kept),
        "widths": [
            {"name": layer.weight, "dense": len(layer.outputs), "pruned": int(stays[layer.outputs].sum())}
            for layer in groups.channels.layers
        ],
    }


def _latencies(groups: ChannelGroups, kept: Tensor) -> dict[str, Any]:
    """Return nanoseconds for an image by the measured times, if the budget is of latency."""
    if not groups.has_latency:
        return {}
    latency = groups.for_budget("latency")
    return {"latency": {"dense": round(latency.cost_of(torch.ones_like(kept))), "pruned": round(latency.cost_of(kept))}}
