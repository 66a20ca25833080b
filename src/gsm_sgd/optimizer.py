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

import math
import warnings
import weakref
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from .budget import PassiveWeight, cubic_compression
from .fused import FusedRule
from .groups import check_hyperparameters, check_lr, deadline, passive_decay, settle, why_passive_weights_stay
from .masks import (
    Masks,
    apply_masks_,
    is_governed,
    magnitude_masks,
    mask_gradients,
    named_in,
    prunable_in,
    residual,
    sparsity_rows,
)
from .rule import EagerRule, Kernel, Part, laid_out_as
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
from .states import UNSUPPORTED, check_parameters, check_supported, in_order_of, plain

_SCHEDULE = ("compression", "total_steps", "shrink_to", "compression_schedule", "ramp_steps", "fade_steps", "cut_step")
_OF_THE_MODEL = (*_SCHEDULE, "steps", "fading", "fixed")
_OF_A_GROUP = ("lr", "momentum", "weight_decay", "passive_decay", "nesterov", "prunable")
_OF_THE_OBJECT = ("foreach", "fused", "check_ranks")
_LOSSLESS = 0.01  # share of the weights' norm that a cut may take without a warning


class CutWarning(UserWarning):
    """The cut costs accuracy, or is about to: passive weights have not vanished, a layer keeps nothing, or no cut."""


class NonFiniteGradientError(ArithmeticError):
    """A prunable parameter has an infinite or NaN gradient; the step that met it changed nothing."""


