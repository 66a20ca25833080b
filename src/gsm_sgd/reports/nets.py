"""What the weight files of a run say: which weights each method keeps, and where masks agree."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..experiments import UsageError
from ..experiments.lottery import TICKETS
from ..experiments.recipes import method_title
from ..experiments.rundir import read_masks, read_weights
from ..masks import Masks, magnitude_masks
from .runs import Run

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Agreement(NamedTuple):
    """How far two masks agree, and how far they would by chance if each layer kept as many weights as it does.

    `overlap` is the share of the smaller mask that the other keeps too; `jaccard` what both keep, as a share of
    what either keeps.
    """

    overlap: float
    chance_overlap: float
    jaccard: float
    chance_jaccard: float


def prunable_weights(run: Run, name: str) -> dict[str, Tensor]:
    """Return the prunable weights in `<name>.safetensors` of a finished run, in the order of its layers.

    Raises:
        UsageError: the file is missing, damaged, or another net's.
    """
    assert run.result is not None
    path = run.path / f"{name}.safetensors"
    weights = read_weights(path)
    for layer in run.result["layers"]:
        weight = weights.get(layer["name"])
        if weight is None or weight.dtype not in _DTYPES or list(weight.shape) != layer["shape"]:
            raise UsageError(f"{path} is not of the net that result.json beside it describes")
    return {layer["name"]: weights[layer["name"]] for layer in run.result["layers"]}


def methods(run: Run) -> list[str]:
    """Return what has chosen weights: the run's method, and magnitude if there is a base net; a replay's one.

    Of channels magnitude chooses none, as it is of single weights.
    """
    if run.net == "ticket-magnitude":
        return ["magnitude"]
    beside = (run.path / "base.safetensors").exists() and "widths" not in (run.result or {})
    return [method_title(run.method), *(["magnitude"] if beside else [])]


def mask(run: Run, method: str) -> Masks:
    """Return which weights of each layer one of `methods` keeps.

    Raises:
        UsageError: the masks, or the weights that an older run's are to be told from, cannot be read.
    """
    assert run.result is not None
    stored = run.path / f"{TICKETS.get(method.lower(), 'masks')}.safetensors"
    if stored.exists():
        masks = read_masks(stored)
        layers = {layer["name"]: layer["shape"] for layer in run.result["layers"]}
        if {name: list(mask.shape) for name, mask in masks.items()} != layers:
            raise UsageError(f"{stored} is not of the net that result.json beside it describes")
        return Masks({name: masks[name] for name in layers})
    if method.lower() == methods(run)[0].lower():  # what the run's own net keeps
        return Masks({name: weight != 0 for name, weight in prunable_weights(run, run.net).items()})
    try:
        return magnitude_masks(prunable_weights(run, "base"), compression=run.result["compression"])
    except ValueError as error:
        raise UsageError(f"{run.path / 'result.json'} is damaged: {error}") from error


def kept(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many weights of each layer a mask keeps."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def agreement(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Agreement:
    """Return how far two masks of the same layers agree; of two empty ones, not at all."""
    both = sum(int((ours[name] & theirs[name]).sum()) for name in ours)
    a, b = kept(ours), kept(theirs)
    chance = sum(a[name] * b[name] / ours[name].numel() for name in ours if ours[name].numel())
    less, total = min(sum(a.values()), sum(b.values())), sum(a.values()) + sum(b.values())
    if not less:
        return Agreement(0.0, 0.0, 0.0, 0.0)
    return Agreement(both / less, chance / less, both / (total - both), chance / (total - chance))
