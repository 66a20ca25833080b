"""What operators that move data do to labels: the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .call import Call, shape_of
from .graph import Padding
from .labels import LOCKED, Value, compressed, silencers_of_all

RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten")
MOVES = (
    *RESHAPES,
    *("permute", "transpose", "t", "movedim", "swapaxes", "squeeze", "unsqueeze", "expand", "expand_as", "repeat"),
    *("slice", "select", "narrow", "unbind"),
)
SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_PARTS = ("slice", "select", "narrow")


def move(call: Call) -> Any:
    """Let the operator do to the labels what it does to the data."""
    value = call.value(call.given) or call.value_of_tensor(call.given)
    if value is None:
        return call.keep_tensors(f"{call.operator} {call.where} moves it")
    before = value.labels.expand(shape_of(call.given))
    if call.operator in RESHAPES:
        before = before.contiguous()
    if call.operator == "expand_as":
        after: Any = before.expand(call.shape)
    else:
        after = call.target(before, *call.node.args[1:], **call.node.kwargs)
    if call.operator == "unbind":
        if value.labels.shape[call.arg("dim")] > 1:
            return call.keep(f"unbind {call.where} takes them apart")
        return [Value(compressed(part), value.silencers) for part in after]
    after = compressed(after)
    if call.operator in RESHAPES:
        after = _rows_alike(call, after)
    elif call.operator in _PARTS and after.unique().numel() < value.labels.unique().numel():
        return call.keep(f"{call.operator} {call.where} takes some of them")
    return Value(after, value.silencers)


def _rows_alike(call: Call, labels: Tensor) -> Tensor:
    """Tie channels that a reshape puts into rows: of each row the same stay, so that rows stay equally long."""
    axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
    for axis in axes[:-1]:
        first = labels.narrow(axis, 0, 1)
        call.graph.tie(labels, first)
        labels = first
    return labels


def split(call: Call) -> Any:
    """Split labels as the data; along channels only into equal parts, of which the same channels stay."""
    value = call.value(call.given) or call.value_of_tensor(call.given)
    if value is None:
        return call.keep_tensors(f"{call.operator} {call.where} takes it apart")
    parts = call.target(value.labels.expand(shape_of(call.given)), *call.node.args[1:], **call.node.kwargs)
    if value.labels.shape[call.arg("dim", 0)] > 1:
        if len({part.shape for part in parts}) > 1:
            call.keep(f"{call.operator} {call.where} takes parts of unequal size")
            return [None] * len(parts)
        for part in parts[1:]:
            call.graph.tie(part, parts[0])
    return [Value(compressed(part), value.silencers) for part in parts]


def cat(call: Call) -> Value | None:
    """Join labels as the data; entries of a tensor without channels must stay."""
    nodes: Sequence[fx.Node] = call.given
    axis = call.arg("dim") % len(call.shape)
    values = [call.value(node) or call.value_of_tensor(node) for node in nodes]
    known = [value for value in values if value is not None]
    if not known:
        return call.keep_tensors(f"cat {call.where} joins it with a tensor that has no channels")
    silencers = silencers_of_all([value.silencers for value in known])
    if any(value.labels.shape[axis] > 1 for value in known):
        labels = [
            torch.tensor(LOCKED).expand(shape_of(node)) if value is None else value.labels.expand(shape_of(node))
            for node, value in zip(nodes, values, strict=True)
        ]
        return Value(compressed(torch.cat(labels, axis)), silencers)
    if None in values:
        return call.keep(f"cat {call.where} joins them with a tensor that has no channels")
    for value in known:
        if value.labels.shape != known[0].labels.shape:
            return call.keep(f"cat {call.where} joins different axes")
        call.graph.tie(value.labels, known[0].labels)
    return Value(known[0].labels, silencers)


def reorder(call: Call) -> Value | None:
    """Pass on channels of which pixels are flipped or rolled, and refuse those that are themselves."""
    (value,) = call.labelled
    dims = call.arg("dims") or range(value.labels.ndim)
    if any(value.labels.shape[dim] > 1 for dim in dims):
        return call.refuse("changes the order of channels")
    return value


def pad(call: Call) -> Value | None:
    """Pass channels on through padding of pixels; channels of zeros get labels of their own."""
    (value,) = call.labelled
    amounts = list(call.arg("pad"))
    zeros = call.operator == "constant_pad_nd" or call.arg("mode") == "constant"
    zeros = zeros and not call.arg("value")
    changed = [
        axis
        for axis, size in enumerate(value.labels.shape)
        if size > 1 and shape_of(call.given)[axis] != call.shape[axis]
    ]
    if not changed:
        constant = call.arg("mode", "constant") == "constant"
        return Value(value.labels, value.silencers if zeros or not constant else None)
    (axis, *more), rank = changed, len(call.shape)
    place = 2 * (rank - axis - 1)
    if more or not zeros or tuple(getattr(call.graph.module(call.module), "padding", ())) != tuple(amounts):
        return call.keep(f"{call.where} a fixed number of channels is added: use a module like torch.nn.ZeroPad3d")
    left, right = (call.graph.fresh(amount) for amount in amounts[place : place + 2])
    call.graph.paddings.append(Padding(call.module, place, (left, right)))
    return Value(call.spread(torch.cat([left, value.labels.reshape(-1), right]), axis), value.silencers)


def pixels(call: Call) -> Value | None:
    """Pass on channels that become pixels of one, of which all stay or go, or the other way round."""
    (value,) = call.labelled
    labels = call.along(value, -3, shape_of(call.given)[-3])
    if labels is None:
        return call.refuse()
    if call.operator == "pixel_unshuffle":
        square = int(call.arg("downscale_factor")) ** 2
        return Value(call.spread(labels.repeat_interleave(square), -3), value.silencers)
    rows = call.tie_groups(labels, len(labels) // int(call.arg("upscale_factor")) ** 2)
    return Value(call.spread(rows[:, 0].contiguous(), -3), value.silencers)
