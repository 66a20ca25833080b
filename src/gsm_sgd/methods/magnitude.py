"""Magnitude pruning: all at once, step by step, or in alternation."""

from typing import ClassVar, get_args

import torch
from torch import Tensor

from ..masks import Masks
from ..schedules import CURVES
from .layers import Layers, by_magnitude, check_layers, divide
from .method import Method, check_every, check_share


class Dense(Method):
    """The dense control: all weights are kept, so the budget has to be all of them."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "dense net"

    def check(self) -> None:
        """Check the budget."""
        if self.kept != self.num_prunable:
            raise ValueError(f"dense keeps all {self.num_prunable} weights, not {self.kept}: set compression to 1")


class ByMagnitude(Method):
    """What methods share that keep the largest |w|.

    Args:
        layers: whether the largest are those of the whole model, "global", or of each layer, "uniform" or "erk".
    """

    layers: Layers = "global"

    def check(self) -> None:
        """Check the settings."""
        check_layers(self.layers, get_args(Layers))
        if self.layers != "global":
            divide({key: weight.shape for key, weight in self.weights.items()}, self.kept, self.layers)

    def final(self) -> Masks:
        """Return masks of the Q largest |w|."""
        return by_magnitude(self.weights, self.kept, self.layers)


class OneShot(ByMagnitude):
    """One-shot magnitude pruning (Han et al., 2015): train, cut to the largest |w|, train on with the masks.

    The learning rate schedule should start again at the cut (Renda et al., 2020): see `restart`.

    Args:
        cut: share of the steps after which to cut; 0 cuts at once, which is for nets that are trained already.
        layers: "global" cuts the smallest of the whole model, "uniform" and "erk" those of each layer.
    """

    name: ClassVar[str] = "one_shot"
    title: ClassVar[str] = "one-shot magnitude"
    cut: float = 0.5

    def check(self) -> None:
        """Check the settings."""
        super().check()
        self.cut = check_share("cut", self.cut)

    @property
    def restart(self) -> int | None:
        """The step of the cut."""
        return round(self.cut * self.total_steps)

    def start(self) -> Masks | None:
        """Cut at once if so asked."""
        return self.final() if self.restart == 0 else None

    def after_step(self) -> Masks | None:
        """Cut once."""
        return self.final() if self.step == self.restart else None


class Gradual(ByMagnitude):
    """Gradual magnitude pruning (Zhu and Gupta, 2017): every few steps the smallest |w| are cut, for good.

    After a share x of the time from `begin` to `end` the sparsity is s (1 - (1 - x)^3) of the final sparsity s.

    Args:
        begin: share of the steps after which pruning begins.
        end: share of the steps after which the final sparsity is reached.
        every: steps between two cuts.
        layers: "global" cuts the smallest of the whole model, "uniform" and "erk" those of each layer.
    """

    name: ClassVar[str] = "gradual"
    title: ClassVar[str] = "gradual magnitude"
    begin: float = 0.0
    end: float = 0.4
    every: int = 50

    def check(self) -> None:
        """Check the settings."""
        super().check()
        self.begin, self.end = check_share("begin", self.begin), check_share("end", self.end)
        self.every = check_every(self.every)
        if self.begin > self.end:
            raise ValueError(f"begin must not be above end, which {self.begin:g} is with end {self.end:g}")

    def start(self) -> Masks | None:
        """Cut at once if pruning is to end before it begins."""
        return self._cut_after(0)

    def after_step(self) -> Masks | None:
        """Cut if that is due."""
        return self._cut_after(self.step)

    def _cut_after(self, step: int) -> Masks | None:
        """Return masks of the density that the cubic rule gives after so many steps, if a cut is due."""
        begin, end = round(self.begin * self.total_steps), round(self.end * self.total_steps)
        if not begin <= step <= end or ((step - begin) % self.every and step != end):
            return None
        share = (step - begin) / (end - begin) if end > begin else 1.0
        cut = round((self.num_prunable - self.kept) * CURVES["cubic"](share))
        return by_magnitude(self.weights, self.num_prunable - cut, self.layers) if cut else None


class ACDC(ByMagnitude):
    """AC/DC (Peste et al., 2021): phases of the largest |w| alone alternate with dense ones; the last is sparse.

    In a dense phase weights that were cut begin at zero, and all of the optimizer's momentum starts from zero.
    The defaults are the paper's on ImageNet: of 100 epochs 10 to begin with, phases of 5, a last dense one of 10, and
    15 sparse ones in the end.

    Args:
        warm_up: share of the steps of the dense phase that comes first.
        phase: share of the steps of each phase on the way.
        last_dense: share of the steps of the last dense phase.
        last_sparse: share of the steps of the last phase, whose masks are the final ones.
        layers: "global" keeps the largest of the whole model, "uniform" and "erk" those of each layer.
    """

    name: ClassVar[str] = "ac_dc"
    title: ClassVar[str] = "AC/DC"
    warm_up: float = 0.1
    phase: float = 0.05
    last_dense: float = 0.1
    last_sparse: float = 0.15

    def check(self) -> None:
        """Check the settings."""
        super().check()
        for key in ("warm_up", "phase", "last_dense", "last_sparse"):
            setattr(self, key, check_share(key, getattr(self, key)))
        if self.warm_up + self.last_dense + self.last_sparse > 1:
            raise ValueError("warm_up, last_dense and last_sparse must not be more than 1 together")
        if round(self.phase * self.total_steps) < 1:
            raise ValueError(f"a phase of {self.phase:g} is less than one of {self.total_steps} steps")

    def is_sparse(self, step: int) -> bool:
        """Return whether a step, counted from 0, falls into a sparse phase."""
        total = self.total_steps
        first, length = round(self.warm_up * total), round(self.phase * total)
        last_sparse = total - round(self.last_sparse * total)
        last_dense = last_sparse - round(self.last_dense * total)
        if not first <= step < last_dense:
            return step >= last_sparse
        return (step - first) // length % 2 == 0

    def start(self) -> Masks | None:
        """Cut at once if there is no warm-up."""
        return self.final() if self.is_sparse(0) else None

    def after_step(self) -> Masks | None:
        """Cut, or let all weights be active, where a phase begins."""
        now, before = self.is_sparse(self.step), self.is_sparse(self.step - 1)
        if now == before or self.step >= self.total_steps:
            return None
        if now:
            return self.final()
        for parameter, state in self.optimizer.state.items():
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.zero_()
        return Masks({key: torch.ones_like(weight, dtype=torch.bool) for key, weight in self.weights.items()})
