"""Which weights are active: the exact top Q of all importances in the model.

Legend (Ding et al., "Global Sparse Momentum SGD", NeurIPS 2019): W weight, T importance, B activity mask,
N number of prunable weights, C compression ratio, Q number of weights kept.

The selection needs one number, the Q-th largest importance. Nothing is sorted to find it:

1. A strided sample of the importances gives two values that very likely enclose it.
2. One pass counts, row by row, the importances that reach the higher value and those between the two.
3. The few between are gathered, and the one whose rank is Q is found among them.

The counts of step 2 are exact, so they show if the Q-th largest is not between. Then it is one of the two values, as
zero is where many gradients are zero: the importances equal to it are counted, however many they are, and none is
gathered. Or the sample misled: then the two values move apart, and step 2 is repeated. Of several importances equal to
the Q-th largest those at lower indices are active, in parameter order.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Half-width of the guess where the threshold lies: one guess in twenty misses, which costs time, not exactness.
_SIGMAS = 2.0
ROW = 32  # scores at most: shorter rows take longer to count, in longer ones more is gathered than is needed
_CHUNK = 2**14  # rows: what is compared at a time stays in the cache
_ROUNDING = 4 * sys.float_info.epsilon


def check_compression(compression: float) -> None:
    """Raise ValueError if a compression ratio C is not finite or below 1."""
    if not math.isfinite(compression) or compression < 1:
        raise ValueError(f"compression must be a finite number of at least 1, not {compression}")


def kept_weights(num_weights: int, compression: float) -> int:
    """Return Q = floor(N / C), the number of weights that a compression ratio C leaves of N.

    Raises:
        ValueError: C is not finite, is below 1, or is so high that nothing would be left.
    """
    check_compression(compression)
    quotient = num_weights / float(compression)
    whole = round(quotient)
    # C = N / Q is a rounded number, so N / C may fall just short of the whole number that is meant
    kept = whole if math.isclose(quotient, whole, rel_tol=_ROUNDING) else math.floor(quotient)
    if kept == 0:
        raise ValueError(f"compression {compression:g} leaves none of {num_weights} weights; use at most {num_weights}")
    return kept


def importance(weight: Tensor, grad: Tensor) -> Tensor:
    """Return T = |W * dL/dW|, shaped as `weight`: the first-order Taylor estimate of what removing W costs.

    Half-precision inputs give float32 scores: their products underflow in float16 and tie in bfloat16.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * grad.to(dtype)).abs_()


def score_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """Return the precision in which all importances can be compared: float32 at least."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights), torch.float32)


def select_top(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Mark the k largest of all scores taken together, ties going to the lower index in list order.

    Args:
        scores: floating-point tensors of any shapes on one device; mixed precisions are compared exactly.
        k: how many to mark, 0 <= k <= total number of scores.

    Returns:
        One bool tensor per score tensor, of its shape, with exactly k True in all.

    Raises:
        ValueError: k is out of range, a score is NaN, not floating point, or on another device.
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if any(not score.is_floating_point() for score in scores):
        raise ValueError("scores must be floating point")
    if len({score.device for score in scores}) > 1:
        raise ValueError("scores must all be on one device")
    if any(bool(score.isnan().any()) for score in scores):
        raise ValueError("scores contain NaN")
    if k in (0, total):
        return [torch.full(score.shape, k > 0, dtype=torch.bool, device=score.device) for score in scores]
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    flat = [score.to(dtype).reshape(-1) for score in scores]
    masks = find_cut(StoredScores(flat), k).masks(flat)
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


class Cut(NamedTuple):
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

    @classmethod
    def above(cls, value: Tensor) -> "Cut":
        """Return the cut that keeps only scores larger than a value."""
        return cls(value, -1, value.new_empty(0, dtype=torch.int64))


class NotFiniteError(ArithmeticError):
    """A score is infinite or NaN."""


class Scores(Protocol):
    """All scores of a model, as `find_cut` asks for them, be they stored or computed anew each time."""

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess two values that enclose the k-th largest score, `sigmas` standard deviations to either side."""

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Return how many scores are at least `high`, and all that are less and exceed `low`, in any order.

        Raises:
            NotFiniteError: some scores raise it here if one of them is not finite.
        """

    def count(self, value: Tensor) -> list[int]:
        """Return how many scores of each tensor equal `value`, which lies in the last bracket or at an end of it."""

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Return the flat positions, by ascending index, of the scores of one tensor that equal `value`."""

    def __len__(self) -> int:
        """Return the number of tensors."""


ScoresOf = Callable[[Sequence[int]], Scores]
"""Given numbers of tensors, their scores."""


def find_cut(scores: Scores, k: int, positive: bool = False) -> Cut:
    """Return where the k largest of all scores end, for 0 < k <= their number. None may be NaN.

    With `positive`, only scores above zero are among them, even if these are fewer than k.
    """
    sigmas = _SIGMAS
    while True:
        low, high = scores.bracket(k, sigmas)
        reached, values = scores.between(low, high)
        if reached < k <= reached + len(values):
            value = values.topk(k - reached, sorted=False).values.amin()
            more, equal = torch.stack([(values > value).sum(), (values == value).sum()]).tolist()
            found: Found | None = Found(value, reached + more, equal)
        else:
            found = at_end(k, reached if k <= reached else reached + len(values), low, high, scores.count)
        if found is not None:
            break
        sigmas *= 2  # the sample misled
    if positive and found.value <= 0:
        return Cut.above(torch.zeros_like(found.value))
    room = k - found.larger
    if room == found.equal:
        return Cut(found.value, len(scores) - 1, values.new_empty(0, dtype=torch.int64))
    tensor, room = tensor_with(room, found.counts or scores.count(found.value))
    return Cut(found.value, tensor, scores.ties(tensor, found.value)[room:])


