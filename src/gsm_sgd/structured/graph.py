"""Which entries of which tensors belong to the same channel?

The model is exported with torch.export, and its graph is run on labels instead of numbers: each entry of a tensor
carries the label of the channel it belongs to. Data movement is done to labels by the very operators that move the
data. Where two tensors are added or multiplied their labels are tied: they are one channel from then on.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

LOCKED = 0
"""The label of entries that must stay."""
STAYS = -1
"""The unit of such entries."""

_MOVES = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "movedim", "swapaxes"),
    *("squeeze", "unsqueeze", "expand", "expand_as", "repeat", "slice", "select", "narrow", "unbind"),
}
_RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten"}
_SPLITS = {"chunk", "split", "split_with_sizes", "tensor_split"}
_COPIES = {"to", "_to_copy", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "type_as"}
_POINTWISE = {"dropout", "feature_dropout", "hardswish"}  # that lack torch's tag
_REDUCTIONS = {"mean", "sum", "amax", "amin", "max", "min", "var", "std", "linalg_vector_norm"}
_SPATIAL = (
    "roll",
    "flip",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "avg_pool",
    "max_pool",
    "upsample_",
    "lp_pool",
    "pad",
)
_MIXERS = {
    *("softmax", "_softmax", "log_softmax", "scaled_dot_product_attention", "cumsum", "topk", "sort"),
    *("matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "rms_norm", "glu"),
}
_CONVOLUTIONS = {f"conv{transpose}{dims}d" for transpose in ("", "_transpose") for dims in (1, 2, 3)}
_PROBES = (0.7, -1.3, 2.1, -0.4)  # numbers that an operator is tried on


class Value(NamedTuple):
    """What is known of a tensor in the graph.

    Attributes:
        labels: of its entries, of a shape that broadcasts to the tensor's.
        silencers: names of the parameters that make a channel zero here when its entries in them are zero; None if
            nothing does.
    """

    labels: Tensor
    silencers: frozenset[str] | None


class Layer(NamedTuple):
    """A convolution or linear layer as the graph calls it.

    Attributes:
        weight: the name of its weight.
        inputs: labels of its input channels; None if it is grouped, and each output has as many inputs as ever.
        outputs: labels of its output channels.
        macs: multiplications and additions for one image and one pair of input and output channel; of a grouped layer
            for one output channel.
        weights: elements of the weight for the same.
    """

    weight: str
    inputs: Tensor | None
    outputs: Tensor
    macs: int
    weights: int


class Padding(NamedTuple):
    """Channels of zeros that a padding module adds on both sides of its input's."""

    module: str
    place: int  # in the module's `padding`
    labels: tuple[Tensor, Tensor]


class Channels(NamedTuple):
    """The channels of a model: which entries of its tensors are kept or removed together, as a unit.

    Attributes:
        count: how many units there are, numbered from 0; entries of the unit `STAYS` are never removed.
        rows: of each parameter that can silence units, the dimension and the units along it. A unit is silent, and
            nothing reads anything else from it than zero, once all its entries there are zero.
        slots: units along dimensions of all tensors of the model: (name, dimension) -> units.
        layers: convolutions and linear layers in the order of their calls.
        paddings: channels of zeros that modules add.
        norms: the weight of the batch norm that alone reads what a layer gives, by the layer's weight.
        locked: why all outputs of a layer stay, by its weight.
        flow: the nodes of the graph in order: name, what they depend on, and the units that pass.
        ends: the nodes that are inputs of the model, and those that are outputs.
    """

    count: int
    rows: dict[str, tuple[int, Tensor]]
    slots: dict[tuple[str, int], Tensor]
    layers: list[Layer]
    paddings: list[Padding]
    norms: dict[str, str]
    locked: dict[str, str]
    flow: list[tuple[str, list[str], Tensor]]
    ends: tuple[set[str], set[str]]


