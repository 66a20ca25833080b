"""A net's state as files hold it: plain tensors under bare names, each checked before any file is made."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..distributed import is_dtensor
from ..names import bare_names, own_names, without_prune
from . import UsageError


def plain_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a state under bare names, detached; what torch.nn.utils.prune holds, as the net uses it.

    UsageError names an entry that is not a plain tensor.
    """
    if not isinstance(state, Mapping):
        raise UsageError(f"a {type(state).__name__} is not a net's state: give model.state_dict()")
    for name, value in state.items():
        if not isinstance(name, str):
            raise UsageError(f"the state has an entry {name!r}, which is not a name: give model.state_dict()")
        if reason := _not_plain(value):
            raise UsageError(f"the state's entry {name!r} is {reason}")
    names = bare_names(state)
    tensors = {names[name]: value.detach().resolve_conj().resolve_neg() for name, value in state.items()}
    return without_prune(tensors)


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a state into a model, whatever torch.compile, DDP or DataParallel have put into the names of either."""
    names = own_names(model.state_dict(), state)
    if len(set(names.values())) < len(names):
        names = {name: name for name in state}
    model.load_state_dict({names[name]: value for name, value in state.items()})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hex, of tensors by rising name: of name, type and shape as a line, and of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _not_plain(value: Any) -> str | None:
    """Return what an entry is and what to do about it, None if it is a plain tensor."""
    if isinstance(value, Mapping):
        return "a dict of its own: if it is the net's state, give it alone, else leave it out"
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, not a tensor: leave it out, or make it a tensor"
    if is_lazy(value):
        return "not initialized yet: call the net once before"
    if is_dtensor(value):
        return "sharded over processes: give its full_tensor(), for which every process has to call"
    if value.is_quantized:
        return "quantized: give its dequantize(), or leave it out"
    if value.is_nested:
        return "nested: make it a dense tensor, or leave it out"
    if value.layout != torch.strided:
        return f"of layout {value.layout}, not dense: give its to_dense(), or leave it out"
    if type(value.detach()) is not Tensor:
        return f"of type {type(value).__name__}, not a plain tensor: make it one, or leave it out"
    return None
