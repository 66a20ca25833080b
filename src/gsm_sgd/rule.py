"""One step of the rule on all weights that it governs, in eager operations. fused.py has the compiled ones.

With weights W, gradients G, momenta Z and active weights B, the rule is momentum SGD with the gradient D, so that
torch's own kernels make the update:

    D  = G where B, else (eta_p - eta) W
    Z <- beta Z + D + eta W
    W <- W - alpha Z

Half precision has its own update: there a step of decay is often less than half a unit in the last place, and rounded
to nearest, a passive weight would never shrink.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .selection import ROW, Cut, NotFiniteError, Scores, ScoresOf, StoredScores, importance, score_dtype

Finder = Callable[[ScoresOf, bool], Cut]
"""Given the scores, and whether one is not finite, where those end that are active; or NotFiniteError is raised."""


HALF = (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """Parameters of a group to be updated together, with gradients and momenta, and the group's hyperparameters.

    `owners` are the optimizer's own: of DTensors all else is the part that this process holds. `step` is how many
    steps have been taken.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor | None]
    lr: float
    momentum: float
    weight_decay: float
    passive_decay: float
    nesterov: bool
    step: int

    def only(self, numbers: Sequence[int]) -> "Part":
        """Return some of the parameters."""
        columns: dict[str, Any] = {name: [getattr(self, name)[i] for i in numbers] for name in self._fields[:4]}
        return self._replace(**columns)

    def by_precision(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the parameters in full precision, and of those in half precision."""
        half = [param.dtype in HALF for param in self.params]
        return [i for i, is_half in enumerate(half) if not is_half], [i for i, is_half in enumerate(half) if is_half]


def all_params(parts: Sequence[Part]) -> list[Tensor]:
    """Return the parameters of all parts."""
    return [param for part in parts for param in part.params]


class Kernel(NamedTuple):
    """Which of torch's implementations of SGD to use, as `torch.optim.SGD` takes it."""

    foreach: bool | None
    fused: bool | None

    def or_quickest(self, params: Sequence[Tensor]) -> "Kernel":
        """Return this choice, or where none was made the quickest implementation for these parameters."""
        fits = all(param.is_contiguous() or param.stride() == dense_stride(param) for param in params)
        fits = fits and all(param.is_floating_point() for param in params)
        fits = fits and {param.device.type for param in params} <= {"cpu", "cuda"}
        return Kernel(None, True if fits else None) if self == (None, None) else self

    def sgd_(self, part: Part, grads: list[Tensor], weight_decay: float) -> None:
        """Update parameters and momenta by momentum SGD."""
        if part.params:
            foreach, fused = self
            if any(grad.is_sparse or grad.is_complex() for grad in grads):  # only the loop takes them
                foreach = fused = False
            if fused:  # torch's kernel takes it for granted that tensors lie in memory alike
                grads = laid_out_as(part.params, grads)
            sgd(
                part.params,
                grads,
                part.momenta,
                foreach=foreach,
                fused=fused,
                weight_decay=weight_decay,
                momentum=part.momentum,
                lr=part.lr,
                dampening=0,
                nesterov=part.nesterov,
                maximize=False,
            )


class EagerRule:
    """The rule in memory that is kept from step to step, a number for each weight: to get it anew takes longer."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.memory = torch.empty(0)

    def update_(self, parts: Sequence[Part], find: Finder, check_finite: Callable[[], None]) -> None:
        """Update weights and momenta in place; the active weights are those that `find` finds the most important.

        `check_finite` is called if an importance is not finite, and raises if a gradient is to blame. Else a weight
        is: it counts as the most important if it is infinite, as the least if it is NaN.
        """
        whole, views, ends = self._importances(parts)
        suspect = len(whole) > 0 and not math.isfinite(whole.amax())
        if suspect:
            whole.nan_to_num_(nan=-1.0, posinf=math.inf)
        flat = [whole[start:end] for start, end in pairwise(ends)]

        def scores_of(numbers: Sequence[int]) -> Scores:
            if len(numbers) == len(flat):
                return StoredScores(flat, whole, views)
            return StoredScores([flat[i] for i in numbers], None, [views[i] for i in numbers])

        try:
            cut = find(scores_of, suspect)
        except NotFiniteError:
            check_finite()
            cut = find(scores_of, False)
        whole[: ends[cut.tensor + 1]].ge_(cut.value)
        whole[ends[cut.tensor + 1] : ends[-1]].gt_(cut.value)
        flat[cut.tensor][cut.surplus] = 0
        self._update_active_(parts, views)

    def update_masked_(self, parts: Sequence[Part], masks: Sequence[Tensor]) -> None:
        """Update weights and momenta in place, where the active weights are those of bool masks."""
        self._update_active_(parts, list(masks))

    def _update_active_(self, parts: Sequence[Part], active: list[Tensor]) -> None:
        """Update weights and momenta given B for each of them in turn; B in numbers may be overwritten."""
        for part in parts:
            mine, active = active[: len(part.params)], active[len(part.params) :]
            full, half = part.by_precision()
            update_half_(part.only(half), [mine[number] for number in half])
            part, mine = part.only(full), [mine[number] for number in full]
            if not part.params:
                continue
            mine = [b.to(param.dtype) for b, param in zip(mine, part.params, strict=True)]
            extra = part.passive_decay - part.weight_decay
            if extra:  # of passive weights; lerp takes either end as it is, so that gradients are not rounded away
                directions = [*torch._foreach_mul(part.params, extra)]
                torch._foreach_lerp_(directions, part.grads, mine)
            else:
                torch._foreach_mul_(mine, part.grads)
                directions = mine
            self._kernel.or_quickest(part.params).sgd_(part, directions, part.weight_decay)

    def decay_(self, part: Part) -> None:
        """Update parameters of which all weights are passive."""
        full, half = part.by_precision()
        update_half_(part.only(half), [torch.zeros_like(part.params[number], dtype=torch.bool) for number in half])
        part = part.only(full)
        self._kernel.sgd_(part, part.grads, part.passive_decay)

    def _importances(self, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor], list[int]]:
        """Return |W G| of all weights in one tensor with a rest of -1, views laid out as the weights, their ends.

        Scores are rounded to the precision of their own weights, whatever that of the tensor.
        """
        weights = all_params(parts)
        dtype = score_dtype(weights)
        ends = list(accumulate((weight.numel() for weight in weights), initial=0))
        size, device = -(-ends[-1] // ROW) * ROW, weights[0].device
        if (len(self.memory), self.memory.dtype, self.memory.device) != (size, dtype, device):
            self.memory = torch.empty(size, dtype=dtype, device=device)
        whole = self.memory
        views = [
            whole.as_strided(weight.shape, dense_stride(weight), end)
            for weight, end in zip(weights, ends, strict=False)
        ]
        grads = [grad for part in parts for grad in part.grads]
        if len({weight.dtype for weight in weights}) > 1:
            for view, weight, grad in zip(views, weights, grads, strict=True):
                view.copy_(importance(weight, grad))
        else:
            torch._foreach_copy_(views, weights)
            torch._foreach_mul_(views, grads)
        whole[: ends[-1]].abs_()
        whole[ends[-1] :] = -1  # of fewer weights than in the last step some importances would be left here
        return whole, views, ends


def update_half_(part: Part, active: Sequence[Tensor]) -> None:
    """Update parameters in half precision, with float32 between reading and writing them.

    What is passive is rounded up or down at random, by how near either is, so that on average it shrinks as it should.
    The noise depends on the step alone: it is the same on all replicas, and in a run that was resumed.
    """
    if not part.params:
        return
    generator = torch.Generator(part.params[0].device).manual_seed(part.step)
    for w, g, z, b in zip(part.params, part.grads, part.momenta, active, strict=True):
        weight, keep = w.float(), b.bool()
        direction = torch.where(keep, g.float() + part.weight_decay * weight, part.passive_decay * weight)
        if z is not None:
            momentum = part.momentum * z.float() + direction
            direction = direction + part.momentum * momentum if part.nesterov else momentum
            z.copy_(torch.where(keep, momentum, _dithered(momentum, z.dtype, generator)))
        weight = weight - part.lr * direction
        w.copy_(torch.where(keep, weight, _dithered(weight, w.dtype, generator)))


def _dithered(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values with noise of up to half a unit in the last place of a lower precision."""
    finfo = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=finfo.tiny))
    unit = torch.exp2(exponent) * (finfo.eps / 2)
    noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    return values + noise * unit


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy of a tensor, in its own memory order where that is dense."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def laid_out_as(params: Sequence[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of the parameters' shapes, each in the memory order of its parameter."""
    if [tensor.stride() for tensor in tensors] == [param.stride() for param in params]:
        return tensors
    return [
        tensor if tensor.stride() == param.stride() else torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
        for param, tensor in zip(params, tensors, strict=True)
    ]
