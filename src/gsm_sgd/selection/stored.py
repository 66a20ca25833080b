"""Scores that lie in memory, and the buffer that holds those of a step."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from ..memory import by_index, dense_stride
from ..scores import Score, evaluate, magnitude, score_dtype, taylor
from .threshold import Local, Threshold, find_threshold

ROW = 32  # scores at most: shorter rows take longer to count, in longer ones more is gathered than is needed
_CHUNK = 2**14  # rows: what is compared at a time stays in the cache


def select_top(scores: Sequence[Tensor], k: int, positive: bool = False) -> list[Tensor]:
    """Mark the k largest of all scores taken together, ties going to the lower index in list order.

    Args:
        scores: floating-point tensors of any shapes on one device; mixed precisions are compared exactly.
        k: how many to mark, 0 <= k <= total number of scores.
        positive: whether to mark only scores above zero, even if these are fewer than k.

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
    if k == 0 or (k == total and not positive):
        return [torch.full(score.shape, k > 0, dtype=torch.bool, device=score.device) for score in scores]
    if k == total:
        return [score > 0 for score in scores]
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    flat = [score.to(dtype).reshape(-1) for score in scores]
    masks = find_threshold(Local(StoredScores(flat)), k, positive).masks(flat)
    return [mask.view(score.shape) for mask, score in zip(masks, scores, strict=True)]


def guess_bracket(sample: Tensor, share: float, sigmas: float) -> tuple[Tensor, Tensor]:
    """Guess two values with a `share` of all scores above them, the first too low and the second too high."""
    rank = share * len(sample)
    # How many sampled scores lie above the threshold is about binomial: so many standard deviations, and one more.
    margin = sigmas * math.sqrt(rank * (1 - share)) + 1
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    size = len(sample)
    high = sample.kthvalue(size - first).values if first >= 0 else sample.new_tensor(math.inf)
    low = sample.kthvalue(size - last).values if last < size else sample.new_tensor(-math.inf)
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


class ScoreBuffer:
    """The scores of all weights of a step in one tensor that steps reuse: allocating it again takes longer.

    Scores are rounded to the precision of their own weights, whatever that of the tensor.
    """

    def __init__(self) -> None:
        self.whole = torch.empty(0)
        self.views: list[Tensor] = []  # the scores of each weight, of its shape, in its memory order
        self._ends = [0]

    def fill(
        self,
        score: Score,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[Mapping[str, Any]],
    ) -> bool:
        """Compute the scores, in a precision that fits all weights; return whether they are all finite."""
        dtype, device = score_dtype(weights), weights[0].device
        self._ends = list(accumulate((weight.numel() for weight in weights), initial=0))
        size = -(-self._ends[-1] // ROW) * ROW
        if (len(self.whole), self.whole.dtype, self.whole.device) != (size, dtype, device):
            self.whole = torch.empty(size, dtype=dtype, device=device)
        self.views = [
            self.whole.as_strided(weight.shape, dense_stride(weight), end)
            for weight, end in zip(weights, self._ends, strict=False)
        ]
        if score in (taylor, magnitude) and len({weight.dtype for weight in weights}) == 1:
            torch._foreach_copy_(self.views, list(weights))
            if score is taylor:
                torch._foreach_mul_(self.views, list(grads))
            self.whole[: self._ends[-1]].abs_()
        else:
            for view, weight, grad, state in zip(self.views, weights, grads, states, strict=True):
                view.copy_(evaluate(score, weight, grad, state))
        self.whole[self._ends[-1] :] = -1  # else a step with fewer weights would find scores of an earlier one here
        return not len(self.whole) or all(map(math.isfinite, self.whole.aminmax()))

    def sanitize_(self) -> None:
        """Make scores that are not finite comparable: infinite ones the largest, NaN the smallest."""
        self.whole.nan_to_num_(nan=-1.0, posinf=math.inf)

    def scores_of(self, numbers: Sequence[int]) -> "StoredScores":
        """Return the scores of some weights."""
        flat = [self.whole[start:end] for start, end in pairwise(self._ends)]
        if len(numbers) == len(flat):
            return StoredScores(flat, self.whole, self.views)
        return StoredScores([flat[i] for i in numbers], None, [self.views[i] for i in numbers])

    def active(self, threshold: Threshold) -> list[Tensor]:
        """Overwrite the scores by 1 where a weight is active, else 0, and return them by weight."""
        end = self._ends[threshold.tensor + 1]
        self.whole[:end].ge_(threshold.value)
        self.whole[end : self._ends[-1]].gt_(threshold.value)
        if len(threshold.surplus):
            self.whole[self._ends[threshold.tensor] : end][threshold.surplus] = 0
        return self.views