class Graph:
    """The labels of all tensors of a model, and what its layers do with them.

    Attributes:
        slots: labels of (tensor name, dimension).
        layers: each call of a convolution or linear layer.
        reads: what layers take as input, with what silences it.
        paddings: channels of zeros that modules add.
        norms: the weight of the batch norm that alone reads what a layer gives, by the layer's weight.
        silences: the dimension along which parameters hold channels that their zeros silence.
        tensors: parameters and buffers by name.
        flow: the nodes in order: name, the names of the nodes that it depends on, and the labels of its values.
    """

    def __init__(self, model: nn.Module, ignore: Sequence[str]) -> None:
        self._model, self._ignore = model, ignore
        self._parents = [LOCKED]
        self._locks = [(torch.tensor([LOCKED]), "it meets what has no channels")]
        self._unknown: list[tuple[Tensor, str]] = []
        self.slots: dict[tuple[str, int], Tensor] = {}
        self.layers: list[Layer] = []
        self.reads: list[Value] = []
        self.paddings: list[Padding] = []
        self.norms: dict[str, str] = {}
        self.flow: list[tuple[str, list[str], Tensor]] = []
        self._ends: tuple[set[str], set[str]] = (set(), set())
        self._runs, self._earlier, self.batch = 0, set[str](), 1
        self.made: dict[fx.Node, str] = {}  # by which layer's weight
        self.silences: dict[str, int] = {}
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    # --- labels ---

    def fresh(self, count: int) -> Tensor:
        """Return new labels."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, label: int) -> int:
        """Return the label that stands for all that this one is tied to."""
        parents = self._parents
        while parents[label] != label:
            parents[label] = parents[parents[label]]
            label = parents[label]
        return label

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Make each entry's labels in two tensors one."""
        pairs = torch.stack(torch.broadcast_tensors(one, other)).flatten(1).unique(dim=1)
        for a, b in pairs.T.tolist():
            low, high = sorted((self.root(a), self.root(b)))
            self._parents[high] = low  # the locked label is the lowest

    def lock(self, labels: Tensor, reason: str) -> None:
        """Keep channels, for a reason."""
        self._locks.append((labels.unique(), reason))

    def slot(self, name: str, dim: int, labels: Tensor | None = None) -> Tensor:
        """Return the labels along a dimension of a tensor of the model, tied to these if they are given."""
        if (name, dim) not in self.slots:
            size = self.tensors[name].shape[dim]
            self.slots[name, dim] = self.fresh(size) if labels is None else labels.reshape(-1)
        elif labels is not None:
            self.tie(self.slots[name, dim], labels.reshape(-1))
        return self.slots[name, dim]

    def _reasons(self) -> dict[int, str]:
        """Return why channels are locked, by the labels that stand for them."""
        reasons: dict[int, str] = {}
        for labels, reason in self._locks:
            for label in labels.tolist():
                reasons.setdefault(self.root(label), reason)
        return reasons

    # --- running the graph ---

    def run(self, graph: fx.Graph, names: Mapping[str, str]) -> None:
        """Run an exported graph on labels.

        Args:
            graph: of ATen operators.
            names: the names of the model's tensors by those of their placeholders.

        Raises:
            ValueError: an operator on the path of channels is not understood.
        """
        values: dict[fx.Node, Any] = {}
        first = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        every = {**dict(self._model.named_parameters(remove_duplicate=False)), **self.tensors}
        names = {placeholder: first[id(every[name])] for placeholder, name in names.items()}
        self._earlier = {layer.weight for layer in self.layers}
        for node in graph.nodes:
            if node.op == "placeholder" and node.name not in names and isinstance(node.meta.get("val"), Tensor):
                self.batch = max(1, *node.meta["val"].shape[:1])
            call = Call(self, node, values, names)
            if node.op == "call_function":
                values[node] = call.run()
            elif node.op == "output":
                for value in call.labelled:
                    self.lock(value.labels, "it is an output of the model")
            mine = [value.labels for value in _each(values.get(node))]
            labels = (
                torch.cat([labels.flatten().unique() for labels in mine])
                if mine
                else torch.tensor([], dtype=torch.int64)
            )
            sources = [f"{self._runs}:{source.name}" for source in node.all_input_nodes]
            self.flow.append((f"{self._runs}:{node.name}", sources, labels))
            if node.op == "output" or (node.op == "placeholder" and node.name not in names):
                self._ends[node.op == "output"].add(f"{self._runs}:{node.name}")
        self._runs += 1
        locked = self._reasons()
        for labels, problem in self._unknown:
            if any(self.root(label) not in locked for label in labels.flatten().tolist()):
                raise ValueError(f"{problem}: leave the layers before it out with ignore=")

    def add_layer(self, layer: Layer) -> None:
        """Note a call of a layer, unless another run of the graph has."""
        if layer.weight not in self._earlier:
            self.layers.append(layer)

    def knows_all_layers(self) -> bool:
        """Return whether each parameter with channels has been met."""
        known = {name for name, _ in self.slots}
        return all(tensor.ndim < 2 or name in known for name, tensor in self.tensors.items())

    def refuse(self, labels: Tensor, problem: str) -> None:
        """Note a problem with channels, which is none if they turn out to be locked."""
        self._unknown.append((labels, problem))

    def is_ignored(self, module: str) -> bool:
        """Return whether a module, or one that it is in, is to be left out."""
        parts = module.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatch(path, pattern) for path in paths for pattern in self._ignore)

    def module(self, path: str) -> nn.Module:
        """Return a module by its path."""
        return self._model.get_submodule(path)

    def resolve(self) -> "Channels":
        """Return what has been found, in units instead of labels."""
        reasons = self._reasons()
        root_of = torch.tensor([self.root(label) for label in range(len(self._parents))])
        governed: dict[str, Tensor] = {}
        for labels, silencers in self.reads:
            read = torch.zeros(len(root_of), dtype=torch.bool)
            read[root_of[labels]] = True
            for name in silencers or ():
                governed[name] = governed.get(name, read) | read
        silent = torch.zeros(len(root_of), dtype=torch.bool)
        for name, read in governed.items():
            mine = root_of[self.slots[name, self.silences[name]]]
            silent[mine[read[mine]]] = True
        silent[list(reasons)] = False
        unit_of_root = torch.where(silent, silent.cumsum(0) - 1, STAYS)

        def units(labels: Tensor) -> Tensor:
            return unit_of_root[root_of[labels]]

        rows = {}
        for name in self.tensors:
            if name in governed:
                dim = self.silences[name]
                roots = root_of[self.slots[name, dim]]
                mine = torch.where(governed[name][roots], unit_of_root[roots], STAYS)
                if (mine != STAYS).any():
                    rows[name] = (dim, mine)
        return Channels(
            count=int(silent.sum()),
            rows=rows,
            slots={slot: units(labels) for slot, labels in self.slots.items()},
            layers=[
                layer._replace(
                    inputs=None if layer.inputs is None else units(layer.inputs), outputs=units(layer.outputs)
                )
                for layer in self.layers
            ],
            paddings=[pad._replace(labels=(units(pad.labels[0]), units(pad.labels[1]))) for pad in self.paddings],
            norms=self.norms,
            locked={
                layer.weight: reasons.get(self.root(int(layer.outputs[0])), "nothing reads it")
                for layer in self.layers
                if (units(layer.outputs) == STAYS).all()
            },
            flow=[(name, sources, units(labels).unique()) for name, sources, labels in self.flow],
            ends=self._ends,
        )


