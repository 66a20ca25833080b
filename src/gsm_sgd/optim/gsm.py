"""GSM: Global Sparse Momentum SGD (Ding et al., NeurIPS 2019)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ..budget import Budget
from ..compiled import Compiled
from ..decay import Motion
from ..memory import dense_stride, flattened, laid_out_as
from ..patterns import Pattern
from ..rule import HALF, Part, dithered, masked_gradient, sgd_step
from ..schedules import Schedule
from ..scores import Score, evaluate, score_dtype
from ..selection.threshold import Threshold
from .sparse import Active, ScheduleLike, SparseOptimizer

Kinds = tuple[tuple[int, bool, bool], ...]  # of each part: number of parameters, has momentum, is Nesterov's


class GSM(SparseOptimizer):
    """Train so that all prunable weights but exactly Q shrink to nothing, by momentum SGD.

    At every step the Q weights of the whole model with the largest score |w g| are active and follow their gradients;
    all others are passive and only decay:

        T  = |W * dL/dW|                                score
        B  = 1 for the Q largest T of the whole model   active; the others are passive
        Z <- beta Z + eta W + B * dL/dW                 eta is `passive_decay` where B = 0
        W <- W - alpha Z

    B is chosen again at every step, so a passive weight can come back. A weight is active only if its score is above
    zero, even if fewer than Q are. A parameter without a gradient is passive in that step. A parameter with
    `requires_grad=False` stays as it is and does not count in N; if parameters are frozen or unfrozen while training, N
    and Q follow at the next step, until the masks are fixed. Call `finalize()` when training is over; with a Schedule
    whose `cut` is below 1 it has cut already, and another call is harmless. A `CutWarning` says when a cut costs
    accuracy.

    Mirrors `torch.optim.SGD`, which it equals bit for bit at density 1; states load across both ways where the settings
    agree. Not supported: `dampening`, `maximize`, `differentiable`, and sparse gradients of prunable parameters. A step
    reads weights and gradients twice where SGD reads them once, and keeps a float32 score for each weight from step to
    step unless `compiled`.

    Args:
        params: parameters, named parameters, or groups of either, as for `torch.optim.SGD`. The group key `prunable`
            says whether the rule applies to a group; by default it applies to each parameter with `ndim >= 2`. The
            others are trained by momentum SGD.
        lr: learning rate alpha.
        compression, density, sparsity, num_kept: the budget, exactly one of them, one number for the whole model. Of N
            prunable weights it keeps floor(N / compression), floor(N density), floor(N (1 - sparsity)), or `num_kept`.
        macs, parameters, channels, latency: the budget of a pattern of channels, one of them: a share of what the dense
            net costs. See `gsm_sgd.structured.ChannelGroups`.
        momentum: beta, in [0, 1).
        weight_decay: eta, coupled L2 as in `torch.optim.SGD`.
        nesterov: as in `torch.optim.SGD`.
        schedule: None is the paper's rule: Q from the first step on, and the cut when you call `finalize()`. A
            `Schedule` lets the density fall over a ramp, fades and cuts. A function gets the number of steps taken and
            returns the density of the next; below the budget's it has no effect.
        passive_decay: weight decay of passive weights, a number or "auto". None is "auto" with a Schedule, and
            otherwise `weight_decay`, the paper's rule. "auto" chooses it at every step from the learning rate, so that
            a weight that is passive from the end of the ramp on has shrunk to `Schedule.shrink_to` of its value when
            the fade begins, and in the fade once more. It is never below `weight_decay`, and not so high that a return
            to the highest learning rate would do harm.
        score: "taylor" |w g|, "magnitude" |w|, "random", or a function; see `gsm_sgd.scores`.
        pattern: what is kept or dropped together; None is single weights; see `gsm_sgd.patterns`.
        compiled: compile the passes over memory with torch.compile, in up to minutes for a large model. It then needs
            almost no memory of its own. None of it changes which weights are active.
        foreach, fused: which implementation of SGD to use, as in `torch.optim.SGD`; None is the quickest.
        check_ranks: what to compare over all processes of the default process group. By default the settings, once,
            before the first step. True also compares weights and gradients, before each step, for finding mistakes:
            under DistributedDataParallel they are the same bits on each. False compares nothing, for processes that
            train different models.

    A loaded state brings its budget and schedule, with a warning where they are not the ones given here; `compiled`,
    `foreach`, `fused`, `score`, `pattern` and `check_ranks` stay as given here. States match by the parameters' names
    where both sides have them. `state` has `momentum_buffer` for each parameter, and `mask` once the masks are fixed.

    Raises:
        ValueError: a hyperparameter is out of range, nothing is prunable, a parameter is given twice, is complex, has
            no data yet, or is a part of a weight, as weight norm has them.
            With `compiled=True` a step raises RuntimeError where nothing can be compiled.

    Example:
        >>> optimizer = GSM(model.named_parameters(), lr=0.1, sparsity=0.98, schedule=Schedule(total_steps))
        >>> for images, labels in batches:
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(images), labels).backward()
        ...     optimizer.step()
        >>> masks = optimizer.finalize()
    """

    _streams = True

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        compression: float | None = None,
        density: float | None = None,
        sparsity: float | None = None,
        num_kept: int | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        channels: float | None = None,
        latency: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        schedule: ScheduleLike = None,
        passive_decay: float | Literal["auto"] | None = None,
        score: str | Score = "taylor",
        pattern: Pattern | None = None,
        compiled: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        check_ranks: bool | None = None,
    ) -> None:
        amounts = {"compression": compression, "density": density, "sparsity": sparsity, "num_kept": num_kept}
        amounts |= {"macs": macs, "parameters": parameters, "channels": channels, "latency": latency}
        budget = Budget.of(**amounts) if any(amount is not None for amount in amounts.values()) else None  # type: ignore[arg-type]
        if passive_decay is None and isinstance(schedule, Schedule):
            passive_decay = "auto"
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "passive_decay": passive_decay,
            "foreach": foreach,
            "fused": fused,
            "maximize": False,
            "dampening": 0,
            "differentiable": False,
        }
        super().__init__(params, defaults, budget, schedule, score, pattern, compiled, check_ranks)

    def _prepare(self) -> None:
        super()._prepare()
        self._update_masked, self._update_streamed = Compiled(_update_masked_), Compiled(_update_streamed_)

    def _buffer_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _motion(self, group: dict[str, Any]) -> Motion:
        return Motion(float(group["lr"]), group["momentum"], group["nesterov"], group["first_lr"], group["highest_lr"])

    def _dense_(self, part: Part, exactly: bool) -> None:
        if not exactly:
            part = _without_half(part, active=True)
        _sgd_(part, part.grads, part.group["weight_decay"], exactly)

    def _decay_(self, part: Part) -> None:
        part = _without_half(part, active=False)
        _sgd_(part, part.grads, part.passive_decay)

    def _update_(self, parts: Sequence[Part], active: Active) -> None:
        if isinstance(active, Threshold):
            weights = [param for part in parts for param in part.params]
            if all(weight.dtype not in HALF for weight in weights):
                return self._update_by_threshold_(parts, active)
            active = _masks(self._score, parts, active)
        kept, full_parts = [], []
        for part in parts:
            mine, active = active[: len(part.params)], active[len(part.params) :]
            full, half = part.by_precision()
            _update_half_(part.only(half), [mine[number] for number in half])
            if full:
                kept += [mine[number] for number in full]
                full_parts.append(part.only(full))
        if self._compiled and full_parts and self._compiles_for(full_parts):
            masks = [mask.bool() for mask in kept]
            return self._update_masked(*_columns(full_parts), masks, *_settings(full_parts))  # type: ignore[no-any-return]
        for part in full_parts:
            mine, kept = kept[: len(part.params)], kept[len(part.params) :]
            _sgd_(part, _masked_gradients(part, mine), part.group["weight_decay"])
        return None

    def _update_by_threshold_(self, parts: Sequence[Part], threshold: Threshold) -> None:
        """Update in one compiled pass that computes the scores once more; the surplus of equal scores by itself."""
        weights, grads, momenta = _columns(parts)
        values = threshold.value.repeat(len(weights))
        if threshold.tensor + 1 < len(weights):
            values[threshold.tensor + 1 :] = _next_larger(threshold.value)
        surplus = _surplus(parts, threshold)
        self._update_streamed(self._score, weights, grads, momenta, values, *_settings(parts))
        for tensor, elements in surplus:
            tensor[threshold.surplus] = elements


def _sgd_(part: Part, grads: list[Tensor], weight_decay: float, exactly: bool = False) -> None:
    """Update parameters by torch's SGD along these gradients; unless `exactly`, by the quickest implementation."""
    if not part.params:
        return
    foreach, fused = part.group["foreach"], part.group["fused"]
    if (foreach, fused) == (None, None) and not exactly and _takes_fused(part.params):
        fused = True
    if any(grad.is_sparse or grad.is_complex() for grad in grads):  # only the loop takes them
        foreach = fused = False
    if fused:  # torch's kernel takes it for granted that tensors lie in memory alike
        grads = laid_out_as(part.params, grads)
    sgd(
        part.params,
        grads,
        [*part.buffers.get("momentum_buffer", [None] * len(part.params))],
        foreach=foreach,
        fused=fused,
        weight_decay=weight_decay,
        momentum=part.group["momentum"],
        lr=part.group["lr"],
        dampening=0,
        nesterov=part.group["nesterov"],
        maximize=False,
    )


