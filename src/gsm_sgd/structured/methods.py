"""What GSM's choice of channels is compared with: slimming, group lasso and uniform magnitude."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from ..budget import SHARES, Budget
from ..masks import Masks, mask_gradients
from ..names import by_bare_name
from ..schedules import real_number, whole_number
from .channels import ChannelGroups
from .graph import STAYS
from .labels import along_axis


class ChannelMethod:
    """Train with a penalty, silence channels once, and train the rest: what these methods share.

    A method works inside `optimizer.step()`: its penalty is added to the gradients right before each step, and silent
    channels are zero after each step. A subclass defines `name`, `scores` and, unless it has no penalty, `_penalize`.

    Args:
        optimizer: any of torch's kind that trains all parameters that silence channels.
        total_steps: optimizer steps of the whole training.
        model: what has been traced.
        groups: its channels.
        cut: share of the steps after which channels are silenced; 0 does so at once, and 1 leaves it to `finalize()`.
        budget: one of `macs`, `parameters`, `channels` and `latency`: a share of what the dense net costs.

    Attributes:
        step: how many steps have been taken.
        kept: bool, which units are kept; None before this is known.

    Raises:
        ValueError: an argument is out of range, the budget cannot be met, the model is not what was traced, or the
            optimizer does not train a parameter that silences channels. Nothing has changed.

    Example:
        >>> groups = ChannelGroups.trace(model, images)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> method = Slimming(optimizer, total_steps, model, groups, macs=0.5)
        >>> ...the usual loop...
        >>> slim = remove_channels(model, groups, method.finalize(), optimizer)
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""  # in words, if those are others

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 0.7,
        **budget: float,
    ) -> None:
        self.total_steps, self.cut = whole_number("total_steps", total_steps), real_number("cut", cut)
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, not {self.total_steps}")
        if not 0 <= self.cut <= 1:
            raise ValueError(f"cut is a share, from 0 to 1, not {self.cut:g}")
        if len(budget) != 1 or not set(budget) <= set(SHARES):
            raise ValueError(f"give one of {', '.join(SHARES)}, not {' and '.join(budget) or 'none'}")
        self.budget = Budget.of(**budget)  # type: ignore[arg-type]
        self.groups = groups.for_budget(self.budget.kind).by_score().over(list(groups.channels.rows))
        self.parameters = self._find(model, optimizer)
        self._silencing = [self.parameters[name] for name in groups.channels.rows]
        self._most = self.budget.num_kept(self.groups.total(self._silencing))
        self.groups.check_budget(self._most)
        self.step = 0
        self.kept: Tensor | None = None
        self._gone: list[tuple[Tensor, Tensor]] = []
        self._prepare(model, optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self.restart == 0:
            self.finalize()

    @classmethod
    def settings(cls) -> dict[str, Any]:
        """Return the settings of this method, with their defaults."""
        arguments = signature(cls).parameters.values()
        return {argument.name: argument.default for argument in arguments if argument.kind is argument.KEYWORD_ONLY}

    @property
    def restart(self) -> int | None:
        """The step of the cut, at which a learning rate schedule may start again; None if the cut ends the training."""
        step = round(self.cut * self.total_steps)
        return step if step < self.total_steps else None

    def _find(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return the model's parameters by the names that were traced."""
        parameters = self._parameters_of(model)
        self.groups.check_model(parameters)
        self._check_trained({name: parameters[name] for name in self.groups.channels.rows}, optimizer)
        return parameters

    @staticmethod
    def _parameters_of(model: nn.Module) -> dict[str, Tensor]:
        return by_bare_name(dict(model.named_parameters()))

    @staticmethod
    def _check_trained(silencing: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        trained = {param for group in optimizer.param_groups for param in group["params"] if param.requires_grad}
        for name, param in silencing.items():
            if param not in trained:
                raise ValueError(f"{name!r} silences channels, but the optimizer does not train it")

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find what the method works on, or raise ValueError before it has touched anything."""

    def _check_inner(self, fewest: Tensor) -> None:
        """Raise ValueError if the fewest channels to which inner layers can come cost more than the budget."""
        if (least := self.groups.cost_of(fewest)) > self._most:
            share = least / self.groups.total(self._silencing)
            raise ValueError(f"inner layers alone can only come to {share:.4g} of the dense net's cost")

    def scores(self) -> Tensor:
        """Return the score of each unit as it is now; the units with the lowest go."""
        raise NotImplementedError

    def _penalize(self) -> None:
        """Add to the gradients what makes units small."""

    def _choose(self) -> Tensor:
        """Return which units to keep."""
        return self.groups._select(self._checked_scores(), self._most)

    def _checked_scores(self) -> Tensor:
        """Return the scores, or raise ValueError if one is not finite."""
        scores = self.scores().cpu()
        if not scores.isfinite().all():
            raise ValueError("weights are not finite, so nothing can be kept by their size: training has diverged")
        return scores

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
        if self.step == self.restart:
            self.finalize()
        if not self._gone:
            self._penalize()
        self.step += 1

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        for param, gone in self._gone:
            param.masked_fill_(gone.to(param.device), 0)

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _identity(self) -> dict[str, Any]:
        settings = {key: getattr(self, key) for key in self.settings()}
        return {"method": self.name, **settings, "total_steps": self.total_steps, self.budget.kind: self.budget.value}

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the training depends on besides the model and the optimizer."""
        return {**self._identity(), "step": self.step, "kept": self.kept, "is_final": bool(self._gone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; those of the model and the optimizer are to be loaded before.

        Raises:
            ValueError: it is of another method, another model, or has other settings.
        """
        for key, ours in self._identity().items():
            if state.get(key) != ours:
                raise ValueError(f"the state was saved with {key} {state.get(key)}, which is {ours} here")
        kept = state["kept"]
        if kept is not None and len(kept) != self.groups.channels.count:
            raise ValueError(f"the state is of a model of {len(kept)} units, not {self.groups.channels.count}")
        if self._gone:  # let these move again
            self._handles.pop().remove()
        self.step, self.kept, self._gone = state["step"], kept, []
        if state["is_final"]:
            self._silence(kept)

    def _totals(self, parts: Iterable[tuple[Tensor, int, Tensor]]) -> Tensor:
        """Return a sum for each unit over parts, each a tensor, a dimension of it, and the units along that."""
        count = self.groups.channels.count
        totals = torch.zeros(count + 1, dtype=torch.float64, device=self._silencing[0].device)
        for values, dim, units in parts:
            rows = values.detach().double().movedim(dim, 0).reshape(len(units), -1).sum(1)
            totals.index_add_(0, units.to(totals.device) % len(totals), rows)  # STAYS goes to the last place
        return totals[:-1]


class Penalized(ChannelMethod):
    """A method with a penalty of some strength."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 0.7,
        strength: float = 1e-4,
        **budget: float,
    ) -> None:
        self.strength = real_number("strength", strength)
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength must be finite and at least 0, not {strength}")
        super().__init__(optimizer, total_steps, model, groups, cut=cut, **budget)


class Slimming(Penalized):
    """L1 on the scales gamma of batch norm, of which the smallest go: the gradient of gamma gets lambda sign(gamma).

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017. Where channels are added,
    the sum of their |gamma| counts.

    Args:
        optimizer, total_steps, model, groups, cut, budget: as of `ChannelMethod`.
        strength: lambda; the paper takes 1e-4 or 1e-5.

    Raises:
        ValueError: as `ChannelMethod`, or channels have no such scale.
    """

    name: ClassVar[str] = "slimming"
    title: ClassVar[str] = "network slimming"

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
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


class GroupL1(Penalized):
    """Group lasso over all that belongs to a unit, of which those with the smallest norm go.

    These are its filters, norms and biases, and the slices that followers read it with (Fang et al., "DepGraph: Towards
    Any Structural Pruning", 2023). The gradient of a weight w gets lambda w / ||group|| for each group that w is in.

    Args:
        optimizer, total_steps, model, groups, cut, budget: as of `ChannelMethod`.
        strength: lambda.

    Raises:
        ValueError: as `ChannelMethod`.
    """

    name: ClassVar[str] = "group_l1"
    title: ClassVar[str] = "group lasso"

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
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
                scale = along_axis(inverse[units.to(inverse.device)], dim, weight.ndim).to(weight)
                weight.grad.add_(weight * scale, alpha=self.strength)


class Uniform(ChannelMethod):
    """The same share of every layer, of the filters with the largest L1 norm, chosen once.

    Li et al., "Pruning Filters for Efficient ConvNets", 2017. Where channels are added, the sum of their filters' norms
    counts. By default channels are silenced at once, for a net that is trained already; what follows retrains the rest.

    Args:
        optimizer, total_steps, model, groups, cut, budget: as of `ChannelMethod`.

    Raises:
        ValueError: as `ChannelMethod`.
    """

    name: ClassVar[str] = "uniform"
    title: ClassVar[str] = "uniform magnitude of filters"

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 0.0,
        **budget: float,
    ) -> None:
        super().__init__(optimizer, total_steps, model, groups, cut=cut, **budget)

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
        scores = self._checked_scores()
        levels = scores.unique()

        def fits(level: Tensor) -> bool:
            return self.groups.cost_of(scores >= level) <= self._most

        lowest = levels[bisect_left(range(len(levels) - 1), True, key=lambda i: fits(levels[i]))]
        return self.groups._select(scores, min(self._most, math.ceil(self.groups.cost_of(scores >= lowest))))
