"""What a net costs as a function of its widths: MACs, parameters, channels, or milliseconds."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

KINDS = ("macs", "parameters", "channels", "latency")


class Cost(Protocol):
    """A cost of a net; families are channels that cost the same."""

    def total(self, widths: Tensor) -> float:
        """Return the cost, given the number of channels of each family; it never rises when a width falls."""

    def savings(self, sizes: Tensor, blocks: Tensor, block_sizes: Tensor) -> Tensor:
        """Return what each block of a family saves if it is dropped after the later ones, all else as it is."""


class Term(NamedTuple):
    """A part of a cost: `each` for each pair of an input and an output; of one side if the other is None.

    A side is a number that always stays, and how many channels of the layer each channel of a family is.
    """

    each: float
    inputs: tuple[int, Tensor] | None
    outputs: tuple[int, Tensor]


class Products:
    """A cost that is a sum of products of widths, as MACs and parameters are."""

    def __init__(self, terms: Sequence[Term], families: int) -> None:
        none = (1, torch.zeros(families))
        sides = [(term.inputs or none, term.outputs) for term in terms]
        self._each = torch.tensor([term.each for term in terms], dtype=torch.float64)
        self._fixed = torch.tensor([[float(side[0]) for side in pair] for pair in sides], dtype=torch.float64).T
        self._per_channel = torch.stack([torch.stack([pair[i][1] for pair in sides]) for i in (0, 1)]).double()

    def total(self, widths: Tensor) -> float:
        """Return the sum; exact where all numbers are whole and below 2^53."""
        inputs, outputs = self._fixed + self._per_channel @ widths.double()
        return float(self._each @ (inputs * outputs))

    def savings(self, sizes: Tensor, blocks: Tensor, block_sizes: Tensor) -> Tensor:
        """Return what the first channel of the block's family saves, times the size of the block."""
        dense = self.total(sizes)
        first = [dense - self.total(sizes - one) for one in torch.eye(len(sizes), dtype=sizes.dtype)]
        return torch.tensor(first, dtype=torch.float64)[blocks] * block_sizes
