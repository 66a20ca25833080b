"""GSM for AdamW: the rule of Global Sparse Momentum SGD with moments."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from ..budget import Budget
from ..decay import Motion
from ..memory import laid_out_as
from ..patterns import Pattern
from ..rule import HALF, Part, adamw_step, dithered
from ..scores import Score
from .sparse import ScheduleLike, SparseOptimizer
from .update import takes_fused


class GSMAdamW(SparseOptimizer):
    """Train so that all prunable weights but exactly Q shrink to nothing, by AdamW.

    `GSM` for transformers, and whatever else is trained by AdamW. At every step the Q weights of the whole model with
    the largest score |w g| are active and follow their gradients; all others are passive and only decay:

        T  = |W * G|                                    score, of the gradient G
        B  = 1 for the Q largest T of the whole model   active; the others are passive
        M <- beta1 M + (1 - beta1) B G                  only active weights have their gradient in the first moment,
        V <- beta2 V + (1 - beta2) G^2                  all have it in the second
        W <- W - alpha eta W                            eta is `passive_decay` where B = 0
        W <- W - alpha M^ / (sqrt(V^) + eps)            M^, V^: corrected for their start at zero

    |w g| is the first-order change of the loss, whatever the scale of a coordinate, so AdamW does not change the score.
    The second moment is of the full gradient: were it masked as well, a weight that is active now and then would move
    too far. A weight that turns passive coasts on the first moment that it has for some 1 / (1 - beta1) steps.

    A parameter without a gradient is passive in that step: it decays, and its moments and the number of its steps stay
    as they are, as `torch.optim.AdamW` leaves them; in the fade it moves as if its gradient were zero. Everything else
    is as `GSM` has it.

    Mirrors `torch.optim.AdamW`, which it equals bit for bit at density 1; states load across both ways where the
    settings agree. Not supported: `amsgrad`, `maximize`, `capturable`, `differentiable`, coupled decay, and sparse
    gradients.

    Args:
        params: parameters, named parameters, or groups of either; see `GSM`. Leave out what is no matrix of a block:
            embeddings, positions, norms and the head, by "prunable": False; `one_phase` does.
        lr: learning rate alpha; a scheduler's highest may be what trains the dense net.
        compression, density, sparsity, num_kept: the budget, exactly one of them; see `GSM`.
        macs, parameters, channels, latency: the budget of a pattern of channels, one of them; see `GSM`.
        betas: beta1 in [0, 1) and beta2 in (0, 1).
        eps: above 0.
        weight_decay: eta, decoupled as in `torch.optim.AdamW`.
        schedule: None, a `Schedule`, or a function of the step; see `GSM`.
        passive_decay: weight decay of passive weights, a number or "auto"; see `GSM`. "auto" is in closed form: with
            r = shrink_to^(1 / steps left), at least beta1, it is (1 - r) / alpha.
        score: "taylor" |w g|, "fisher" |w| sqrt(v), "magnitude" |w|, "random", or a function, whose state has
            `exp_avg`, `exp_avg_sq` and `step` as they are before the step; see `gsm_sgd.scores`.
        pattern: what is kept or dropped together; None is single weights; see `gsm_sgd.patterns`.
        foreach, fused: which of torch's implementations of AdamW to use, as there; None is the quickest.
        check_ranks: what to compare over all processes; see `GSM`.
        multipliers: of gradients and of updates, by name; see `GSM`. The decay is not multiplied.

    Raises:
        ValueError: as `GSM`, or betas or eps are out of range.

    Example:
        >>> optimizer = GSMAdamW(model.named_parameters(), lr=1e-3, sparsity=0.9, schedule=Schedule(total_steps))
        >>> for tokens, labels in batches:
        ...     optimizer.zero_grad()
        ...     F.cross_entropy(model(tokens), labels).backward()
        ...     optimizer.step()
        >>> masks = optimizer.finalize()
    """

    _rule = staticmethod(adamw_step)
    _own_steps = True
    _multiplies_updates = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        compression: float | None = None,
        density: float | None = None,
        sparsity: float | None = None,
        num_kept: int | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        channels: float | None = None,
        latency: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "passive_decay": passive_decay,
            "foreach": foreach,
            "fused": fused,
            "amsgrad": False,
            "maximize": False,
            "capturable": False,
            "differentiable": False,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults, budget, schedule, score, pattern, check_ranks, multipliers)

    def _buffer_names(self, group: dict[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq")

    def _motion(self, group: dict[str, Any]) -> Motion:
        return Motion(float(group["lr"]), 0.0, False, group["first_lr"], group["highest_lr"], group["betas"][0])

    def _numbers(self, part: Part) -> list[list[float]]:
        lr, (beta1, beta2), eps, decay = (part.group[key] for key in ("lr", "betas", "eps", "weight_decay"))
        return [
            [float(lr), 1 - beta1, 1 - beta2, max(eps, _least_root(param)), decay, part.passive_decay, *corrections]
            for param, corrections in zip(part.params, _corrections(part), strict=True)
        ]

    def _torchs_(self, part: Part, exactly: bool) -> None:
        _adamw_(part, part.grads, part.group["weight_decay"], exactly)

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        lr, decay, beta2 = float(part.group["lr"]), part.group["weight_decay"], part.group["betas"][1]
        mine = [b.to(param.dtype) for b, param in zip(active, part.params, strict=True)]
        if part.extra_decay:
            passive = torch._foreach_mul(mine, part.params)
            torch._foreach_sub_(passive, part.params)  # - (1 - B) W: nothing where a weight is active
            torch._foreach_mul_(part.params, 1 - lr * decay)
            torch._foreach_add_(part.params, passive, alpha=lr * part.extra_decay)
        else:
            torch._foreach_mul_(part.params, 1 - lr * decay)
        torch._foreach_mul_(mine, part.grads)
        # Torch's step takes B G for both moments, so the second gets the rest of G^2 before: (1 - beta2) (1 - B) G^2
        # over the beta2 by which the step multiplies it.
        rest = torch._foreach_sub(part.grads, mine)
        torch._foreach_addcmul_(part.buffers["exp_avg_sq"], rest, rest, (1 - beta2) / beta2)
        _adamw_(part, mine, weight_decay=0.0)

    _in_c = _masked_

    def _settings_in_c(self, group: dict[str, Any]) -> Sequence[float]:
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        return lr, decay, self.passive_decay(group) - decay, *map(float, group["betas"]), float(group["eps"]), 0

    def _decay_(self, part: Part) -> None:
        factor = 1 - float(part.group["lr"]) * part.passive_decay
        generator = torch.Generator(part.params[0].device).manual_seed(part.step)
        for param in part.params:
            if param.dtype in HALF:
                param.copy_(dithered(param.float() * factor, param.dtype, generator))
            else:
                param.mul_(factor)


def _adamw_(part: Part, grads: list[Tensor], weight_decay: float, exactly: bool = False) -> None:
    """Update parameters by torch's AdamW along these gradients; unless `exactly`, by the quickest implementation."""
    if not part.params:
        return
    group, (beta1, beta2) = part.group, part.group["betas"]
    foreach, fused = group["foreach"], group["fused"]
    if (foreach, fused) == (None, None) and not exactly and takes_fused(part.params):
        fused = all(param.is_cpu for param in part.params) or None  # on a GPU it wants the steps there
    if fused:  # torch's kernel takes it for granted that tensors lie in memory alike
        grads = laid_out_as(part.params, grads)
    adamw(
        part.params,
        grads,
        part.buffers["exp_avg"],
        part.buffers["exp_avg_sq"],
        [],
        part.own_steps,
        foreach=foreach,
        fused=fused,
        has_complex=any(param.is_complex() for param in part.params),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )


def _corrections(part: Part) -> list[tuple[float, float]]:
    """Return 1 - beta1^t and 1 - beta2^t of each parameter, with t counting the step that is being taken."""
    if not part.params:
        return []
    beta1, beta2 = part.group["betas"]
    return [(1 - beta1 ** (t + 1), 1 - beta2 ** (t + 1)) for t in torch.stack(part.own_steps).tolist()]


def _least_root(param: Tensor) -> float:
    """Return the least root of a second moment above zero, which float16 rounds to zero for most gradients."""
    if param.dtype not in HALF:
        return 0.0
    finfo = torch.finfo(param.dtype)
    return math.sqrt(finfo.tiny * finfo.eps)
