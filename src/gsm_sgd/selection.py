"""Which weights are active: the exact top Q of all importances in the model.

Legend (Ding et al., "Global Sparse Momentum SGD", NeurIPS 2019): W weight, T importance, B activity mask,
N number of prunable weights, C compression ratio, Q number of weights kept.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

_SAMPLE = 16_384  # scores looked at to guess where the threshold lies
_SIGMAS = 5.0  # half-width of that guess: rarely missed, and a miss costs time, never exactness


def kept_weights(num_weights: int, compression: float) -> int:
    """Return Q = floor(N / C), the number of weights that a compression ratio C leaves of N.

    Raises:
        ValueError: C is not finite, is below 1, or is so high that nothing would be left.
    """
    if not math.isfinite(compression) or compression < 1:
        raise ValueError(f"compression must be a finite number of at least 1, not {compression}")
    kept = math.floor(num_weights / compression)
    if kept == 0:
        raise ValueError(
            f"compression {compression:g} leaves none of {num_weights} weights; use at most {num_weights}"
        )
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
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if any(not score.is_floating_point() for score in scores):
        raise ValueError("scores must be floating point")
    if len({score.device for score in scores}) > 1:
        raise ValueError("scores must all be on one device")
    if k == 0 or not total:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    dtype = reduce(torch.promote_types, (score.dtype for score in scores))
    scores = [score.to(dtype) for score in scores]
    if torch.stack([score.amax() for score in scores if score.numel()]).isnan().any():  # amax passes NaN on
        raise ValueError("scores contain NaN")
    if k == total:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]

    threshold, above, equal = _threshold(scores, k)
    if above + equal == k:
        return [score >= threshold for score in scores]
    masks = [score > threshold for score in scores]
    _mark_first_ties_(masks, scores, threshold, k - above)
    return masks


def _threshold(scores: Sequence[Tensor], k: int) -> tuple[Tensor, int, int]:
    """Return the k-th largest score, how many scores are above it and how many equal it. 1 <= k <= total.

    A sample brackets the threshold; one pass counts what is above the bracket and gathers what is inside.
    The threshold is the top-k of those few. Nothing is sorted or concatenated but the sample and the bracket.
    """
    flat = [score.reshape(-1) for score in scores]
    low, high = _bracket(flat, k)
    while True:
        above = sum(int((score > high).count_nonzero()) for score in flat)
        if low == high:  # a tie as wide as the bracket: nothing to gather
            equal = sum(int((score == low).count_nonzero()) for score in flat)
            inside = low.expand(equal)
        else:
            inside = torch.cat([score[(score >= low) & (score <= high)] for score in flat])
        if above >= k:  # missed: the threshold is higher
            low, high = high, torch.full_like(high, torch.inf)
        elif above + inside.numel() < k:  # missed: it is lower
            low, high = torch.full_like(low, -torch.inf), low
        elif low == high:
            return low, above, inside.numel()
        else:
            threshold = inside.topk(k - above, sorted=False).values.amin()
            above += int((inside > threshold).count_nonzero())
            return threshold, above, int((inside == threshold).count_nonzero())


def _bracket(flat: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Guess two values that enclose the k-th largest score, from a strided sample of all of them."""
    total = sum(score.numel() for score in flat)
    stride = total // _SAMPLE | 1  # odd, so that it is not a divisor of the usual power-of-two row lengths
    sample = torch.cat([score[::stride] for score in flat])
    rank = k / total * sample.numel()
    # How many sampled scores lie above the threshold is about binomial: so many standard deviations, and one.
    margin = _SIGMAS * math.sqrt(rank * (1 - k / total)) + 1
    first, last = math.floor(rank - margin), math.ceil(rank + margin)
    largest = sample.topk(min(last + 1, sample.numel())).values
    high = largest[first] if first >= 0 else sample.new_tensor(torch.inf)
    low = largest[last] if last < sample.numel() else sample.new_tensor(-torch.inf)
    return low, high


def _mark_first_ties_(masks: Sequence[Tensor], scores: Sequence[Tensor], value: Tensor, count: int) -> None:
    """Mark, in place, the first `count` scores equal to `value`, in list order."""
    for mask, score in zip(masks, scores, strict=True):
        ties = (score == value).reshape(-1).nonzero().squeeze(1)[:count]
        mask.put_(ties, torch.ones_like(ties, dtype=torch.bool))  # put_ counts in row-major order in any layout
        count -= ties.numel()
        if count == 0:
            return
