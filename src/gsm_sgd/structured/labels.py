"""Labels: each entry of a tensor carries the number of the channel it belongs to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOCKED = 0
"""The label of entries that must stay."""


class Value(NamedTuple):
    """What is known of a tensor in the graph.

    Attributes:
        labels: of its entries, of a shape that broadcasts to the tensor's.
        silencers: names of the parameters that make a channel zero here when its entries in them are zero; None if
            nothing does.
    """

    labels: Tensor
    silencers: frozenset[str] | None


class Labels:
    """A union-find: labels that are tied stand for one channel. Channels may be locked, each for a reason."""

    def __init__(self) -> None:
        self._parents = [LOCKED]
        self._locks = [(torch.tensor([LOCKED]), "it meets what has no channels")]

    def fresh(self, count: int) -> Tensor:
        """Return new labels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """Return the label that stands for all that this one is tied to."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def roots(self) -> Tensor:
        """Return the root of every label."""
        return torch.tensor([self.root(label) for label in range(len(self._parents))])

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Tie the labels of two tensors entry by entry."""
        pairs = torch.stack(torch.broadcast_tensors(one, other)).flatten(1).unique(dim=1)
        for a, b in pairs.T.tolist():
            low, high = sorted((self.root(a), self.root(b)))
            self._parents[high] = low  # LOCKED is the lowest

    def lock(self, labels: Tensor, reason: str) -> None:
        """Keep channels, for a reason."""
        self._locks.append((labels.unique(), reason))

    def reasons(self) -> dict[int, str]:
        """Return why channels are locked, by their roots; the first reason counts."""
        reasons: dict[int, str] = {}
        for labels, reason in self._locks:
            for label in labels.tolist():
                reasons.setdefault(self.root(label), reason)
        return reasons


def along_axis(labels: Tensor, axis: int, rank: int) -> Tensor:
    """Return a row of labels as a tensor of this rank that has them along an axis."""
    return labels.view([-1 if place == axis else 1 for place in range(rank)])


def padded(labels: Tensor, rank: int) -> Tensor:
    """Return labels with axes of size 1 in front, as broadcasting adds them."""
    return labels.view((1,) * (rank - labels.ndim) + labels.shape)


def compressed(labels: Tensor) -> Tensor:
    """Return labels with one entry along each axis that they do not depend on."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1 and (labels.stride(axis) == 0 or bool((labels == first).all())):
            labels = first
    return labels


def silencers_of_all(silencers: Sequence[frozenset[str] | None]) -> frozenset[str] | None:
    """Return what silences all of several values, or None if one of them cannot be silenced."""
    known = [names for names in silencers if names is not None]
    return frozenset().union(*known) if len(known) == len(silencers) else None
