"""The compression ratio at which a sparse file has at most a size given in advance, wherever the kept weights are."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from torch import nn

from ..budget import kept_weights
from ..experiments import UsageError
from ..experiments.recipes import Recipe
from ..names import prunable_parameters
from .sparse import largest_size

_UNITS = {"b": 1, "kb": 10**3, "kib": 2**10, "mb": 10**6, "mib": 2**20}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]+)\s*", re.IGNORECASE)
_DIGITS = 6  # of a compression ratio, as a run folder's name has it


def parse_size(text: str) -> int:
    """Return a size in bytes, rounded down: 20KB are 20,000 bytes, 20KiB are 20,480; UsageError if it is no size."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(f"a size is a number with B, KB, KiB, MB or MiB, like 20KB, not {text!r}")
    return int(Decimal(match[1]) * _UNITS[match[2].lower()])


def compression_for(target: int, model: nn.Module, recipes: Sequence[Recipe]) -> float:
    """Return the least compression ratio, of six digits, at which no sparse file of these runs has over `target` bytes.

    The recipes of the runs, which are in the files, differ in the seed alone.

    Raises:
        UsageError: even with one weight left the file could be larger.
    """
    state, prunable = model.state_dict(), prunable_parameters(model)
    total = sum(weight.numel() for weight in prunable.values())

    def size(kept: int) -> int:
        ratio = _ratio(total, kept)
        fields = [replace(recipe, compression=ratio).as_dict() for recipe in recipes]
        return max(largest_size(state, kept_weights(total, ratio), prunable=prunable, recipe=one) for one in fields)

    if size(1) > target:
        raise UsageError(
            f"{target:,} bytes are too few: with one weight left, biases, names, recipe and certificate take up to "
            f"{size(1):,}, which is the smallest --target-size"
        )
    # the first count that is too many is bisected for, and the last one before it kept
    return _ratio(total, bisect_right(range(1, total + 1), target, key=size))


def _ratio(total: int, kept: int) -> float:
    """Return the least ratio of six digits that keeps at most `kept` weights of `total`, or else one."""
    least = Context(_DIGITS, ROUND_CEILING).divide(total, kept)
    if least > total:
        least = Context(_DIGITS, ROUND_FLOOR).divide(total, kept)
    return float(least)
