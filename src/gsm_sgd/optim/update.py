"""A rule as it is applied where torch has no kernel for it: in half precision, and compiled."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from ..memory import dense_stride, flattened
from ..rule import Buffers, Part, Rule, dithered
from ..scores import Score, evaluate, score_dtype
from ..selection.threshold import Threshold

# A step changes it by a share of 1 - beta2, which is mostly less than half a unit in the last place.
_AT_RANDOM = ("exp_avg_sq",)


@torch.no_grad()
def update_half_(rule: Rule, part: Part, active: Sequence[Tensor], rows: Sequence[list[float]], kind: bool) -> None:
    """Update parameters in half precision, with float32 between reading and writing them.

    Passive weights are rounded at random; see `dithered`. The noise depends on the step alone: it is the same on all
    replicas, and in a run that was resumed.
    """
    if not part.params:
        return
    generator = torch.Generator(part.params[0].device).manual_seed(part.step)
    for i, (w, g, b) in enumerate(zip(part.params, part.grads, active, strict=True)):
        keep = b.bool()
        buffers = [buffer[i].float() for buffer in part.buffers.values()]
        weight, moved = rule(w.float(), g.float(), buffers, keep, rows[i], kind)
        for (name, buffer), new in zip(part.buffers.items(), moved, strict=True):
            rounded = dithered(new, buffer[i].dtype, generator)
            buffer[i].copy_(rounded if name in _AT_RANDOM else torch.where(keep, new, rounded))
        w.copy_(torch.where(keep, weight, dithered(weight, w.dtype, generator)))


def update_masked_(
    rule: Rule,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Buffers],
    masks: Sequence[Tensor],
    settings: Tensor,
    kinds: Sequence[bool],
) -> None:
    """Apply the rule to weights that are active where masks are True."""
    for i in reversed(range(len(weights))):
        weight, moved = rule(weights[i], grads[i], buffers[i], masks[i], settings[i].unbind(), kinds[i])
        for buffer, new in zip(buffers[i], moved, strict=True):
            buffer.copy_(new)
        weights[i].copy_(weight)


def update_streamed_(
    rule: Rule,
    score: Score,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Buffers],
    thresholds: Tensor,
    settings: Tensor,
    kinds: Sequence[bool],
) -> None:
    """Apply the rule to weights that are active if their score reaches the threshold of their tensor."""
    active = [
        evaluate(score, w, g, {}).to(thresholds.dtype) >= threshold
        for w, g, threshold in zip(weights, grads, thresholds.unbind(), strict=True)
    ]
    update_masked_(rule, weights, grads, buffers, active, settings, kinds)


def takes_fused(params: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel, the quickest, takes these parameters; torch 2.9's ruins half precision."""
    dense = all(param.is_contiguous() or param.stride() == dense_stride(param) for param in params)
    real = all(param.dtype in (torch.float32, torch.float64) for param in params)
    return dense and real and {param.device.type for param in params} <= {"cpu", "cuda"}


def columns(parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Return the weights, gradients and buffers of all parts.

    Raises:
        ValueError: a weight has gaps in memory.
    """
    weights = [param for part in parts for param in part.params]
    if any(weight.stride() != dense_stride(weight) for weight in weights):
        raise ValueError("compiled=True needs parameters without gaps in memory: make them contiguous, or leave it out")
    buffers = [[buffer[i] for buffer in part.buffers.values()] for part in parts for i in range(len(part.params))]
    return weights, [grad for part in parts for grad in part.grads], buffers


def as_tensor(rows: Sequence[list[float]], weights: Sequence[Tensor]) -> Tensor:
    """Return the settings of all weights as one tensor, so that nothing is compiled twice."""
    return torch.tensor(rows, dtype=score_dtype(weights), device=weights[0].device)


def masks_of(score: Score, parts: Sequence[Part], threshold: Threshold) -> list[Tensor]:
    """Return which weights are active, as bool tensors."""
    masks = []
    pairs = [pair for part in parts for pair in zip(part.params, part.grads, strict=True)]
    for number, (weight, grad) in enumerate(pairs):
        compare = torch.ge if number <= threshold.tensor else torch.gt
        mask = torch.empty_like(weight, dtype=torch.bool)  # lies in memory as the weight does
        masks.append(compare(evaluate(score, weight, grad, {}).to(threshold.value.dtype), threshold.value, out=mask))
        if number == threshold.tensor:
            flattened(mask, weight)[threshold.surplus] = False
    return masks


def thresholds_of(threshold: Threshold, tensors: int) -> Tensor:
    """Return for each of so many tensors the value that scores of active weights reach."""
    values = threshold.value.repeat(tensors)
    if threshold.tensor + 1 < tensors:
        values[threshold.tensor + 1 :] = _next_larger(threshold.value)
    return values


def surplus_of(
    rule: Rule, parts: Sequence[Part], threshold: Threshold, rows: Sequence[list[float]], kinds: Sequence[bool]
) -> list[tuple[Tensor, Tensor]]:
    """Return what the rule makes of the surplus of equal scores, which is passive: tensors and their elements there."""
    if not len(threshold.surplus):
        return []
    number = threshold.tensor
    weights, grads, buffers = columns(parts)
    like = weights[number]
    tensors = [flattened(tensor, like) for tensor in (like, grads[number], *buffers[number])]
    weight, grad, *before = (tensor[threshold.surplus] for tensor in tensors)
    passive = torch.zeros_like(weight, dtype=torch.bool)
    after, moved = rule(weight, grad, before, passive, rows[number], kinds[number])
    return list(zip((tensors[0], *tensors[2:]), chain([after], moved), strict=True))


def _next_larger(value: Tensor) -> Tensor:
    """Return the next number that compares as larger: after zero not a denormal one if these count as zero."""
    following = torch.nextafter(value, value.new_tensor(float("inf")))
    return following if following > value else torch.full_like(value, torch.finfo(value.dtype).tiny)
