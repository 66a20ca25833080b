"""Which units to keep: the best by score per cost, as many as a budget allows."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .branches import Branch
from .cost import Cost, Products

_TINY = 1e-300
_NEAR = 1e-3  # of the budget may be left over


class Choice:
    """Chooses units in blocks: in each family the best `round_to`, the next best, and so on.

    Args:
        families: of each unit its family: units of a family occur in the same places, and cost the same.
        round_to: the number of units in a block; the last block of a family may be smaller.
        axes: units of which some must stay, with how many.
        branches: what may vanish as a whole.

    Attributes:
        sizes: the number of units of each family.
        blocks: of each block its family.
        block_sizes: of each block the number of units.
    """

    def __init__(
        self, families: Tensor, round_to: int, axes: Sequence[tuple[Tensor, int]], branches: Sequence[Branch]
    ) -> None:
        self._families, self._axes, self._branches = families, axes, branches
        self.sizes = families.bincount()
        counts = (self.sizes + round_to - 1) // round_to
        self.blocks = torch.arange(len(counts)).repeat_interleave(counts)
        self._firsts = counts.cumsum(0) - counts
        ranks = torch.cat([torch.arange(int(size)) // round_to for size in self.sizes])
        self._block_at = self._firsts.repeat_interleave(self.sizes) + ranks  # of units by family and score
        self.block_sizes = self._block_at.bincount()

    def widths(self, kept: Tensor) -> Tensor:
        """Return how many units of each family are kept."""
        return self._families[kept].bincount(minlength=len(self.sizes))

    def choose(self, scores: Tensor, budget: float, cost: Cost, savings: Tensor) -> Tensor:
        """Return which units to keep.

        1. In each family, order the units by score, and put them into blocks.
        2. Protect the best units of each axis, as many as must stay; where these cost too much, the cheapest.
        3. Order the other blocks by score per cost.
        4. Keep as many as fit the budget; where the next one does not, go on without its family.
        5. Drop what only led to or came from a branch that has fallen to nothing.

        Args:
            scores: of the units; ties go to the lower index.
            budget: what the kept units may cost at most, unless those that must stay cost more.
            cost: of a net by its widths.
            savings: what each block saves if it is dropped.
        """
        best_first = scores.argsort(descending=True, stable=True)
        by_family = best_first[self._families[best_first].argsort(stable=True)]
        block_of = _inverse(by_family, self._block_at)

        protected = self._best(block_of, _inverse(best_first))
        if self._total(protected, cost) > budget:
            protected = self._cheapest(block_of, savings)

        worth = torch.zeros(len(self.blocks), dtype=torch.float64).index_add_(0, block_of, scores)
        order = self._priority(worth, savings, cost).argsort(descending=True, stable=True)
        chosen, rest = protected, order[~torch.isin(order, protected)]
        while len(rest):
            count = self._how_many_fit(chosen, rest, budget, cost)
            chosen, rest = torch.cat([chosen, rest[:count]]), rest[count:]
            if budget - self._total(chosen, cost) < _NEAR * budget:
                break
            rest = rest[self.blocks[rest] != self.blocks[rest[:1]]]

        kept = torch.isin(block_of, chosen)
        for branch in self._branches:
            if not kept[branch.units].any():
                kept[branch.useless] = False
        return kept

    def _best(self, block_of: Tensor, place: Tensor) -> Tensor:
        """Return the blocks of the best units of each axis, as many as must stay, by their places in order of score."""
        best = [block_of[axis[place[axis].argsort()[:least]]] for axis, least in self._axes]
        return torch.cat(best).unique() if best else torch.tensor([], dtype=torch.int64)

    def _cheapest(self, block_of: Tensor, savings: Tensor) -> Tensor:
        """Return the blocks of the cheapest units of each axis, which may be those of another; scores do not matter."""
        place = _inverse(savings[self._firsts][self.blocks].argsort(stable=True))[block_of]
        stays = torch.zeros(len(self.blocks), dtype=torch.bool)
        for axis, least in sorted(self._axes, key=lambda pair: len(pair[0])):
            more = axis[~stays[block_of[axis]]]
            missing = max(0, least - (len(axis) - len(more)))
            stays[block_of[more[place[more].argsort(stable=True)[:missing]]]] = True
        return stays.nonzero().squeeze(1)

    def _priority(self, worth: Tensor, savings: Tensor, cost: Cost) -> Tensor:
        """Return the score per cost of blocks, as it is in the dense net; it never rises within a family.

        Where a block would be worth more than one before it, which it cannot stay without, the two count as one.
        """
        if isinstance(cost, Products):
            return worth / savings.clamp(min=_TINY)
        priority, start = torch.empty_like(worth), 0
        for size in self.blocks.bincount().tolist():
            merged: list[tuple[float, float, int]] = []
            for score, saving in zip(*(side[start : start + size].tolist() for side in (worth, savings)), strict=True):
                block = (score, saving, 1)
                while merged and block[0] * merged[-1][1] > merged[-1][0] * block[1]:
                    block = tuple(map(operator.add, block, merged.pop()))
                merged.append(block)
            rates = [score / max(saving, _TINY) for score, saving, _ in merged]
            priority[start : start + size] = torch.tensor(rates).repeat_interleave(
                torch.tensor([count for _, _, count in merged])
            )
            start += size
        return priority

    def _total(self, blocks: Tensor, cost: Cost) -> float:
        """Return what a net of these blocks costs."""
        widths = torch.zeros_like(self.sizes)
        return cost.total(widths.index_add_(0, self.blocks[blocks], self.block_sizes[blocks]))

    def _how_many_fit(self, chosen: Tensor, more: Tensor, budget: float, cost: Cost) -> int:
        """Return how many more blocks fit, by bisection: the cost never falls with their number."""
        fitting, too_many = 0, len(more) + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self._total(torch.cat([chosen, more[:middle]]), cost) <= budget:
                fitting = middle
            else:
                too_many = middle
        return fitting


def _inverse(order: Tensor, places: Tensor | None = None) -> Tensor:
    """Return for each item its place in an order, or what stands at that place."""
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order)) if places is None else places
    return found
