"""Export a model, and run its graph on labels."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, fx, nn

from .arithmetic import mixing, over_pixels, pointwise, reduction
from .call import Call, each
from .graph import Channels, Graph
from .layers import batch_norm, convolution, group_norm, layer_norm, linear, norm, prelu
from .moves import MOVES, SPLITS, cat, move, pad, pixels, reorder, split

Rule = Callable[[Call], Any]
"""Returns the value of a call: a Value, a list of such, or None if it has no channels."""

_LAYERS: dict[str, Rule] = {
    **{f"conv{transpose}{dims}d": convolution for transpose in ("", "_transpose") for dims in (1, 2, 3)},
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": norm,
}
_OTHERS: dict[str, Rule] = {
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "prelu": prelu,
    **dict.fromkeys(("dropout", "feature_dropout", "hardswish"), pointwise),  # which lack torch's tag
    **dict.fromkeys(MOVES, move),
    **dict.fromkeys(SPLITS, split),
    "cat": cat,
    **dict.fromkeys(("roll", "flip"), reorder),
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), pixels),
    **dict.fromkeys(
        ("to", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "type_as"),
        lambda call: call.value(call.given),
    ),
    **dict.fromkeys(
        ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm"),
        reduction,
    ),
    **dict.fromkeys(
        (
            *("softmax", "_softmax", "log_softmax", "scaled_dot_product_attention", "cumsum", "topk", "sort"),
            *("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "rms_norm", "glu"),
        ),
        mixing,
    ),
}
_OVER_PIXELS = ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool", "upsample_", "lp_pool")


def traced(model: nn.Module, inputs: tuple[Any, ...], ignore: Sequence[str]) -> Channels:
    """Return the channels of a model: in evaluation mode and, if it then has more layers, in training mode too.

    Raises:
        ValueError: the model cannot be exported, an operator on the path of channels is not understood, or `ignore`
            names no module.
    """
    paths = [path for path, _ in model.named_modules()]
    for pattern in ignore:
        if not any(fnmatch(path, pattern) for path in paths):
            raise ValueError(f"ignore={pattern!r} is no module of the model")
    graph = Graph(model, ignore)
    modes = {module: module.training for module in model.modules()}
    try:
        for training in (False, True):
            model.train(training)
            _run(graph, _exported(model, inputs))
            if graph.knows_all_layers():
                break
    finally:
        for module, mode in modes.items():
            module.training = mode
    return graph.resolve()


def _exported(model: nn.Module, inputs: tuple[Any, ...]) -> torch.export.ExportedProgram:
    try:
        with torch.random.fork_rng(devices=[]):
            return torch.export.export(model, inputs)
    except Exception as error:  # torch's, or the model's own, of any kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        mode = "training" if model.training else "evaluation"
        raise ValueError(
            f"the model cannot be exported in {mode} mode, so its channels are unknown: {reason}"
        ) from error


def _run(graph: Graph, exported: torch.export.ExportedProgram) -> None:
    """Run an exported graph on labels.

    Raises:
        ValueError: an operator on the path of channels is not understood.
    """
    signature, values = exported.graph_signature, dict[fx.Node, Any]()
    tensors = graph.names_of({**signature.inputs_to_parameters, **signature.inputs_to_buffers})
    known, count, run = {layer.weight for layer in graph.layers}, len(graph.layers), len(graph.flow)
    for node in exported.graph.nodes:
        if node.name in signature.user_inputs and isinstance(node.meta.get("val"), Tensor):
            graph.batch = max(1, *node.meta["val"].shape[:1], graph.batch)
        if node.op == "call_function":
            values[node] = _value(graph, node, values, tensors)
        elif node.op == "output":
            for source in node.all_input_nodes:
                for value in each(values.get(source)):
                    graph.lock(value.labels, "it is an output of the model")
        labels = [value.labels.flatten() for value in each(values.get(node))]
        passing = torch.cat(labels).unique() if labels else torch.tensor([], dtype=torch.int64)
        graph.flow.append((f"{run}:{node.name}", [f"{run}:{source.name}" for source in node.all_input_nodes], passing))
        if node.op == "output" or node.name in signature.user_inputs:
            graph.ends[node.op == "output"].add(f"{run}:{node.name}")
    graph.layers[count:] = [layer for layer in graph.layers[count:] if layer.weight not in known]
    graph.check()


def _value(graph: Graph, node: fx.Node, values: dict[fx.Node, Any], tensors: Mapping[str, str]) -> Any:
    """Return the value of a node; of an operation in place its first argument's too."""
    if not isinstance(node.target, torch._ops.OpOverload):  # operator.getitem is the only other one
        source = values.get(node.args[0])  # type: ignore[arg-type]
        return source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
    call = Call(graph, node, values, tensors)
    found = _rule(call)(call)
    if node.target._schema.name.endswith("_") and isinstance(node.args[0], fx.Node):
        values[node.args[0]] = found
    return found


def _rule(call: Call) -> Rule:
    """Return what a call does to labels."""
    operator = call.operator
    if operator in _LAYERS:
        return _LAYERS[operator]
    if not call.labelled and operator not in (*MOVES, *SPLITS, "cat"):
        return lambda call: call.keep_tensors(f"{call.operator} {call.where} takes it")
    if torch.Tag.pointwise in call.target.tags or call.target._overloadname == "other":  # max and min of two
        return pointwise
    if operator.startswith(_OVER_PIXELS):
        return over_pixels
    return _OTHERS.get(operator, Call.refuse)
