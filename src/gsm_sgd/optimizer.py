"""GSM: Global Sparse Momentum SGD as a `torch.optim.Optimizer`.

The rule, for a prunable weight tensor W with momentum Z (Ding et al., NeurIPS 2019):

    T  = |W * dL/dW|                                importance
    B  = 1 for the Q largest T of the whole model   active; the others are passive
    Z <- beta Z + eta W + B * dL/dW
    W <- W - alpha Z

alpha learning rate (`lr`), beta `momentum`, eta `weight_decay`; for passive weights eta is `passive_decay`.
B is chosen anew at every step, so a passive weight can come back. Q may fall to its final value over the first steps;
before the cut B may stay as it is for some steps, in which the passive weights fade; and the cut may come before the
last steps, which then train the kept weights alone.
"""

import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .budget import PassiveWeight, cubic_compression
from .fused import FusedRule
from .groups import check_hyperparameters, deadline, passive_decay, vanishes
from .masks import Masks, apply_masks_, is_prunable, magnitude_masks, named_in, prunable_in
from .rule import EagerRule, Kernel, Part, all_params, laid_out_as
from .selection import Cut, NotFiniteError, ScoresOf, check_compression, find_cut, kept_weights
from .sharded import (
    Shards,
    cut_out,
    grad_here,
    here,
    is_dtensor,
    refuse_differing_copies,
    refuse_disagreement,
    several_processes,
    spread_as,
)

_OF_THE_MODEL = (
    *("compression", "total_steps", "shrink_to", "compression_schedule", "ramp_steps", "fade_steps", "cut_step"),
    *("steps", "fading", "fixed"),
)
_OF_A_GROUP = ("lr", "momentum", "weight_decay", "passive_decay", "nesterov", "prunable")


class NonFiniteGradientError(ArithmeticError):
    """A prunable parameter has an infinite or NaN gradient; the step that met it changed nothing."""


