"""What the weight files of a run say: which weights each method keeps, how large they are, where masks agree."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..experiments import UsageError
from ..experiments.lottery import TICKETS
from ..experiments.rundir import read_masks, read_weights
from ..masks import magnitude_masks
from .runs import Run

BINS_PER_DECADE = 5
LOWEST, HIGHEST = -12, 2  # log10 |w|: what lies beyond counts in the first bin, or the last
_BITS_OF_A_WEIGHT = 32
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Histogram(NamedTuple):
    """How many weights there are in each bin of log10 |w|, and how many are exactly zero."""

    counts: list[int]
    zeros: int


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
    """Return which methods have chosen weights to keep: GSM, and magnitude if there is a base net; a replay's one."""
    if run.net == "ticket-magnitude":
        return ["magnitude"]
    return ["GSM", *(["magnitude"] if (run.path / "base.safetensors").exists() else [])]


def mask(run: Run, method: str) -> dict[str, Tensor]:
    """Return which weights of each layer a method keeps.

    Raises:
        UsageError: the weights that this is to be told from cannot be read.
    """
    assert run.result is not None
    stored = run.path / f"{TICKETS[method.lower()]}.safetensors"
    if stored.exists():
        return read_masks(stored)
    if method == methods(run)[0]:  # what the run's own net keeps
        return {name: weight != 0 for name, weight in prunable_weights(run, run.net).items()}
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


def histogram(run: Run, name: str) -> Histogram:
    """Return how log10 |w| is distributed over the prunable weights in `<name>.safetensors` of a finished run."""
    flat = torch.cat([weight.float().abs().flatten() for weight in prunable_weights(run, name).values()])
    present = flat[flat > 0].log10().clamp(LOWEST, HIGHEST)
    counts = torch.histc(present, (HIGHEST - LOWEST) * BINS_PER_DECADE, LOWEST, HIGHEST)
    return Histogram([int(count) for count in counts], int((flat == 0).sum()))


def size_by_parts(run: Run) -> float:
    """Return the bytes of a run's net, in float32, without any header.

    That is its kept weights, all that was not prunable as it is, and log2 of the number of ways to choose as many
    weights of each layer: no code for the positions is shorter on average.
    """
    prunable = prunable_weights(run, run.net)
    others = [
        tensor for name, tensor in read_weights(run.path / f"{run.net}.safetensors").items() if name not in prunable
    ]
    bits = sum(
        _BITS_OF_A_WEIGHT * int(weight.count_nonzero()) + _log2_choices(weight.numel(), int(weight.count_nonzero()))
        for weight in prunable.values()
    )
    return bits / 8 + sum(tensor.numel() * tensor.element_size() for tensor in others)


def _log2_choices(n: int, k: int) -> float:
    """Return log2 of the number of ways to choose k of n."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)