class GSM(Optimizer):
    """Train so that all prunable weights but exactly Q = floor(N / C) shrink to nothing.

    Mirrors `torch.optim.SGD`, which it equals bit for bit at `compression=1`. Call `finalize()` when training is over
    to cut the passive weights; whatever is trained after that keeps them at exactly zero. A `CutWarning` says when a
    cut costs accuracy.

    A parameter with `requires_grad=False` stays as it is and does not count in N. If parameters are frozen or unfrozen
    while training, N and Q follow at the next step, until the masks are fixed. A weight is active only if its
    importance is above zero, even if fewer than Q are.

    Args:
        params: parameters, named parameters, or groups of either, as for `torch.optim.SGD`. The group key
            `prunable` says whether the rule applies to a group; by default it applies to each parameter with
            `ndim >= 2`. The others are trained by plain momentum SGD.
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
        check_ranks: what to compare over all processes of the default process group. By default the settings, once,
            before the first step. True also compares weights and gradients, before each step, for finding mistakes:
            under DistributedDataParallel they are the same bits on each. False compares nothing, for processes that
            train different models.

    A loaded state brings its own schedule, that is everything from `compression` to `cut_step`, with a warning where
    it is not the one given here; to train longer, set it in `param_groups` after loading. `foreach`, `fused` and
    `check_ranks` stay as given here. A state is matched by the parameters' names where both sides have them.

    Raises:
        ValueError: a hyperparameter is out of range, nothing is prunable, a parameter is given twice, is complex, has
            no data yet, or is a part of a weight, as weight norm has them.
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
        check_ranks: bool | None = None,
    ) -> None:
        if foreach and fused:
            raise ValueError("foreach and fused cannot both be True")
        if compression_schedule != "cubic":
            if ramp_steps:
                raise ValueError("ramp_steps is for compression_schedule='cubic' only")
            ramp_steps = 0
        self._schedule = compression_schedule if callable(compression_schedule) else None
        defaults: dict[str, Any] = {
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
            "base_lr": 0.0,
            "highest_lr": 0.0,
            "passive_weight": tuple(PassiveWeight()),  # one since the ramp's end, or the fade's beginning, 1 then
            "prunable": None,
            "foreach": foreach,
            "fused": fused,
            "check_ranks": check_ranks,
            **UNSUPPORTED,
        }
        settle(defaults)
        check_compression(defaults["compression"])
        if defaults["ramp_steps"] is None and defaults["total_steps"] is not None:
            end = min(step for step in (defaults["total_steps"], defaults["cut_step"]) if step is not None)
            defaults["ramp_steps"] = round(0.4 * end)
        self._choose_rule(foreach, fused)
        self._shards: Shards | None = None
        self._agreed = False  # whether all processes are known to go by the same numbers
        self._hooks: RemovableHandle | None = None  # keep gradients of cut weights at zero
        super().__init__(params, defaults)
        if self.num_prunable == 0:
            raise ValueError("nothing to prune: GSM needs a parameter with ndim >= 2, or a prunable group")
        kept_weights(self.num_prunable, compression)
        reasons = [why_passive_weights_stay(group) for group in self.param_groups if _governs(group)]
        if self.param_groups[0]["compression"] > 1 and any(reasons):
            reason = next(filter(None, reasons))
            warnings.warn(f"the cut will remove weights that still matter: {reason}", CutWarning, stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.SGD` does.

        Raises:
            ValueError: a hyperparameter is out of range, a parameter is given twice, `compression` or its schedule
                is not the other groups', or the group is prunable and `finalize()` has already chosen what is kept.
        """
        group = {**self.defaults, **param_group}
        if self.param_groups:  # a loaded state may have brought others than the defaults
            first = self.param_groups[0]
            group |= {key: first[key] for key in _OF_THE_MODEL if key not in param_group}
        params = group["params"]
        if not isinstance(params, Tensor | set):  # a set has no order: torch says so
            group["params"] = params = list(params)
            tensors = [param[1] if isinstance(param, tuple) else param for param in params]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError("a parameter is given twice")
        settle(group)
        check_supported(group)
        check_hyperparameters(group)
        group["base_lr"] = float(group["lr"])
        if self.param_groups:
            other = next((key for key in _OF_THE_MODEL if group[key] != first[key]), None)
            if other:
                raise ValueError(f"{other} is one for the whole model, groups cannot differ in it")
        super().add_param_group(group)
        try:
            check_parameters(self.param_groups[-1])
            if self._fixed and _governs(self.param_groups[-1]):
                raise ValueError("prunable parameters cannot be added once the masks are fixed")
        except ValueError:
            del self.param_groups[-1]
            raise

    @property
    def num_prunable(self) -> int:
        """N, the number of weights that the rule governs: those of prunable parameters that are not frozen.

        Once the masks are fixed, of the parameters that have them.
        """
        masked = (param for param, param_state in self.state.items() if "mask" in param_state)
        return sum(param.numel() for param in (masked if self._fixed else self._governed()))

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
        left = (abs(float(group["passive_weight"][0])) for group in self.param_groups if _governs(group))
        return max(left, default=1.0)

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
        return {key: self.state[param]["mask"].clone() for key, param in self._masked().items()}

    @property
    def passive_residual(self) -> float:
        """What share of the L2 norm of all governed weights a cut would take now; reads every weight."""
        if self._fixed:
            return residual(self._masked(), self.masks)
        governed = self._governed_by_key()
        return residual(governed, magnitude_masks(governed, self.param_groups[0]["compression"]))

    @property
    def _fixed(self) -> bool:
        """Whether it is fixed what is kept."""
        return bool(self.param_groups and self.param_groups[0]["fixed"])

    def _governed(self) -> list[Tensor]:
        """Return the parameters that the rule governs now."""
        return [param for group in self.param_groups for param in group["params"] if is_governed(param, group)]

    def _governed_by_key(self) -> dict[Any, Tensor]:
        """Return them by the keys that their masks get."""
        governed = set(self._governed())
        return {key: param for key, param in prunable_in(self).items() if param in governed}

    def _masked(self) -> dict[Any, Tensor]:
        """Return the parameters that have masks, by the keys of these; none before the masks are fixed."""
        if not self._fixed:
            return {}
        return {key: param for key, param in prunable_in(self).items() if "mask" in self.state.get(param, {})}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once and return what `closure`, if given, returned.

        A prunable parameter without a gradient is passive in this step: it only decays; in the fade, as if its
        gradient were zero. Where nothing is passive (compression 1, or after `finalize()`) it stays as it is, as with
        `torch.optim.SGD`. A frozen parameter always stays. If no parameter has a gradient, nothing happens.

        Raises:
            NonFiniteGradientError: a prunable parameter's gradient is not finite. Nothing has changed.
            ValueError: a learning rate, a gradient or a parameter cannot be right any more. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        governed = self._governed()
        chosen_from = [param for param in governed if param.grad is not None]
        shards = self._shards_of(chosen_from)
        self._refuse_disagreement(shards)
        trained = [param for group in self.param_groups for param in group["params"] if _has_gradient(param)]
        if not trained or self._is_torchs_initialisation(trained, shards):
            return loss
        self._check_step(governed)
        check_finite = partial(_refuse_nonfinite_gradients, self, chosen_from, shards)
        self._cut_or_fade_if_due(check_finite)
        num_prunable, compression = self.num_prunable, self.compression
        kept = kept_weights(num_prunable, compression) if num_prunable else 0
        ramp_is_over = compression >= self.param_groups[0]["compression"]
        all_active, fixed, finalized = kept == num_prunable, self._fixed, self.finalized
        if not self.param_groups[0]["steps"] and not all_active:
            self._warn_of_zeros()
        decays = [passive_decay(group) for group in self.param_groups]
        plain, ruled, still = self._parts(decays, all_active, fixed, finalized)
        if all_active or fixed:
            check_finite()
        if ruled and fixed:
            owners = [owner for part in ruled for owner in part.owners]
            self._rule.update_masked_(ruled, [here(self.state[owner]["mask"]) for owner in owners])
        elif ruled:
            available = sum(param.numel() for param in chosen_from)
            self._rule.update_(ruled, partial(_find_cut, min(kept, available), len(chosen_from), shards), check_finite)
        # Nothing passive: this is torch.optim.SGD, with the implementation that it would choose, to the bit.
        for part in plain:
            kernel = self._kernel if all_active else self._kernel.or_quickest(part.params)
            kernel.sgd_(part, part.grads, part.weight_decay)
        for part in still:
            self._rule.decay_(part)
        for part in (*plain, *ruled, *still):
            self._remember(part)
        self._count_step(decays, count_passive=ramp_is_over and not finalized)
        return loss

    def _check_step(self, governed: list[Tensor]) -> None:
        """Raise, before anything moves, if this step cannot be taken."""
        for group in self.param_groups:
            check_lr(group["lr"])
            for param in group["params"]:
                if _is_sparse(param.grad) and (is_governed(param, group) or group["weight_decay"]):
                    raise RuntimeError(
                        f"{self._name_of(param)} has a sparse gradient: put it into a group with "
                        '"prunable": False and "weight_decay": 0'
                    )
        if len({here(param).device for param in governed}) > 1:
            raise ValueError("GSM needs all prunable parameters on one device")
        if self._fixed:
            self._check_frozen(governed)

    def _check_frozen(self, governed: list[Tensor]) -> None:
        """Raise if parameters have been frozen, unfrozen or replaced where the masks do not allow it any more."""
        new = next((param for param in governed if "mask" not in self.state.get(param, {})), None)
        if new is not None:
            raise ValueError(
                f"{self._name_of(new)} was frozen when the masks were fixed, and no longer is: freeze it again, "
                'or train it in a group with "prunable": False'
            )
        masked = [param for param, param_state in self.state.items() if "mask" in param_state]
        frozen = next((param for param in masked if not param.requires_grad), None)
        if frozen is not None and not self.finalized:
            name = self._name_of(frozen)
            raise ValueError(f"{name} was frozen during the fade: freeze it before, or after the cut")
        changed = next((param for param in masked if self.state[param]["mask"].shape != param.shape), None)
        if changed is not None:
            shape, mask_shape = tuple(changed.shape), tuple(self.state[changed]["mask"].shape)
            raise ValueError(
                f"{self._name_of(changed)} has shape {shape}, its mask {mask_shape}: "
                "build a new optimizer after a parameter has changed its shape"
            )

    def _is_torchs_initialisation(self, trained: list[Tensor], shards: Shards | None) -> bool:
        """Return whether torch's distributed checkpoints ask for empty state, by a step without rates and gradients.

        Masks are among it, as only what the state has a place for is loaded.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        idle = not any(bool(grad_here(param).any()) for param in trained if not _is_sparse(param.grad))
        if not (idle if shards is None else shards.everywhere([idle])[0]):
            return False
        for group in self.param_groups:
            for param in group["params"]:
                if _has_gradient(param) and group["momentum"]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
                if is_governed(param, group):
                    self.state[param]["mask"] = torch.ones_like(param, dtype=torch.bool)
        return True

    def _warn_of_zeros(self) -> None:
        """Warn of what can never become active."""
        zeros = [row.name for row in sparsity_rows(self._governed_by_key()) if row.params and not row.nonzeros]
        if zeros:
            warnings.warn(
                f"every weight of {_quoted(zeros)} is zero, so none has an importance above zero and none will ever "
                'be active: initialise it otherwise, put it into a group with "prunable": False, or begin with a ramp',
                UserWarning,
                stacklevel=4,
            )

    def _count_step(self, decays: list[float], count_passive: bool) -> None:
        """Take down that a step has been taken."""
        first = self.param_groups[0]
        for group, decay in zip(self.param_groups, decays, strict=True):
            if count_passive:
                passive = PassiveWeight(*group["passive_weight"])
                group["passive_weight"] = tuple(
                    passive.step(float(group["lr"]), decay, group["momentum"], group["nesterov"])
                )
            group["highest_lr"] = max(group["highest_lr"], float(group["lr"]))
        steps = first["steps"] + 1
        for group in self.param_groups:
            group["steps"] = steps
        if not self.finalized and first["compression"] > 1 and steps - 1 == first["total_steps"]:
            warnings.warn(
                f"total_steps={steps - 1} steps have been taken, and nothing has been cut: call finalize() when "
                "training ends",
                CutWarning,
                stacklevel=4,
            )

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Cut: set all prunable weights but the Q largest |W| of the whole model to zero, for good.

        Steps taken afterwards train the kept weights alone, and the gradients of the others are zero as soon as they
        have been computed, so that clipping does not see them. A second call keeps the same weights, and sets the
        others to zero again if other weights have been loaded meanwhile. Of several processes that train one model all
        have to call.

        Warns:
            CutWarning: what is cut still matters, or a layer keeps nothing.

        Returns:
            Bool masks, True where a weight is kept, exactly Q in all: keyed by parameter name, or by position
            among the prunable parameters if the optimizer was given no names.
        """
        cut_already = self.finalized
        self._fix_what_is_kept()
        masks, masked = self.masks, self._masked()
        if not cut_already:
            self._warn_of_cut(masked, masks)
        apply_masks_(masked, masks)
        for key, param in masked.items():
            if "momentum_buffer" in self.state[param]:  # it would push a weight that was cut away from zero
                here(self.state[param]["momentum_buffer"]).masked_fill_(~here(masks[key]), 0)
        for group in self.param_groups:
            group["fading"] = False
        self._mask_gradients()
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
            governed = self._governed_by_key()
            masks = magnitude_masks(governed, self.param_groups[0]["compression"])
            for param_state in self.state.values():
                param_state.pop("mask", None)  # one that was only a place to load another into
            for key, param in governed.items():
                self.state[param]["mask"] = masks[key]
            for group in self.param_groups:
                group["fixed"] = True
            self._rule.memory = torch.empty(0)  # nothing is chosen any more

    def _warn_of_cut(self, masked: dict[Any, Tensor], masks: Masks) -> None:
        """Warn if the cut that is about to be made takes weights that matter, or all weights of a layer."""
        left = residual(masked, masks)
        if left > _LOSSLESS:
            reason = why_passive_weights_stay(self.param_groups[0], self.passive_shrinkage)
            warnings.warn(
                f"the cut takes {left:.1%} of the weights' norm, so it costs accuracy: {reason}",
                CutWarning,
                stacklevel=4,
            )
        kept = sparsity_rows({str(key): mask for key, mask in masks.items()})
        if empty := [row.name for row in kept if row.params and not row.nonzeros]:
            warnings.warn(
                f"no weight of {_quoted(empty)} is kept, so nothing passes through it: lower the compression, or leave "
                'it out with "prunable": False',
                CutWarning,
                stacklevel=4,
            )

    def _mask_gradients(self) -> None:
        """Keep the gradients of what has been cut at zero, as long as this optimizer lives."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        if self.finalized:
            self._hooks = mask_gradients((param, ~here(self.state[param]["mask"])) for param in self._masked().values())
            weakref.finalize(self, self._hooks.remove)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: beside the state, a compression schedule that is a function."""
        return {**super().__getstate__(), "_schedule": self._schedule}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as every optimizer does, with a mask of each prunable parameter that has been updated.

        Until the masks are fixed they keep everything. They are there because torch's distributed
        checkpoints load only what the state already has a place for.

        Warns:
            CutWarning: `total_steps` are over, and nothing has been cut.
        """
        state: dict[str, Any] = super().state_dict()
        for group in state["param_groups"]:
            group.update({key: plain(value) for key, value in group.items()})
        first = self.param_groups[0]
        if not self._fixed:
            governed = [is_governed(param, group) for group in self.param_groups for param in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for number, (param, by_rule) in enumerate(zip(params, governed, strict=True)):
                if by_rule and number in state["state"]:
                    mask = torch.ones_like(param, dtype=torch.bool)
                    state["state"][number] = {**state["state"][number], "mask": mask}
        if not self.finalized and first["compression"] > 1 and first["steps"] >= (first["total_steps"] or math.inf):
            warnings.warn(
                "total_steps are over, and the net of this state has not been cut: call finalize() first",
                CutWarning,
                stacklevel=2,
            )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of GSM or of `torch.optim.SGD`; see the class for which settings it brings.

        Raises:
            ValueError: the state is of other parameters, or asks for what GSM does not support. Nothing has changed.
        """
        groups = self.param_groups
        for group in state_dict["param_groups"]:
            check_supported(group)
        super().load_state_dict(in_order_of(groups, state_dict))
        given = {key: groups[0][key] for key in _SCHEDULE}
        for old, new in zip(groups, self.param_groups, strict=True):
            new.update({key: value for key, value in old.items() if key not in new or key in _OF_THE_OBJECT})
        loaded = {key: self.param_groups[0][key] for key in _SCHEDULE}
        if changed := [key for key in _SCHEDULE if loaded[key] != given[key]]:
            brought = ", ".join(f"{key}={loaded[key]!r} (not {given[key]!r})" for key in changed)
            warnings.warn(
                f"the loaded state brings {brought}: to go by another schedule, set it in param_groups after loading",
                UserWarning,
                stacklevel=2,
            )
        self._mask_gradients()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; torch casts loaded masks to the parameters' dtype, here they are bool again.

        What is kept for a parameter is spread over processes as the parameter is, however it was when it was saved.

        Raises:
            ValueError: it is of another shape, and so the state is another model's; or masks are missing. Nothing has
                changed.
        """
        groups: list[dict[str, Any]] = state["param_groups"]
        states: dict[Tensor, dict[str, Any]] = state["state"]
        for param, param_state in states.items():
            for key, what in (("momentum_buffer", "momentum"), ("mask", "mask")):
                if isinstance(param_state.get(key), Tensor):
                    param_state[key] = _spread_as(param, param_state[key], what)
                elif key in param_state:  # a flattened checkpoint that lacks it has an empty dict
                    del param_state[key]
        fixed = groups[0].get("fixed", any("mask" in param_state for param_state in states.values()))
        governed = [param for group in groups for param in group["params"] if is_governed(param, group)]
        if fixed and any("mask" not in states.get(param, {}) for param in governed):
            raise ValueError(
                "the state lacks the mask of a prunable parameter: load it into an optimizer that has taken no step, "
                "with the same parameters frozen as when it was saved"
            )
        for param_state in states.values():
            mask = param_state.pop("mask", None)
            if fixed and mask is not None:
                param_state["mask"] = mask.bool()
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("fixed", fixed)
            for key, default in self.defaults.items():
                if state.get("defaults"):  # a copy, or unpickled
                    group.setdefault(key, default)
        self._shards, self._agreed = None, False
        if not hasattr(self, "_rule"):  # a copy, or unpickled: none of it is state
            self._choose_rule(self.defaults["foreach"], self.defaults["fused"])
            self._hooks = None
            self._mask_gradients()

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
                by_rule = is_governed(param, group) and not all_active
                if _has_gradient(param):
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
        settings = (group["lr"], group["momentum"], group["weight_decay"], decay, group["nesterov"], group["steps"])
        return Part(params, parts, [grad_here(param) for param in params], momenta, *settings)

    def _momenta(self, params: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """Return the momenta of parts of parameters, zeros where there are none yet. The state stays as it is.

        Raises:
            ValueError: a parameter has changed its shape.
        """
        momenta = []
        for param, part in zip(params, parts, strict=True):
            found = self.state[param].get("momentum_buffer") if param in self.state else None
            momentum = torch.zeros_like(part) if found is None else here(found)
            if momentum.shape != part.shape:
                raise ValueError(
                    f"{self._name_of(param)} has shape {tuple(part.shape)}, its momentum {tuple(momentum.shape)}: "
                    "build a new optimizer after a parameter has changed its shape"
                )
            momenta.append(momentum.to(part))  # the model may have been converted since
        return laid_out_as(parts, momenta)  # a state from elsewhere may lie in memory in another order

    def _remember(self, part: Part) -> None:
        """Put the momenta of parameters that have been updated into the state."""
        for owner, momentum in zip(part.owners, part.momenta, strict=True):
            if momentum is None:
                continue
            state = self.state[owner]
            if "momentum_buffer" not in state or here(state["momentum_buffer"]) is not momentum:
                state["momentum_buffer"] = spread_as(owner, momentum)

    def _name_of(self, param: Tensor) -> str:
        """Return what to call a parameter in a message."""
        names = {id(tensor): name for name, tensor in named_in(self).items()}
        params = [id(tensor) for group in self.param_groups for tensor in group["params"]]
        return f"parameter {names[id(param)]!r}" if names else f"parameter number {params.index(id(param))}"

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
        check = bool(group["check_ranks"])
        if not several_processes() or group["check_ranks"] is False or (self._agreed and not check):
            return
        params = [param for group in self.param_groups for param in group["params"]]
        device = here(group["params"][0]).device if shards is None else shards.device
        counts = {"parameters": len(params), "parameter groups": len(self.param_groups)}
        settings = {f"the number of {what}": float(count) for what, count in counts.items()}
        settings |= {"the number of prunable weights": self.num_prunable, "compression": self.compression}
        refuse_disagreement(settings, device)  # first how many there are: else the next call would not fit
        refuse_disagreement(_settings(self), device)
        self._agreed = shards is None or group["compression_schedule"] != "custom"
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
    return any(is_governed(param, group) for param in group["params"])


def _has_gradient(param: Tensor) -> bool:
    """Return whether a parameter is trained in this step: a frozen one is not, whatever gradient is left there."""
    return param.requires_grad and param.grad is not None


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.is_sparse


def _quoted(names: list[str]) -> str:
    """Return names as a list to read, a long one shortened."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _find_cut(kept: int, tensors: int, shards: Shards | None, scores_of: ScoresOf, suspect: bool) -> Cut:
    """Return where the `kept` largest scores of so many tensors end, on this process or on all of them."""
    if shards is not None:
        return shards.find_cut(scores_of, kept, suspect, positive=True)
    if suspect:
        raise NotFiniteError
    return find_cut(scores_of(range(tensors)), kept, positive=True)


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
        finite = shards.everywhere(finite)
    if not all(finite):
        keys = {param: key for key, param in prunable_in(optimizer).items()}
        key = keys[params[finite.index(False)]]
        name = repr(key) if isinstance(key, str) else f"number {key}"
        raise NonFiniteGradientError(f"the gradient of prunable parameter {name} is not finite")
