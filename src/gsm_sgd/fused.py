"""One step of the rule in compiled passes over memory, instead of one pass for each operation.

The first pass counts, row by row, the importances above and inside a bracket around the threshold. Then only the few
inside are looked at. The last pass updates all weights and momenta, and computes the importances once more instead of
having stored them. All that changes from step to step is in tensors, so each pass is compiled once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .passes import (
    WIDE,
    Compiled,
    Kinds,
    Tensors,
    count_all,
    count_equal,
    count_sample,
    count_stored,
    decoded,
    flattened,
    importances,
    rows_of,
    update_,
    update_masked_,
)
from .rule import HALF, EagerRule, Finder, Kernel, Part, all_params, dense_stride, update_half_
from .selection import (
    ROW,
    Cut,
    NotFiniteError,
    Scores,
    StoredScores,
    by_index,
    importance,
    row_width,
    score_dtype,
    within,
)

_SMALL = 2**22  # importances; so few are stored, as it takes time to look at some of each tensor
_GRID = (-2.0, -0.5, -0.125, -0.03, 0.0, 0.03, 0.125, 0.5, 2.0)  # log2 of where to look, from the last threshold
_CHUNK = 2**20  # importances that are computed at a time where a few are looked for
_SETS = 8  # of parameters that have gradients together: so often torch compiles a function anew
_FINE = 1.1  # ratio of two values between which importances are taken to lie evenly


class FusedRule:
    """The rule as compiled passes. They are compiled when a step first needs them, and again for other parameters."""

    def __init__(self) -> None:
        self._importances = Compiled(importances)
        self._count_stored = Compiled(count_stored)
        passes = (Compiled(function) for function in (count_sample, count_all, decoded, count_equal))
        self._passes = _Passes(*passes)
        self._update = Compiled(update_)
        self._update_masked = Compiled(update_masked_)
        self._hints = _Hints()
        self._eager = EagerRule(Kernel(None, None))  # for what is not compiled
        self._sets: set[tuple[int, ...]] = set()

    @property
    def memory(self) -> Tensor:
        """What is kept from step to step: nothing, unless steps were taken that could not be compiled."""
        return self._eager.memory

    @memory.setter
    def memory(self, memory: Tensor) -> None:
        self._eager.memory = memory

    def update_(self, parts: Sequence[Part], find: Finder, check_finite: Callable[[], None]) -> None:
        """Update weights and momenta in place; see `EagerRule.update_`."""
        weights, grads, _ = lists = _lists(parts)
        _refuse_gaps(weights)
        if not self._compiles_for(parts):
            return self._eager.update_(parts, find, check_finite)
        try:
            cut = find(partial(self._scores_of, weights, grads), False)
        except NotFiniteError:
            check_finite()
            return self._eager.update_(parts, find, check_finite)
        self._hints.threshold = cut.value
        thresholds = cut.value.repeat(len(weights))
        if cut.tensor + 1 < len(weights):
            thresholds[cut.tensor + 1 :] = _next_larger(cut.value)
        if any(weight.dtype in HALF for weight in weights):
            return self.update_masked_(parts, _masks(weights, grads, thresholds, cut))
        passive = _passive_values(parts, cut)
        self._update(*lists, thresholds, *_settings(parts))
        for tensor, values in passive:
            tensor[cut.surplus] = values
        return None

    def update_masked_(self, parts: Sequence[Part], masks: Sequence[Tensor]) -> None:
        """Update weights and momenta in place, where the active weights are those of bool masks."""
        kept, full_parts = [], []
        for part in parts:
            mine, masks = masks[: len(part.params)], masks[len(part.params) :]
            full, half = part.by_precision()
            update_half_(part.only(half), [mine[number] for number in half])
            if full:
                kept += [mine[number] for number in full]
                full_parts.append(part.only(full))
        if full_parts and self._compiles_for(full_parts):
            self._update_masked(*_lists(full_parts), kept, *_settings(full_parts))
        else:
            self._eager.update_masked_(full_parts, kept)

    def decay_(self, part: Part) -> None:
        """Update parameters of which all weights are passive."""
        self._eager.decay_(part)

    def _compiles_for(self, parts: Sequence[Part]) -> bool:
        """Return whether to compile for these parameters: not where too many sets of them take turns."""
        params = tuple(id(owner) for part in parts for owner in part.owners)
        if params not in self._sets and len(self._sets) < _SETS:
            self._sets.add(params)
        return params in self._sets

    def _scores_of(self, weights: Tensors, grads: Tensors, numbers: Sequence[int]) -> Scores:
        """Return the scores of some weights; if they are not all, without compiling anything for them."""
        if len(numbers) == len(weights):
            return self._scores(weights, grads)
        some = [weights[i] for i in numbers]
        flat = [importance(flattened(w, w), flattened(grads[i], w)) for i, w in zip(numbers, some, strict=True)]
        return StoredScores([score.to(score_dtype(weights)) for score in flat], None, some)

    def _scores(self, weights: Tensors, grads: Tensors) -> Scores:
        sizes = [weight.numel() for weight in weights]
        if sum(sizes) > _SMALL:
            return _ComputedScores(weights, grads, self._hints, self._passes)
        whole = self._importances(weights, grads)
        flat = whole.split([*sizes, len(whole) - sum(sizes)])[: len(sizes)]
        return _StoredScores(flat, whole, weights, self._count_stored)


class _StoredScores(StoredScores):
    """The importances of a small model, stored once and then counted by a compiled pass."""

    def __init__(self, scores: Tensors, whole: Tensor, like: Tensors, count: "Compiled") -> None:
        super().__init__(scores, whole, like)
        self._rows, self._count = whole.view(-1, ROW), count

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Take the importances of rows with one in the bracket from the pass; gather the rows that have more."""
        reached, _, several, values = _singles(*self._count(self._rows, low, high))
        near = self._rows.index_select(0, several).view(-1)
        return reached, torch.cat([values, within(near, low, high)])


