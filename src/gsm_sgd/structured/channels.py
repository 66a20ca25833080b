"""ChannelGroups: the channels of a model, as a pattern by which an optimizer keeps and drops them."""

import copy
import math
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..names import bare_name
from ..patterns import Pattern, Top
from .cost import KINDS, Cost, Products, Term
from .graph import STAYS, Channels, Graph
from .latency import measured
from .surgery import TOLERANCE, difference, narrowed, silenced


_TINY = 1e-300
_NEAR = 1e-3  # of the budget may be left over


class ChannelGroups(Pattern):
    """The channels of a model; those that only make sense together are a unit, which is kept or removed as a whole.

    A unit is silent once the parameters that scale it are zero: gamma and beta of the batch norms that it passes
    last before other layers read it or, where there is none, the filter and bias that make it. These parameters alone
    are governed by the rule; all others are trained as usual. Its score is |sum of w g| over them, the first-order
    change of the loss when the channel is silenced, so signs count. Channels that would save most for the least
    score are dropped first: by score per cost.

    A budget is a share of what the dense net costs, in all layers that were traced: `macs`, `parameters`,
    `channels`, or `latency` once `measure_latency` has been called.

    Build one with `trace`.

    Attributes:
        channels: what has been found in the model.
        families: of each unit the number of its family: channels of one family cost the same.
        example_inputs: what the model was traced with.
    """

    signed = True
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
            model: in any mode; it is traced in evaluation mode, and in training mode too where it then uses more layers.
            example_inputs: its positional arguments, or its only one; a batch of any size.
            ignore: modules whose output channels all stay, by path; "*" stands for anything.
            floor: share of each layer's channels that stays at least. One always stays, except where a whole branch
                beside a shortcut can go.
            round_to: a layer keeps multiples of so many channels, or all.

        Raises:
            ValueError: the model cannot be exported, an operator on the path of channels is not understood, a removal
                would change the output otherwise than it should, or no channel can be removed.
        """
        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        if not 0 <= floor <= 1:
            raise ValueError(f"floor is a share of channels, from 0 to 1, not {floor}")
        if round_to < 1:
            raise ValueError(f"round_to must be at least 1, not {round_to}")
        return cls(model, traced(model, inputs, ignore), inputs, floor, round_to)

    def __init__(
        self, model: nn.Module, channels: Channels, inputs: tuple[Any, ...], floor: float, round_to: int
    ) -> None:
        self.channels, self.example_inputs = channels, inputs
        self._floor, self._round_to = floor, round_to
        self.shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        if not channels.count:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(channels.locked.items())[:3])
            raise ValueError(f"no channel of this model can be removed ({reasons})")
        self.families = _families(channels)
        self._sizes = self.families.bincount()
        self._costs: dict[str, Cost] = {
            "macs": Products(self._layer_terms(), len(self._sizes)),
            "parameters": Products(self._parameter_terms(), len(self._sizes)),
            "channels": Products([Term(1, None, (0, torch.ones(len(self._sizes))))], len(self._sizes)),
        }
        self._names = list(channels.rows)

        starts = [range(0, int(size), round_to) for size in self._sizes]
        self._blocks = torch.tensor([family for family, blocks in enumerate(starts) for _ in blocks])
        ranks = torch.cat([torch.arange(size) // round_to for size in self._sizes])
        firsts = torch.tensor([0, *map(len, starts)]).cumsum(0)[:-1]
        self._block_at = firsts.repeat_interleave(self._sizes) + ranks  # of units in order of family and score
        self._block_sizes = self._block_at.bincount()

        self._set_cost("macs")

        self._branches: list[tuple[Tensor, Tensor]] = []
        if floor == 0:
            branches = _branches(channels)
            if branches and self._survives(model, _without(channels, [branch for branch, _ in branches])):
                self._branches = branches
        self._protected = self._find_protected()
        self._try(model)

    def _try(self, model: nn.Module) -> None:
        """Raise ValueError if the model without some channels is not the model with those at zero."""
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(self.channels.count, generator=generator) < 0.5  # noqa: PLR2004
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
                wrong.append(layers[0].rpartition(".")[0] if layers else f"family {family}")
        raise ValueError(
            f"without some channels of {', '.join(wrong[:3]) or 'several layers'} the model does not compute what it "
            "computes with those at zero: its forward depends on their number; leave these layers out with ignore="
        )

    def _survives(self, model: nn.Module, kept: Tensor) -> bool:
        """Return whether a removal is exact, in a copy of the model with noise in all tensors, so that zeros show."""
        noisy = _noisy(model)
        try:
            pair = silenced(noisy, self.channels, kept), narrowed(noisy, self.channels, kept)
            return difference(*pair, self.example_inputs) <= TOLERANCE
        except Exception:  # the model's forward is anybody's
            return False

    # --- costs ---

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
        savings = self._cost.savings(self._sizes, self._blocks, self._block_sizes)
        self._savings = savings if self._per_cost else self._block_sizes.double()

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
        if {name: tuple(param.shape) for name, param in model.named_parameters()} != self.shapes:
            raise ValueError("the model is not what it was when its channels were traced: trace it again")
        given = self.example_inputs if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,)
        found = dict(times or {})
        self._costs["latency"] = measured(model, self.channels, self.families, self._side, given, found)
        return found

    def cost_of(self, kept: Tensor) -> float:
        """Return the cost of a net with these units, in the unit of the budget."""
        return self._cost.total(self.families[kept].bincount(minlength=len(self._sizes)))

    def _widths(self, blocks: Tensor) -> Tensor:
        """Return the number of channels of each family in some blocks."""
        widths = torch.zeros_like(self._sizes)
        return widths.index_add_(0, self._blocks[blocks], self._block_sizes[blocks])

    def _priority(self, worth: Tensor) -> Tensor:
        """Return the score per cost of blocks, as it is in the dense net; it never rises within a family.

        Where a block would be worth more than one before it, which it cannot stay without, the two count as one.
        """
        savings = self._savings
        if isinstance(self._cost, Products):
            return worth / savings
        priority = torch.empty_like(worth)
        start = 0
        for size in self._blocks.bincount().tolist():
            merged: list[tuple[float, float, int]] = []
            for score, saving in zip(*(side[start : start + size].tolist() for side in (worth, savings)), strict=True):
                block = (score, saving, 1)
                while merged and block[0] * merged[-1][1] > merged[-1][0] * block[1]:
                    block = tuple(map(operator.add, block, merged.pop()))  # type: ignore[assignment]
                merged.append(block)
            rates = [score / max(saving, _TINY) for score, saving, _ in merged]
            priority[start : start + size] = torch.tensor(rates).repeat_interleave(
                torch.tensor([count for _, _, count in merged])
            )
            start += size
        return priority

    def _find_protected(self) -> list[tuple[Tensor, int]]:
        """Return axes of layers, as units, with how many of them must stay."""
        may_vanish = {tuple(branch.tolist()) for branch, _ in self._branches}
        axes = {}
        for layer in self.channels.layers:
            units = layer.outputs[layer.outputs != STAYS].unique()
            least = max(1, math.ceil(self._floor * len(layer.outputs))) - int((layer.outputs == STAYS).sum())
            if least > 0 and tuple(units.tolist()) not in may_vanish:
                axes[tuple(units.tolist())] = (units, min(least, len(units)))
        return list(axes.values())

    # --- the pattern ---

    def for_budget(self, kind: str) -> Self:
        """Return the pattern with a budget that is a share of this cost.

        Raises:
            ValueError: it is a budget of weights, or latency has not been measured.
        """
        if kind == "latency" and kind not in self._costs:
            raise ValueError("call measure_latency before you give latency=")
        if kind not in self._costs:
            raise ValueError(f"a pattern of channels takes one of {', '.join(KINDS)}, not {kind}")
        bound = copy.copy(self)
        bound._set_cost(kind)
        return bound

    def by_score(self) -> Self:
        """Return the pattern that drops the channels of the lowest scores, whatever they cost."""
        bound = copy.copy(self)
        bound._per_cost, bound._savings = False, self._block_sizes.double()
        return bound

    def over(self, names: Sequence[str]) -> Self:
        """Return the pattern for these parameters, in this order."""
        bound = copy.copy(self)
        bound._names = [bare_name(name) for name in names]
        return bound

    def parameter_groups(self, params: Any) -> list[dict[str, Any]]:
        """Return an optimizer's parameters with each group in two: what the rule governs, and the rest.

        Raises:
            ValueError: they have no names, or lack parameters that silence channels, or those are frozen.
        """
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{"params": params}]
        found, split = set(), []
        for group in groups:
            named = list(group["params"])
            if not all(isinstance(item, tuple) for item in named):
                raise ValueError("a pattern of channels needs names: pass model.named_parameters()")
            mine = [(name, param) for name, param in named if bare_name(name) in self.channels.rows]
            if group.get("prunable") is False:
                mine = []
            found |= {bare_name(name) for name, param in mine if param.requires_grad}
            rest = [item for item in named if not any(item[1] is param for _, param in mine)]
            for part, prunable in ((mine, True), (rest, False)):
                if part:
                    split.append({**group, "params": part, "prunable": prunable})
        if missing := [name for name in self.channels.rows if name not in found]:
            raise ValueError(
                f"{missing[0]!r} silences channels, but is not trained here: pass all named parameters, or leave its "
                "layer out with ignore= when you trace"
            )
        return split

    def check(self, name: str, weight: Tensor) -> None:
        """Raise ValueError if a parameter is not what was traced."""
        if self.shapes.get(bare_name(name)) != tuple(weight.shape):
            raise ValueError(f"{name!r} is not what it was when the channels were traced: trace the model again")

    def total(self, weights: Sequence[Tensor]) -> int:
        """Return what the dense net costs: MACs, parameters, channels or nanoseconds."""
        return math.floor(self._cost.total(self._sizes)) if weights else 0

    def cost(self, masks: Sequence[Tensor]) -> int:
        """Return what a net with these masks costs."""
        return math.floor(self.cost_of(self.kept_by(dict(zip(self._names, masks, strict=True)))))

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
        stays = torch.cat([kept[0], kept[0].new_ones(1)])
        masks = []
        for name, score in zip(self._names, scores, strict=True):
            dim, units = self.channels.rows[name]
            shape = [-1 if axis == dim else 1 for axis in range(score.ndim)]
            masks.append(stays[units.to(score.device)].view(shape).expand(score.shape).contiguous())
        return masks

    def kept_by(self, masks: Mapping[str, Tensor]) -> Tensor:
        """Return which units masks of the governed parameters keep: those of which any entry is kept."""
        kept = torch.zeros(self.channels.count + 1, dtype=torch.bool)
        for name, (dim, units) in self.channels.rows.items():
            if name in masks:
                kept[units[masks[name].movedim(dim, 0).reshape(len(units), -1).any(1).cpu()]] = True
            else:  # without a gradient nothing is active, and nothing is in the way
                continue
        return kept[:-1]

    # --- selection ---

    def _select(self, scores: Tensor, budget: int) -> Tensor:
        """Return which units to keep: the best by score per cost, as many as the budget allows.

        1. In each family, order the units by score, and put them into blocks of `round_to`.
        2. Of each layer protect the best units, as many as must stay.
        3. Order all blocks by score per cost, protected ones first.
        4. Keep as many as fit the budget; where the next one does not, go on without its family.
        5. Drop what only led to or came from a branch that has fallen to nothing.
        """
        best_first = scores.argsort(descending=True, stable=True)
        by_family = best_first[self.families[best_first].argsort(stable=True)]
        block_of = torch.empty_like(self._block_at)
        block_of[by_family] = self._block_at

        worth = torch.zeros(len(self._blocks), dtype=torch.float64).index_add_(0, block_of, scores)
        priority = self._priority(worth)
        place = torch.empty_like(best_first)
        place[best_first] = torch.arange(len(place))
        for axis, least in self._protected:
            priority[block_of[axis[place[axis].argsort()[:least]]]] = math.inf

        order = priority.argsort(descending=True, stable=True)
        count = int(priority.isposinf().sum())
        chosen, rest = order[:count], order[count:]
        while len(rest):
            count = self._how_many_fit(chosen, rest, budget)
            chosen, rest = torch.cat([chosen, rest[:count]]), rest[count:]
            if budget - self._cost.total(self._widths(chosen)) < _NEAR * budget:
                break
            rest = rest[self._blocks[rest] != self._blocks[rest[:1]]]
        kept = torch.isin(block_of, chosen)
        for branch, implied in self._branches:
            if not kept[branch].any():
                kept[implied] = False
        return kept

    def _how_many_fit(self, chosen: Tensor, more: Tensor, budget: int) -> int:
        """Return how many more blocks fit, by bisection: the cost never falls with their number."""
        fitting, too_many = 0, len(more) + 1
        while too_many - fitting > 1:
            middle = (fitting + too_many) // 2
            if self._cost.total(self._widths(torch.cat([chosen, more[:middle]]))) <= budget:
                fitting = middle
            else:
                too_many = middle
        return fitting


def traced(model: nn.Module, inputs: tuple[Any, ...], ignore: Sequence[str]) -> Channels:
    """Return the channels of a model, found in evaluation mode and, if it then has more layers, in training mode."""
    graph = Graph(model, ignore)
    modes = {module: module.training for module in model.modules()}
    try:
        for training in (False, True):
            model.train(training)
            try:
                exported = torch.export.export(model, inputs)
            except Exception as error:  # torch's, or the model's own, of any kind
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ValueError(f"the model cannot be exported, so its channels are unknown: {reason}") from error
            signature = exported.graph_signature
            graph.run(exported.graph, {**signature.inputs_to_parameters, **signature.inputs_to_buffers})
            if graph.knows_all_layers():
                break
    finally:
        for module, mode in modes.items():
            module.training = mode
    return graph.resolve()


def _families(channels: Channels) -> Tensor:
    """Return a number for each unit, the same for units that occur equally often in the same places."""
    places: list[dict[int, int]] = [defaultdict(int) for _ in range(channels.count)]
    for number, units in enumerate(channels.slots.values()):
        found, counts = units[units != STAYS].unique(return_counts=True)
        for unit, count in zip(found.tolist(), counts.tolist(), strict=True):
            places[unit][number] = count
    numbers: dict[tuple[tuple[int, int], ...], int] = {}
    return torch.tensor([numbers.setdefault(tuple(place.items()), len(numbers)) for place in places])


def _branches(channels: Channels) -> list[tuple[Tensor, Tensor]]:
    """Return which layers may lose all channels, all at once, since a way around is left.

    For each such layer: the units of its inputs, and all units that are of no use without them.
    """
    axes = {}
    for layer in channels.layers:
        if layer.inputs is not None and (layer.inputs != STAYS).all():
            units = layer.inputs.unique()
            axes[tuple(units.tolist())] = units
    found, gone = [], torch.zeros(channels.count + 1, dtype=torch.bool)
    for units in axes.values():
        mine = torch.zeros_like(gone)
        mine[units] = True
        alone = all(mine[other].all() or not mine[other].any() for other in channels.slots.values())
        if not alone or _live(channels, gone | mine) is None:
            continue
        live = _live(channels, mine)
        assert live is not None
        gone |= mine
        found.append((units, (~live[:-1]).nonzero().squeeze(1)))
    return found


def _live(channels: Channels, gone: Tensor) -> Tensor | None:
    """Return which units are still on a way from the model's inputs to its outputs, or None if there is no way."""
    inputs, outputs = channels.ends
    sources = {name: [] if len(units) and gone[units].all() else before for name, before, units in channels.flow}
    reached: set[str] = set()
    for name, before in sources.items():
        if name in inputs or any(source in reached for source in before):
            reached.add(name)
    if not outputs <= reached:
        return None
    needed, waiting = set(outputs), list(outputs)
    while waiting:
        new = [source for source in sources[waiting.pop()] if source in reached and source not in needed]
        needed.update(new)
        waiting.extend(new)
    live = torch.zeros_like(gone)
    for name, _, units in channels.flow:
        if name in needed:
            live[units] = True
    return live & ~gone


def _without(channels: Channels, branches: Sequence[Tensor]) -> Tensor:
    """Return which units are kept where these are all gone."""
    kept = torch.ones(channels.count, dtype=torch.bool)
    for branch in branches:
        kept[branch] = False
    return kept


def _noisy(model: nn.Module) -> nn.Module:
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
