"""What is checked at a step and at the cut, before anything moves, and what is warned of."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import local_grad, to_local
from ..masks import Masks, residual, sparsity_rows
from ..names import is_governed
from ..selection.sharded import Shards
from .states import check_lr

NameOf = Callable[[Tensor], str]
_LOSSLESS = 0.01  # share of the weights' norm that a cut may take without a warning
_DENSE = 'with "prunable": False'


class CutWarning(UserWarning):
    """The cut costs accuracy, or is about to: passive weights have not vanished, a layer keeps nothing, or no cut."""


class NonFiniteGradientError(ArithmeticError):
    """A prunable parameter has an infinite or NaN gradient; the step that met it changed nothing."""


def check_step(groups: Iterable[Mapping[str, Any]], governed: Sequence[Tensor], name_of: NameOf) -> None:
    """Raise if a step cannot be taken: learning rates, sparse gradients, devices."""
    for group in groups:
        check_lr(group["lr"])
        for param in group["params"]:
            if is_sparse(param.grad) and "betas" in group:
                raise RuntimeError(
                    f"{name_of(param)} has a sparse gradient, which AdamW does not take: use sparse=False"
                )
            if is_sparse(param.grad) and (is_governed(param, group) or group["weight_decay"]):
                raise RuntimeError(
                    f'{name_of(param)} has a sparse gradient: put it into a group {_DENSE} and "weight_decay": 0'
                )
    if len({to_local(param).device for param in governed}) > 1:
        raise ValueError("all prunable parameters must be on one device")


def check_masked(
    state: Mapping[Tensor, Mapping[str, Any]], governed: Sequence[Tensor], fading: bool, name_of: NameOf
) -> None:
    """Raise if parameters have been frozen, unfrozen or replaced where the masks do not allow it any more."""
    new = next((param for param in governed if "mask" not in state.get(param, {})), None)
    if new is not None:
        raise ValueError(
            f"{name_of(new)} was frozen when the masks were fixed, and no longer is: freeze it again, "
            f"or train it in a group {_DENSE}"
        )
    for param, param_state in state.items():
        if "mask" not in param_state:
            continue
        if fading and not param.requires_grad:
            raise ValueError(f"{name_of(param)} was frozen during the fade: freeze it before, or after the cut")
        if param_state["mask"].shape != param.shape:
            raise ValueError(
                f"{name_of(param)} has shape {tuple(param.shape)}, its mask {tuple(param_state['mask'].shape)}: "
                "build a new optimizer after a parameter has changed its shape"
            )


def check_gradients(params: Sequence[Tensor], shards: Shards | None, name_of: NameOf) -> None:
    """Raise NonFiniteGradientError unless all gradients are finite; one transfer from the device for all of them."""
    # A tensor is finite if and only if its extremes are: infinity is one, and NaN spreads to both.
    grads = [local_grad(param) for param in params]
    extremes = [extreme for g in grads for extreme in (torch.aminmax(g) if g.numel() else [g.sum()] * 2)]
    if not extremes:
        return
    if len({extreme.device for extreme in extremes}) > 1:
        extremes = [extreme.cpu() for extreme in extremes]
    finite = torch.stack(extremes).isfinite().view(-1, 2).all(1).tolist()
    if shards is not None:
        finite = shards.everywhere(finite)
    if not all(finite):
        raise NonFiniteGradientError(f"the gradient of {name_of(params[finite.index(False)])} is not finite")


def warn_of_zeros(governed: Mapping[str, Tensor]) -> None:
    """Warn of parameters that can never become active."""
    zeros = [row.name for row in sparsity_rows(governed) if row.params and not row.nonzeros]
    if zeros:
        warnings.warn(
            f"every weight of {_quoted(zeros)} is zero, so none has a score above zero and none will ever be active: "
            f"initialise it otherwise, put it into a group {_DENSE}, or begin with a ramp",
            UserWarning,
            stacklevel=4,
        )


def warn_of_cut(masked: Mapping[str, Tensor], masks: Masks, reason: str | None, may_be_empty: bool = False) -> None:
    """Warn if the cut that is about to be made takes weights that matter, or all of a layer unless that is harmless."""
    left = residual(masked, masks)
    if left > _LOSSLESS:
        because = f": {reason}" if reason else ""
        text = f"the cut takes {left:.1%} of the weights' norm, so it costs accuracy{because}"
        warnings.warn(text, CutWarning, stacklevel=4)
    empty = [row.name for row in masks.table() if row.params and not row.nonzeros]
    if empty and not may_be_empty:
        warnings.warn(
            f"no weight of {_quoted(empty)} is kept, so nothing passes through it: keep more weights, or leave it out "
            f"{_DENSE}",
            CutWarning,
            stacklevel=4,
        )


def is_sparse(grad: Tensor | None) -> bool:
    """Return whether there is a gradient, and it is sparse."""
    return grad is not None and grad.is_sparse


def _quoted(names: list[str]) -> str:
    """Return names as a list to read, a long one shortened."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
