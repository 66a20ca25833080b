"""What operators that compute do to labels: entry by entry, over pixels, or over channels."""

from typing import Any

import torch
from torch import Tensor, fx

from .call import Call, shape_of
from .labels import Value, padded, silencers_of_all

_PROBES = (0.7, -1.3, 2.1, -0.4)  # numbers that an operator is tried on


def pointwise(call: Call) -> Value | None:
    """Tie the labels of the operands entry by entry: they are one channel from then on."""
    nodes = [arg for arg in (*call.node.args, *call.node.kwargs.values()) if isinstance(arg, fx.Node)]
    values = {node: value for node in nodes if (value := call.value(node)) is not None}
    rank = len(call.shape)
    labels = max((padded(value.labels, rank) for value in values.values()), key=Tensor.numel)
    axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
    for node in nodes:
        sizes = (1,) * (rank - len(shape_of(node))) + shape_of(node)
        is_factor = all(sizes[axis] == 1 for axis in axes)
        if node in values:
            theirs = padded(values[node].labels, rank)
            if theirs.numel() == 1 < labels.numel() and is_factor:
                call.graph.lock(theirs, "it is a factor of all channels")
            elif theirs.shape != labels.shape and theirs.numel() > 1:
                return call.keep(f"{call.operator} {call.where} combines different axes")
            else:
                call.graph.tie(labels, theirs)
        elif not is_factor:
            name = call.tensor(node)
            if name is None or len(axes) > 1:
                return call.keep(f"{call.operator} {call.where} meets a tensor that has no channels")
            call.graph.slot(name, axes[0] - rank + len(shape_of(node)), labels.reshape(-1))
    return Value(labels, _silencers(call, values))


def _silencers(call: Call, values: dict[fx.Node, Value]) -> frozenset[str] | None:
    """Return what makes the result zero, by trying: one operand that is zero, or all of them."""
    for node, value in values.items():
        if value.silencers is not None and _is_zero(call, {node}):
            return value.silencers
    return silencers_of_all([value.silencers for value in values.values()]) if _is_zero(call, {*values}) else None


def _is_zero(call: Call, zeros: set[fx.Node]) -> bool:
    """Return whether the operator gives zero where some operands are zero, whatever the others are."""

    def probe(arg: Any, turn: int) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        numbers = torch.zeros(len(_PROBES)) if arg in zeros else torch.tensor(_PROBES).roll(turn)
        dtype = arg.meta["val"].dtype
        return numbers > 0 if dtype == torch.bool else numbers.to(dtype)

    args = [probe(arg, turn) for turn, arg in enumerate(call.node.args)]
    kwargs = {key: probe(arg, turn + 7) for turn, (key, arg) in enumerate(call.node.kwargs.items())}
    return not bool(call.target(*args, **kwargs).any())


def over_pixels(call: Call) -> Any:
    """Pass on channels of which pixels are pooled or resampled."""
    (value,) = call.labelled
    before, after = shape_of(call.given), call.shape
    if any(size > 1 and before[axis] != after[axis] for axis, size in enumerate(value.labels.shape)):
        return call.refuse("works on channels")
    return [value, None] if "indices" in call.operator else value


def reduction(call: Call) -> Any:
    """Pass on channels of which pixels are reduced; keep those that are reduced themselves."""
    (value,) = call.labelled
    rank, dims = len(shape_of(call.given)), call.arg("dim")
    dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    if any(value.labels.shape[dim] > 1 for dim in dims):
        return call.keep(f"{call.operator} {call.where} runs over them")
    kept = len(call.shape) == rank
    labels = value.labels if kept else value.labels.squeeze([dim % rank for dim in dims])
    found = Value(labels, None if call.operator == "std" else value.silencers)
    return [found, None] if isinstance(call.node.meta["val"], tuple | list) else found


def mixing(call: Call) -> Value | None:
    """Keep channels that are mixed by what is no layer."""
    return call.keep(f"{call.operator} {call.where} mixes them")
