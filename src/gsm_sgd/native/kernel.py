"""A step in C of parameters that have been laid out once, as long as they stay where they are."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import dense_stride, laid_out_as
from ..rule import Part

_ALL, _BY_SCORE, _BY_MASK = range(3)  # which weights of a parameter are active
_DONE = 0
_CHUNK = 2**14  # weights that a thread takes at a time, as step.c has it


def fits(part: Part) -> bool:
    """Return whether step.c takes these parameters: dense ones in float32 on a CPU, with what belongs to them."""
    tensors = [*part.params, *part.own_steps]
    return (
        all(map(is_, part.params, part.owners))  # none is a DTensor
        and all(type(tensor.data) is Tensor and tensor.is_cpu and tensor.dtype is torch.float32 for tensor in tensors)
        and all(param.stride() == dense_stride(param) for param in part.params)
        and all(grad.dtype is torch.float32 and grad.layout is torch.strided for grad in part.grads)
        and (part.group["foreach"], part.group["fused"]) == (None, None)
    )


def _form(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what of a group decides how it is laid out for a step."""
    return group["prunable"], bool(group.get("momentum")), group["foreach"], group["fused"]


class _Tensor(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "grad", "first", "second", "mask", "own_steps")),
        *((name, ctypes.c_int64) for name in ("size", "active", "ordered", "group")),
    ]


class _Group(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("lr", "decay", "extra_decay", "beta1", "beta2", "eps")),
        ("nesterov", ctypes.c_int64),
    ]


class _Chunk(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("tensor", "start", "size", "place", "found", "equal")]


class _Entry(NamedTuple):
    """A parameter that is trained, and what must not change for a step to repeat."""

    param: Tensor
    weight_at: int
    size: int
    stride: tuple[int, ...]
    state: list[tuple[str, Tensor, int]]  # names, tensors and addresses: buffers, mask, steps


class Kernel:
    """A step of parameters that are all float32, on a CPU, and without gaps in memory.

    Args:
        step: the library's function.
        dense: parameters of which all weights are active.
        ruled: those of which some are: the ones with the largest scores, or those that `masks` keep.
        masks: of `ruled`, in bool; None if scores decide.
        by_gradient: whether the score is |w g|, not |w|.
        groups: all parameter groups; a step repeats only while the parameters that it does not update stay untrained.
    """

    def __init__(
        self,
        step: Callable[..., int],
        dense: Sequence[Part],
        ruled: Sequence[Part],
        masks: Sequence[Tensor] | None,
        by_gradient: bool,
        groups: Sequence[dict[str, Any]],
    ) -> None:
        self._step, self._by_gradient, self.fixed = step, by_gradient, masks is not None
        by_rule = _BY_SCORE if masks is None else _BY_MASK
        parts = [*((part, _ALL) for part in dense), *((part, by_rule) for part in ruled)]
        self.groups = [part.group for part, _ in parts]
        self._tensors = (_Tensor * sum(len(part.params) for part, _ in parts))()
        self._groups = (_Group * len(parts))()
        self._entries: list[_Entry] = []
        self._copies: list[tuple[Tensor, int, Tensor]] = []  # masks, versions, and as weights lie
        rows, kept = iter(self._tensors), iter(masks or ())
        for number, (part, active) in enumerate(parts):
            for i, param in enumerate(part.params):
                state = {name: buffers[i] for name, buffers in part.buffers.items()}
                row = next(rows)
                row.weight, row.size = param.data_ptr(), param.numel()
                row.first, row.second, *_ = *(buffer.data_ptr() for buffer in state.values()), None, None
                row.active, row.ordered, row.group = active, param.is_contiguous(), number
                if part.own_steps:
                    state["step"] = part.own_steps[i]
                    row.own_steps = part.own_steps[i].data_ptr()
                if active == _BY_MASK:
                    state["mask"] = next(kept)
                    (mask,) = laid_out_as([param], [state["mask"]])
                    row.mask = mask.data_ptr()
                    if mask is not state["mask"]:
                        self._copies.append((state["mask"], state["mask"]._version, mask))
                places = [(name, tensor, tensor.data_ptr()) for name, tensor in state.items()]
                self._entries.append(_Entry(param, param.data_ptr(), param.numel(), param.stride(), places))
        chunks = [
            _Chunk(number, start, min(_CHUNK, row.size - start))
            for number, row in enumerate(self._tensors)
            for start in range(0, row.size, _CHUNK)
        ]
        self._chunks = (_Chunk * len(chunks))(*chunks)
        self._total = sum(row.size for row in self._tensors if row.active == _BY_SCORE)
        self.num_prunable = sum(row.size for row in self._tensors if row.active != _ALL)
        self._forms = [(group, list(group["params"]), _form(group)) for group in groups]
        mine = {id(entry.param) for entry in self._entries}
        others = [param for group in groups for param in group["params"] if id(param) not in mine]
        self._frozen = [param for param in others if not param.requires_grad]
        self._idle = [param for param in others if param.requires_grad]

    def can_repeat(self, groups: Sequence[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Take new gradients; return whether they fit, and all parameters, buffers and masks are where they were."""
        if len(groups) != len(self._forms) or any(param.requires_grad for param in self._frozen):
            return False
        if any(param.grad is not None for param in self._idle):
            return False
        if any(mask._version != version for mask, version, _ in self._copies):
            return False
        for group, (known, params, form) in zip(groups, self._forms, strict=True):
            same = group is known and len(group["params"]) == len(params)
            if not same or not all(map(is_, group["params"], params)) or _form(group) != form:
                return False
        for row, (param, weight_at, size, stride, places) in zip(self._tensors, self._entries, strict=True):
            grad, found = param.grad, state.get(param)
            if (
                grad is None
                or found is None
                or not param.requires_grad
                or param.data_ptr() != weight_at
                or param.numel() != size
                or grad.stride() != stride
                or grad.dtype is not torch.float32
                or grad.layout is not torch.strided
            ):
                return False
            for name, tensor, at in places:
                if found.get(name) is not tensor or tensor.data_ptr() != at:
                    return False
            row.grad = grad.data_ptr()
        return True

    def take(self, grads: Sequence[Tensor]) -> None:
        """Take new gradients, laid out as the parameters are, in the order in which these were given."""
        for row, grad in zip(self._tensors, grads, strict=True):
            row.grad = grad.data_ptr()

    def step(self, settings: Sequence[Sequence[float]], num_active: int) -> bool:
        """Take a step; return False if it is one for torch's operations, and nothing has changed.

        That is if a gradient or a weight is not finite, or if of equal scores in a parameter that is not contiguous
        some are active and some are not.
        """
        for group, values in zip(self._groups, settings, strict=True):
            group.lr, group.decay, group.extra_decay, group.beta1, group.beta2, group.eps, group.nesterov = values
        return (
            self._step(
                self._tensors,
                len(self._tensors),
                self._chunks,
                len(self._chunks),
                self._groups,
                self._total,
                num_active,
                self._by_gradient,
                min(torch.get_num_threads(), len(self._chunks)),
            )
            == _DONE
        )
