"""The rule (Ding et al., 2019): active weights follow their gradients, passive ones only decay.

Legend: W weight, G gradient, B 1 where a weight is active, alpha learning rate, eta weight decay, eta_p that of passive
weights; Z momentum and beta its coefficient; M, V the moments of AdamW, beta1, beta2 their coefficients, t its steps.

With momentum SGD, which is torch.optim.SGD's step with another gradient:

    G' = B G + (1 - B) (eta_p - eta) W          what takes the place of the gradient
    Z <- beta Z + eta W + G'
    W <- W - alpha Z                            Nesterov: W <- W - alpha (eta W + G' + beta Z)

With AdamW, of which only the first moment and the decay see what is active:

    M <- beta1 M + (1 - beta1) B G
    V <- beta2 V + (1 - beta2) G^2
    W <- W - alpha (B eta + (1 - B) eta_p) W
    W <- W - alpha M / (1 - beta1^t) / (sqrt(V / (1 - beta2^t)) + epsilon)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)

Number = float | Tensor
Buffers = Sequence[Tensor]
Rule = Callable[[Tensor, Tensor, Buffers, Tensor, Sequence[Number], bool], tuple[Tensor, Buffers]]
"""(weight, grad, buffers, active, settings, variant) -> weight and buffers after a step."""


class Part(NamedTuple):
    """Parameters of a group to be updated together.

    `owners` are the optimizer's own; `params`, `grads` and `buffers` (by name, one for each parameter) are this
    process's parts of DTensors. `group` has the hyperparameters, and `step` is how many steps have been taken;
    `own_steps`, where the state has them, how many each parameter has taken, as AdamW counts them.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    group: dict[str, Any]
    passive_decay: float
    step: int
    own_steps: list[Tensor]

    @property
    def extra_decay(self) -> float:
        """How much more passive weights decay than active ones: eta_p - eta."""
        return self.passive_decay - float(self.group["weight_decay"])

    def only(self, numbers: Sequence[int]) -> "Part":
        """Return some of the parameters."""

        def some(column: Sequence[Tensor]) -> list[Tensor]:
            return [column[number] for number in numbers]

        buffers = {name: some(buffer) for name, buffer in self.buffers.items()}
        own_steps = some(self.own_steps) if self.own_steps else []
        return self._replace(
            owners=some(self.owners),
            params=some(self.params),
            grads=some(self.grads),
            buffers=buffers,
            own_steps=own_steps,
        )

    def by_precision(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the parameters in full precision or with sparse gradients, and of the others."""
        half = [p.dtype in HALF and not g.is_sparse for p, g in zip(self.params, self.grads, strict=True)]
        return [i for i, is_half in enumerate(half) if not is_half], [i for i, is_half in enumerate(half) if is_half]


def sgd_step(
    weight: Tensor, grad: Tensor, buffers: Buffers, active: Tensor, settings: Sequence[Number], nesterov: bool
) -> tuple[Tensor, Buffers]:
    """Take a step with momentum SGD; the settings are alpha, beta, eta and eta_p - eta. Without a buffer, beta is 0."""
    lr, beta, decay, extra_decay = settings
    direction = torch.where(active, grad, extra_decay * weight) + decay * weight
    if not buffers:
        return weight - lr * direction, []
    momentum = buffers[0] * beta + direction
    direction = direction + beta * momentum if nesterov else momentum
    return weight - lr * direction, [momentum]


def adamw_step(
    weight: Tensor, grad: Tensor, buffers: Buffers, active: Tensor, settings: Sequence[Number], kind: bool
) -> tuple[Tensor, Buffers]:
    """Take a step with AdamW.

    The settings are alpha, 1 - beta1, 1 - beta2, epsilon, eta, eta_p, 1 - beta1^t and 1 - beta2^t.
    """
    lr, share1, share2, eps, decay, passive_decay, correction1, correction2 = settings
    first, second = buffers
    first = first + share1 * (torch.where(active, grad, 0.0) - first)
    second = second + share2 * (grad * grad - second)
    weight = weight - lr * torch.where(active, decay * weight, passive_decay * weight)
    return weight - lr / correction1 * first / ((second / correction2).sqrt() + eps), [first, second]


def dithered(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return values with noise of up to half a unit in the last place of a lower precision.

    So they round up or down at random, by how near either is: a step of decay is often less than half a unit, and
    rounded to nearest a passive weight would never shrink.
    """
    finfo = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=finfo.tiny))
    unit = torch.exp2(exponent) * (finfo.eps / 2)
    noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    return values + noise * unit
