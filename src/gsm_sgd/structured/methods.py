"""What GSM's choice of channels is compared with: slimming, group lasso and uniform magnitude."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ..budget import SHARES, Budget
from ..masks import Masks, mask_gradients
from ..names import bare_names
from ..schedules import Schedule
from ..selection.stored import select_top
from .channels import ChannelGroups
from .graph import STAYS


class ChannelMethod:
    """Train with a penalty, silence channels once, and train the rest: what these methods share.

    A method works through hooks on an optimizer: its penalty is added to the gradients right before each step, and
    silent channels are at zero after each step. A subclass defines `scores` and, unless it has none, `_penalize`.

    Args:
        optimizer: any of torch's kind that trains all parameters that silence channels.
        model: what has been traced.
        groups: its channels.
        schedule: its `cut_step` says before which step channels are silenced; None leaves that to `finalize()`.
        budget: one of `macs`, `parameters`, `channels` and `latency`, a share of what the dense net costs.

    Attributes:
        step: how many steps have been taken.
        kept: bool, which units are kept, once this is known.

    Raises:
        ValueError: the budget cannot be met, the model is not what was traced, or the optimizer does not train a
            parameter that silences channels.

    Example:
        >>> groups = ChannelGroups.trace(model, images)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> method = Slimming(optimizer, model, groups, Schedule(total_steps), macs=0.5)
        >>> ...the usual loop...
        >>> slim = remove_channels(model, groups, method.finalize(), optimizer)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        groups: ChannelGroups,
        schedule: Schedule | None = None,
        **budget: float,
    ) -> None:
        if len(budget) != 1 or not set(budget) <= set(SHARES):
            raise ValueError(f"give one of {', '.join(SHARES)}, not {' and '.join(budget) or 'none'}")
        share = Budget.of(**budget)  # type: ignore[arg-type]
        self.groups = groups.for_budget(share.kind).by_score().over(list(groups.channels.rows))
        self.parameters = self._find(model, optimizer)
        self._silencing = [self.parameters[name] for name in groups.channels.rows]
        self._budget = share.num_kept(self.groups.total(self._silencing))
        self.groups.check_budget(self._budget)
        self.schedule, self.step = schedule, 0
        self.kept: Tensor | None = None
        self._gone: list[tuple[Tensor, Tensor]] = []
        self._prepare(model)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _find(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the model's parameters by the names that were traced."""
        names = bare_names(dict(model.named_parameters()))
        parameters: dict[str, Tensor] = {names[name]: param for name, param in model.named_parameters()}
        if {name: tuple(param.shape) for name, param in parameters.items()} != self.groups.shapes:
            raise ValueError("the model is not what it was when its channels were traced: trace it again")
        trained = {param for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
        for name in self.groups.channels.rows:
            if parameters[name] not in trained:
                raise ValueError(f"{name!r} silences channels, but the optimizer does not train it")
        return parameters

    def _prepare(self, model: nn.Module) -> None:
        """Find what the method works on, or raise ValueError before it has touched anything."""

    def scores(self) -> Tensor:
        """Return the score of each unit as it is now; the units with the lowest go."""
        raise NotImplementedError

    def _penalize(self) -> None:
        """Add to the gradients what makes units small."""

    def _choose(self) -> Tensor:
        """Return which units to keep."""
        return self._best(self.scores(), self._budget)

    def _best(self, scores: Tensor, budget: int) -> Tensor:
        (kept,) = self.groups.select([scores], budget, select_top)
        return kept.cpu()

    def finalize(self) -> Masks:
        """Silence the channels that are not kept, unless this has been done, and return the masks of what does it."""
        if not self._gone:
            self._silence(self._choose())
        assert self.kept is not None
        return self._masks(self.kept)

    def _masks(self, kept: Tensor) -> Masks:
        masks = self.groups.expand([kept], self._silencing)
        return Masks(zip(self.groups.channels.rows, masks, strict=True))

    def _cut(self, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return parameters, and for each a bool tensor that is True where it is to be zero."""
        return [(param, ~mask) for param, mask in zip(self._silencing, self._masks(kept).values(), strict=True)]

    @torch.no_grad()
    def _silence(self, kept: Tensor) -> None:
        """Set parameters to zero, and hold them there."""
        self.kept, self._gone = kept, self._cut(kept)
        self._handles.append(mask_gradients(self._gone))  # so that clipping does not count them
        for param, gone in self._gone:
            param.masked_fill_(gone, 0)
            if param.grad is not None:
                param.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("closure", *args[1:2]) is not None:
            raise ValueError(f"{type(self).__name__} needs gradients before the step: take steps without a closure")
        if self.schedule is not None and self.step == self.schedule.cut_step:
            self.finalize()
        if not self._gone:
            self._penalize()
        self.step += 1

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        for param, gone in self._gone:
            param.masked_fill_(gone, 0)

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the training depends on, as plain tensors and numbers."""
        return {"step": self.step, "kept": self.kept, "cut": bool(self._gone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after the model's and the optimizer's have been loaded.

        Raises:
            ValueError: it is of another model.
        """
        kept = state["kept"]
        if kept is not None and len(kept) != self.groups.channels.count:
            raise ValueError(f"the state is of a model of {len(kept)} units, not {self.groups.channels.count}")
        if self._gone:  # let these move again
            self._handles.pop().remove()
        self.step, self.kept, self._gone = state["step"], kept, []
        if state["cut"]:
            self._silence(kept)

    def _totals(self, parts: Iterable[tuple[Tensor, int, Tensor]]) -> Tensor:
        """Return a sum for each unit over parts, each a tensor, a dimension of it, and the units along that."""
        count = self.groups.channels.count
        totals = torch.zeros(count + 1, dtype=torch.float64, device=self._silencing[0].device)
        for values, dim, units in parts:
            rows = values.double().movedim(dim, 0).reshape(len(units), -1).sum(1)
            totals.index_add_(0, units.to(totals.device) % len(totals), rows)  # STAYS goes to the last place
        return totals[:-1]


class _Penalty(ChannelMethod):
    """A method with a penalty of some strength."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        groups: ChannelGroups,
        schedule: Schedule | None = None,
        *,
        strength: float = 1e-4,
        **budget: float,
    ) -> None:
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, not {strength}")
        self.strength = strength
        super().__init__(optimizer, model, groups, schedule, **budget)


class Slimming(_Penalty):
    """L1 on the scales gamma of batch norm, of which the smallest go: the gradient of gamma gets lambda sign(gamma).

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017. Where channels are added,
    the sum of their |gamma| counts.

    Args:
        optimizer, model, groups, schedule, budget: as of `ChannelMethod`.
        strength: lambda; the paper takes 1e-4 or 1e-5.

    Raises:
        ValueError: as `ChannelMethod`, or channels have no such scale.
    """

    def _prepare(self, model: nn.Module) -> None:
        scales = {module.weight for module in model.modules() if isinstance(module, _NormBase | nn.GroupNorm)}
        rows = [(name, self.parameters[name], *row) for name, row in self.groups.channels.rows.items()]
        self._rows = [(param, dim, units) for _, param, dim, units in rows if param in scales]
        scaled = {STAYS}.union(*(units.tolist() for _, _, units in self._rows))
        for name, _, _, units in rows:
            if not scaled.issuperset(units.tolist()):
                raise ValueError(f"no norm scales the channels of {name!r}: leave its layer out with ignore=")

    def scores(self) -> Tensor:
        """Return the sum of |gamma| of each unit."""
        return self._totals((gamma.abs(), dim, units) for gamma, dim, units in self._rows)

    def _penalize(self) -> None:
        for gamma, _, units in self._rows:
            if gamma.grad is not None:
                gamma.grad.add_(gamma.sign() * (units != STAYS).to(gamma), alpha=self.strength)


class GroupL1(_Penalty):
    """Group lasso over all that belongs to a unit, of which those with the smallest norm go.

    These are its filters, norms and biases, and the slices that followers read it with (Fang et al., "DepGraph: Towards
    Any Structural Pruning", 2023). The gradient of a weight w gets lambda w / ||group|| for each group that w is in.

    Args:
        optimizer, model, groups, schedule, budget: as of `ChannelMethod`.
        strength: lambda.

    Raises:
        ValueError: as `ChannelMethod`.
    """

    def _prepare(self, model: nn.Module) -> None:
        slots = self.groups.channels.slots.items()
        parameters = self.parameters  # the slots of buffers do not count
        self._slots = [(parameters[name], dim, units) for (name, dim), units in slots if name in parameters]

    def scores(self) -> Tensor:
        """Return the norm of each group."""
        return self._totals((weight.square(), dim, units) for weight, dim, units in self._slots).sqrt()

    def _penalize(self) -> None:
        norms = self.scores()
        inverse = torch.cat([torch.where(norms > 0, 1 / norms, 0), norms.new_zeros(1)])  # STAYS is the last
        for weight, dim, units in self._slots:
            if weight.requires_grad and weight.grad is not None:
                shape = [-1 if axis == dim else 1 for axis in range(weight.ndim)]
                scale = inverse[units.to(inverse.device)].view(shape).to(weight)
                weight.grad.add_(weight * scale, alpha=self.strength)


class Uniform(ChannelMethod):
    """The same share of every layer, of the filters with the largest L1 norm, chosen once.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017. Where channels are added, the sum of their filters' norms
    counts. Without a schedule channels are silenced at once; what follows retrains the others.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        groups: ChannelGroups,
        schedule: Schedule | None = None,
        **budget: float,
    ) -> None:
        super().__init__(optimizer, model, groups, schedule, **budget)
        if schedule is None:
            self.finalize()

    def scores(self) -> Tensor:
        """Return how many of its family are not better than a unit, as a share."""
        slots = self.groups.channels.slots
        filters = {
            layer.weight: (self.parameters[layer.weight].abs(), dim, layer.outputs)
            for layer in self.groups.channels.layers
            for dim in (1, 0)  # the outputs of transposed convolutions, and of all others
            if torch.equal(slots.get((layer.weight, dim), torch.tensor([])), layer.outputs)
        }
        norms, families = self._totals(filters.values()).cpu(), self.groups.families
        best_first = norms.argsort(descending=True, stable=True)
        by_family = best_first[families[best_first].argsort(stable=True)]
        sizes = families.bincount()
        first = (sizes.cumsum(0) - sizes)[families[by_family]]
        shares = torch.empty_like(norms)
        shares[by_family] = 1 - (torch.arange(len(norms)) - first) / sizes[families[by_family]].double()
        return shares

    def _choose(self) -> Tensor:
        """Return which units to keep: of each family the largest share that fits."""
        scores = self.scores()
        levels = scores.unique()

        def fits(level: Tensor) -> bool:
            return self.groups.cost_of(scores >= level) <= self._budget

        lowest = levels[bisect_left(range(len(levels) - 1), True, key=lambda i: fits(levels[i]))]
        return self._best(scores, min(self._budget, math.ceil(self.groups.cost_of(scores >= lowest))))


METHODS: dict[str, type[ChannelMethod]] = {"slimming": Slimming, "group_l1": GroupL1, "uniform": Uniform}
"""The methods by name."""
