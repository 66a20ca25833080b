"""AOFP: Ding et al., "Approximated Oracle Filter Pruning for Destructive CNN Width Optimization", 2019."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ..distributed import is_distributed
from ..optim.checks import CutWarning
from ..schedules import real_number, whole_number
from .channels import ChannelGroups
from .labels import along_axis
from .methods import ChannelMethod


class AOFP(ChannelMethod):
    """Search each inner layer for filters that do no damage, by halves, until the budget is met.

    Each layer has a search space S, at first all its filters. In every step a random half of S is off in a second path:
    the layers that read it run twice, and the change of what they make, ||y - y'||^2 / ||y||^2 behind norm (by running
    statistics) and ReLU, is the damage of all filters that were off. Every so many steps, with g = |S| / 2: if the g
    filters of the least mean damage are below the threshold they are silenced for good, and S is all that are left;
    else S becomes these g or, if g is 1, all that are left. Gradients stay as they are.

    A layer is inner if it alone makes its channels. It keeps one; `floor` and `round_to` of the groups do not count.
    What is missing of the budget at the cut goes by damage too.

    Args:
        optimizer, total_steps, model, groups, budget: as of `ChannelMethod`.
        cut: share of the steps after which the search ends; the rest trains what is left.
        every: steps between two decisions of all layers.
        threshold: theta.

    Raises:
        ValueError: as `ChannelMethod`; or inner layers alone cannot meet the budget.

    Warns:
        CutWarning: the search has not met the budget by the cut.
    """

    name: ClassVar[str] = "aofp"
    title: ClassVar[str] = "AOFP"
    kept: Any

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 0.7,
        every: int = 1000,
        threshold: float = 0.01,
        **budget: float,
    ) -> None:
        self.every, self.threshold = whole_number("every", every), real_number("threshold", threshold)
        if self.every < 1 or not 0 <= self.threshold < math.inf:
            raise ValueError(f"every must be at least 1 and threshold at least 0, not {every} and {threshold}")
        super().__init__(optimizer, total_steps, model, groups, cut=cut, **budget)

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        channels, count = self.groups.channels, self.groups.channels.count
        makers = Counter(unit for layer in channels.layers for unit in layer.outputs.unique().tolist())
        inner = torch.tensor([makers[unit] == 1 for unit in range(count)] + [False])  # the last is of what stays
        layers = (layer.outputs[inner[layer.outputs]].unique() for layer in channels.layers)
        self._layers = [units for units in layers if len(units)]
        self._readers = [layer for layer in channels.layers if layer.inputs is not None and inner[layer.inputs].any()]
        self._model, self.kept = model, torch.ones(count, dtype=torch.bool)
        self.damage = torch.full((count,), math.inf, dtype=torch.float64)
        self._search, self._masked, self._watching = list(self._layers), list[tuple[Tensor, Tensor]](), list[Any]()
        self._total = torch.zeros(count, dtype=torch.float64, device=self._silencing[0].device)
        self._draws = torch.zeros(count, dtype=torch.float64)
        self._check_inner(self._without(self._by_damage(), 0))
        self._draw()
        self._watch()

    def _watch(self) -> None:
        """Let the layers that read inner ones run twice from now on."""
        modules: dict[str, Any] = dict(self._model.named_modules(remove_duplicate=False))
        for layer in self._readers:
            module = modules[layer.weight.rpartition(".")[0]]
            norm = modules.get(self.groups.channels.norms.get(layer.weight, "no.").rpartition(".")[0])
            self._watching.append(module.register_forward_hook(self._hook(module, norm, layer.inputs)))

    def _hook(self, reader: nn.Module, norm: Any, inputs: Any) -> Any:
        """Return what measures the damage at a layer, but not at the same one of a copy of the model."""

        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            (given,), off = args, self._off[inputs]
            if module is not reader or not module.training or not off.any():
                return
            part = given * along_axis(~off, given.ndim - 1 if isinstance(module, nn.Linear) else 1, given.ndim).to(
                given
            )
            before, after = (_activated(made, norm) for made in (output, module.forward(part)))
            change = (before - after).square().sum() / before.square().sum().clamp(min=1e-30)
            self._total[inputs[off].unique()] += change.to(self._total)

        return measure

    def _draw(self) -> None:
        """Choose what is off in the second path of the next step: of each search space a half."""
        generator = torch.Generator().manual_seed(self.step)
        self._off = torch.zeros(len(self._draws) + 1, dtype=torch.bool)
        for units in self._search:
            order = torch.randperm(len(units), generator=generator)
            self._off[units[order[: len(units) // 2]]] = True

    def scores(self) -> Tensor:
        """Return the mean damage of each unit when it was last decided about; infinite before."""
        return self.damage

    def _penalize(self) -> None:
        self._draws += self._off[:-1]
        if (self.step + 1) % self.every == 0 and self._search:
            self._decide()

    def _decide(self) -> None:
        if is_distributed():
            dist.all_reduce(self._total)
        self.damage = torch.where(self._draws > 0, self._total.cpu() / self._draws, self.damage)
        search = []
        for layer, units in zip(self._layers, self._search, strict=True):
            half = units[self.damage[units].argsort(stable=True)][: len(units) // 2]
            if harmless := bool((self.damage[half[-1:]] < self.threshold).any()):
                self.kept = self._without(half, self._most)
            search.append(half if len(half) > 1 and not harmless else layer[self.kept[layer]])
        self._search = search if self.groups.cost_of(self.kept) > self._most else []
        self._total.zero_(), self._draws.zero_()
        self._masked = self._cut(self.kept)

    def _without(self, units: Tensor, most: float) -> Tensor:
        """Return what is kept without these units, the first ones first, as many as the cost needs; each layer one."""
        kept: Tensor = self.kept.clone()
        layer_of = {int(unit): layer for layer in self._layers for unit in layer}
        for unit in units.tolist():
            if self.groups.cost_of(kept) <= most:
                break
            kept[unit] &= kept[layer_of[unit]].sum() == 1
        return kept

    def _by_damage(self) -> Tensor:
        order = self.damage.argsort(stable=True)
        return order[torch.isin(order, torch.cat([order[:0], *self._layers]))]

    def _choose(self) -> Tensor:
        kept = self._without(self._by_damage(), self._most)
        if more := int(self.kept.sum() - kept.sum()):
            text = f"{more} channels go that the search has not chosen, so it costs accuracy: search longer"
            warnings.warn(text, CutWarning, stacklevel=3)
        return kept

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        super()._after_step()
        for param, gone in self._masked:
            param.masked_fill_(gone, 0)
        self._draw()

    def _silence(self, kept: Tensor) -> None:
        for handle in self._watching:
            handle.remove()
        self._watching, self._search = [], []
        super()._silence(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the training depends on, the search too."""
        own = {"damage": self.damage, "search": self._search, "total": self._total, "draws": self._draws}
        return super().state_dict() | own

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with its search; see `ChannelMethod`."""
        super().load_state_dict(state)
        self.damage, self._search = state["damage"].cpu().clone(), [units.cpu() for units in state["search"]]
        self._total.copy_(state["total"]), self._draws.copy_(state["draws"])
        self._masked = self._cut(state["kept"])
        self._draw()
        if not (state["is_final"] or self._watching):
            self._watch()


def _activated(made: Tensor, norm: Any) -> Tensor:
    """Return what a layer's outputs become behind its norm, by running statistics, and ReLU."""
    if norm is not None:
        made = F.batch_norm(made, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return F.relu(made).float()