def _takes_fused(params: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel, the quickest, takes these parameters; torch 2.9's ruins half precision."""
    dense = all(param.is_contiguous() or param.stride() == dense_stride(param) for param in params)
    real = all(param.dtype in (torch.float32, torch.float64) for param in params)
    return dense and real and {param.device.type for param in params} <= {"cpu", "cuda"}


def _masked_gradients(part: Part, active: list[Tensor]) -> list[Tensor]:
    """Return `masked_gradient` of all parameters, in operations on lists; masks of numbers may be overwritten."""
    mine = [b.to(param.dtype) for b, param in zip(active, part.params, strict=True)]
    if not part.extra_decay:
        torch._foreach_mul_(mine, part.grads)
        return mine
    # lerp takes either end as it is, so that gradients are not rounded away
    directions = [*torch._foreach_mul(part.params, part.extra_decay)]
    torch._foreach_lerp_(directions, part.grads, mine)
    return directions


def _without_half(part: Part, active: bool) -> Part:
    """Update what is in half precision, all of it active or passive, and return the rest."""
    full, half = part.by_precision()
    if not half:
        return part
    mine = part.only(half)
    _update_half_(mine, [torch.full_like(param, active, dtype=torch.bool) for param in mine.params])
    return part.only(full)


def _update_half_(part: Part, active: Sequence[Tensor]) -> None:
    """Update parameters in half precision, with float32 between reading and writing them.

    Passive weights are rounded at random; see `dithered`. The noise depends on the step alone: it is the same on all
    replicas, and in a run that was resumed.
    """
    if not part.params:
        return
    group, generator = part.group, torch.Generator(part.params[0].device).manual_seed(part.step)
    momenta = part.buffers.get("momentum_buffer", [None] * len(part.params))
    for w, g, z, b in zip(part.params, part.grads, momenta, active, strict=True):
        keep = b.bool()
        direction = masked_gradient(w.float(), g.float(), keep, part.extra_decay)
        before = None if z is None else z.float()
        settings = (float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])
        weight, momentum = sgd_step(w.float(), before, direction, *settings)
        if z is not None and momentum is not None:
            z.copy_(torch.where(keep, momentum, dithered(momentum, z.dtype, generator)))
        w.copy_(torch.where(keep, weight, dithered(weight, w.dtype, generator)))


