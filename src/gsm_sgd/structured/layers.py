"""What layers and norms do to labels: they read channels, make new ones, or treat each by itself."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .call import Call, shape_of
from .graph import Layer
from .labels import LOCKED, Value, silencers_of_all


def convolution(call: Call) -> Value | None:
    """Read channels along the axis before the spatial ones."""
    axis, transposed = 1 - len(shape_of(call.arg("weight"))), "transpose" in call.operator
    sites = _sites(call, shape_of(call.given) if transposed else call.shape, axis)
    return _layer(call, axis, transposed, call.arg("groups", 1), sites)


def linear(call: Call) -> Value | None:
    """Read channels along the last axis."""
    return _layer(call, -1, False, 1, _sites(call, call.shape, -1))


def batch_norm(call: Call) -> Value | None:
    """Note the norm that alone reads what a layer gives: it goes with the layer when a branch vanishes."""
    weight, made_by = call.tensor(call.arg("weight")), call.graph.made.get(call.given)
    running = call.tensor(call.arg("running_mean"))
    if weight is not None and running is not None and made_by is not None and len(call.given.users) == 1:
        call.graph.norms[made_by] = weight
    return norm(call)


def norm(call: Call) -> Value | None:
    """Pass on the channels of a norm that treats each by itself; its gamma and beta silence them."""
    value, graph = call.value(call.given), call.graph
    labels = None if value is None else call.along(value, 1, shape_of(call.given)[1])
    if labels is None:
        return call.keep(f"the norm {call.module} reads another axis")
    arguments = [call.arg(name) for name in ("weight", "bias", "running_mean", "running_var")]
    names = [call.tensor(argument) for argument in arguments]
    for name in filter(None, names):
        graph.slot(name, 0, labels)
    if any(argument is not None and name is None for argument, name in zip(arguments, names, strict=True)):
        graph.lock(labels, f"a weight of {call.module} is computed")
    own = [name for name in names[:2] if name is not None]
    return Value(call.spread(labels, 1), graph.silencers(own) if names[0] else None)


def group_norm(call: Call) -> Value | None:
    """Tie the channels of each group, over which the norm averages."""
    value = call.value(call.given)
    labels = None if value is None else call.along(value, 1, shape_of(call.given)[1])
    if labels is not None:
        call.tie_groups(labels, call.arg("num_groups"))
    return norm(call)


def layer_norm(call: Call) -> Value | None:
    """Keep channels that the norm averages over; pass on those that it treats each by itself."""
    (value,) = call.labelled
    normalized = len(call.arg("normalized_shape"))
    if all(size == 1 for size in value.labels.shape[-normalized:]):
        return Value(value.labels, None)
    return call.keep(f"the layer norm {call.module} averages over them")


def prelu(call: Call) -> Value | None:
    """Pass channels on; each may have a slope of its own."""
    value, weight = call.value(call.given), call.tensor(call.arg("weight"))
    if value is None or weight is None:
        return call.refuse()
    if shape_of(call.arg("weight")) != (1,):
        labels = call.along(value, 1, shape_of(call.given)[1])
        if labels is None:
            return call.refuse()
        call.graph.slot(weight, 0, labels)
    return value


def _sites(call: Call, shape: Sequence[int], channels: int) -> int:
    """Return at how many places a layer is evaluated for one image."""
    sizes = list(shape)
    del sizes[channels]
    return prod(sizes) // call.graph.batch


def _layer(call: Call, axis: int, transposed: bool, groups: int, sites: int) -> Value | None:
    """Note a layer that reads channels along an axis, and return its outputs."""
    graph, weight, value = call.graph, call.tensor(call.arg("weight")), call.value(call.given)
    if weight is None:
        return call.keep(f"the weight of a layer {call.where} is computed")
    size = shape_of(call.given)[axis]
    reads = None if value is None else call.along(value, axis, size)
    if reads is None:
        reads = torch.full((size,), LOCKED)
        if value is not None:
            graph.lock(value.labels, f"the layer {call.module} reads another axis")
    each = prod(shape_of(call.arg("weight"))[2:])  # weights, for a pair of channels
    out = 1 if transposed and groups == 1 else 0
    if groups == 1:
        inputs, outputs = graph.slot(weight, 1 - out, reads), graph.slot(weight, out)
        silencers = None if value is None else value.silencers
        if silencers is None:
            graph.lock(reads, f"nothing makes what {call.module} reads zero")
        graph.reads.append(Value(reads, silencers))
        layer = Layer(weight, inputs, outputs, each * sites, each)
    else:
        outputs = _grouped(call, weight, reads, transposed, groups)
        each *= size // groups
        layer = Layer(weight, None, outputs, each * sites, each)
    graph.layers.append(layer)
    graph.made[call.node] = weight
    if graph.is_ignored(call.module):
        graph.lock(outputs, "it is ignored")
    return Value(call.spread(outputs, axis), _silencers(call, weight, outputs, out))


def _grouped(call: Call, weight: str, reads: Tensor, transposed: bool, groups: int) -> Tensor:
    """Tie inputs and outputs of each group, which stay or go together, and return the outputs' labels."""
    rows = call.tie_groups(reads, groups)
    if transposed:  # the weight has all inputs, and the outputs of one group
        call.graph.slot(weight, 0, reads)
        return rows[:, :1].expand(groups, shape_of(call.arg("weight"))[1]).reshape(-1)
    outputs = call.graph.slot(weight, 0)
    call.graph.tie(outputs.view(groups, -1), rows[:, :1])
    return outputs


def _silencers(call: Call, weight: str, outputs: Tensor, dim: int) -> frozenset[str] | None:
    """Return what silences the outputs of a layer: its filters and, if it has one, its bias."""
    graph, bias = call.graph, call.arg("bias")
    if bias is None:
        return graph.silencers([weight], dim)
    if (name := call.tensor(bias)) is None:
        graph.lock(outputs, f"the bias of {call.module} is computed")
        return None
    graph.slot(name, 0, outputs)
    return silencers_of_all([graph.silencers([weight], dim), graph.silencers([name])])
