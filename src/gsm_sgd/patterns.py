"""Patterns: which weights are kept or dropped together?"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from .budget import SHARES
from .schedules import whole_number

_APART = 'choose another pattern, or put it into a group with "prunable": False'


class Top(Protocol):
    """How a pattern finds the best units of the whole model, of which each process may hold a part."""

    def __call__(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return masks of the k largest scores, ties to the lower index; in a step, only of those above zero."""

    def total(self, scores: Sequence[Tensor]) -> int:
        """Return how many units there are."""


class Pattern:
    """Units of `size` weights; the units with the largest pooled scores of the whole model are kept.

    A subclass defines `pool` and `expand`, and `select` where the choice is another. All take and return a tensor for
    each prunable parameter, in model order. The same pattern chooses the active weights of a step by their scores, and
    at the cut the weights to keep by their magnitudes. `repr` says in states which pattern they are of.

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

    def __repr__(self) -> str:
        """Return what tells it from other patterns."""
        return type(self).__name__

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError, naming the parameter, if the pattern does not fit its shape."""

    def reach(self, weight: Tensor) -> Sequence[int] | None:
        """Return how far a unit reaches along each axis of a weight.

        A DTensor may be divided between units, where a multiple of this begins. None means not at all.
        """
        return None

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

    def reach(self, weight: Tensor) -> Sequence[int]:
        """Return 1 for each axis."""
        return [1] * weight.ndim


class NM(Pattern):
    """At most n of each m weights that lie side by side along the input dimension: NM(2, 4) is 2:4 sparsity.

    The input dimension is the second: of a linear layer (out, in), the groups are m consecutive inputs of an output, as
    torch's semi-structured kernels take them; of a convolution (out, in, height, width), m consecutive input channels
    at one place. A layer that stores its weight transposed, as GPT-2's Conv1D, has its groups along the outputs.

    The pattern prescribes the density n / m, so it takes no budget. Every group keeps exactly n weights; in the ramp of
    a Schedule, while the density is above k / m, it has k active ones.

    Args:
        n: how many weights each group keeps.
        m: how many weights a group has.

    Raises:
        ValueError: not 1 <= n <= m; or, from the optimizer, a layer whose inputs m does not divide.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = whole_number("n", n), whole_number("m", m)
        if not 1 <= self.n <= self.m:
            raise ValueError(f"NM(n, m) keeps n of each m weights, so 1 <= n <= m, not n={n} and m={m}")
        self.density = self.n / self.m

    def __repr__(self) -> str:
        """Return how it is made."""
        return f"NM({self.n}, {self.m})"

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError if m does not divide the inputs."""
        if weight.ndim < 2:
            raise ValueError(f"parameter {name!r} has no input dimension: {_APART}")
        inputs = weight.shape[1]
        if inputs % self.m:
            raise ValueError(f"parameter {name!r} has {inputs} inputs, which {self.m} does not divide: {_APART}")

    def reach(self, weight: Tensor) -> Sequence[int]:
        """Return m along the input dimension."""
        return [self.m if axis == 1 else 1 for axis in range(weight.ndim)]

    def select(self, units: Sequence[Tensor], num_kept: int, top: Top) -> Sequence[Tensor]:
        """Return the same number of weights in each group."""
        total = top.total(units)
        each = num_kept * self.m // total
        may = top(units, total)  # in a step, those above zero
        return [self._largest(scores, each) & above for scores, above in zip(units, may, strict=True)]

    def _largest(self, scores: Tensor, each: int) -> Tensor:
        """Return the largest of each group, ties to the lower index: those with fewer than `each` before them."""
        members = scores.unflatten(1, (-1, self.m)).unbind(2)
        kept = []
        for i, mine in enumerate(members):
            before = torch.zeros_like(mine, dtype=torch.int16)
            for j, other in enumerate(members):
                if j != i:
                    before += other >= mine if j < i else other > mine
            kept.append(before < each)
        return torch.stack(kept, 2).flatten(1, 2)


class Block(Pattern):
    """Blocks of height x width weights are kept or dropped together, by the sum of their scores.

    Blocks lie in the matrix (out, in) of a linear layer. Of a convolution (out, in, height, width) it is the matrix
    (out, in * height * width) that im2col multiplies by, so that `weight.flatten(1).to_sparse_bsr((height, width))`
    stores what is kept and nothing else. A budget is rounded down to whole blocks.

    Args:
        height: how many outputs a block spans.
        width: how many inputs.

    Raises:
        ValueError: a size is below 1; or, from the optimizer, a matrix that blocks do not divide.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = whole_number("height", height), whole_number("width", width)
        if min(self.height, self.width) < 1:
            raise ValueError(f"a block must be at least 1 x 1, not {height} x {width}")
        self.size = self.height * self.width

    def __repr__(self) -> str:
        """Return how it is made."""
        return f"Block({self.height}, {self.width})"

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError if blocks do not divide the matrix."""
        if weight.ndim < 2:
            raise ValueError(f"parameter {name!r} is no matrix: {_APART}")
        rows, columns = len(weight), math.prod(weight.shape[1:])
        if rows % self.height or columns % self.width:
            raise ValueError(
                f"parameter {name!r} is a matrix of {rows} x {columns}, which blocks of {self.height} x {self.width} "
                f"do not divide: {_APART}"
            )

    def reach(self, weight: Tensor) -> Sequence[int] | None:
        """Return the block; it may span several of the further axes of a convolution, or be cut by none of them."""
        return [self.height, self.width] if weight.ndim == 2 else [self.height, *weight.shape[1:]]

    def pool(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums."""
        return [self._blocks(tensor).sum((1, 3)) for tensor in scores]

    def expand(self, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
        """Return each mark in all places of its block."""
        return [
            mask[:, None, :, None].expand(self._blocks(tensor).shape).reshape(tensor.shape)
            for mask, tensor in zip(kept, scores, strict=True)
        ]

    def _blocks(self, tensor: Tensor) -> Tensor:
        """Return a weight as (block rows, height, block columns, width)."""
        blocks: Tensor = tensor.flatten(1).unflatten(1, (-1, self.width)).unflatten(0, (-1, self.height))
        return blocks
