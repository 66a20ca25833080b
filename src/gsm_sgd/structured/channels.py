"""ChannelGroups: the channels of a model, as a pattern by which an optimizer keeps and drops them."""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..budget import SHARES
from ..names import own_names
from ..patterns import Pattern, Top
from ..schedules import whole_number
from .branches import Branch, find_branches
from .choice import Choice
from .cost import Cost, Products, Term
from .graph import STAYS, Channels
from .labels import along_axis
from .latency import measured
from .surgery import TOLERANCE, difference, narrowed, silenced, with_stays
from .tracing import traced


class ChannelGroups(Pattern):
    """The channels of a model; those that only make sense together are a unit, which is kept or removed as a whole.

    A unit is silent once the parameters that scale it are zero: gamma and beta of the batch norms that it passes
    last before other layers read it or, where there is none, the filter and bias that make it. These parameters alone
    are governed by the rule; all others are trained as usual. Its score is the root mean square, over the last
    hundred steps or so, of the sum of w g over them: the first-order change of the loss when the channel is silenced,
    so signs count within a step (Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019). One
    step's alone would switch channels on and off at random. What saves most for the least score is dropped first.

    A budget is a share of what the dense net costs, in all layers that were traced: `macs`, `parameters`,
    `channels`, or `latency` once `measure_latency` has been called.

    Build one with `trace`.

    Attributes:
        channels: what has been found in the model.
        families: of each unit the number of its family: channels of one family cost the same.
        example_inputs: what the model was traced with.
    """

    signed = True
    averaged = True
    spares_layers = True
    _per_cost = True

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        ignore: Sequence[str] = (),
        floor: float = 0.0,
        round_to: int = 1,
    ) -> Self:
        """Find the channels of a model by torch.export, and try whether they can be removed.

        The model stays as it is.

        Args:
            model: in any mode; it is traced in evaluation mode, and in training mode too if it then uses more.
            example_inputs: its positional arguments, or its only one; a batch of any size.
            ignore: modules whose output channels all stay, by path; "*" stands for anything.
            floor: share of each layer's channels that stays at least. One always stays, except where a whole branch
                next to a shortcut can go.
            round_to: a layer keeps multiples of so many channels, or all.

        Raises:
            ValueError: the model cannot be exported, an operator on the path of channels is not understood, a removal
                would change the output otherwise than it should, or no channel can be removed.
        """
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        if not 0 <= floor <= 1:
            raise ValueError(f"floor is a share of channels, from 0 to 1, not {floor}")
        if whole_number("round_to", round_to) < 1:
            raise ValueError(f"round_to must be at least 1, not {round_to}")
        if isinstance(ignore, str):
            raise ValueError(f"ignore is a list of modules: ignore=[{ignore!r}]")
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor) or tensor.is_meta:
                raise ValueError(f"{name!r} has no data yet: run a batch through the model, or load its weights, first")
        return cls(model, traced(model, inputs, ignore), inputs, floor, round_to)

    def __init__(
        self, model: nn.Module, channels: Channels, inputs: tuple[Any, ...], floor: float, round_to: int
    ) -> None:
        self.channels, self.example_inputs = channels, inputs
        self.shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        if not channels.count:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(channels.locked.items())[:3])
            raise ValueError(f"no channel of this model can be removed ({reasons or 'it has no layers'})")
        self.families = _families(channels)
        self._names = list(channels.rows)
        branches = [] if floor else self._surviving_branches(model)
        axes = _axes_that_stay(channels, floor, branches)
        self._choice = Choice(self.families, round_to, axes, branches)
        self._costs: dict[str, Cost] = {
            "macs": Products(self._layer_terms(), len(self._sizes)),
            "parameters": Products(self._parameter_terms(), len(self._sizes)),
            "channels": Products([Term(1, None, (0, torch.ones(len(self._sizes))))], len(self._sizes)),
        }
        self._set_cost("macs")
        self._try(model)

    def check_model(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless a model's parameters are those that were traced."""
        if {name: tuple(param.shape) for name, param in parameters.items()} != self.shapes:
            raise ValueError("the model is not what it was when its channels were traced: trace it again")

    # --- trial ---

    def _surviving_branches(self, model: nn.Module) -> list[Branch]:
        """Return the branches that may vanish, unless the model then computes something else."""
        branches = find_branches(self.channels)
        kept = torch.ones(self.channels.count, dtype=torch.bool)
        for branch in branches:
            kept[branch.units] = False
        return branches if branches and self._survives(model, kept) else []

    def _try(self, model: nn.Module) -> None:
        """Raise ValueError if the model without some channels is not the model with those at zero."""
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(self.channels.count, generator=generator) < 0.5
        kept |= self._select(torch.zeros(len(kept), dtype=torch.float64), 0)
        if self._survives(model, kept):
            return
        wrong = []
        for family in range(len(self._sizes)):
            alone = torch.ones_like(kept)
            alone[(self.families == family) & ~kept] = False
            if not self._survives(model, alone):
                units = (self.families == family).nonzero().squeeze(1)
                layers = [layer.weight for layer in self.channels.layers if torch.isin(units, layer.outputs).any()]
                wrong += [layer.rpartition(".")[0] for layer in layers[:1]]
        raise ValueError(
            f"without some channels of {', '.join(wrong[:3]) or 'several layers'} the model does not compute what it "
            "computes with those at zero: its forward depends on their number; leave these layers out with ignore="
        )

    def _survives(self, model: nn.Module, kept: Tensor) -> bool:
        """Return whether a removal is exact, in a copy of the model with noise in all tensors, so that zeros show."""
        noisy = with_noise(model)
        try:
            pair = silenced(noisy, self.channels, kept), narrowed(noisy, self.channels, kept)
            return difference(*pair, self.example_inputs) <= TOLERANCE
        except Exception:  # the model's forward is anybody's
            return False

    # --- costs ---

    @property
    def _sizes(self) -> Tensor:
        return self._choice.sizes

    def _side(self, units: Tensor) -> tuple[int, Tensor]:
        """Return how many channels of a layer stay, and how many each channel of a family is."""
        counts = self.families[units[units != STAYS]].bincount(minlength=len(self._sizes))
        return int((units == STAYS).sum()), counts / self._sizes

    def _layer_terms(self) -> list[Term]:
        return [
            Term(layer.macs, None if layer.inputs is None else self._side(layer.inputs), self._side(layer.outputs))
            for layer in self.channels.layers
        ]

    def _parameter_terms(self) -> list[Term]:
        terms = []
        for name, shape in self.shapes.items():
            sides = [(dim, self._side(units)) for (slot, dim), units in self.channels.slots.items() if slot == name]
            others = math.prod(size for dim, size in enumerate(shape) if dim not in dict(sides))
            one = [side for _, side in sides] or [(1, torch.zeros(len(self._sizes)))]
            terms.append(Term(others, one[1] if len(one) > 1 else None, one[0]))
        return terms

    def _set_cost(self, kind: str) -> None:
        self._cost = self._costs[kind]
        savings = self._cost.savings(self._sizes, self._choice.blocks, self._choice.block_sizes)
        self._savings = savings if self._per_cost else self._choice.block_sizes.double()

    def measure_latency(
        self, model: nn.Module, inputs: Tensor | tuple[Any, ...] | None = None, times: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Measure on this machine how long layers of several widths take, for a budget of `latency`.

        Call it with as many threads, and the batch, that the narrow net is for; the layout of the inputs, such as
        channels-last, is that of the layers. It takes some seconds, and the machine should do nothing else.

        Args:
            model: what was traced, on the device that it is for.
            inputs: positional arguments, or the only one; None takes those it was traced with.
            times: what an earlier call returned: so a run that goes on has the same budget, and nothing is measured.

        Returns:
            Nanoseconds by a description of what was measured, as JSON can hold it.

        Raises:
            ValueError: the model is not what was traced, or a layer with channels is none of torch's.
        """
        self.check_model(dict(model.named_parameters()))
        given = self.example_inputs if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,)
        found = dict(times or {})
        self._costs["latency"] = measured(model, self.channels, self.families, self._side, given, found)
        return found

    @property
    def has_latency(self) -> bool:
        """Whether latency has been measured."""
        return "latency" in self._costs

    def cost_of(self, kept: Tensor) -> float:
        """Return the cost of a net with these units, in the unit of the budget."""
        return self._cost.total(self._choice.widths(kept))

    def _select(self, scores: Tensor, budget: float) -> Tensor:
        """Return which units to keep: the best by score per cost, as many as the budget allows."""
        return self._choice.choose(scores, budget, self._cost, self._savings)

    # --- the pattern ---

    def for_budget(self, kind: str) -> Self:
        """Return the pattern with a budget that is a share of this cost.

        Raises:
            ValueError: it is a budget of weights, or latency has not been measured.
        """
        if kind == "latency" and not self.has_latency:
            raise ValueError("call measure_latency before you give latency=")
        if kind not in self._costs:
            raise ValueError(f"a pattern of channels takes one of {', '.join(SHARES)}, not {kind}")
        bound = copy.copy(self)
        bound._set_cost(kind)
        return bound

    def by_score(self) -> Self:
        """Return the pattern that drops the channels of the lowest scores, whatever they cost."""
        bound = copy.copy(self)
        bound._per_cost, bound._savings = False, self._choice.block_sizes.double()
        return bound

    def over(self, names: Sequence[str]) -> Self:
        """Return the pattern for these parameters, in this order."""
        bound = copy.copy(self)
        bound._names = self._own(names)
        return bound

    def _own(self, names: Sequence[str]) -> list[str]:
        """Return names as in the model that was traced, which may have been wrapped since."""
        own = own_names(self.shapes, names)
        return [own[name] for name in names]

    def parameter_groups(self, params: Any) -> list[dict[str, Any]]:
        """Return an optimizer's parameters with each group in two: what the rule governs, and the rest.

        Raises:
            ValueError: they have no names, or lack parameters that silence channels, or those are frozen.
        """
        params = list(params)
        found, split = set[str](), []
        for group in params if params and isinstance(params[0], dict) else [{"params": params}]:
            named = list(group["params"]) if not isinstance(group["params"], Tensor) else [group["params"]]
            if not all(isinstance(item, tuple) for item in named):
                raise ValueError("a pattern of channels needs names: pass model.named_parameters()")
            sides: tuple[list[Any], list[Any]] = [], []
            for item, name in zip(named, self._own([name for name, _ in named]), strict=True):
                governed = name in self.channels.rows and item[1].requires_grad and group.get("prunable") is not False
                sides[governed].append(item)
                found |= {name} if governed else set()
            for prunable, part in enumerate(sides):
                if part:
                    split.append({**group, "params": part, "prunable": bool(prunable)})
        if missing := [name for name in self.channels.rows if name not in found]:
            raise ValueError(
                f"{missing[0]!r} silences channels, but is not trained here: pass all named parameters, or leave its "
                "layer out with ignore= when you trace"
            )
        return split

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError if a parameter is not what was traced."""
        if self.shapes.get(*self._own([name])) != tuple(weight.shape):
            raise ValueError(f"{name!r} is not what it was when the channels were traced: trace the model again")

    def total(self, weights: Sequence[Tensor]) -> int:
        """Return what the dense net costs: MACs, parameters, channels or nanoseconds."""
        return math.floor(self._cost.total(self._sizes)) if weights else 0

    def cost(self, masks: Sequence[Tensor]) -> int:
        """Return what a net with these masks costs."""
        return math.floor(self.cost_of(self._any_kept(dict(zip(self._names, masks, strict=True)))))

    def check_budget(self, num_kept: int) -> None:
        """Raise ValueError if the budget is less than what always stays."""
        if (least := self.smallest()) > num_kept:
            dense = self.total([torch.empty(0)])
            raise ValueError(f"the budget is below the smallest possible, {least / dense:.4g} of the dense net's cost")

    def smallest(self) -> int:
        """Return what is left at least, whatever the budget."""
        kept = self._select(torch.zeros(self.channels.count, dtype=torch.float64), 0)
        return math.ceil(self.cost_of(kept))

    def pool(self, scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return |sum of the scores| of each unit."""
        pooled = torch.zeros(self.channels.count + 1, dtype=torch.float64, device=scores[0].device)
        for name, score in zip(self._names, scores, strict=True):
            dim, units = self.channels.rows[name]
            rows = score.double().movedim(dim, 0).reshape(len(units), -1).sum(1)
            pooled.index_add_(0, units.to(score.device) % len(pooled), rows)  # STAYS goes to the last place
        return [pooled[:-1].abs()]

    def select(self, units: Sequence[Tensor], num_kept: int, top: Top) -> Sequence[Tensor]:
        """Return which units are kept, at a cost of at most `num_kept`."""
        (may,) = top(units, len(units[0]))
        return [self._select(units[0].cpu(), num_kept).to(units[0].device) & may]

    def expand(self, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return masks of the parameters; what belongs to no unit is kept."""
        stays, masks = with_stays(kept[0]), []
        for name, score in zip(self._names, scores, strict=True):
            dim, units = self.channels.rows[name]
            mine = along_axis(stays[units.to(score.device)], dim, score.ndim)
            masks.append(mine.expand(score.shape).contiguous())
        return masks

    def kept_by(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which units masks of the governed parameters keep: those of which any entry is kept.

        Raises:
            ValueError: a mask is missing, or has another shape than its parameter.
        """
        own = dict(zip(self._own(list(masks)), masks.values(), strict=True))
        for name in self.channels.rows:
            if name not in own:
                raise ValueError(
                    f"the masks lack {name!r}, which silences channels: take those of an optimizer with this pattern "
                    "that trains it to the end"
                )
            if own[name].shape != self.shapes[name]:
                raise ValueError(f"the mask of {name!r} has shape {tuple(own[name].shape)}, not {self.shapes[name]}")
        return self._any_kept({name: own[name] for name in self.channels.rows})

    def _any_kept(self, masks: Mapping[str, Tensor]) -> Tensor:
        kept = torch.zeros(self.channels.count + 1, dtype=torch.bool)
        for name, mask in masks.items():
            dim, units = self.channels.rows[name]
            kept[units[mask.movedim(dim, 0).reshape(len(units), -1).any(1).cpu()]] = True
        return kept[:-1]


def _families(channels: Channels) -> Tensor:
    """Return a number for each unit, the same for units that occur equally often in the same places."""
    places: list[dict[int, int]] = [defaultdict(int) for _ in range(channels.count)]
    for number, units in enumerate(channels.slots.values()):
        found, counts = units[units != STAYS].unique(return_counts=True)
        for unit, count in zip(found.tolist(), counts.tolist(), strict=True):
            places[unit][number] = count
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(place.items()), len(numbers)) for place in places])


def _axes_that_stay(channels: Channels, floor: float, branches: Sequence[Branch]) -> list[tuple[Tensor, int]]:
    """Return the output channels of layers, as units, with how many of them must stay."""
    may_vanish = {tuple(branch.units.tolist()) for branch in branches}
    axes: dict[tuple[int, ...], tuple[Tensor, int]] = {}
    for layer in channels.layers:
        units = layer.outputs[layer.outputs != STAYS].unique()
        least = max(1, math.ceil(floor * len(layer.outputs))) - int((layer.outputs == STAYS).sum())
        key = tuple(units.tolist())
        if least > 0 and key not in may_vanish:
            before = axes[key][1] if key in axes else 0
            axes[key] = (units, max(before, min(least, len(units))))
    return list(axes.values())


def with_noise(model: nn.Module) -> nn.Module:
    """Return a copy of a model with noise in its tensors, so that nothing is zero or one by chance."""
    noisy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*noisy.named_parameters(), *noisy.named_buffers()):
            if tensor.is_floating_point() and tensor.numel():
                spread = tensor.float().std().item() if tensor.numel() > 1 else 0.0
                noise = torch.randn(tensor.shape, generator=generator).to(tensor) * (0.3 * spread or 0.1)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return noisy
