"""Channels of the recipes' nets: found, named as masks of weights, and counted."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..masks import Masks
from ..names import prunable_parameters
from ..structured.channels import ChannelGroups
from ..structured.graph import STAYS
from ..structured.surgery import indices
from . import UsageError


def find_channels(model: nn.Module, images: Tensor) -> ChannelGroups:
    """Return the channels of a net that takes such images; UsageError if none can be removed."""
    try:
        return ChannelGroups.trace(model, images)
    except ValueError as error:
        raise UsageError(str(error)) from error


def silencing_parameters(model: nn.Module, groups: ChannelGroups) -> dict[str, nn.Parameter]:
    """Return the parameters that silence channels, by name."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in groups.channels.rows}


def weight_masks(model: nn.Module, groups: ChannelGroups, masks: Masks) -> Masks:
    """Return masks of all prunable weights, given those of what silences channels: what a narrow net is left with."""
    left = indices(groups.channels, groups.kept_by(masks))
    whole = Masks()
    for name, weight in prunable_parameters(model).items():
        mask = torch.ones_like(weight, dtype=torch.bool)
        for dim, index in left.get(name, {}).items():
            gone = torch.ones(weight.shape[dim], dtype=torch.bool)
            gone[index] = False
            mask.index_fill_(dim, gone.nonzero().squeeze(1).to(mask.device), value=False)
        whole[name] = mask
    return whole


def costs(groups: ChannelGroups, masks: Masks, narrow: nn.Module) -> dict[str, Any]:
    """Return what a result says of channels: MACs, parameters and the widths of layers, dense and pruned."""
    kept = groups.kept_by(masks)
    stays = torch.cat([kept, kept.new_ones(1)])
    macs = groups.for_budget("macs")
    found: dict[str, Any] = {
        "macs": {"dense": int(macs.cost_of(torch.ones_like(kept))), "pruned": int(macs.cost_of(kept))},
        "parameters": {
            "dense": sum(map(math.prod, groups.shapes.values())),
            "pruned": sum(parameter.numel() for parameter in narrow.parameters()),
        },
    }
    assert STAYS == -1  # so that it finds the last entry
    found["widths"] = [
        {"name": layer.weight, "dense": len(layer.outputs), "pruned": int(stays[layer.outputs].sum())}
        for layer in groups.channels.layers
    ]
    return found
