"""A call of an operator in the graph: its arguments, and the labels that come with them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from .graph import Graph
from .labels import Value, along_axis


class Call:
    """A node of an exported graph, to be run on labels.

    Attributes:
        graph: what is found.
        node: the node.
        operator: the name of its operator, without a trailing "_".
        target: the operator.
        labelled: the values among its inputs.
        module: the path of the module that calls it.
    """

    def __init__(self, graph: Graph, node: fx.Node, values: Mapping[fx.Node, Any], tensors: Mapping[str, str]) -> None:
        self.graph, self.node, self._values, self._tensors = graph, node, values, tensors
        self.target: Any = node.target
        schema = getattr(node.target, "_schema", None)
        self.operator = schema.name.rpartition("::")[2].rstrip("_") if schema else str(node.target)
        self.labelled = [value for source in node.all_input_nodes for value in each(values.get(source))]
        stack = list(node.meta.get("nn_module_stack", {}).values())
        self.module: str = stack[-1][0] if stack else ""

    # --- arguments ---

    def arg(self, name: str, default: Any = None) -> Any:
        """Return an argument by its name in the operator's schema; the default if there is none of this name."""
        for place, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                if place < len(self.node.args):
                    return self.node.args[place]
                return self.node.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
        return default

    @property
    def given(self) -> Any:
        """The first argument."""
        return self.node.args[0]

    def value(self, arg: Any) -> Value | None:
        """Return the value of an argument, or None if it has no channels."""
        return self._values.get(arg) if isinstance(arg, fx.Node) else None

    def tensor(self, arg: Any) -> str | None:
        """Return the name of the model's tensor that an argument is, if it is one."""
        return self._tensors.get(arg.name) if isinstance(arg, fx.Node) else None

    def value_of_tensor(self, arg: Any) -> Value | None:
        """Return the value of a tensor of the model's that is larger than 1 in one dimension only."""
        name = self.tensor(arg)
        wide = [dim for dim, size in enumerate(shape_of(arg)) if size > 1] if name is not None else []
        if name is None or len(wide) != 1:
            return None
        labels = self.graph.slot(name, wide[0])
        return Value(along_axis(labels, wide[0], len(shape_of(arg))), self.graph.silencers([name], wide[0]))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result, or of the first of several."""
        return shape_of(self.node)

    @property
    def where(self) -> str:
        """Where the call is, for messages."""
        return f"in {self.module}" if self.module else "in the model's forward"

    # --- labels ---

    def along(self, value: Value, axis: int, size: int) -> Tensor | None:
        """Return the labels along an axis of this size, or None if they lie along another axis too."""
        shape = list(value.labels.shape)
        others = [other for place, other in enumerate(shape) if place != axis % len(shape)]
        if shape[axis] not in (1, size) or any(other > 1 for other in others):
            return None
        return value.labels.reshape(-1).expand(size)

    def spread(self, labels: Tensor, axis: int) -> Tensor:
        """Return labels along an axis of the result."""
        return along_axis(labels, axis % len(self.shape), len(self.shape))

    def tie_groups(self, labels: Tensor, groups: int) -> Tensor:
        """Tie the labels of each group, all of the same size, and return them as rows."""
        rows = labels.reshape(groups, -1)
        self.graph.tie(rows, rows[:, :1])
        return rows

    # --- what is not understood ---

    def keep(self, reason: str) -> Value | None:
        """Keep all channels that come here, as their number matters; return None, as none come out."""
        for value in self.labelled:
            self.graph.lock(value.labels, reason)
        return self.keep_tensors(reason)

    def keep_tensors(self, reason: str) -> Value | None:
        """Keep the model's tensors that are arguments as large as they are, and return None."""
        for source in self.node.all_input_nodes:
            if (name := self.tensor(source)) is not None:
                for dim in range(len(shape_of(source))):
                    self.graph.lock(self.graph.slot(name, dim), reason)
        return None

    def refuse(self, problem: str = "is not understood, and channels pass through it") -> Value | None:
        """Refuse channels that come here, unless they turn out to be locked; return None."""
        for value in self.labelled:
            self.graph.refusals.append((value.labels, f"{self.operator} {self.where} {problem}"))
        return self.keep_tensors(f"{self.operator} {self.where} takes it")


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of what a node returns, or of the first of several."""
    found = node.meta["val"]
    return tuple((found[0] if isinstance(found, Sequence) else found).shape)


def each(value: Any) -> Iterable[Value]:
    """Return the values that a node has, which may be several."""
    if isinstance(value, Value):
        return [value]
    return [item for item in value if item is not None] if isinstance(value, list) else []