# --- compiled ---


def _update_streamed_(
    score: Score,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    thresholds: Tensor,
    settings: Tensor,
    kinds: Kinds,
) -> None:
    """Apply the rule to weights that are active if their score reaches the threshold of their tensor."""
    active = [
        evaluate(score, w, g, {}).to(thresholds.dtype) >= threshold
        for w, g, threshold in zip(weights, grads, thresholds.unbind(), strict=True)
    ]
    _update_masked_(weights, grads, momenta, active, settings, kinds)


def _update_masked_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masks: Sequence[Tensor],
    settings: Tensor,
    kinds: Kinds,
) -> None:
    """Apply the rule to weights that are active where masks are True."""
    groups = [group for group, (size, _, _) in enumerate(kinds) for _ in range(size)]
    for i, (w, g, active, group) in reversed(list(enumerate(zip(weights, grads, masks, groups, strict=True)))):
        lr, beta, decay, extra = settings[group].unbind()
        _, has_momentum, nesterov = kinds[group]
        direction = masked_gradient(w, g, active, extra)
        weight, momentum = sgd_step(w, momenta[i] if has_momentum else None, direction, lr, beta, decay, nesterov)
        if momentum is not None:
            momenta[i].copy_(momentum)
        w.copy_(weight)


def _columns(parts: Sequence[Part]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the weights, gradients and momenta of all parts; a weight itself where it has no momentum.

    Raises:
        ValueError: a weight has gaps in memory.
    """
    weights = [param for part in parts for param in part.params]
    if any(weight.stride() != dense_stride(weight) for weight in weights):
        raise ValueError("compiled=True needs parameters without gaps in memory: make them contiguous, or leave it out")
    momenta = [momentum for part in parts for momentum in part.buffers.get("momentum_buffer", part.params)]
    return weights, [grad for part in parts for grad in part.grads], momenta


def _settings(parts: Sequence[Part]) -> tuple[Tensor, Kinds]:
    """Return lr, momentum, weight decay and extra decay of each part, and what has to be known to compile."""
    rows = [[float(p.group[key]) for key in ("lr", "momentum", "weight_decay")] + [p.extra_decay] for p in parts]
    kinds = tuple((len(p.params), p.group["momentum"] > 0, p.group["nesterov"]) for p in parts)
    weights = [param for part in parts for param in part.params]
    return torch.tensor(rows, dtype=score_dtype(weights), device=weights[0].device), kinds


def _masks(score: Score, parts: Sequence[Part], threshold: Threshold) -> list[Tensor]:
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


def _surplus(parts: Sequence[Part], threshold: Threshold) -> list[tuple[Tensor, Tensor]]:
    """Return what the rule makes of the surplus of equal scores, which is passive: tensors and their elements there."""
    if not len(threshold.surplus):
        return []
    part, place = [(part, place) for part in parts for place in range(len(part.params))][threshold.tensor]
    param, group = part.params[place], part.group
    flat = flattened(param, param)
    weight = flat[threshold.surplus]
    momentum = [flattened(z[place], param) for z in part.buffers.values()]
    before = momentum[0][threshold.surplus] if momentum else None
    settings = (float(group["lr"]), group["momentum"], group["weight_decay"], group["nesterov"])
    after, moved = sgd_step(weight, before, part.extra_decay * weight, *settings)
    return [(flat, after), *((z, moved) for z in momentum if moved is not None)]


def _next_larger(value: Tensor) -> Tensor:
    """Return the next number that compares as larger: after zero not a denormal one if these count as zero."""
    following = torch.nextafter(value, value.new_tensor(float("inf")))
    return following if following > value else torch.full_like(value, torch.finfo(value.dtype).tiny)
