"""Which weights are active: the exact top Q of all importances in the model.

Legend (Ding et al., "Global Sparse Momentum SGD", NeurIPS 2019): W weight, T importance, B activity mask,
N number of prunable weights, C compression ratio, Q number of weights kept.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

_SIGMAS = 5.0  # half-width of the guess where the threshold lies: a miss is rare and costs time, not exactness


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
    kept = math.floor(num_weights / compression)
    if kept == 0:
        raise ValueError(f"compression {compression:g} leaves none of {num_weights} weights; use at most {num_weights}")
    return kept


def importance(weight: Tensor, grad: Tensor) -> Tensor:
    """Return T = |W * dL/dW|, shaped as `weight`: the first-order Taylor estimate of what removing W costs.

    Half-precision inputs give float32 scores: their products underflow in float16 and tie in bfloat16.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * grad.to(dtype)).abs_()


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
    chosen = top_indices(scores, k)
    if any(bool(score.isnan().any()) for score in scores):
        raise ValueError("scores contain NaN")
    masks = [torch.zeros(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    for mask, indices in zip(masks, chosen, strict=True):
        mask.view(-1)[indices] = True
    return masks


def top_indices(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return what `select_top` marks as int64 indices into each flattened score tensor, ascending.

    One pass gathers the candidates, the scores that a sample says are surely enough; all else looks at these
    alone. Nothing is sorted, and nothing but the candidates concatenated: little more than k, or everything in the
    rare case that the sample misled. Arguments and errors are those of `select_top`, except that NaN is no error as
    long as there are k other scores: it is never selected.
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if any(not score.is_floating_point() for score in scores):
        raise ValueError("scores must be floating point")
    if len({score.device for score in scores}) > 1:
        raise ValueError("scores must all be on one device")
    if k in (0, total):
        return [torch.arange(score.numel() if k else 0, device=score.device) for score in scores]
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    flat = [score.to(dtype).reshape(-1) for score in scores]

    low, high = _bracket(flat, k)
    candidates = _at_least(flat, low)
    if sum(map(len, candidates)) < k:  # the sample misled: everything is a candidate
        candidates = _at_least(flat, torch.full_like(low, -torch.inf))
        if sum(map(len, candidates)) < k:
            raise ValueError("scores contain NaN")
    values = torch.cat([score[indices] for score, indices in zip(flat, candidates, strict=True)])
    chosen = _exactly(values, k, high)
    return [part[keep] for part, keep in zip(candidates, chosen.split([*map(len, candidates)]), strict=True)]


def _at_least(flat: Sequence[Tensor], low: Tensor) -> list[Tensor]:
    return [(score >= low).nonzero().squeeze(1) for score in flat]


def _exactly(values: Tensor, k: int, high: Tensor) -> Tensor:
    """Mark the k largest values, ties to the lower index. `high`, a guess, is to lie just above the k-th."""
    upper = values > high
    above = int(upper.count_nonzero())
    if above < k:
        threshold = values[~upper].topk(k - above, sorted=False).values.amin()
    else:  # the guess was too low
        threshold = values.topk(k, sorted=False).values.amin()
    chosen = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.count_nonzero())]] = True
    return chosen


def _bracket(flat: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Guess two values that enclose the k-th largest score, from a strided sample of all of them."""
    total = sum(score.numel() for score in flat)
    # A sample of N^(2/3) balances its own cost against that of the scores that it leaves between the two values.
    # An odd stride visits every column of a matrix with 2^n columns.
    stride = round(total ** (1 / 3)) | 1
    sample = torch.cat([score[::stride] for score in flat]).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    rank = k / total * len(sample)
    # How many sampled scores lie above the k-th is about binomial: so many standard deviations, and one more.
    margin = _SIGMAS * math.sqrt(rank * (1 - k / total)) + 1
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    largest = sample.topk(min(last + 1, len(sample))).values
    high = largest[first] if first >= 0 else sample.new_tensor(torch.inf)
    low = largest[last] if last < len(sample) else sample.new_tensor(-torch.inf)
    return low, high
