"""GSM: Global Sparse Momentum SGD as a `torch.optim.Optimizer`.

The rule, for a prunable weight tensor W with momentum Z (Ding et al., NeurIPS 2019):

    T  = |W * dL/dW|                                importance
    B  = 1 for the Q largest T of the whole model   active; the others are passive
    Z <- beta Z + eta W + B * dL/dW
    W <- W - alpha Z

alpha learning rate (`lr`), beta `momentum`, eta `weight_decay`; for passive weights eta is `passive_decay`.
B is chosen anew at every step, so a passive weight can come back.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .masks import Masks, apply_masks_, is_prunable, magnitude_masks, prunable_in
from .selection import check_compression, importance, kept_weights, top_indices


class NonFiniteGradientError(ArithmeticError):
    """A prunable parameter has an infinite or NaN gradient; the step that met it changed nothing."""


class GSM(Optimizer):
    """Train so that all prunable weights but exactly Q = floor(N / C) shrink to nothing.

    A drop-in for `torch.optim.SGD`, which it equals bit for bit at `compression=1`. Call `finalize()` when
    training is over to cut the passive weights; whatever is trained after that keeps them at exactly zero.

    Args:
        params: parameters, named parameters, or groups of either, as for `torch.optim.SGD`. The group key
            `prunable` says whether the rule applies to a group; by default it applies to each parameter with
            `ndim >= 2`. The others are trained by plain momentum SGD. Leave frozen parameters out: without a
            gradient a prunable one is passive, so it decays.
        lr: learning rate alpha.
        compression: C, one number for the whole model: of N prunable weights floor(N / C) are kept.
        momentum: beta, in [0, 1). The higher, the faster passive weights shrink: a weight that stays passive
            for k steps follows w_0 exp(-alpha eta k / (1 - beta)).
        weight_decay: eta, coupled L2 as in `torch.optim.SGD`.
        nesterov: look ahead along the momentum, as in `torch.optim.SGD`.
        passive_decay: eta of passive weights; None means `weight_decay`, the paper's rule.

    Raises:
        ValueError: a hyperparameter is out of range, nothing is prunable, or a parameter is given twice.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        compression: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        passive_decay: float | None = None,
    ) -> None:
        check_compression(compression)
        defaults = {
            "lr": lr,
            "compression": compression,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "passive_decay": passive_decay,
            "prunable": None,
        }
        super().__init__(params, defaults)
        if self.num_prunable == 0:
            raise ValueError("nothing to prune: GSM needs a parameter with ndim >= 2, or a prunable group")
        kept_weights(self.num_prunable, compression)
        shrinks = (_passive_decay(group) > 0 for group in self.param_groups if _governs(group))
        if compression > 1 and not all(shrinks):
            warnings.warn(
                "passive weights never shrink where weight_decay and passive_decay are both 0: "
                "the cut will remove weights that still matter",
                UserWarning,
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.SGD` does.

        Raises:
            ValueError: a hyperparameter is out of range, a parameter is given twice, `compression` is not the
                other groups', or the group is prunable and `finalize()` has already chosen what is kept.
        """
        group = {**self.defaults, **param_group}
        params = group["params"]
        if not isinstance(params, Tensor | set):  # a set has no order: torch says so
            group["params"] = params = list(params)
            tensors = [param[1] if isinstance(param, tuple) else param for param in params]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError("a parameter is given twice")
        _check_hyperparameters(group)
        if self.param_groups and group["compression"] != self.param_groups[0]["compression"]:
            raise ValueError("compression is one number for the whole model, groups cannot differ in it")
        super().add_param_group(group)
        if self.finalized and _governs(self.param_groups[-1]):
            del self.param_groups[-1]
            raise ValueError("prunable parameters cannot be added after finalize()")

    @property
    def num_prunable(self) -> int:
        """N, the number of weights that the rule governs."""
        return sum(param.numel() for param in prunable_in(self).values())

    @property
    def nonzeros(self) -> int:
        """Q = floor(N / C): how many weights are active at every step, and how many `finalize()` keeps."""
        return kept_weights(self.num_prunable, self.param_groups[0]["compression"])

    @property
    def finalized(self) -> bool:
        """Whether `finalize()` has cut the passive weights."""
        return any("mask" in state for state in self.state.values())

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once and return what `closure`, if given, returned.

        A prunable parameter without a gradient is passive in this step: it only decays. Where nothing is
        passive (compression 1, or after `finalize()`) it stays as it is, as with `torch.optim.SGD`. If no
        parameter has a gradient, nothing happens.

        Raises:
            NonFiniteGradientError: a prunable parameter's gradient is not finite. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if not grads:
            return loss
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("GSM does not support sparse gradients")
        prunable = prunable_in(self)
        _refuse_nonfinite_gradients(prunable)
        num_prunable = sum(param.numel() for param in prunable.values())
        kept = kept_weights(num_prunable, self.param_groups[0]["compression"])
        active = self._active([param for param in prunable.values() if param.grad is not None], kept)
        some_passive = kept < num_prunable and not self.finalized
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None or (some_passive and is_prunable(param, group)):
                    _update_(param, self.state[param], active.get(param), group)
        return loss

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Cut: set all prunable weights but the Q largest |W| of the whole model to zero, for good.

        Steps taken afterwards train the kept weights alone. A second call changes nothing.

        Returns:
            Bool masks, True where a weight is kept, exactly Q in all: keyed by parameter name, or by position
            among the prunable parameters if the optimizer was given no names.
        """
        prunable: dict[Any, Tensor] = dict(prunable_in(self))
        if not self.finalized:
            masks = magnitude_masks(prunable, self.param_groups[0]["compression"])
            apply_masks_(prunable, masks)
            for key, param in prunable.items():
                state = self.state[param]
                state["mask"] = masks[key]
                if "momentum_buffer" in state:  # else it would push a weight that was cut away from zero
                    state["momentum_buffer"].masked_fill_(~masks[key], 0)
        return {key: self.state[param]["mask"].clone() for key, param in prunable.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; torch casts loaded masks to the parameters' dtype, here they are bool again."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
        for param_state in self.state.values():
            if "mask" in param_state:
                param_state["mask"] = param_state["mask"].bool()

    def _active(self, params: list[Tensor], kept: int) -> dict[Tensor, Tensor]:
        """Return B as flat indices for prunable parameters, all with gradients: Q in all, or all there are."""
        if self.finalized:
            return {param: self.state[param]["mask"].reshape(-1).nonzero().squeeze(1) for param in params}
        scores = [importance(param, param.grad) for param in params if param.grad is not None]
        active = top_indices(scores, min(kept, sum(score.numel() for score in scores)))
        return dict(zip(params, active, strict=True))


def _update_(weight: Tensor, state: dict[str, Any], active: Tensor | None, group: dict[str, Any]) -> None:
    """Apply the rule to one parameter, in place.

    Each operation is the one that `torch.optim.SGD` uses, so that with all weights active the bits are its own.

    Args:
        weight: the parameter W, with its gradient.
        state: its optimizer state, with the momentum Z.
        active: B as ascending indices into the flattened weight; None where the rule does not govern it.
        group: its hyperparameters.
    """
    alpha, beta, eta = group["lr"], group["momentum"], group["weight_decay"]
    grad = weight.grad
    if grad is None:
        direction = weight * _passive_decay(group)
    elif active is None or len(active) == weight.numel():  # all of it is active
        direction = grad.add(weight, alpha=eta) if eta else grad
    else:
        direction = weight * _passive_decay(group)
        moved = grad.take(active)
        if eta:
            moved.add_(weight.take(active), alpha=eta)
        if direction.is_contiguous():
            direction.view(-1)[active] = moved
        else:  # not put_: it is not allowed where deterministic algorithms are asked for
            direction[torch.unravel_index(active, direction.shape)] = moved
    if beta:
        if "momentum_buffer" in state:
            state["momentum_buffer"].mul_(beta).add_(direction)
        else:
            state["momentum_buffer"] = direction.clone()
        momentum = state["momentum_buffer"]
        direction = direction.add(momentum, alpha=beta) if group["nesterov"] else momentum
    weight.add_(direction, alpha=-alpha)


def _passive_decay(group: dict[str, Any]) -> float:
    chosen: float | None = group["passive_decay"]
    decay: float = group["weight_decay"] if chosen is None else chosen
    return decay


def _governs(group: dict[str, Any]) -> bool:
    """Return whether the rule governs any parameter of a group."""
    return any(is_prunable(param, group) for param in group["params"])


def _refuse_nonfinite_gradients(prunable: dict[str, Tensor] | dict[int, Tensor]) -> None:
    """Raise if a gradient is not finite; one transfer from the device for all of them."""
    grads = {key: p.grad for key, p in prunable.items() if p.grad is not None and p.grad.numel()}
    if not grads:
        return
    # A tensor is finite if and only if its extremes are: infinity is one, and NaN spreads to both.
    extremes = torch.stack([extreme for grad in grads.values() for extreme in torch.aminmax(grad)])
    finite = extremes.isfinite().view(-1, 2).all(1).tolist()
    if not all(finite):
        key = list(grads)[finite.index(False)]
        name = repr(key) if isinstance(key, str) else f"number {key}"
        raise NonFiniteGradientError(f"the gradient of prunable parameter {name} is not finite")


def _check_hyperparameters(group: dict[str, Any]) -> None:
    for key in ("lr", "weight_decay", "passive_decay"):
        value = group[key]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key} must be finite and at least 0, not {value}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs momentum above 0")
