"""RepOptimizer's multipliers of gradients: a fixed number for each weight, which then trains as a branched block.

Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", 2023. With SGD the gradient G becomes M G.
AdamW takes no notice of a gradient's scale, so there both the gradient and the update are multiplied by M: that is
AdamW on V = W / M, whose gradient is M G. `gsm_sgd.reparam.multipliers` finds them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..distributed import local_slice, to_local
from ..masks import Handles
from ..names import named_in, own_names
from ..rule import HALF, Part

Factors = Mapping[Tensor, Tensor]
"""Multipliers by parameter."""


def check_multipliers(multipliers: Mapping[str, Tensor], named: Mapping[str, Tensor], updates: bool) -> None:
    """Raise ValueError unless multipliers fit.

    They are of parameters by name, finite and above zero, and where updates are multiplied too, not in half precision.
    """
    if multipliers and not named:
        raise ValueError("multipliers go by names: pass model.named_parameters()")
    for name, param in zip(multipliers, factors_of(multipliers, named), strict=True):
        if not (multipliers[name].isfinite() & (multipliers[name] > 0)).all():
            raise ValueError(f"the multipliers of {name!r} must be finite and above 0")
        if updates and param.dtype in HALF:
            raise ValueError(f"AdamW's multipliers need float32, and {name!r} is in half precision: leave it out")


def factors_of(multipliers: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Return multipliers by parameter; ValueError if there is no such parameter, or it has another shape."""
    factors = {}
    for name, own in own_names(named, multipliers).items():
        if own not in named:
            raise ValueError(f"there are multipliers of {name!r}, which is no parameter that is trained here")
        factor, param = multipliers[name], named[own]
        if factor.shape != param.shape:
            raise ValueError(
                f"the multipliers of {name!r} have shape {tuple(factor.shape)}, and it has {tuple(param.shape)}: "
                "build a new optimizer with those of this model"
            )
        factors[param] = factor
    return factors


def multiplied(parts: Sequence[Part], factors: Factors, updates: bool) -> list[Part]:
    """Return parts with multiplied gradients and, if updates are to be multiplied too, copies of divided weights."""
    changed = []
    for part in parts:
        params, grads = [*part.params], [*part.grads]
        for number, owner in enumerate(part.owners):
            if owner in factors:
                factor = local_slice(owner, factors[owner]).to(params[number])
                grads[number] = grads[number] * factor
                params[number] = params[number] / factor if updates else params[number]
        changed.append(part._replace(params=params, grads=grads))
    return changed


def put_back_(parts: Sequence[Part], factors: Factors) -> None:
    """Write divided weights that have been updated back into their parameters."""
    for part in parts:
        for owner, param in zip(part.owners, part.params, strict=True):
            if owner in factors:
                to_local(owner).copy_(param * local_slice(owner, factors[owner]).to(param))


def multiply_gradients(
    optimizer: Optimizer, multipliers: Mapping[str, Tensor], model: nn.Module | None = None
) -> RemovableHandle:
    """Multiply gradients in every step of an optimizer of torch's, as RepOptimizer does.

    Of SGD's kind gradients are multiplied; of Adam's, which has betas, gradients and updates. `GSM` and `GSMAdamW` take
    `multipliers=` instead. Gradients are as they were after a step.

    Args:
        optimizer: trains the parameters.
        multipliers: tensors above 0, by name and of the parameter's shape; see `gsm_sgd.reparam.multipliers`.
        model: whose names these are, where the optimizer has none.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        ValueError: multipliers are of no parameter, have another shape, are not finite and above 0 or, of Adam's kind,
            of a parameter in half precision; or, later, a step is taken with a closure.

    Example:
        >>> optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
        >>> multiply_gradients(optimizer, multipliers(wide))
    """
    if hasattr(optimizer, "num_prunable"):
        raise ValueError(f"{type(optimizer).__name__} multiplies gradients itself: pass multipliers= to it")
    named = named_in(optimizer) if model is None else dict(model.named_parameters())
    trained = {param: "betas" in group for group in optimizer.param_groups for param in group["params"]}
    named = {name: param for name, param in named.items() if param in trained}
    check_multipliers(multipliers, named, updates=any(trained.values()))
    factors = factors_of(multipliers, named)
    before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def multiply(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", *args[1:2]) is not None:
            raise ValueError("gradients are multiplied before the step: take steps without a closure")
        before[:] = [(param, param.grad) for param in factors if param.grad is not None]
        for param, grad in before:
            param.grad = grad * factors[param].to(param)
            if trained[param]:
                param.div_(factors[param].to(param))

    @torch.no_grad()
    def undo(*_: object) -> None:
        for param, grad in before:
            param.grad = grad
            if trained[param]:
                param.mul_(factors[param].to(param))

    return Handles([optimizer.register_step_pre_hook(multiply), optimizer.register_step_post_hook(undo)])
