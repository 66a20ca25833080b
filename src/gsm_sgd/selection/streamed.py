"""Scores that are never stored: compiled passes over weights and gradients compute them each time they are needed.

A first pass samples them for a bracket around the threshold. A second one counts, row by row, the scores above and
inside the bracket. Then only the rows with some inside are read again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compiled import Compiled
from ..memory import by_index, flattened
from ..scores import Score, evaluate, magnitude, score_dtype, taylor
from .stored import ROW, StoredScores, guess_bracket, row_width, within
from .threshold import NotFiniteError, Scores

Tensors = Sequence[Tensor]

STREAMED = (taylor, magnitude)
"""The scores that depend on nothing but a weight and its gradient, one by one."""

_SMALL = 2**22  # scores; so few are stored, since passes over many small tensors take longer
_WIDE = 64  # scores in a row, at most
_BASE = 256.0  # counts that share a number are its digits in this base: no row is longer
_RUN = 32  # sampled scores that lie side by side: those of a cache line cost no more than one
_CHUNK = 2**20  # scores that are computed at a time where a few are looked for


class Passes(NamedTuple):
    """The compiled passes."""

    whole: Callable[..., Tensor]
    sample: Callable[..., Tensor]
    rows: Callable[..., tuple[Tensor, Tensor, Tensor]]
    equal: Callable[..., Tensor]

    @classmethod
    def compiled(cls) -> "Passes":
        """Return passes that are compiled when they are first called."""
        return cls(Compiled(_whole), Compiled(_sample), Compiled(_count_rows), Compiled(_equal))


def streamed(score: Score, weights: Tensors, grads: Tensors, passes: Passes) -> Scores:
    """Return the scores of all weights, computed as they are needed; those of a small model at once."""
    sizes = [weight.numel() for weight in weights]
    if sum(sizes) > _SMALL:
        return StreamedScores(score, weights, grads, passes)
    whole = passes.whole(score, weights, grads)
    return _Stored(whole.split([*sizes, len(whole) - sum(sizes)])[: len(sizes)], whole, weights, passes)


class _Stored(StoredScores):
    """Scores of a small model, counted by the compiled pass."""

    def __init__(self, scores: Tensors, whole: Tensor, like: Tensors, passes: Passes) -> None:
        super().__init__(scores, whole, like)
        self.between = StreamedScores(_itself, [whole], [whole], passes).between  # type: ignore[method-assign]


class StreamedScores:
    """The scores of all weights, as `find_threshold` asks for them.

    Args:
        score: one of `STREAMED`.
        weights, grads: what they are the scores of, without gaps in memory.
        passes: the compiled passes.
    """

    def __init__(self, score: Score, weights: Tensors, grads: Tensors, passes: Passes) -> None:
        self._score, self._weights, self._grads, self._passes = score, weights, grads, passes
        sizes = [weight.numel() for weight in weights]
        self._total = sum(sizes)
        self._ends = list(accumulate((size // row_width(size, _WIDE) for size in sizes), initial=0))
        self._dtype = score_dtype(weights)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._weights)

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess from a sample of short runs."""
        # A sample of about 4 N^(2/3): see StoredScores. An odd distance visits every column of a matrix.
        distance = max(_RUN, round(self._total ** (1 / 3) * _RUN / 4)) | 1
        sample = self._passes.sample(self._score, self._weights, self._grads, distance)
        return guess_bracket(sample, k / self._total, sigmas)

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Take the scores of rows with one in the bracket from the pass; compute again the rows that have more."""
        inside, top, total = self._passes.rows(self._score, self._weights, self._grads, low, high)
        reached = total.item()
        if math.isnan(reached):
            raise NotFiniteError
        rows = (inside > 0).nonzero().squeeze(1)
        more = inside.take(rows) > 1
        return int(reached), torch.cat([top.take(rows[~more]), within(self._rows(rows[more]), low, high)])

    def count(self, value: Tensor) -> list[int]:
        """Compare all scores in a pass."""
        return [int(count) for count in self._passes.equal(self._score, self._weights, self._grads, value).tolist()]

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Compute the scores of the tensor, some at a time."""
        weight = self._weights[number]
        pairs = zip(*(flattened(t, weight).split(_CHUNK) for t in (weight, self._grads[number])), strict=True)
        equal = [evaluate(self._score, w, g, {}).to(value.dtype) == value for w, g in pairs]
        found = [places.nonzero().squeeze(1) + i * _CHUNK for i, places in enumerate(equal)]
        return by_index(torch.cat(found), weight)

    def _rows(self, numbers: Tensor) -> Tensor:
        """Return the scores of these rows."""
        splits = torch.searchsorted(numbers, torch.tensor(self._ends, device=numbers.device)).tolist()
        scores = [torch.empty(0, dtype=self._dtype, device=numbers.device)]
        for i, (start, end) in enumerate(pairwise(splits)):
            if start < end:
                mine = numbers[start:end] - self._ends[i]
                weight, grad = (
                    _rows_of(t, self._weights[i]).index_select(0, mine) for t in (self._weights[i], self._grads[i])
                )
                scores.append(evaluate(self._score, weight, grad, {}).to(self._dtype).view(-1))
        return torch.cat(scores)


