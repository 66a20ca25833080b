"""The channels of a model: which entries of which tensors are kept or removed together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .labels import Labels, Value

STAYS = -1
"""The unit of entries that are never removed."""


class Layer(NamedTuple):
    """A call of a convolution or linear layer.

    Attributes:
        weight: the name of its weight.
        inputs: labels, later units, of its input channels; None if it is grouped: each output then has the same number
            of inputs, whatever is removed.
        outputs: those of its output channels.
        macs: multiply-accumulates for one image and one pair of input and output channel; of a grouped layer for one
            output channel.
        weights: elements of the weight for the same.
    """

    weight: str
    inputs: Tensor | None
    outputs: Tensor
    macs: int
    weights: int


class Padding(NamedTuple):
    """Channels of zeros that a padding module adds before and after those of its input."""

    module: str
    place: int  # in the module's `padding`
    labels: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Channels:
    """The channels of a model, in units: what belongs to a unit is kept or removed as a whole.

    Attributes:
        count: the number of units, numbered from 0; entries of the unit `STAYS` are never removed.
        rows: of each parameter that can silence units, the dimension and the units along it. Where all entries of a
            unit are zero, every layer reads zeros from it, and it can be removed.
        slots: units along dimensions of the model's tensors: (name, dimension) -> units.
        layers: convolutions and linear layers, in the order of their calls.
        paddings: channels of zeros that modules add.
        norms: by the weight of a layer, that of the batch norm which alone reads its outputs.
        locked: by the weight of a layer of which all outputs stay, the reason.
        flow: the nodes of the graph in order: name, names of the nodes they depend on, units that pass.
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


class Graph(Labels):
    """What running a model's graph on labels finds; `resolve` returns it in units.

    Attributes:
        tensors: parameters and buffers by name.
        slots, layers, paddings, norms, flow, ends: as of `Channels`, with labels for units.
        reads: what layers take as input.
        silences: the dimension along which parameters hold channels that their zeros silence.
        made: by which layer's weight a node's value was made.
        batch: how many images the example has.
        refusals: labels that pass through what is not understood, and what that is.
    """

    def __init__(self, model: nn.Module, ignore: Sequence[str]) -> None:
        super().__init__()
        self._model, self._ignore = model, ignore
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.slots: dict[tuple[str, int], Tensor] = {}
        self.layers: list[Layer] = []
        self.paddings: list[Padding] = []
        self.norms: dict[str, str] = {}
        self.flow: list[tuple[str, list[str], Tensor]] = []
        self.ends: tuple[set[str], set[str]] = (set(), set())
        self.reads: list[Value] = []
        self.silences: dict[str, int] = {}
        self.made: dict[fx.Node, str] = {}
        self.batch = 1
        self.refusals: list[tuple[Tensor, str]] = []

    def slot(self, name: str, dim: int, labels: Tensor | None = None) -> Tensor:
        """Return the labels along a dimension of one of the model's tensors, tied to these if they are given."""
        if (name, dim) not in self.slots:
            size = self.tensors[name].shape[dim]
            self.slots[name, dim] = self.fresh(size) if labels is None else labels.reshape(-1)
        elif labels is not None:
            self.tie(self.slots[name, dim], labels.reshape(-1))
        return self.slots[name, dim]

    def names_of(self, placeholders: Mapping[str, str]) -> dict[str, str]:
        """Return the first name of each tensor of the model, by placeholder, given any of its names."""
        first = {id(tensor): name for name, tensor in reversed(self.tensors.items())}
        every = {
            **dict(self._model.named_parameters(remove_duplicate=False)),
            **dict(self._model.named_buffers(remove_duplicate=False)),
        }
        return {placeholder: first[id(every[name])] for placeholder, name in placeholders.items()}

    def silencers(self, names: Sequence[str], dim: int = 0) -> frozenset[str] | None:
        """Note that the zeros of parameters silence what lies along a dimension.

        Returns the names, or None if one is not trained, or is a silencer along another dimension already.
        """
        if any(self.silences.setdefault(name, dim) != dim for name in names):
            return None
        return frozenset(names) if all(self.tensors[name].requires_grad for name in names) else None

    def is_ignored(self, module: str) -> bool:
        """Return whether a module, or one that it is in, is to be left out."""
        parts = module.split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(fnmatch(path, pattern) for path in paths for pattern in self._ignore)

    def module(self, path: str) -> nn.Module:
        """Return a module by its path."""
        return self._model.get_submodule(path)

    def knows_all_layers(self) -> bool:
        """Return whether every tensor of two dimensions or more has been met."""
        known = {name for name, _ in self.slots}
        return all(tensor.ndim < 2 or name in known for name, tensor in self.tensors.items())

    def check(self) -> None:
        """Raise ValueError if channels that are not locked pass through what is not understood."""
        locked, free = self.reasons(), dict[str, set[int]]()
        for labels, problem in self.refusals:
            found = {self.root(label) for label in labels.flatten().tolist()} - locked.keys()
            free[problem] = free.get(problem, set()) | found
        for problem, roots in free.items():
            if roots:
                made = [layer.weight for layer in self.layers if roots & set(map(self.root, layer.outputs.tolist()))]
                modules = list(dict.fromkeys(weight.rpartition(".")[0] for weight in made))
                raise ValueError(f"{problem}: keep the channels that get there, with ignore={modules}")

    # --- in units ---

    def resolve(self) -> Channels:
        """Return what has been found, in units: the channels that can be silenced and are not locked."""
        reasons, root_of = self.reasons(), self.roots()
        governed = self._governed(root_of)
        silent = torch.zeros(len(root_of), dtype=torch.bool)
        for name, read in governed.items():
            mine = root_of[self.slots[name, self.silences[name]]]
            silent[mine[read[mine]]] = True
        silent[list(reasons)] = False
        unit_of = torch.where(silent, silent.cumsum(0) - 1, STAYS)[root_of]

        rows = {}
        for name in filter(governed.__contains__, self.tensors):  # in model order
            labels = self.slots[name, self.silences[name]]
            units = torch.where(governed[name][root_of[labels]], unit_of[labels], STAYS)
            if (units != STAYS).any():
                rows[name] = (self.silences[name], units)
        layers = [
            layer._replace(
                inputs=None if layer.inputs is None else unit_of[layer.inputs], outputs=unit_of[layer.outputs]
            )
            for layer in self.layers
        ]
        return Channels(
            count=int(silent.sum()),
            rows=rows,
            slots={slot: unit_of[labels] for slot, labels in self.slots.items()},
            layers=layers,
            paddings=[pad._replace(labels=(unit_of[pad.labels[0]], unit_of[pad.labels[1]])) for pad in self.paddings],
            norms=self.norms,
            locked={
                layer.weight: reasons.get(self.root(int(found.outputs[0])), "nothing reads it")
                for layer, found in zip(layers, self.layers, strict=True)
                if (layer.outputs == STAYS).all()
            },
            flow=[(name, sources, unit_of[labels].unique()) for name, sources, labels in self.flow],
            ends=self.ends,
        )

    def _governed(self, root_of: Tensor) -> dict[str, Tensor]:
        """Return which roots each parameter silences where layers read them."""
        governed: dict[str, Tensor] = {}
        for labels, silencers in self.reads:
            read = torch.zeros(len(root_of), dtype=torch.bool)
            read[root_of[labels]] = True
            for name in silencers or ():
                governed[name] = governed.get(name, read) | read
        return governed