class Found(NamedTuple):
    """The k-th largest score, how many are larger, how many equal it, and how many of each tensor if that is known."""

    value: Tensor
    larger: int
    equal: int
    counts: list[int] | None = None


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


def tensor_with(place: int, counts: Sequence[int]) -> tuple[int, int]:
    """Return in which tensor something is, and as the how manieth there, given how many each tensor has."""
    for tensor, count in enumerate(counts):
        if place <= count:
            return tensor, place
        place -= count
    raise AssertionError("there are fewer in all")


def guess_bracket(sample: Tensor, share: float, sigmas: float) -> tuple[Tensor, Tensor]:
    """Guess two values with a `share` of all scores above them, the first too low and the second too high."""
    rank = share * len(sample)
    # How many sampled scores lie above the threshold is about binomial: so many standard deviations, and one more.
    margin = sigmas * math.sqrt(rank * (1 - share)) + 1
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    largest = sample.topk(min(last + 1, len(sample))).values
    high = largest[first] if first >= 0 else sample.new_tensor(math.inf)
    low = largest[last] if last < len(sample) else sample.new_tensor(-math.inf)
    return low, high


def row_width(numel: int, limit: int) -> int:
    """Return the width, at most `limit`, of the rows that `numel` scores fall into without a rest."""
    return next(width for width in range(limit, 0, -1) if numel % width == 0)


def count_rows(parts: Sequence[Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Count scores by rows.

    Args:
        parts: matrices of scores, at most 256 wide: a bfloat16 number counts no further.
        low, high: the bracket.

    Returns:
        For each row of all matrices how many scores lie between `low` and `high`, not more than zero if `low` is
        `high`; and the number of those that are at least `high` in all.
    """
    inside, reached = [], []
    for rows in parts:
        size = _CHUNK if rows.is_cpu else len(rows)
        mark = rows.new_empty(min(len(rows), size), rows.shape[1])
        for chunk in rows.split(size):
            # On a CPU comparing into floats and adding these is several times as fast as comparing into bools.
            reached.append(torch.ge(chunk, high, out=mark[: len(chunk)]).sum(1))
            inside.append(torch.gt(chunk, low, out=mark[: len(chunk)]).sum(1) - reached[-1])
    return torch.cat(inside), torch.cat(reached).sum(dtype=torch.float64)


class StoredScores:
    """Scores that lie in memory.

    Args:
        scores: one-dimensional tensors of one dtype on one device.
        whole: a tensor that holds all of them one after another, if there is one: it saves work for each of them.
        like: what they are the scores of, if that may lie in memory in another order than that of its index.
    """

    def __init__(
        self,
        scores: Sequence[Tensor],
        whole: Tensor | None = None,
        like: Sequence[Tensor] = (),
    ) -> None:
        self._scores, self._like = scores, like
        self._parts = list(scores) if whole is None else [whole]
        self._total = sum(part.numel() for part in self._parts)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._scores)

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess from a strided sample."""
        # A sample of about N^(2/3) balances its own cost against that of the scores that it leaves between the values.
        # An odd stride visits every column of a matrix with 2^n columns.
        stride = round(self._total ** (1 / 3) / 2) | 1
        sample = torch.cat([part[::stride] for part in self._parts])
        return guess_bracket(sample, k / self._total, sigmas)

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Count all rows and gather those with any score in the bracket."""
        parts = [part.view(-1, row_width(len(part), ROW)) for part in self._parts if len(part)]
        inside, reached = count_rows(parts, low, high)
        values = []
        for rows, hits in zip(parts, inside.split([len(rows) for rows in parts]), strict=True):
            near = rows.index_select(0, (hits > 0).nonzero().squeeze(1)).view(-1)
            values.append(within(near, low, high))
        return int(reached), torch.cat(values)

    def count(self, value: Tensor) -> list[int]:
        """Compare all scores."""
        return torch.stack([(score == value).count_nonzero() for score in self._scores]).tolist()

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Compare the scores of the tensor."""
        positions = (self._scores[number] == value).nonzero().squeeze(1)
        return by_index(positions, self._like[number]) if self._like else positions


def within(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the values that lie between `low` and `high`."""
    values = values[values > low]
    return values[values < high]


def by_index(positions: Tensor, like: Tensor) -> Tensor:
    """Sort positions in the memory of a dense tensor by its index order."""
    return positions if like.is_contiguous() else positions[index_order(positions, like).argsort()]


def index_order(positions: Tensor, like: Tensor) -> Tensor:
    """Return at which place in the index order of a dense tensor positions in its memory are."""
    if like.is_contiguous():
        return positions
    index, rest = torch.zeros_like(positions), positions
    for axis in memory_order(like):
        if like.shape[axis] > 1:  # the stride of any other axis means nothing
            index += rest.div(like.stride(axis), rounding_mode="floor") * math.prod(like.shape[axis + 1 :])
            rest = rest % like.stride(axis)
    return index


def memory_order(tensor: Tensor) -> list[int]:
    """Return the axes of a dense tensor in the order that makes it contiguous."""
    return sorted(range(tensor.ndim), key=lambda axis: (tensor.shape[axis] > 1, -tensor.stride()[axis]))
