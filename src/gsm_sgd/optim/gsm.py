"""GSM: Global Sparse Momentum SGD (Ding et al., NeurIPS 2019)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from ..budget import Budget
from ..decay import Motion
from ..memory import laid_out_as
from ..patterns import Pattern
from ..rule import Part, sgd_step
from ..scores import Score
from .sparse import ScheduleLike, SparseOptimizer
from .update import takes_fused


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
    reads weights and gradients twice where SGD reads them once. On a CPU in float32 it is in C, if there is a compiler;
    elsewhere it keeps a float32 score for each weight from step to step.

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
        foreach, fused: which of torch's implementations of SGD to use, as in `torch.optim.SGD`; None is the quickest.
        check_ranks: what to compare over all processes of the default process group. By default the settings, once,
            before the first step. True also compares weights and gradients, before each step, for finding mistakes:
            under DistributedDataParallel they are the same bits on each. False compares nothing, for processes that
            train different models.
        multipliers: of gradients, by name and of the parameters' shapes, above 0; see `gsm_sgd.reparam.multipliers`.
            Scores are of the gradients as they are, the change of the loss.

    A loaded state brings its budget and schedule, with a warning where they are not the ones given here; `foreach`,
    `fused`, `score`, `pattern`, `check_ranks` and `multipliers` stay as given here. States match by the parameters'
    names where both sides have them. `state` has `momentum_buffer` for each parameter, and `mask` once the
    masks are fixed.

    Raises:
        ValueError: a hyperparameter is out of range, nothing is prunable, a parameter is given twice, is complex, has
            no data yet, or is a part of a weight, as weight norm has them.

    Example:
        >>> optimizer = GSM(model.named_parameters(), lr=0.1, sparsity=0.98, schedule=Schedule(total_steps))
        >>> for images, labels in batches:
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(images), labels).backward()
        ...     optimizer.step()
        >>> masks = optimizer.finalize()
    """

    _rule = staticmethod(sgd_step)

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
        foreach: bool | None = None,
        fused: bool | None = None,
        check_ranks: bool | None = None,
        multipliers: Mapping[str, Tensor] | None = None,
    ) -> None:
        budget = Budget.given(
            **{"compression": compression, "density": density, "sparsity": sparsity, "num_kept": num_kept},
            **{"macs": macs, "parameters": parameters, "channels": channels, "latency": latency},
        )
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
        super().__init__(params, defaults, budget, schedule, score, pattern, check_ranks, multipliers)

    def _buffer_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _motion(self, group: dict[str, Any]) -> Motion:
        return Motion(float(group["lr"]), group["momentum"], group["nesterov"], group["first_lr"], group["highest_lr"])

    def _numbers(self, part: Part) -> list[list[float]]:
        row = [*(float(part.group[key]) for key in ("lr", "momentum", "weight_decay")), part.extra_decay]
        return [row] * len(part.params)

    def _kind(self, group: dict[str, Any]) -> bool:
        return bool(group["nesterov"])

    def _torchs_(self, part: Part, exactly: bool) -> None:
        _sgd_(part, part.grads, part.group["weight_decay"], exactly)

    def _decay_(self, part: Part) -> None:
        part = self._without_half(part, active=False)
        _sgd_(part, part.grads, part.passive_decay)

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        _sgd_(part, _masked_gradients(part, active), part.group["weight_decay"])

    _in_c = _masked_

    def _settings_in_c(self, group: dict[str, Any]) -> Sequence[float]:
        lr, decay, momentum = (float(group[key]) for key in ("lr", "weight_decay", "momentum"))
        return lr, decay, self.passive_decay(group) - decay, momentum, 0.0, 0.0, group["nesterov"]


def _sgd_(part: Part, grads: list[Tensor], weight_decay: float, exactly: bool = False) -> None:
    """Update parameters by torch's SGD along these gradients; unless `exactly`, by the quickest implementation."""
    if not part.params:
        return
    foreach, fused = part.group["foreach"], part.group["fused"]
    if (foreach, fused) == (None, None) and not exactly and takes_fused(part.params):
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


def _masked_gradients(part: Part, active: list[Tensor]) -> list[Tensor]:
    """Return G' of all parameters, in operations on lists; masks of numbers may be overwritten."""
    mine = [b.to(param.dtype) for b, param in zip(active, part.params, strict=True)]
    if not part.extra_decay:
        torch._foreach_mul_(mine, part.grads)
        return mine
    # lerp takes either end as it is, so that gradients are not rounded away
    directions = [*torch._foreach_mul(part.params, part.extra_decay)]
    torch._foreach_lerp_(directions, part.grads, mine)
    return directions