class GSM(Optimizer):
    """Train so that all prunable weights but exactly Q = floor(N / C) shrink to nothing.

    A drop-in for `torch.optim.SGD`, which it equals bit for bit at `compression=1`. Call `finalize()` when
    training is over to cut the passive weights; whatever is trained after that keeps them at exactly zero.

    Args:
        params: parameters, named parameters, or groups of either, as for `torch.optim.SGD`. The group key
            `prunable` says whether the rule applies to a group; by default it applies to each parameter with
            `ndim >= 2`. The others are trained by plain momentum SGD. Leave frozen parameters out: without a
            gradient a prunable one is passive, so it decays.
        lr: learning rate alpha.
        compression: C, one number for the whole model: of N prunable weights floor(N / C) are kept.
        momentum: beta, in [0, 1). The higher, the faster passive weights shrink: a weight that stays passive
            for k steps follows w_0 exp(-alpha eta k / (1 - beta)).
        weight_decay: eta, coupled L2 as in `torch.optim.SGD`.
        nesterov: look ahead along the momentum, as in `torch.optim.SGD`.
        passive_decay: eta of passive weights; None means `weight_decay`, the paper's rule. "auto" chooses it anew at
            every step from the learning rate, so that a weight that is passive from the end of the ramp on has shrunk
            to `shrink_to` of its value by the cut; with a fade, by its beginning, and in the fade once more. It is
            never below `weight_decay`, and not so high that a return to the highest learning rate would do harm: where
            the rate falls very low before the cut, weights shrink less (`passive_shrinkage` tells).
        total_steps: how many steps will be taken, for "auto".
        shrink_to: what "auto" aims at. It is low since a weight that turns passive later has less time.
        compression_schedule: "constant"; "cubic", which raises the compression ratio from 1 to C over the first
            `ramp_steps` (`budget.cubic_compression`); or a function of the number of steps taken, the compression
            ratio of the next. A function is not in `state_dict()`.
        ramp_steps: how many steps the cubic rise takes; None means two fifths of those up to the cut or the end.
        fade_steps: how many steps before the cut, or before `total_steps`, choose nothing: what is kept is fixed when
            they begin, the Q largest |W|, and all else only decays. Without them a weight that is passive at the cut
            may have been active shortly before, so that the cut costs accuracy however fast passive weights shrink.
        cut_step: the step after so many begins with `finalize()`; None means that only you call it.
        foreach, fused: which implementation to use; None is the quickest that needs no compiler. `fused=True` is
            compiled at the first step, in up to minutes for a large model, and then needs almost no memory of its
            own; other values are handed on to torch's SGD. None of it changes which weights are active.
        check_ranks: whether to compare, before each step, weights and gradients over all processes of the default
            process group, for finding mistakes: under DistributedDataParallel they are the same bits on each.

    Raises:
        ValueError: a hyperparameter is out of range, nothing is prunable, or a parameter is given twice.
            With `fused=True` a step raises RuntimeError where nothing can be compiled.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        compression: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        passive_decay: float | Literal["auto"] | None = None,
        total_steps: int | None = None,
        shrink_to: float = 1e-6,
        compression_schedule: Literal["constant", "cubic"] | Callable[[int], float] = "constant",
        ramp_steps: int | None = None,
        fade_steps: int = 0,
        cut_step: int | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        check_ranks: bool = False,
    ) -> None:
        check_compression(compression)
        if foreach and fused:
            raise ValueError("foreach and fused cannot both be True")
        if compression_schedule != "cubic":
            if ramp_steps:
                raise ValueError("ramp_steps is for compression_schedule='cubic' only")
            ramp_steps = 0
        elif ramp_steps is None and total_steps is not None:
            ramp_steps = round(0.4 * (total_steps if cut_step is None else min(total_steps, cut_step)))
        self._schedule = compression_schedule if callable(compression_schedule) else None
        defaults = {
            "lr": lr,
            "compression": compression,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "passive_decay": passive_decay,
            "total_steps": total_steps,
            "shrink_to": shrink_to,
            "compression_schedule": "custom" if self._schedule else compression_schedule,
            "ramp_steps": ramp_steps,
            "fade_steps": fade_steps,
            "cut_step": cut_step,
            "steps": 0,
            "fading": False,
            "fixed": False,
            "highest_lr": 0.0,
            "passive_weight": tuple(PassiveWeight()),  # one since the ramp's end, or the fade's beginning, 1 then
            "prunable": None,
            "foreach": foreach,
            "fused": fused,
            "check_ranks": check_ranks,
        }
        self._choose_rule(foreach, fused)
        self._shards: Shards | None = None
        self._agreed = False  # whether all processes are known to go by the same numbers
        super().__init__(params, defaults)
        if self.num_prunable == 0:
            raise ValueError("nothing to prune: GSM needs a parameter with ndim >= 2, or a prunable group")
        kept_weights(self.num_prunable, compression)
        slow = [group for group in self.param_groups if _governs(group) and not vanishes(group)]
        if compression > 1 and slow:
            if slow[0]["passive_decay"] != "auto":
                reason = "passive weights never shrink where weight_decay and passive_decay are both 0"
            elif slow[0]["fade_steps"]:
                reason = "fade_steps are too few for passive weights to shrink; take more, or a lower momentum"
            else:
                reason = "there are too few steps for passive weights to shrink; take more, or a lower momentum"
            warnings.warn(f"the cut will remove weights that still matter: {reason}", UserWarning, stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.SGD` does.

        Raises:
            ValueError: a hyperparameter is out of range, a parameter is given twice, `compression` or its schedule
                is not the other groups', or the group is prunable and `finalize()` has already chosen what is kept.
        """
        group = {**self.defaults, **param_group}
        params = group["params"]
        if not isinstance(params, Tensor | set):  # a set has no order: torch says so
            group["params"] = params = list(params)
            tensors = [param[1] if isinstance(param, tuple) else param for param in params]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError("a parameter is given twice")
        check_hyperparameters(group)
        group["highest_lr"] = float(group["lr"])  # a scheduler that begins lower comes later
        if self.param_groups:
            first = self.param_groups[0]
            for key in ("steps", "fading", "fixed"):
                group[key] = first[key]
            other = next((key for key in _OF_THE_MODEL if group[key] != first[key]), None)
            if other:
                raise ValueError(f"{other} is one for the whole model, groups cannot differ in it")
        super().add_param_group(group)
        if self._fixed and _governs(self.param_groups[-1]):
            del self.param_groups[-1]
            raise ValueError("prunable parameters cannot be added once it is fixed what is kept")

    @property
    def num_prunable(self) -> int:
        """N, the number of weights that the rule governs."""
        return sum(p.numel() for group in self.param_groups for p in group["params"] if is_prunable(p, group))

    @property
    def nonzeros(self) -> int:
        """Q = floor(N / C): how many weights `finalize()` keeps, and how many are active once the ramp is over."""
        return kept_weights(self.num_prunable, self.param_groups[0]["compression"])

    @property
    def compression(self) -> float:
        """The compression ratio of the next step: that of the schedule, and C once it is fixed what is kept.

        Raises:
            ValueError: a schedule's function returns a number that is no compression ratio.
        """
        group = self.param_groups[0]
        if group["compression_schedule"] == "constant" or self._fixed:
            return float(group["compression"])
        if group["compression_schedule"] == "cubic":
            return cubic_compression(group["compression"], group["steps"], group["ramp_steps"])
        if self._schedule is None:
            raise ValueError("the state is of a compression_schedule that is a function: give it to GSM as well")
        compression = float(self._schedule(group["steps"]))
        check_compression(compression)
        return compression

    @property
    def passive_shrinkage(self) -> float:
        """What share is left of a weight that has been passive since the ramp's end or, in the fade, its beginning.

        The largest of all groups.
        """
        return max(abs(float(group["passive_weight"][0])) for group in self.param_groups if _governs(group))

    @property
    def memory(self) -> Tensor:
        """What is kept from one step to the next beside the state: an importance for each weight, or nothing."""
        return self._rule.memory

    @property
    def finalized(self) -> bool:
        """Whether `finalize()` has cut the passive weights."""
        return self._fixed and not self.param_groups[0]["fading"]

    @property
    def masks(self) -> Masks:
        """What is kept, as `finalize()` returns it: fixed when the fade begins, else by the cut; empty before."""
        prunable: dict[Any, Tensor] = dict(prunable_in(self)) if self._fixed else {}
        return {key: self.state[param]["mask"].clone() for key, param in prunable.items()}

    @property
    def _fixed(self) -> bool:
        """Whether it is fixed what is kept."""
        return bool(self.param_groups and self.param_groups[0]["fixed"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once and return what `closure`, if given, returned.

        A prunable parameter without a gradient is passive in this step: it only decays; in the fade, as if its
        gradient were zero. Where nothing is passive (compression 1, or after `finalize()`) it stays as it is, as with
        `torch.optim.SGD`. If no parameter has a gradient, nothing happens.

        Raises:
            NonFiniteGradientError: a prunable parameter's gradient is not finite. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(grad.is_sparse for grad in grads):
            raise RuntimeError("GSM does not support sparse gradients")
        governed = [param for group in self.param_groups for param in group["params"] if is_prunable(param, group)]
        chosen_from = [param for param in governed if param.grad is not None]
        shards = self._shards_of(chosen_from)
        self._refuse_disagreement(shards)
        if not grads:
            return loss
        check_finite = partial(_refuse_nonfinite_gradients, self, chosen_from, shards)
        self._cut_or_fade_if_due(check_finite)
        num_prunable = sum(param.numel() for param in governed)
        compression = self.compression
        kept = kept_weights(num_prunable, compression)
        ramp_is_over = compression >= self.param_groups[0]["compression"]
        all_active, fixed, finalized = kept == num_prunable, self._fixed, self.finalized
        decays = [passive_decay(group) for group in self.param_groups]
        plain, ruled, still = self._parts(decays, all_active, fixed, finalized)
        if all_active or fixed:
            check_finite()
        if ruled and fixed:
            owners = [owner for part in ruled for owner in part.owners]
            self._rule.update_masked_(ruled, [here(self.state[owner]["mask"]) for owner in owners])
        elif ruled:
            if len({param.device for param in all_params(ruled)}) > 1:
                raise ValueError("GSM needs all prunable parameters on one device")
            available = sum(param.numel() for param in chosen_from)
            self._rule.update_(ruled, partial(_find_cut, min(kept, available), len(chosen_from), shards), check_finite)
        # Nothing passive: this is torch.optim.SGD, with the implementation that it would choose, to the bit.
        for part in plain:
            kernel = self._kernel if all_active else self._kernel.or_quickest(part.params)
            kernel.sgd_(part, part.grads, part.weight_decay)
        for part in still:
            self._kernel.sgd_(part, part.grads, part.passive_decay)
        for part in (*plain, *ruled, *still):
            self._remember(part)
        for group, decay in zip(self.param_groups, decays, strict=True):
            if ramp_is_over and not finalized:
                passive = PassiveWeight(*group["passive_weight"])
                group["passive_weight"] = tuple(
                    passive.step(float(group["lr"]), decay, group["momentum"], group["nesterov"])
                )
            group["highest_lr"] = max(group["highest_lr"], float(group["lr"]))
            group["steps"] += 1
        return loss

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Cut: set all prunable weights but the Q largest |W| of the whole model to zero, for good.

        Steps taken afterwards train the kept weights alone. A second call changes nothing. Of several processes that
        train one model all have to call.

        Returns:
            Bool masks, True where a weight is kept, exactly Q in all: keyed by parameter name, or by position
            among the prunable parameters if the optimizer was given no names.
        """
        cut_already = self.finalized
        self._fix_what_is_kept()
        masks = self.masks
        if not cut_already:
            prunable: dict[Any, Tensor] = dict(prunable_in(self))
            apply_masks_(prunable, masks)
            for key, param in prunable.items():
                if "momentum_buffer" in self.state[param]:  # it would push a weight that was cut away from zero
                    here(self.state[param]["momentum_buffer"]).masked_fill_(~here(masks[key]), 0)
            for group in self.param_groups:
                group["fading"] = False
        return masks

    def _cut_or_fade_if_due(self, check_finite: Callable[[], None]) -> None:
        """Do what is to be done before a step that is the first after the cut, or of the fade."""
        group = self.param_groups[0]
        if self.finalized:
            return
        if group["cut_step"] is not None and group["steps"] >= group["cut_step"]:
            check_finite()
            self.finalize()
        elif group["fade_steps"] and not group["fading"] and group["steps"] >= deadline(group):
            check_finite()
            self._fix_what_is_kept()
            for group in self.param_groups:
                group["fading"], group["passive_weight"] = True, tuple(PassiveWeight())

    def _fix_what_is_kept(self) -> None:
        """Put masks of the Q largest |W| into the state, unless they are there."""
        if not self._fixed:
            prunable: dict[Any, Tensor] = dict(prunable_in(self))
            masks = magnitude_masks(prunable, self.param_groups[0]["compression"])
            for key, param in prunable.items():
                self.state[param]["mask"] = masks[key]
            for group in self.param_groups:
                group["fixed"] = True
            self._rule.memory = torch.empty(0)  # nothing is chosen any more

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: beside the state, a compression schedule that is a function."""
        return {**super().__getstate__(), "_schedule": self._schedule}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as every optimizer does, with a mask of each prunable parameter that has been updated.

        Until it is fixed what is kept the masks keep everything. They are there because torch's distributed
        checkpoints load only what the state already has a place for.
        """
        state: dict[str, Any] = super().state_dict()
        if not self._fixed:
            governed = [is_prunable(param, group) for group in self.param_groups for param in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for number, (param, by_rule) in enumerate(zip(params, governed, strict=True)):
                if by_rule and number in state["state"]:
                    mask = torch.ones_like(param, dtype=torch.bool)
                    state["state"][number] = {**state["state"][number], "mask": mask}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; torch casts loaded masks to the parameters' dtype, here they are bool again.

        What is kept for a parameter is spread over processes as the parameter is, however it was when it was saved.

        Raises:
            ValueError: it is of another shape, and so the state is another model's. Nothing has changed.
        """
        for param, param_state in state["state"].items():
            for key, what in (("momentum_buffer", "momentum"), ("mask", "mask")):
                if isinstance(param_state.get(key), Tensor):
                    param_state[key] = _spread_as(param, param_state[key], what)
        super().__setstate__(state)
        masked = any("mask" in param_state for param_state in self.state.values())
        for group in self.param_groups:
            group.setdefault("fixed", masked)  # states of before there was this key have masks only then
            for key, default in self.defaults.items():
                group.setdefault(key, default)
        for param_state in self.state.values():
            if "mask" in param_state:
                if self._fixed:
                    param_state["mask"] = param_state["mask"].bool()
                else:
                    del param_state["mask"]
        self._shards, self._agreed = None, False
        if not hasattr(self, "_rule"):  # a copy, or unpickled: none of it is state
            self._choose_rule(self.defaults["foreach"], self.defaults["fused"])

    def _choose_rule(self, foreach: bool | None, fused: bool | None) -> None:
        self._kernel = Kernel(foreach, fused)
        self._rule = FusedRule() if fused else EagerRule(self._kernel)

    def _parts(
        self, decays: list[float], all_active: bool, fixed: bool, finalized: bool
    ) -> tuple[list[Part], list[Part], list[Part]]:
        """Return what is to be updated by plain SGD, by the rule, and, having no gradient, by decay alone."""
        kinds: tuple[list[Part], list[Part], list[Part]] = [], [], []
        for group, decay in zip(self.param_groups, decays, strict=True):
            sides: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
            for param in group["params"]:
                by_rule = is_prunable(param, group) and not all_active
                if param.grad is not None:
                    sides[by_rule].append(param)
                elif by_rule and not finalized:
                    sides[1 if fixed else 2].append(param)
            for parts, params in zip(kinds, sides, strict=True):
                if params:
                    parts.append(self._part(params, group, decay))
        return kinds

    def _part(self, params: list[Tensor], group: dict[str, Any], decay: float) -> Part:
        """Return what is needed to update parameters of a group, whose passive weights have this decay."""
        parts = [here(param) for param in params]
        momenta: list[Tensor | None] = [None for _ in params]
        if group["momentum"]:
            momenta = [*self._momenta(params, parts)]
        settings = (group["lr"], group["momentum"], group["weight_decay"], decay, group["nesterov"])
        return Part(params, parts, [grad_here(param) for param in params], momenta, *settings)

    def _momenta(self, params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """Return the momenta of parts of parameters, zeros where there are none yet. The state stays as it is."""
        found = [self.state[p].get("momentum_buffer") if p in self.state else None for p in params]
        momenta = [torch.zeros_like(p) if z is None else here(z) for p, z in zip(parts, found, strict=True)]
        return laid_out_as(parts, momenta)  # a state from elsewhere may lie in memory in another order

    def _remember(self, part: Part) -> None:
        """Put the momenta of parameters that have been updated into the state."""
        for owner, momentum in zip(part.owners, part.momenta, strict=True):
            state = self.state[owner]
            if momentum is not None and (
                "momentum_buffer" not in state or here(state["momentum_buffer"]) is not momentum
            ):
                state["momentum_buffer"] = spread_as(owner, momentum)

    def _shards_of(self, params: list[Tensor]) -> Shards | None:
        """Return which parts of parameters this process holds, or None if it holds all of them."""
        if not any(is_dtensor(param) for param in params):
            return None
        if self._shards is None or not self._shards.are_of(params):
            self._shards = Shards(params)
        return self._shards

    def _refuse_disagreement(self, shards: Shards | None) -> None:
        """Raise ValueError on every process if they would not do the same in this step, as far as it is looked at."""
        group = self.param_groups[0]
        check = group["check_ranks"] and several_processes()
        if not check and (shards is None or self._agreed):
            return
        params = [param for group in self.param_groups for param in group["params"]]
        device = here(group["params"][0]).device if shards is None else shards.device
        counts = {"parameters": len(params), "parameter groups": len(self.param_groups)}
        settings = {f"the number of {what}": float(count) for what, count in counts.items()}
        settings |= {"the number of prunable weights": self.num_prunable, "compression": self.compression}
        refuse_disagreement(settings, device)  # first how many there are: else the next call would not fit
        refuse_disagreement(_settings(self), device)
        self._agreed = group["compression_schedule"] != "custom"
        if check:
            refuse_differing_copies(named_in(self) or {f"number {i}": param for i, param in enumerate(params)})


def _settings(optimizer: Optimizer) -> dict[str, float]:
    """Return all settings of all groups as numbers, for comparing them."""
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        where = f" of group {number}" if number else ""
        for key in (*_OF_THE_MODEL, *_OF_A_GROUP):
            value = zlib.crc32(group[key].encode()) if isinstance(group[key], str) else group[key]
            found[key + where] = -1.0 if value is None else float(value)
    return found


def _spread_as(param: Tensor, tensor: Tensor, what: str) -> Tensor:
    """Return a tensor that a state has for a parameter, spread over processes as the parameter is."""
    part, shape = cut_out(param, tensor), here(param).shape
    if part.shape != shape:
        raise ValueError(
            f"a {what} has shape {tuple(part.shape)}, its parameter {tuple(shape)}: "
            "the state that was loaded is of another model"
        )
    return spread_as(param, part)


def _governs(group: dict[str, Any]) -> bool:
    """Return whether the rule governs any parameter of a group."""
    return any(is_prunable(param, group) for param in group["params"])


def _find_cut(kept: int, tensors: int, shards: Shards | None, scores_of: ScoresOf, suspect: bool) -> Cut:
    """Return where the `kept` largest scores of so many tensors end, on this process or on all of them."""
    if shards is not None:
        return shards.find_cut(scores_of, kept, suspect)
    if suspect:
        raise NotFiniteError
    return find_cut(scores_of(range(tensors)), kept)


def _refuse_nonfinite_gradients(optimizer: Optimizer, params: list[Tensor], shards: Shards | None) -> None:
    """Raise if a gradient is not finite; one transfer from the device for all of them."""
    # A tensor is finite if and only if its extremes are: infinity is one, and NaN spreads to both.
    grads = [grad_here(param) for param in params]
    extremes = [extreme for grad in grads for extreme in (torch.aminmax(grad) if grad.numel() else [grad.sum()] * 2)]
    if not extremes:
        return
    if len({extreme.device for extreme in extremes}) > 1:
        extremes = [extreme.cpu() for extreme in extremes]
    finite = torch.stack(extremes).isfinite().view(-1, 2).all(1).tolist()
    if shards is not None:
        finite = shards.all_finite(finite)
    if not all(finite):
        keys = {param: key for key, param in prunable_in(optimizer).items()}
        key = keys[params[finite.index(False)]]
        name = repr(key) if isinstance(key, str) else f"number {key}"
        raise NonFiniteGradientError(f"the gradient of prunable parameter {name} is not finite")