class _Passes(NamedTuple):
    """The compiled passes over importances that are not stored."""

    sample: Callable[[Tensors, Tensors, Tensor], Tensor]
    rows: Callable[[Tensors, Tensors, Tensor, Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor], tuple[Tensor, Tensor]]
    equal: Callable[[Tensors, Tensors, Tensor], Tensor]


class _Hints:
    """What steps tell the next one. The result does not depend on it, only the time that it takes."""

    threshold: Tensor | None = None
    caution: float = 1.0  # by how much to widen the bracket: weights close to each other are not independent


class _ComputedScores:
    """The importances of a model, computed each time that they are looked at.

    Args:
        weights, grads: what they are the importances of.
        hints: what earlier steps tell, to be renewed.
        passes: the compiled passes.
    """

    def __init__(self, weights: Tensors, grads: Tensors, hints: _Hints, passes: _Passes) -> None:
        self._weights, self._grads, self._hints, self._passes = weights, grads, hints, passes
        sizes = [weight.numel() for weight in weights]
        self._total = sum(sizes)
        self._ends = list(accumulate((size // row_width(size, WIDE) for size in sizes), initial=0))
        self._dtype = score_dtype(weights)
        self._asked = False

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._weights)

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess by counting a large sample against a grid of values, laid ever finer."""
        caution = self._hints.caution  # `sigmas` has grown already if this is the second time
        self._hints.caution *= 2.0 if self._asked else 0.98
        self._asked = True
        share = k / self._total
        finfo = torch.finfo(self._dtype)
        last = 0.0 if self._hints.threshold is None else float(self._hints.threshold)
        everything = _geometric(finfo.tiny, finfo.max, len(_GRID))
        grid = [last * 2**step for step in _GRID] if last > finfo.tiny else everything
        nonzero = math.inf
        while True:
            *counts, sampled = self._sample(grid)
            if grid is everything:
                nonzero = counts[0]
            margin = sigmas * caution * math.sqrt(sampled * share * (1 - share)) + 1
            most, least = min(sampled * share + margin, nonzero), sampled * share - margin
            left = sum(number >= most for number in counts) - 1  # counts fall along the grid
            right = len(grid) - sum(number <= least for number in counts)
            if (left < 0 or right == len(grid)) and grid is not everything:
                grid = everything
                continue
            floor = 0.0 if most == nonzero else grid[left]  # below all that are not zero, if it may be zero
            if right == 0 or right == len(grid):
                return self._tensor(floor), self._tensor(grid[0] if right == 0 else math.inf)
            no_finer = (left, right) == (0, len(grid) - 1)
            if no_finer or grid[right] < grid[left] * _FINE:
                low, high = (_between(grid, counts, left, right, wanted) for wanted in (most, least))
                return self._tensor(low if floor else 0.0), self._tensor(high)
            grid = _geometric(grid[left], grid[right], len(grid))

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Take the importances of rows with one in the bracket from the pass; gather the rows that have more."""
        coded, top = self._passes.rows(self._weights, self._grads, low, high)
        reached, self._single, several, self._values = _singles(top, *self._passes.decode(coded))
        self._several, self._near = self._gathered(several)
        self._bracket = low, high
        return reached, torch.cat([self._values, within(self._near, low, high)])

    def count(self, value: Tensor) -> list[int]:
        """Look where `between` found such a value; if it is an end of the bracket, in a pass over all importances."""
        low, high = self._bracket
        if not low < value < high:
            return [int(count) for count in self._passes.equal(self._weights, self._grads, value).tolist()]
        tensors = torch.tensor(self._ends[1:], device=value.device)
        rows_with = torch.searchsorted(tensors, self._single[self._values == value], right=True)
        counts = rows_with.bincount(minlength=len(self))
        for number, _, near in _pieces(self._several, self._near):
            counts[number] += (near == value).count_nonzero()
        return counts.tolist()

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Compute the importances of the tensor, some at a time."""
        weight = self._weights[number]
        pairs = zip(*(flattened(t, weight).split(_CHUNK) for t in (weight, self._grads[number])), strict=True)
        equal = [importance(w, g).to(value.dtype) == value for w, g in pairs]
        found = [places.nonzero().squeeze(1) + i * _CHUNK for i, places in enumerate(equal)]
        return by_index(torch.cat(found), weight)

    def _sample(self, grid: Sequence[float]) -> list[float]:
        return self._passes.sample(self._weights, self._grads, self._tensor(grid)).tolist()

    def _tensor(self, values: float | Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=self._dtype, device=self._weights[0].device)

    def _gathered(self, rows: Tensor) -> tuple[list[tuple[int, Tensor, int]], Tensor]:
        """Return for tensors with any of the rows number, which of its rows, and width; and all their importances."""
        splits = torch.searchsorted(rows, torch.tensor(self._ends, device=rows.device)).tolist()
        several = []
        for number, (start, end) in enumerate(pairwise(splits)):
            if start < end:
                mine = rows[start:end] - self._ends[number]
                several.append((number, mine, row_width(self._weights[number].numel(), WIDE)))
        size = sum(len(mine) * width for _, mine, width in several)
        weights, grads = (torch.empty(size, dtype=self._dtype, device=rows.device) for _ in range(2))
        for gathered, tensors in ((weights, self._weights), (grads, self._grads)):
            for (number, mine, _), (_, _, place) in zip(several, _pieces(several, gathered), strict=True):
                source = rows_of(tensors[number], self._weights[number])
                if source.dtype == self._dtype:
                    torch.index_select(source, 0, mine, out=place)
                else:
                    place.copy_(source.index_select(0, mine))
        scores = weights.mul_(grads).abs_()
        if self._dtype != torch.float32:  # others' importances may be float32, to which the exact product is rounded
            for number, _, place in _pieces(several, scores):
                place.copy_(place.to(score_dtype([self._weights[number]])))
        return several, scores


def _pieces(several: list[tuple[int, Tensor, int]], gathered: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each tensor's number, which of its rows were gathered, and these as a matrix."""
    start = 0
    for number, mine, width in several:
        yield number, mine, gathered[start : start + len(mine) * width].view(-1, width)
        start += len(mine) * width


def _singles(top: Tensor, inside: Tensor, total: Tensor) -> tuple[int, Tensor, Tensor, Tensor]:
    """Return how many importances reach the bracket's end, the rows with one in it and with several, and the ones."""
    reached = total.item()
    if math.isnan(reached):
        raise NotFiniteError
    rows = (inside > 0).nonzero().squeeze(1)
    more = inside.take(rows) > 1
    single, several = rows[~more], rows[more]
    return int(reached), single, several, top.take(single)


# --- helpers ---


def _masks(weights: Tensors, grads: Tensors, thresholds: Tensor, cut: Cut) -> list[Tensor]:
    """Return which weights are active, as bool tensors."""
    masks = []
    for number, (weight, grad, threshold) in enumerate(zip(weights, grads, thresholds.unbind(), strict=True)):
        mask = torch.empty_like(weight, dtype=torch.bool)  # lies in memory as the weight does
        masks.append(torch.ge(importance(weight, grad).to(threshold.dtype), threshold, out=mask))
        if number == cut.tensor:
            flattened(mask, weight)[cut.surplus] = False
    return masks


def _passive_values(parts: Sequence[Part], cut: Cut) -> list[tuple[Tensor, Tensor]]:
    """Return what the rule makes of the surplus ties, which are passive, as tensors and their values there."""
    if not len(cut.surplus):
        return []
    part, place = [(part, place) for part in parts for place in range(len(part.params))][cut.tensor]
    param, momentum = part.params[place], part.momenta[place]
    flat = flattened(param, param)
    weight = flat[cut.surplus]
    direction = weight * part.passive_decay
    values = []
    if momentum is not None:
        flat_momentum = flattened(momentum, param)
        moved = flat_momentum[cut.surplus] * part.momentum + direction
        values.append((flat_momentum, moved))
        direction = direction + moved * part.momentum if part.nesterov else moved
    return [*values, (flat, weight - direction * part.lr)]


def _next_larger(value: Tensor) -> Tensor:
    """Return the next number that compares as larger: after zero not a denormal one if these count as zero."""
    following = torch.nextafter(value, value.new_tensor(math.inf))
    return following if following > value else torch.full_like(value, torch.finfo(value.dtype).tiny)


def _lists(parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the weights, gradients and momenta of all parts; a weight's momentum is missing where it has none."""
    momenta = [
        param if momentum is None else momentum
        for part in parts
        for param, momentum in zip(part.params, part.momenta, strict=True)
    ]
    return all_params(parts), [grad for part in parts for grad in part.grads], momenta


def _settings(parts: Sequence[Part]) -> tuple[Tensor, Kinds]:
    """Return lr, momentum, weight decay and passive decay of each part, and what has to be known to compile."""
    rows = [[part.lr, part.momentum, part.weight_decay, part.passive_decay] for part in parts]
    kinds = tuple((len(part.params), part.momentum > 0, part.nesterov) for part in parts)
    weights = all_params(parts)
    return torch.tensor(rows, dtype=score_dtype(weights), device=weights[0].device), kinds


def _refuse_gaps(weights: Tensors) -> None:
    for weight in weights:
        if weight.stride() != dense_stride(weight):
            raise ValueError(
                "fused=True needs parameters without gaps in memory: make them contiguous, or leave it out"
            )


def _geometric(first: float, last: float, count: int) -> list[float]:
    """Return a geometric sequence."""
    start, step = math.log(first), (math.log(last) - math.log(first)) / (count - 1)
    return [first, *(math.exp(start + step * i) for i in range(1, count - 1)), last]


def _between(grid: Sequence[float], counts: Sequence[float], left: int, right: int, wanted: float) -> float:
    """Return where between two places of a grid the count is as wanted, as if it fell evenly at each step."""
    while left + 1 < right and counts[left + 1] >= wanted:
        left += 1
    fall = counts[left] - counts[left + 1]
    part = (counts[left] - wanted) / fall if fall else 0.0
    return grid[left] + min(part, 1.0) * (grid[left + 1] - grid[left])