class Call:
    """A node of the graph: an operator that is called with values."""

    def __init__(self, graph: Graph, node: fx.Node, values: dict[fx.Node, Any], names: Mapping[str, str]) -> None:
        self._graph, self._node, self._values, self._names = graph, node, values, names
        self.labelled = [value for source in node.all_input_nodes for value in _each(values.get(source))]
        stack = list(node.meta.get("nn_module_stack", {}).values())
        self._module: str = stack[-1][0] if stack else ""

    def run(self) -> Any:
        """Return the value of the node: a Value, a list of such, or None if it has no channels."""
        target, args = self._node.target, self._node.args
        if not isinstance(target, torch._ops.OpOverload):  # operator.getitem is the only other one
            source = self._values.get(args[0])  # type: ignore[arg-type]
            return source[args[1]] if isinstance(source, list) else source
        operator = target._schema.name.rpartition("::")[2]
        in_place = operator.endswith("_")
        found = self._call(operator.rstrip("_") if in_place else operator, target)
        if in_place and isinstance(args[0], fx.Node):
            self._values[args[0]] = found
        return found

    def _call(self, operator: str, target: torch._ops.OpOverload) -> Any:
        if operator in _CONVOLUTIONS:
            return self._convolution("transpose" in operator)
        if operator == "linear":
            return self._linear()
        if operator == "batch_norm" or operator == "instance_norm":
            return self._norm(self._arg(1), self._arg(2), [self._arg(3), self._arg(4)])
        moved = operator in _MOVES or operator in _SPLITS
        if not self.labelled and not (moved and self._tensor_name(self._node.args[0])):
            return None
        if operator == "group_norm":
            return self._group_norm()
        if operator == "layer_norm":
            return self._layer_norm()
        if operator == "prelu":
            return self._prelu()
        if operator in _SPLITS:
            return self._split(operator, target)
        if moved:
            return self._move(operator, target)
        if operator == "cat":
            return self._cat()
        if operator in _COPIES:
            return self.labelled[0]
        if torch.Tag.pointwise in target.tags or operator in _POINTWISE:
            return self._pointwise(target)
        if operator.startswith(_SPATIAL):
            return self._spatial(operator)
        if operator in _REDUCTIONS:
            return self._reduce(operator)
        if operator in ("pixel_shuffle", "pixel_unshuffle"):
            return self._pixels(operator)
        return self._mix(f"{operator} mixes them") if operator in _MIXERS else self._refuse(operator)

    # --- arguments ---

    def _arg(self, place: int, default: Any = None) -> Any:
        """Return an argument of the operator, by its place in the operator's schema."""
        if place < len(self._node.args):
            return self._node.args[place]
        schema = self._node.target._schema.arguments[place]  # type: ignore[union-attr]
        return self._node.kwargs.get(schema.name, schema.default_value if schema.has_default_value() else default)

    def _tensor_name(self, arg: Any) -> str | None:
        """Return the name of the model's tensor that an argument is, if it is one."""
        return self._names.get(arg.name) if isinstance(arg, fx.Node) else None

    def _value(self, arg: Any) -> Value | None:
        return self._values.get(arg) if isinstance(arg, fx.Node) else None

    def _shape(self, arg: Any = None) -> tuple[int, ...]:
        shape: tuple[int, ...] = tuple((self._node if arg is None else arg).meta["val"].shape)
        return shape

    @property
    def _where(self) -> str:
        return f"in {self._module}" if self._module else "in the model's forward"

    # --- layers ---

    def _convolution(self, transposed: bool) -> Any:
        shape = self._shape(self._arg(1))
        sites = self._sites(self._arg(0) if transposed else self._node, channels=1 - len(shape))
        return self._layer(1 - len(shape), transposed, self._arg(6, 1), sites)

    def _linear(self) -> Any:
        return self._layer(-1, False, 1, self._sites(self._node, channels=-1))

    def _sites(self, node: fx.Node, channels: int) -> int:
        """Return at how many places a layer is evaluated for one image."""
        shape = list(self._shape(node))
        del shape[channels]
        return prod(shape) // self._graph.batch

    def _layer(self, axis: int, transposed: bool, groups: int, sites: int) -> Any:
        """Note a layer that reads channels along an axis, and return its outputs."""
        graph, (given, weight_node, bias) = self._graph, (self._arg(place) for place in range(3))
        weight, value = self._tensor_name(weight_node), self._value(given)
        if weight is None:
            return self._mix(f"the weight of a layer {self._where} is computed")
        reads = None if value is None else self._along(value, axis, self._shape(given)[axis])
        if reads is None:
            self._mix(f"the layer {self._module} reads another axis")
            reads = torch.full((self._shape(given)[axis],), LOCKED)
        shape = self._shape(weight_node)
        kernel = prod(shape[2:])
        if groups == 1:
            inputs = graph.slot(weight, 0 if transposed else 1, reads)
            outputs = graph.slot(weight, 1 if transposed else 0)
            graph.silences[weight] = 1 if transposed else 0
            silencers = None if value is None else value.silencers
            graph.reads.append(Value(reads, silencers))
            if silencers is None:
                graph.lock(reads, f"nothing makes what {self._module} reads zero")
            graph.add_layer(Layer(weight, inputs, outputs, kernel * sites, kernel))
        else:
            outputs = self._grouped(weight, reads, transposed, groups, shape)
            graph.silences[weight] = 0
            kernel *= len(reads) // groups
            graph.add_layer(Layer(weight, None, outputs, kernel * sites, kernel))
        if graph.is_ignored(self._module):
            graph.lock(outputs, "it is ignored")
        graph.made[self._node] = weight
        own = [weight]
        if (name := self._tensor_name(bias)) is not None:
            graph.slot(name, 0, outputs)
            graph.silences[name] = 0
            own.append(name)
        elif bias is not None:
            graph.lock(outputs, f"the bias of {self._module} is computed")
        return Value(self._spread(outputs, axis), self._trained(own))

    def _grouped(self, weight: str, reads: Tensor, transposed: bool, groups: int, shape: Sequence[int]) -> Tensor:
        """Tie the inputs and outputs of each group, which stay or go together, and return the outputs' labels."""
        graph, inputs = self._graph, reads.reshape(groups, -1)
        graph.tie(inputs, inputs[:, :1])
        if transposed:  # the weight has all inputs, and one group's outputs
            graph.slot(weight, 0, reads)
            return inputs[:, :1].expand(groups, shape[1]).reshape(-1)
        outputs = graph.slot(weight, 0)
        graph.tie(outputs.view(groups, -1), inputs[:, :1])
        return outputs

    def _norm(self, weight: Any, bias: Any, buffers: Sequence[Any]) -> Any:
        """Note a norm that treats each channel by itself."""
        given = self._node.args[0]
        value, graph = self._value(given), self._graph
        if value is None:
            return None
        labels = self._along(value, 1, self._shape(given)[1])
        if labels is None:
            return self._mix(f"a norm {self._where} reads another axis")
        names = [self._tensor_name(tensor) for tensor in (weight, bias, *buffers)]
        for name in filter(None, names):
            graph.slot(name, 0, labels)
        made_by = graph.made.get(given)
        if names[0] is not None and made_by is not None and len(given.users) == 1:
            graph.norms[made_by] = names[0]
        own = [name for name in names[:2] if name is not None]
        graph.silences.update(dict.fromkeys(own, 0))
        return Value(self._spread(labels, 1), self._trained(own) if names[0] else None)

    def _group_norm(self) -> Any:
        given, groups = self._node.args[:2]
        value = self._value(given)
        labels = self._along(value, 1, self._shape(given)[1]) if value else None
        if labels is not None:
            rows = labels.view(groups, -1)  # type: ignore[arg-type]  # all channels of a group stay or go
            self._graph.tie(rows, rows[:, :1])
        return self._norm(self._arg(2), self._arg(3), ())

    def _layer_norm(self) -> Any:
        value = self.labelled[0]
        normalized = len(self._arg(1))
        if all(size == 1 for size in value.labels.shape[-normalized:]):
            return Value(value.labels, None)
        return self._mix(f"the layer norm {self._module} averages over them")

    def _prelu(self) -> Any:
        value, weight = self._value(self._arg(0)), self._tensor_name(self._arg(1))
        if value is None or weight is None:
            return self._refuse("prelu")
        if self._shape(self._arg(1)) != (1,):
            labels = self._along(value, 1, self._shape(self._arg(0))[1])
            if labels is None:
                return self._refuse("prelu")
            self._graph.slot(weight, 0, labels)
        return value

    # --- operators that move data ---

    def _move(self, operator: str, target: torch._ops.OpOverload) -> Any:
        """Do to the labels what the operator does to the data."""
        given, *rest = self._node.args
        value = self._value(given) or self._of_tensor(given)
        if value is None:
            return None
        before = value.labels.expand(self._shape(given))
        if operator in _RESHAPES:
            before = before.contiguous()
        rest = [self._shape(arg) if isinstance(arg, fx.Node) else arg for arg in rest]
        if operator == "expand_as":
            after: Any = before.expand(*rest)
        else:
            after = target(before, *rest, **self._node.kwargs)
        if isinstance(after, list | tuple):  # unbind
            if value.labels.shape[self._arg(1, 0)] > 1:
                self._mix(f"{operator} {self._where} takes them apart")
            return [Value(_compressed(part), value.silencers) for part in after]
        after = _compressed(after)
        if operator in _RESHAPES:
            after = self._regular(after)
        elif operator in ("slice", "narrow", "select") and after.unique().numel() < value.labels.unique().numel():
            return self._mix(f"{operator} {self._where} takes some of them")
        return Value(after, value.silencers)

    def _regular(self, labels: Tensor) -> Tensor:
        """Tie channels that a reshape has put into rows: of each row the same stay, so that rows stay equally long."""
        axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
        for axis in axes[:-1] if len(axes) > 1 else []:
            self._graph.tie(labels, labels.narrow(axis, 0, 1))
            labels = labels.narrow(axis, 0, 1)
        return labels

    def _split(self, operator: str, target: torch._ops.OpOverload) -> Any:
        """Split labels as the data; along channels only into equal parts, of which the same channels stay."""
        given = self._node.args[0]
        value = self._value(given) or self._of_tensor(given)
        if value is None:
            return None
        parts = [_compressed(part) for part in target(value.labels.expand(self._shape(given)), *self._node.args[1:])]
        axis = self._arg(2, 0)
        if value.labels.shape[axis] > 1:
            if len({part.shape for part in self._node.meta["val"]}) > 1:
                self._mix(f"{operator} {self._where} takes parts of unequal size")
                return [None] * len(parts)
            for part in parts[1:]:
                self._graph.tie(part, parts[0])
        return [Value(part, value.silencers) for part in parts]

    def _cat(self) -> Any:
        """Join labels as the data; where tensors without channels come in between, channels there must stay."""
        nodes, axis = self._node.args[0], self._arg(1, 0)
        axis %= len(self._shape())
        values = [self._value(node) or self._of_tensor(node) for node in nodes]  # type: ignore[union-attr]
        shapes = [self._shape(node) for node in nodes]  # type: ignore[union-attr]
        along = [value is not None and value.labels.shape[axis] > 1 for value in values]
        silencers = _all_of([value.silencers for value in values if value is not None])
        if any(along):
            labels = [
                torch.full((1,) * len(shape), LOCKED).expand(shape) if value is None else value.labels.expand(shape)
                for value, shape in zip(values, shapes, strict=True)
            ]
            return Value(_compressed(torch.cat(labels, axis)), silencers)
        first = next(value for value in values if value is not None)
        if None in values:
            return self._mix(f"cat {self._where} joins them with a tensor of another kind")
        for value in values:
            assert value is not None
            if value.labels.shape != first.labels.shape:
                return self._mix(f"cat {self._where} joins different axes")
            self._graph.tie(value.labels, first.labels)
        return Value(first.labels, silencers)

    def _pixels(self, operator: str) -> Any:
        """Tie the channels that become pixels of one."""
        given, factor = self._node.args
        value = self.labelled[0]
        labels = self._along(value, -3, self._shape(given)[-3])
        if labels is None:
            return self._refuse(operator)
        square = int(factor) ** 2  # type: ignore[arg-type]
        if operator == "pixel_unshuffle":
            return Value(self._spread(labels.repeat_interleave(square), -3), value.silencers)
        rows = labels.view(-1, square)
        self._graph.tie(rows, rows[:, :1])
        return Value(self._spread(rows[:, 0].contiguous(), -3), value.silencers)

    # --- operators that compute ---

    def _pointwise(self, target: torch._ops.OpOverload) -> Any:
        """Tie the labels of the operands entry by entry."""
        nodes = [arg for arg in (*self._node.args, *self._node.kwargs.values()) if isinstance(arg, fx.Node)]
        values = {node: value for node in nodes if (value := self._value(node)) is not None}
        rank = len(self._shape())
        labels = max((_padded(value.labels, rank) for value in values.values()), key=Tensor.numel)
        axes = [axis for axis, size in enumerate(labels.shape) if size > 1]
        for node, value in values.items():
            theirs = _padded(value.labels, rank)
            sizes = (1,) * (rank - len(self._shape(node))) + self._shape(node)
            if theirs.numel() == 1 < labels.numel() and all(sizes[axis] == 1 for axis in axes):
                self._graph.lock(theirs, "it is a factor of all channels")
                continue
            if theirs.shape != labels.shape and theirs.numel() > 1:
                return self._mix(f"{self._node.target} {self._where} combines different axes")
            self._graph.tie(labels, theirs)
        for node in nodes:
            shape = (1,) * (rank - len(self._shape(node))) + self._shape(node)
            if node in values or all(shape[axis] == 1 for axis in axes):
                continue
            name = self._tensor_name(node)
            if name is None or len(axes) > 1:
                return self._mix(f"{self._node.target} {self._where} meets a tensor that has no channels")
            self._graph.slot(name, axes[0] - rank + len(self._shape(node)), labels.reshape(-1))
        return Value(labels, self._silencers(target, values))

    def _silencers(self, target: torch._ops.OpOverload, values: dict[fx.Node, Value]) -> frozenset[str] | None:
        """Return what makes the result zero, by trying: one operand that is zero, or all of them."""
        for node, value in values.items():
            if value.silencers is not None and self._is_zero(target, {node}):
                return value.silencers
        return _all_of([value.silencers for value in values.values()]) if self._is_zero(target, {*values}) else None

    def _is_zero(self, target: torch._ops.OpOverload, zeros: set[fx.Node]) -> bool:
        """Return whether the operator gives zero where some operands are zero, whatever the others are."""

        def probe(arg: Any, turn: int) -> Any:
            if not isinstance(arg, fx.Node):
                return arg
            numbers = torch.tensor(_PROBES).roll(turn)
            dtype = arg.meta["val"].dtype
            return torch.zeros(len(_PROBES)) if arg in zeros else numbers.to(dtype)

        args = [probe(arg, turn) for turn, arg in enumerate(self._node.args)]
        kwargs = {key: probe(arg, turn + 7) for turn, (key, arg) in enumerate(self._node.kwargs.items())}
        return not bool(target(*args, **kwargs).any())

    def _spatial(self, operator: str) -> Any:
        """Pass channels on through what works on pixels alone; padding may add channels of zeros."""
        value = self.labelled[0]
        before, after = self._shape(self._node.args[0]), self._shape()
        changed = [axis for axis in range(len(after)) if before[axis] != after[axis] and value.labels.shape[axis] > 1]
        if operator == "pad" and changed:
            return self._pad_channels(value, changed)
        if changed:
            return self._refuse(operator)
        filled = operator != "pad" or self._arg(2, "constant") != "constant" or not self._arg(3)
        found = Value(value.labels, value.silencers if filled else None)
        return [found, None] if "indices" in operator else found

    def _pad_channels(self, value: Value, axes: Sequence[int]) -> Any:
        """Give channels of zeros labels of their own, if a padding module of torch's adds them."""
        (axis, *more), amounts = axes, list(self._arg(1))
        place = 2 * (len(self._shape()) - axis - 1)
        module = self._graph.module(self._module)
        zeros = self._arg(2, "constant") == "constant" and not self._arg(3)
        if more or not zeros or tuple(getattr(module, "padding", ())) != tuple(amounts):
            return self._mix(f"{self._where} a fixed number of channels is added: use a module like torch.nn.ZeroPad3d")
        left, right = (self._graph.fresh(amount) for amount in amounts[place : place + 2])
        self._graph.paddings.append(Padding(self._module, place, (left, right)))
        labels = torch.cat([left, value.labels.reshape(-1), right])
        return Value(self._spread(labels, axis), value.silencers)

    def _reduce(self, operator: str) -> Any:
        """Reduce pixels, and keep what is reduced over channels."""
        value, given = self.labelled[0], self._node.args[0]
        rank = len(self._shape(given))
        dims = self._arg(1)
        dims = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        if any(value.labels.shape[dim] > 1 for dim in dims):
            return self._mix(f"{operator} {self._where} runs over them")
        kept = len(self._shape()) == rank
        labels = value.labels if kept else value.labels.squeeze([dim % rank for dim in dims])
        found = Value(labels, None if operator == "std" else value.silencers)
        return [found, None] if isinstance(self._node.meta["val"], tuple) else found

    # --- what is not understood ---

    def _mix(self, reason: str) -> None:
        """Keep all channels that come here."""
        for value in self.labelled:
            self._graph.lock(value.labels, reason)

    def _refuse(self, operator: str) -> None:
        problem = f"{operator} {self._where} is not understood, and channels pass through it"
        for value in self.labelled:
            self._graph.refuse(value.labels, problem)

    # --- labels ---

    def _of_tensor(self, arg: Any) -> Value | None:
        """Return labels of a parameter or buffer that has one dimension to have them, if an argument is such a one."""
        name = self._tensor_name(arg)
        wide = [dim for dim, size in enumerate(self._shape(arg)) if size > 1] if name is not None else []
        if name is None or len(wide) != 1:
            return None
        labels = self._graph.slot(name, wide[0])
        self._graph.silences[name] = wide[0]
        return Value(_along_axis(labels, wide[0], len(self._shape(arg))), self._trained([name]))

    def _along(self, value: Value, axis: int, size: int) -> Tensor | None:
        """Return the labels along an axis, or None if they lie along another too."""
        shape = list(value.labels.shape)
        if shape[axis] not in (1, size) or any(
            other > 1 for place, other in enumerate(shape) if place != axis % len(shape)
        ):
            return None
        return value.labels.reshape(-1).expand(size)

    def _spread(self, labels: Tensor, axis: int) -> Tensor:
        return _along_axis(labels, axis % len(self._shape()), len(self._shape()))

    def _trained(self, names: Sequence[str]) -> frozenset[str] | None:
        """Return the names, or None if one is not of a parameter that is trained."""
        return frozenset(names) if all(self._graph.tensors[name].requires_grad for name in names) else None


def _along_axis(labels: Tensor, axis: int, rank: int) -> Tensor:
    return labels.view([-1 if place == axis else 1 for place in range(rank)])


def _padded(labels: Tensor, rank: int) -> Tensor:
    return labels.view((1,) * (rank - labels.ndim) + labels.shape)


def _compressed(labels: Tensor) -> Tensor:
    """Return labels with one entry along each axis that they do not depend on."""
    for axis in range(labels.ndim):
        first = labels.narrow(axis, 0, 1)
        if labels.shape[axis] > 1 and (labels.stride(axis) == 0 or bool((labels == first).all())):
            labels = first
    return labels


def _each(value: Any) -> Iterable[Value]:
    """Return the values that a node has, which may be several."""
    if isinstance(value, Value):
        return [value]
    return [item for item in value if item is not None] if isinstance(value, list) else []


def _all_of(silencers: Sequence[frozenset[str] | None]) -> frozenset[str] | None:
    """Return what silences all, or None if one cannot be silenced."""
    known = [names for names in silencers if names is not None]
    return frozenset().union(*known) if len(known) == len(silencers) else None
