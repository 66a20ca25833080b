"""The rule (Ding et al., 2019): active weights follow their gradients, passive ones only decay.

Legend: W weight, G gradient, Z momentum, B 1 where a weight is active, alpha learning rate, beta momentum coefficient,
eta weight decay, eta_p that of passive weights.

    G' = B G + (1 - B) (eta_p - eta) W          what takes the place of the gradient
    Z <- beta Z + eta W + G'                    torch.optim.SGD's step with it
    W <- W - alpha Z                            Nesterov: W <- W - alpha (eta W + G' + beta Z)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """Parameters of a group to be updated together.

    `owners` are the optimizer's own; `params`, `grads` and `buffers` (by name, one for each parameter) are this
    process's parts of DTensors. `group` has the hyperparameters, and `step` is how many steps have been taken.
    """

    owners: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor]
    buffers: dict[str, list[Tensor]]
    group: dict[str, Any]
    passive_decay: float
    step: int

    @property
    def extra_decay(self) -> float:
        """How much more passive weights decay than active ones: eta_p - eta."""
        return self.passive_decay - float(self.group["weight_decay"])

    def only(self, numbers: Sequence[int]) -> "Part":
        """Return some of the parameters."""

        def some(column: Sequence[Tensor]) -> list[Tensor]:
            return [column[number] for number in numbers]

        buffers = {name: some(buffer) for name, buffer in self.buffers.items()}
        return self._replace(
            owners=some(self.owners), params=some(self.params), grads=some(self.grads), buffers=buffers
        )

    def by_precision(self) -> tuple[list[int], list[int]]:
        """Return the numbers of the parameters in full precision or with sparse gradients, and of the others."""
        half = [p.dtype in HALF and not g.is_sparse for p, g in zip(self.params, self.grads, strict=True)]
        return [i for i, is_half in enumerate(half) if not is_half], [i for i, is_half in enumerate(half) if is_half]


def masked_gradient(weight: Tensor, grad: Tensor, active: Tensor, extra_decay: float | Tensor) -> Tensor:
    """Return G': the gradient where a weight is active, elsewhere what makes it decay by `extra_decay` more."""
    return torch.where(active, grad, extra_decay * weight)


def sgd_step(
    weight: Tensor,
    momentum: Tensor | None,
    direction: Tensor,
    lr: float | Tensor,
    beta: float | Tensor,
    decay: float | Tensor,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return weight and momentum after a step of SGD with this in place of the gradient."""
    direction = direction + decay * weight
    if momentum is not None:
        momentum = momentum * beta + direction
        direction = direction + beta * momentum if nesterov else momentum
    return weight - lr * direction, momentum


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