def _itself(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return what is a score already."""
    return weight


def _whole(score: Score, weights: Tensors, grads: Tensors) -> Tensor:
    """Return all scores in one tensor, with a rest of -1."""
    dtype = score_dtype(weights)
    scores = [
        evaluate(score, flattened(w, w), flattened(g, w), {}).to(dtype) for w, g in zip(weights, grads, strict=True)
    ]
    rest = -sum(score.numel() for score in scores) % ROW
    return torch.cat([*scores, scores[0].new_full((rest,), -1)])


def _sample(score: Score, weights: Tensors, grads: Tensors, distance: int) -> Tensor:
    """Return the scores of runs that begin so far from each other, or of a tensor's first weights if it is small."""
    dtype, runs = score_dtype(weights), []
    for w, g in zip(weights, grads, strict=True):
        weight, grad = (_runs(t, w, distance) for t in (w, g))
        runs.append(evaluate(score, weight, grad, {}).to(dtype).reshape(-1))
    return torch.cat(runs)


def _runs(tensor: Tensor, like: Tensor, distance: int) -> Tensor:
    flat, count = flattened(tensor, like), tensor.numel() // distance
    return flat[: count * distance].view(count, distance)[:, :_RUN] if count else flat[:_RUN]


def _count_rows(
    score: Score, weights: Tensors, grads: Tensors, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Count scores by rows.

    Returns:
        How many scores of each row lie in the bracket; the largest score of each row below its end; and how many reach
        its end in all, NaN if a score is not finite.
    """
    coded, top = [], []
    for w, g in zip(weights, grads, strict=True):
        rows = evaluate(score, _rows_of(w, w), _rows_of(g, w), {}).to(low.dtype)
        marks = torch.where(rows >= high, _BASE, torch.where(rows > low, 1.0, 0.0))
        coded.append((marks + rows * 0).sum(1))  # one reduction for both counts
        top.append(torch.where(rows >= high, -1.0, rows).amax(1))
    codes = torch.cat(coded)
    reached = torch.floor(codes / _BASE)
    return codes - reached * _BASE, torch.cat(top), reached.sum(dtype=torch.float64)


def _equal(score: Score, weights: Tensors, grads: Tensors, value: Tensor) -> Tensor:
    """Return how many scores of each tensor equal a value."""
    counts = []
    for w, g in zip(weights, grads, strict=True):
        equal = evaluate(score, _rows_of(w, w), _rows_of(g, w), {}).to(value.dtype) == value
        counts.append(torch.where(equal, 1.0, 0.0).sum(1).sum(dtype=torch.float64))
    return torch.stack(counts)


def _rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as the matrix whose rows are counted."""
    return flattened(tensor, like).view(-1, row_width(like.numel(), _WIDE))
