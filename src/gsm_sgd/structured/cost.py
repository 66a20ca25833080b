"""What a net costs as a function of its widths: MACs, parameters, channels, or nanoseconds."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Cost(Protocol):
    """A cost of a net; families are channels that cost the same."""

    def total(self, widths: Tensor) -> float:
        """Return the cost, given the number of channels of each family; it never rises when a width falls."""

    def savings(self, sizes: Tensor, blocks: Tensor, block_sizes: Tensor) -> Tensor:
        """Return what each block of a family saves if it is dropped after the later ones, all else as it is."""


Side = tuple[int, Tensor]
"""How many channels of a layer always stay, and how many each channel of a family is."""


class Term(NamedTuple):
    """A part of a cost: `each` for each pair of an input and an output; of one side if the other is None."""

    each: float
    inputs: Side | None
    outputs: Side


class Products:
    """A cost that is a sum of products of widths, as MACs and parameters are."""

    def __init__(self, terms: Sequence[Term], families: int) -> None:
        none = (1, torch.zeros(families))
        sides = [(term.inputs or none, term.outputs) for term in terms]
        self._each = torch.tensor([term.each for term in terms], dtype=torch.float64)
        self._widths = _Widths(sides)

    def total(self, widths: Tensor) -> float:
        """Return the sum; exact where all numbers are whole and below 2^53."""
        inputs, outputs = self._widths.of(widths)
        return float(self._each @ (inputs * outputs))

    def savings(self, sizes: Tensor, blocks: Tensor, block_sizes: Tensor) -> Tensor:
        """Return what the first channel of the block's family saves, times the size of the block."""
        dense = self.total(sizes)
        first = [dense - self.total(sizes - one) for one in torch.eye(len(sizes), dtype=sizes.dtype)]
        return torch.tensor(first, dtype=torch.float64)[blocks] * block_sizes


class Grid(NamedTuple):
    """What a call of a layer costs, measured at several widths.

    Attributes:
        inputs, outputs: its sides.
        widths: rising numbers of inputs, and of outputs; the last are those of the dense net.
        costs: for each pair of these.
    """

    inputs: Side
    outputs: Side
    widths: tuple[Sequence[int], Sequence[int]]
    costs: Sequence[Sequence[float]]


class Interpolated:
    """A cost that is a sum over calls of layers, each interpolated between what was measured, as latency is.

    It never falls where a width rises: what was measured as less counts as much as what is narrower. A call without
    inputs or outputs costs nothing.

    Args:
        grids: the calls.
        each: what a call costs besides, whatever its widths.
    """

    def __init__(self, grids: Sequence[Grid], each: float = 0.0) -> None:
        points = max(2, *(len(side) for grid in grids for side in grid.widths))

        def padded(side: Sequence[Any]) -> list[Any]:
            return [*side, *[side[-1]] * (points - len(side))]

        self._widths, self._each = _Widths([(grid.inputs, grid.outputs) for grid in grids]), each
        points_of = [[padded(grid.widths[side]) for grid in grids] for side in (0, 1)]
        self._points = torch.tensor(points_of, dtype=torch.float64)
        costs = torch.tensor([padded([padded(row) for row in grid.costs]) for grid in grids], dtype=torch.float64)
        self._costs = costs.cummax(1).values.cummax(2).values

    def total(self, widths: Tensor) -> float:
        """Return the sum of what each call costs by bilinear interpolation."""
        sides = self._widths.of(widths)
        above = torch.searchsorted(self._points, sides.unsqueeze(-1).contiguous(), right=True)
        low = (above - 1).clamp(0, self._points.shape[-1] - 2)
        start, end = (self._points.gather(-1, places).squeeze(-1) for places in (low, low + 1))
        inputs, outputs = ((sides - start) / (end - start).clamp(min=1)).clamp(0, 1)
        calls, (row, column) = torch.arange(len(self._costs)), low.squeeze(-1)
        first, second = (
            torch.lerp(self._costs[calls, at, column], self._costs[calls, at, column + 1], outputs)
            for at in (row, row + 1)
        )
        costs = torch.lerp(first, second, inputs) + self._each
        return float(costs[(sides > 0).all(0)].sum())

    def savings(self, sizes: Tensor, blocks: Tensor, block_sizes: Tensor) -> Tensor:
        """Return what each block saves after the later ones of its family, all other families being whole."""
        saved = torch.zeros(len(blocks), dtype=torch.float64)
        dense, last = self.total(sizes), -1
        for place in reversed(range(len(blocks))):
            family = int(blocks[place])
            if family != last:
                widths, before, last = sizes.clone(), dense, family
            widths[family] -= block_sizes[place]
            after = self.total(widths)
            saved[place], before = before - after, after
        return saved


class _Widths:
    """The numbers of inputs and outputs of layers, given the number of channels of each family."""

    def __init__(self, sides: Sequence[tuple[Side, Side]]) -> None:
        self._fixed = torch.tensor([[float(side[0]) for side in pair] for pair in sides], dtype=torch.float64).T
        self._per_channel = torch.stack([torch.stack([pair[i][1] for pair in sides]) for i in (0, 1)]).double()

    def of(self, widths: Tensor) -> Tensor:
        """Return two rows, of inputs and of outputs."""
        return self._fixed + self._per_channel @ widths.double()
