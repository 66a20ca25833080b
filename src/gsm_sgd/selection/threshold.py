"""The threshold: the Q-th largest of all scores of a model, found exactly and without sorting.

1. A strided sample of the scores gives two values that very likely enclose it: the bracket.
2. One pass counts, row by row, the scores that reach the higher value and those between the two.
3. The few between are gathered, and the one whose rank is Q is found among them.

The counts of step 2 are exact, so they show if the Q-th largest is not between. Then it is one of the two values, as
zero is where many gradients are zero: the scores equal to it are counted, however many they are, and none is gathered.
Or the sample misled: then the bracket widens, and step 2 is repeated. Of several scores equal to the Q-th largest those
at lower indices are active, in parameter order.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Half-width of the bracket in standard deviations: one in twenty misses, which costs time, not exactness.
_SIGMAS = 2.0


class NotFiniteError(ArithmeticError):
    """A score is infinite or NaN."""


class Threshold(NamedTuple):
    """Where the k largest scores end: all above `value` are among them, and as many equal ones as there is room for.

    Scores equal to `value` are among them in tensors up to number `tensor`, but not at the flat positions `surplus`
    of that tensor, and not in tensors after it; number -1 means in none.
    """

    value: Tensor
    tensor: int
    surplus: Tensor

    def masks(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """Return which scores are among them, as bool tensors."""
        masks = [score >= self.value if i <= self.tensor else score > self.value for i, score in enumerate(scores)]
        masks[self.tensor][self.surplus] = False
        return masks


class Scores(Protocol):
    """All scores of a process, as the search asks for them."""

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess two values that enclose the k-th largest score, `sigmas` standard deviations to either side."""

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Return how many scores are at least `high`, and all that are less and exceed `low`, in any order."""

    def count(self, value: Tensor) -> list[int]:
        """Return how many scores of each tensor equal `value`, which lies in the last bracket or at an end of it."""

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Return the flat positions, by ascending index, of the scores of one tensor that equal `value`."""

    def __len__(self) -> int:
        """Return the number of tensors."""


ScoresOf = Callable[[Sequence[int]], Scores]
"""Given numbers of tensors, their scores."""


class Found(NamedTuple):
    """The k-th largest score, how many are larger, how many equal it, and how many of each tensor if that is known."""

    value: Tensor
    larger: int
    equal: int
    counts: list[int] | None = None


class Search(Protocol):
    """Where `find_threshold` looks: in this process's scores, or in those of all processes."""

    sigmas: float
    num_tensors: int

    def bracket(self, k: int, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess two values that enclose the k-th largest score."""

    def kth_largest(self, k: int, low: Tensor, high: Tensor) -> Found | None:
        """Return the k-th largest score, or None if it is neither between the two values nor one of them."""

    def count(self, value: Tensor) -> list[int]:
        """Return how many scores of each tensor equal a value."""

    def surplus(self, tensor: int, value: Tensor, room: int, equal: int) -> Tensor:
        """Return where local scores of a tensor equal a value of which there are more than `room`."""


def find_threshold(search: Search, k: int, positive: bool = False) -> Threshold:
    """Return where the k largest of all scores end, for 0 < k <= their number. None may be NaN.

    With `positive`, only scores above zero are among them, even if these are fewer than k.
    """
    sigmas = search.sigmas
    while (found := search.kth_largest(k, *search.bracket(k, sigmas))) is None:
        sigmas *= 2  # the sample misled
    nowhere = torch.empty(0, dtype=torch.int64, device=found.value.device)
    if positive and found.value <= 0:
        return Threshold(torch.zeros_like(found.value), -1, nowhere)
    room = k - found.larger
    if room == found.equal:
        return Threshold(found.value, search.num_tensors - 1, nowhere)
    counts = found.counts or search.count(found.value)
    tensor, room = locate(room, counts)
    return Threshold(found.value, tensor, search.surplus(tensor, found.value, room, counts[tensor]))


class Local:
    """The scores of one process."""

    sigmas = _SIGMAS

    def __init__(self, scores: Scores) -> None:
        self._scores, self.num_tensors = scores, len(scores)
        self.bracket, self.count = scores.bracket, scores.count

    def kth_largest(self, k: int, low: Tensor, high: Tensor) -> Found | None:
        """Look among those between."""
        reached, values = self._scores.between(low, high)
        if reached < k <= reached + len(values):
            value = values.topk(k - reached, sorted=False).values.amin()
            more, equal = torch.stack([(values > value).sum(), (values == value).sum()]).tolist()
            return Found(value, reached + more, equal)
        return at_end(k, reached if k <= reached else reached + len(values), low, high, self.count)

    def surplus(self, tensor: int, value: Tensor, room: int, equal: int) -> Tensor:
        """Return the last of those that are equal."""
        return self._scores.ties(tensor, value)[room:]


def at_end(k: int, reached: int, low: Tensor, high: Tensor, count: Callable[[Tensor], list[int]]) -> Found | None:
    """Return the k-th largest score if it is an end of a bracket that it does not lie between, else None.

    Args:
        k: which.
        reached: how many scores are at least `high` if k is among these, else how many exceed `low`.
        low, high: the bracket.
        count: given a value, how many scores of each tensor equal it.
    """
    value = high if k <= reached else low
    counts = count(value)
    equal = sum(counts)
    larger = reached - equal if k <= reached else reached
    return Found(value, larger, equal, counts) if larger < k <= larger + equal else None


def locate(rank: int, counts: Sequence[int]) -> tuple[int, int]:
    """Locate the item of this rank, given how many each tensor has: tensor index, rank within it."""
    for tensor, count in enumerate(counts):
        if rank <= count:
            return tensor, rank
        rank -= count
    raise AssertionError("there are fewer in all")
