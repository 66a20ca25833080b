"""Patterns: which weights are kept or dropped together?"""

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor

from .budget import SHARES

Top = Callable[[Sequence[Tensor], int], list[Tensor]]
"""(scores of units, k) -> masks of the k largest in the whole model, ties to the lower index; in a step, only of those
above zero."""


class Pattern:
    """Units of `size` weights; the units with the largest pooled scores of the whole model are kept.

    A subclass defines `pool` and `expand`, and `select` where the choice is another. All take and return a tensor for
    each prunable parameter, in model order. The same pattern chooses the active weights of a step by their scores, and
    at the cut the weights to keep by their magnitudes.

    Attributes:
        size: weights in a unit; a budget is rounded down to whole units.
        density: the density that the pattern prescribes in place of a budget; None leaves it to the budget.
        signed: whether the default score |w g| is of a unit as a whole, so that `pool` gets w g with its sign.
        averaged: whether the scores of units are root mean squares over the last hundred steps or so, not of one step.
        spares_layers: whether a parameter of which nothing is kept does no harm, so that no cut warns of it.
    """

    size: int = 1
    density: float | None = None
    signed: bool = False
    averaged: bool = False
    spares_layers: bool = False

    def for_budget(self, kind: str) -> Self:
        """Return the pattern with a budget of this kind, or raise ValueError if there is none for it."""
        if kind in SHARES:
            raise ValueError(f"{kind} is a budget of channels: pass pattern=ChannelGroups.trace(model, inputs)")
        return self

    def over(self, names: Sequence[str]) -> Self:
        """Return the pattern for parameters of these names, of which the tensors come in this order."""
        return self

    def parameter_groups(self, params: Any) -> Any:
        """Return an optimizer's parameters in groups, with `prunable` set where the pattern chooses what it governs."""
        return params

    def total(self, weights: Sequence[Tensor]) -> int:
        """Return what a budget of these parameters is a share of: by default, how many weights they have."""
        return sum(weight.numel() for weight in weights)

    def check_budget(self, num_kept: int) -> None:
        """Raise ValueError if no masks can be within a budget."""

    def cost(self, masks: Sequence[Tensor]) -> int:
        """Return what of that these masks keep."""
        return sum(int(mask.sum()) for mask in masks)

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError, naming the parameter, if the pattern does not fit its shape."""

    def pool(self, scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the scores of the units, given those of the weights."""
        return scores

    def select(self, units: Sequence[Tensor], num_kept: int, top: Top) -> Sequence[Tensor]:
        """Return bool masks of units that together hold at most `num_kept` weights, given their scores."""
        return top(units, num_kept // self.size)

    def expand(self, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return bool masks of weights, given those of units, and what `pool` was given."""
        return kept


class Unstructured(Pattern):
    """Single weights, each a unit of its own: the default."""
