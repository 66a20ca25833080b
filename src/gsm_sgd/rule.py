"""One step of the rule on all weights that it governs, in eager operations. fused.py has the compiled ones.

With weights W, gradients G, momenta Z and activity B, ones and zeros, the rule is momentum SGD with the weight decay
eta_p of passive weights and the gradient B (G + (eta - eta_p) W), so torch's own kernels make the update:

    Z <- beta Z + B (G + (eta - eta_p) W) + eta_p W
    W <- W - alpha Z
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .selection import ROW, Cut, NotFiniteError, Scores, ScoresOf, StoredScores, score_dtype

Finder = Callable[[ScoresOf, bool], Cut]
"""Given the scores, and whether one is not finite, where those end that are active; or NotFiniteError is raised."""


class Part(NamedTuple):
    """Parameters of a group to be updated together, with gradients and momenta, and the group's hyperparameters.

    `owners` are the optimizer's own: of DTensors all else is the part that this process holds.
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
        fits = fits and {param.device.type for param in params} <= {"cpu", "cuda"}
        return Kernel(None, True if fits else None) if self == (None, None) else self

    def sgd_(self, part: Part, grads: list[Tensor], weight_decay: float) -> None:
        """Update parameters and momenta by momentum SGD."""
        if part.params:
            if self.fused:  # torch's kernel takes it for granted that tensors lie in memory alike
                grads = laid_out_as(part.params, grads)
            sgd(
                part.params,
                grads,
                part.momenta,
                foreach=self.foreach,
                fused=self.fused,
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
        active = [mask.to(param.dtype) for mask, param in zip(masks, all_params(parts), strict=True)]
        self._update_active_(parts, active)

    def _update_active_(self, parts: Sequence[Part], active: list[Tensor]) -> None:
        """Update weights and momenta given B for each of them in turn, which is overwritten."""
        for part in parts:
            pulls, active = active[: len(part.params)], active[len(part.params) :]
            extra = part.weight_decay - part.passive_decay
            grads = torch._foreach_add(part.grads, part.params, alpha=extra) if extra and pulls else part.grads
            torch._foreach_mul_(pulls, grads)
            pulls = [pull.to(param.dtype) for pull, param in zip(pulls, part.params, strict=True)]
            self._kernel.or_quickest(part.params).sgd_(part, pulls, part.passive_decay)

    def _importances(self, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor], list[int]]:
        """Return |W G| of all weights in one tensor with a rest of -1, views laid out as the weights, their ends."""
        weights = all_params(parts)
        dtype = score_dtype(weights)
        ends = list(accumulate((weight.numel() for weight in weights), initial=0))
        size, device = -(-ends[-1] // ROW) * ROW, weights[0].device
        if (len(self.memory), self.memory.dtype, self.memory.device) != (size, dtype, device):
            self.memory = torch.full((size,), -1, dtype=dtype, device=device)
        whole = self.memory
        views = [
            whole.as_strided(weight.shape, dense_stride(weight), end)
            for weight, end in zip(weights, ends, strict=False)
        ]
        torch._foreach_copy_(views, weights)
        torch._foreach_mul_(views, [grad for part in parts for grad in part.grads])
        whole[: ends[-1]].abs_()
        return whole, views, ends


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
