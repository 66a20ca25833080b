"""Patterns: which weights are kept or dropped together?"""

from collections.abc import Callable, Sequence

from torch import Tensor

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
    """

    size: int = 1
    density: float | None = None

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
