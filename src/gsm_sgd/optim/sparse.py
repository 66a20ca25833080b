"""SparseOptimizer: score, pool, select, update, cut. A subclass says what an update is."""

import math
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from ..budget import Budget, rounded_down
from ..decay import Motion, PassiveWeight, auto_decay, why_passive_weights_stay
from ..distributed import (
    check_same_replicas,
    check_same_settings,
    is_distributed,
    is_dtensor,
    like_dtensor,
    local_grad,
    offsets,
    to_local,
)
from ..masks import Masks, check_spread, choose, largest, mask_gradients, residual
from ..memory import laid_out_as
from ..names import is_governed, named_in, prunable_in
from ..native import library
from ..native.kernel import Kernel, fits
from ..patterns import Pattern, Unstructured
from ..rule import Part, Rule
from ..schedules import Phase, Schedule, whole_number
from ..scores import Score, find_score, first_order, fisher, magnitude, seed_of, taylor
from ..selection.sharded import Sharded, Shards
from ..selection.stored import ScoreBuffer
from ..selection.threshold import Local, NotFiniteError, ScoresOf, Threshold, find_threshold
from .checks import CutWarning, check_gradients, check_masked, check_step, is_sparse, warn_of_cut, warn_of_zeros
from .multipliers import Factors, check_multipliers, factors_of, multiplied, put_back_
from .states import check_group, check_lr, check_parameters, check_state, in_order_of, localise, plain
from .update import update_half_

_NEW = 0.01  # weight of a step in the mean square of the scores of units
_OF_THE_CALL = {
    *("compression", "density", "sparsity", "num_kept", "budget", "schedule", "total_steps", "peak_lr"),
    *("score", "pattern", "step", "phase"),
}
_OF_THE_OBJECT = ("foreach", "fused")
_ELEMENTWISE = (taylor, magnitude)  # scores that depend on nothing but a weight and its gradient, one by one

ScheduleLike = Schedule | Callable[[int], float] | None
"""A Schedule; a function of the number of steps taken, the density of the next; or None, the final density at once."""


class SparseOptimizer(Optimizer):
    """What all optimizers that train to an exact sparsity share.

    A subclass defines a rule and what stands under "what a subclass defines". Its parameter groups have `lr`,
    `weight_decay`, `passive_decay` and `prunable`, and whatever else it needs. The first group also holds what concerns
    the whole model: `budget`, `schedule`, `step` (steps taken) and `phase`.
    """

    _rule: Rule
    _multiplies_updates = False  # whether multipliers are for updates as well as for gradients
    _own_steps = False  # whether the state counts the steps of each parameter, as torch's Adam does

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        budget: Budget | None,
        schedule: ScheduleLike,
        score: str | Score,
        pattern: Pattern | None,
        check_ranks: bool | None,
        multipliers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._score, self._pattern = find_score(score), pattern or Unstructured()
        if not isinstance(self._pattern, Pattern) or whole_number("the pattern's size", self._pattern.size) < 1:
            raise ValueError(f"pattern must be a Pattern with a size of at least 1, not {pattern!r}")
        if self._score is fisher and "exp_avg_sq" not in self._buffer_names(defaults):
            raise ValueError("the score 'fisher' needs a second moment: use GSMAdamW, or another score")
        prescribed = self._pattern.density
        if budget is not None and prescribed is not None:
            name = type(self._pattern).__name__
            raise ValueError(f"the pattern {name} prescribes the density {prescribed:g}: leave out the budget")
        budget = budget or Budget.of(density=prescribed)
        self._pattern = self._pattern.for_budget(budget.kind)
        if self._pattern.signed and self._score is taylor:
            self._score = first_order
        self._model_wide = {
            **{"budget": budget, "schedule": schedule, "step": 0, "phase": Phase.RAMP.value},
            **{"pattern": repr(self._pattern), "unit_scores": None},
        }
        self._check_ranks_always = check_ranks
        self._multipliers = dict(multipliers or {})
        self._prepare()
        if defaults["passive_decay"] is None and isinstance(schedule, Schedule):
            defaults = {**defaults, "passive_decay": "auto"}
        super().__init__(self._pattern.parameter_groups(params), {**defaults, "prunable": None})
        if self.num_prunable == 0:
            raise ValueError("nothing to prune: give a parameter with ndim >= 2, or a prunable group")
        check_multipliers(self._multipliers, named_in(self), self._multiplies_updates)
        self._pattern.check_budget(self.num_kept)
        self._note_phase(self.num_prunable)
        self._warn_of_plan(stacklevel=4)

    def _warn_of_plan(self, stacklevel: int) -> None:
        """Warn if passive weights cannot vanish by the cut that is planned."""
        reasons = [self._why_passive_weights_stay(group) for group in self.param_groups if self._governs(group)]
        if self.num_kept < self.num_prunable and any(reasons):
            reason = next(filter(None, reasons))
            warnings.warn(f"the cut will remove weights that still matter: {reason}", CutWarning, stacklevel=stacklevel)

    def _prepare(self) -> None:
        """Make what is not state."""
        self._buffer = ScoreBuffer()
        self._kernel: Kernel | None = None  # the last step in C, for repeating it
        self._shards: Shards | None = None
        self._agreed = False  # whether all processes are known to have the same settings
        self._hooks: RemovableHandle | None = None  # keep gradients of cut weights at zero

    def forget_parameters(self) -> None:
        """Forget what is known of parameters, as other ones have taken their place."""
        self._prepare()
        self._mask_gradients()

    # --- what a subclass defines ---

    def _buffer_names(self, group: dict[str, Any]) -> Sequence[str]:
        """Return the names of the tensors that the state has for each parameter of a group."""
        raise NotImplementedError

    def _motion(self, group: dict[str, Any]) -> Motion:
        """Return how passive weights of a group move."""
        raise NotImplementedError

    def _numbers(self, part: Part) -> list[list[float]]:
        """Return the rule's settings for the next step of each parameter."""
        raise NotImplementedError

    def _kind(self, group: dict[str, Any]) -> bool:
        """Return which of a rule's variants a group has."""
        return False

    def _torchs_(self, part: Part, exactly: bool) -> None:
        """Update parameters of which all weights are active; `exactly` as torch's optimizer would, to the bit."""
        raise NotImplementedError

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        """Update parameters in full precision, and count their steps where they have any.

        The masks are in bool, or as 0 and 1, and may be overwritten.
        """
        raise NotImplementedError

    def _decay_(self, part: Part) -> None:
        """Update parameters without a gradient, of which all weights are passive."""
        raise NotImplementedError

    _in_c: Callable[..., None] | None = None  # the `_masked_` that step.c repeats; a subclass may have another one

    def _settings_in_c(self, group: dict[str, Any]) -> Sequence[float]:
        """Return what step.c's Group has."""
        raise NotImplementedError

    # --- settings ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as every torch optimizer does.

        Raises:
            ValueError: a hyperparameter is out of range, or concerns the whole model; a parameter is given twice; or
                the group is prunable and the masks are fixed.
        """
        if misplaced := _OF_THE_CALL & set(param_group):
            raise ValueError(f"{min(misplaced)} is one for the whole model: pass it to {type(self).__name__}")
        group = {**self.defaults, **param_group}
        params = group["params"]
        if not isinstance(params, Tensor | set):  # a set has no order: torch says so
            group["params"] = params = list(params)
            tensors = [param[1] if isinstance(param, tuple) else param for param in params]
            if len({id(tensor) for tensor in tensors}) < len(tensors):
                raise ValueError("a parameter is given twice")
        if not self.param_groups:
            group |= self._model_wide
        check_group(group, self.schedule if self.param_groups else group["schedule"])
        group |= {"first_lr": float(group["lr"]), "highest_lr": 0.0, "passive_weight": tuple(PassiveWeight())}
        super().add_param_group(group)
        try:
            check_parameters(self.param_groups[-1])
            for name, param in zip(*self._named(self.param_groups[-1]), strict=True):
                self._pattern.check(name, param)
            if self._fixed and self._governs(self.param_groups[-1]):
                raise ValueError("prunable parameters cannot be added once the masks are fixed")
        except ValueError:
            del self.param_groups[-1]
            raise

    @property
    def schedule(self) -> ScheduleLike:
        """What is planned; assign another one to train longer, say."""
        schedule: ScheduleLike = self.param_groups[0]["schedule"]
        return schedule

    @schedule.setter
    def schedule(self, schedule: ScheduleLike) -> None:
        for group in self.param_groups:
            check_group(group, schedule)
        self.param_groups[0]["schedule"] = schedule
        if not self._fixed:
            self._note_phase(self.num_prunable)
            self._warn_of_plan(stacklevel=3)

    @property
    def num_prunable(self) -> int:
        """N, the number of weights that the rule governs: those of prunable parameters that are not frozen.

        Once the masks are fixed, of the parameters that have them. With a pattern of channels what the dense net costs:
        MACs, parameters, channels or nanoseconds.
        """
        masked = [param for param, param_state in self.state.items() if "mask" in param_state]
        return self._pattern.total(masked if self._fixed else self._governed())

    @property
    def num_kept(self) -> int:
        """Q: how many weights the cut keeps, and how many are active once the ramp is over; at most, with channels."""
        return self._kept_of(self.num_prunable)

    @property
    def num_active(self) -> int:
        """How many weights may be active in the next step: Q, and more in the ramp.

        Raises:
            ValueError: the schedule's function returns something else than a density.
        """
        return self._active_of(self.num_prunable)

    def _kept_of(self, total: int) -> int:
        """Return Q for N weights."""
        if not total:
            return 0
        kept, size = Budget(*self.param_groups[0]["budget"]).num_kept(total), self._pattern.size
        if kept < size:
            raise ValueError(f"{kept} weights to keep are less than one unit of {size}: keep more")
        return kept - kept % size

    def _active_of(self, total: int) -> int:
        """Return how many of N weights may be active in the next step."""
        kept, schedule, step = self._kept_of(total), self.schedule, self.param_groups[0]["step"]
        if schedule is None or self._fixed:
            return kept
        if isinstance(schedule, Schedule):
            density = schedule.density(step, Budget(*self.param_groups[0]["budget"]).share(total))
        else:
            density = float(schedule(step))
            if not 0 < density <= 1:
                raise ValueError(f"the schedule must return a density above 0 and at most 1, not {density}")
        return max(kept, rounded_down(density * total, total))

    @property
    def phase(self) -> Phase:
        """What the next step does: ramp, search, fade, or train the kept weights alone because it has been cut."""
        return Phase(self.param_groups[0]["phase"])

    @property
    def masks(self) -> Masks:
        """What is kept, as `finalize()` returns it: fixed when the fade begins, else by the cut; empty before."""
        return Masks({key: self.state[param]["mask"].clone() for key, param in self._masked().items()})

    @property
    def governed(self) -> dict[str, Tensor]:
        """The parameters that have masks or, before these are fixed, that the rule governs, by their masks' keys."""
        return self._masked() if self._fixed else self._governed_by_key()

    def would_keep(self) -> Masks:
        """Return the masks that a cut at this moment would have: of the largest weights, unless they are fixed."""
        return self.masks if self._fixed else largest(self._governed_by_key(), self.num_kept, self._pattern)

    @property
    def summary(self) -> str:
        """What is pruned and what stays dense, in a line: numbers of weights, and names."""
        governed = set(self._governed())
        rest = {name: param for name, param in self._all_by_name().items() if param not in governed}
        names = [name for name, param in rest.items() if param.ndim > 1]
        vectors = len(rest) - len(names)
        dense = [*names, *([f"{vectors} biases and other vectors"] if vectors else [])]
        tensors = f"{len(governed)} tensor" + "s" * (len(governed) > 1)
        return (
            f"keeps {self.num_kept:,} of {self.num_prunable:,} weights in {tensors}; "
            f"dense: {', '.join(dense) or 'nothing'}"
        )

    @property
    def passive_residual(self) -> float:
        """What share of the L2 norm of all governed weights a cut would take now; reads every weight."""
        return residual(self.governed, self.would_keep())

    @property
    def passive_shrinkage(self) -> float:
        """What share is left of a weight that has been passive since the ramp's end or, in the fade, its beginning.

        The largest of all groups.
        """
        left = (abs(float(group["passive_weight"][0])) for group in self.param_groups if self._governs(group))
        return max(left, default=1.0)

    @property
    def buffer_bytes(self) -> int:
        """Memory kept between steps besides the state, in bytes: a score for each weight, or nothing."""
        return self._buffer.whole.nbytes

    def passive_decay(self, group: dict[str, Any]) -> float:
        """Return the weight decay of a group's passive weights in the next step."""
        decay, chosen = float(group["weight_decay"]), group["passive_decay"]
        schedule, step = self.schedule, self.param_groups[0]["step"]
        if chosen != "auto":
            return decay if chosen is None else float(chosen)
        assert isinstance(schedule, Schedule)
        weight = abs(float(group["passive_weight"][0]))
        return max(decay, auto_decay(weight, step, self.phase is Phase.FADE, schedule, self._motion(group)))

    # --- a step ---

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter once and return what `closure`, if given, returned.

        A prunable parameter without a gradient is passive in this step: it only decays; in the fade, as if its
        gradient were zero. Where nothing is passive (density 1, or after the cut) it stays as it is, as with torch's
        optimizers. A frozen parameter always stays. If no parameter has a gradient, nothing happens.

        Raises:
            NonFiniteGradientError: a prunable parameter's gradient is not finite. Nothing has changed.
            ValueError: a learning rate, a gradient or a parameter cannot be right any more. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._repeat():
            self._step()
        return loss

    def _step(self) -> None:
        """Take a step, if any parameter has a gradient."""
        self._kernel = None
        governed = self._governed()
        scored = [param for param in governed if param.grad is not None]
        shards = self._shards_of(scored)
        self._check_agreement(shards)
        trained = [param for group in self.param_groups for param in group["params"] if _has_gradient(param)]
        if not trained or self._is_torchs_initialisation(trained, shards):
            return
        check_step(self.param_groups, governed, self._name_of)
        if self._fixed:
            check_masked(self.state, governed, self.phase is Phase.FADE, self._name_of)
        check_finite = partial(check_gradients, scored, shards, self._name_of)

        self._fade_or_cut_if_due(check_finite)  # the cut comes before the first step after it
        total = self.num_prunable
        num_active = self._active_of(total) if total else 0
        everything = num_active == total
        first = not (self._fixed or self.param_groups[0]["step"])
        if first and not everything and self._score in (taylor, magnitude, fisher):
            warn_of_zeros(self._governed_by_key())
        dense, ruled, still = self._parts(everything)
        if ruled and not self._fixed:
            available = self._pattern.total(scored)
            prescribed = self._pattern.density is not None  # of whichever weights there are
            num_active = self._active_of(available) if prescribed else min(num_active, available)
        if not self._natively(dense, ruled, still, num_active):
            self._by_torch(dense, ruled, still, num_active, everything, shards, check_finite)
        for part in (*dense, *ruled, *still):
            self._remember(part)
        self._count_step(total)

    def _by_torch(
        self,
        dense: list[Part],
        ruled: list[Part],
        still: list[Part],
        num_active: int,
        everything: bool,
        shards: Shards | None,
        check_finite: Callable[[], None],
    ) -> None:
        """Take a step in torch's operations, which go for all types, devices, scores and patterns."""
        if ruled and not self._fixed:
            if self._score not in (taylor, first_order):  # which show what is not finite
                check_finite()
            # score, pool, select
            active = self._select(ruled, num_active, shards, check_finite)
        else:
            check_finite()
            active = [to_local(self.state[owner]["mask"]) for part in ruled for owner in part.owners]
        # update
        factors = factors_of(self._multipliers, named_in(self)) if self._multipliers else {}
        if factors:
            dense, ruled, active = self._multiplied(dense, ruled, active, factors)
        if ruled:
            self._update_(ruled, active)
        for part in dense:
            self._torchs_(part if everything else self._without_half(part, active=True), exactly=everything)
        for part in still:
            self._decay_(part)
        if factors and self._multiplies_updates:
            put_back_([*dense, *ruled], factors)

    def _natively(self, dense: list[Part], ruled: list[Part], still: list[Part], num_active: int) -> bool:
        """Take the same step in C, if it is one that step.c takes; return whether."""
        by_rule = type(self)._masked_ is type(self)._in_c and not self._multipliers
        chosen = self._fixed or (self._score in _ELEMENTWISE and isinstance(self._pattern, Unstructured))
        if still or not ruled or not by_rule or not chosen or not all(map(fits, (*dense, *ruled))):
            return False
        step = library.load_step()
        if step is None:
            return False
        grads = [grad for part in (*dense, *ruled) for grad in laid_out_as(part.params, part.grads)]
        masks = [self.state[owner]["mask"] for part in ruled for owner in part.owners] if self._fixed else None
        kernel = Kernel(step, dense, ruled, masks, self._score is taylor, self.param_groups)
        kernel.take(grads)
        if not kernel.step([self._settings_in_c(group) for group in kernel.groups], num_active):
            return False
        self._kernel, self._buffer = kernel, ScoreBuffer()
        return True

    def _repeat(self) -> bool:
        """Take a step in C as the last one was if nothing but values has changed since; return whether."""
        kernel, compared = self._kernel, self._agreed or not is_distributed() or self._check_ranks_always is False
        if kernel is None or self._check_ranks_always or not compared or self._due is not None:
            return False
        if kernel.fixed != self._fixed or not kernel.can_repeat(self.param_groups, self.state):
            return False
        num_active = self._active_of(kernel.num_prunable)
        if num_active == kernel.num_prunable:
            return False
        for group in self.param_groups:
            check_lr(group["lr"])
        if not kernel.step([self._settings_in_c(group) for group in kernel.groups], num_active):
            return False
        self._count_step(kernel.num_prunable)
        return True

    def _select(
        self, parts: Sequence[Part], num_active: int, shards: Shards | None, check_finite: Callable[[], None]
    ) -> list[Tensor]:
        """Score, pool, select: return which weights are active, `num_active` in all processes together."""
        weights = [param for part in parts for param in part.params]
        grads = [grad for part in parts for grad in part.grads]
        single = isinstance(self._pattern, Unstructured)
        finite = self._buffer.fill(self._score, weights, grads, self._score_states(parts))
        if not finite:
            if self._score not in _ELEMENTWISE and shards is None:
                check_finite()
                self._check_scores(parts)
            self._buffer.sanitize_()
        if shards is not None and single and self._score not in _ELEMENTWISE:
            whole = self._buffer.whole
            whole.masked_fill_(whole <= 0, -1)  # passive all alike: no other sign is exchanged
        if single:
            try:
                threshold = _threshold(self._buffer.scores_of, len(weights), num_active, shards, suspect=not finite)
            except NotFiniteError:
                check_finite()  # if no gradient is to blame a weight is: infinite it is active, NaN passive
                threshold = _threshold(self._buffer.scores_of, len(weights), num_active, shards)
            return self._buffer.active(threshold)
        if not finite:
            check_finite()
        pattern = self._pattern.over(self._keys_of(parts))
        return choose(self._buffer.views, num_active, pattern, positive=True, averaged=self._averaged, shards=shards)

    def _averaged(self, units: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the root mean squares of the units' scores over recent steps, which the first group keeps.

        Of a pattern that does not average, the scores as they are.
        """
        if not self._pattern.averaged:
            return units
        squares = [scores.square() for scores in units]
        if before := self.param_groups[0]["unit_scores"]:
            squares = [torch.lerp(mean.to(new), new, _NEW) for mean, new in zip(before, squares, strict=True)]
        self.param_groups[0]["unit_scores"] = squares
        return [mean.sqrt() for mean in squares]

    def _check_scores(self, parts: Sequence[Part]) -> None:
        """Raise ValueError if a score is NaN though neither weight nor gradient is."""
        owners = [(owner, param) for part in parts for owner, param in zip(part.owners, part.params, strict=True)]
        for (owner, param), scores in zip(owners, self._buffer.views, strict=True):
            if scores.isnan().any() and not param.isnan().any():
                raise ValueError(f"a score of {self._name_of(owner)} is NaN, though weight and gradient are not")

    def _keys_of(self, parts: Sequence[Part]) -> list[str]:
        """Return the keys that the masks of parameters get."""
        keys = {id(param): key for key, param in prunable_in(self).items()}
        return [keys[id(owner)] for part in parts for owner in part.owners]

    def _score_states(self, parts: Sequence[Part]) -> list[dict[str, Any]]:
        """Return what a score may know of each weight beside its gradient."""
        owners = [owner for part in parts for owner in part.owners]
        if self._score in (taylor, first_order, magnitude):
            return [{}] * len(owners)
        columns = [{**part.buffers, **({"step": part.own_steps} if part.own_steps else {})} for part in parts]
        states = [
            {name: column[i] for name, column in mine.items()}
            for part, mine in zip(parts, columns, strict=True)
            for i in range(len(part.owners))
        ]
        seeds = [seed_of(key, offsets(owner)) for key, owner in zip(self._keys_of(parts), owners, strict=True)]
        return [{**mine, "seed": seed} for mine, seed in zip(states, seeds, strict=True)]

    def _parts(self, everything: bool) -> tuple[list[Part], list[Part], list[Part]]:
        """Return what to update with all weights active, by the rule, and, having no gradient, by decay alone."""
        kinds: tuple[list[Part], list[Part], list[Part]] = [], [], []
        for group in self.param_groups:
            sides: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
            for param in group["params"]:
                by_rule = is_governed(param, group) and not everything
                if _has_gradient(param):
                    sides[by_rule].append(param)
                elif by_rule and self.phase is not Phase.DONE:
                    sides[1 if self._fixed else 2].append(param)
            for parts, params in zip(kinds, sides, strict=True):
                if params:
                    parts.append(self._part(params, group))
        return kinds

    def _part(self, params: list[Tensor], group: dict[str, Any]) -> Part:
        """Return what is needed to update parameters of a group; buffers that do not exist yet are zeros."""
        locals_ = [to_local(param) for param in params]
        buffers = {name: self._buffers(name, params, locals_) for name in self._buffer_names(group)}
        grads = [local_grad(param) for param in params]
        own_steps = [self._own_step(param, group) for param in params] if self._own_steps else []
        step = self.param_groups[0]["step"]
        return Part(params, locals_, grads, buffers, group, self.passive_decay(group), step, own_steps)

    def _own_step(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """Return how many steps a parameter has taken, where and in which precision torch's Adam has it."""
        wide = torch.get_default_dtype() == torch.float64 and not group["fused"]
        device = to_local(param).device if group["fused"] else torch.device("cpu")
        found = self.state[param].get("step", 0.0) if param in self.state else 0.0
        return torch.as_tensor(found, dtype=torch.float64 if wide else torch.float32, device=device)

    def _buffers(self, name: str, params: list[Tensor], locals_: list[Tensor]) -> list[Tensor]:
        """Return buffers of the local parts of parameters, zeros if missing; does not modify state.

        Raises:
            ValueError: a parameter has changed its shape.
        """
        buffers = []
        for param, local in zip(params, locals_, strict=True):
            found = self.state[param].get(name) if param in self.state else None
            buffer = torch.zeros_like(local) if found is None else to_local(found)
            if buffer.shape != local.shape:
                raise ValueError(
                    f"{self._name_of(param)} has shape {tuple(local.shape)}, its {name} {tuple(buffer.shape)}: "
                    "build a new optimizer after a parameter has changed its shape"
                )
            buffers.append(buffer.to(local))  # the model may have been converted since
        return laid_out_as(locals_, buffers)  # a state from elsewhere may lie in memory in another order

    def _remember(self, part: Part) -> None:
        """Put the buffers of parameters that have been updated into the state."""
        for name, buffers in part.buffers.items():
            for owner, buffer in zip(part.owners, buffers, strict=True):
                state = self.state[owner]
                if name not in state or to_local(state[name]) is not buffer:
                    state[name] = like_dtensor(owner, buffer)
        for owner, step in zip(part.owners, part.own_steps, strict=False):
            self.state[owner]["step"] = step

    def _count_step(self, total: int) -> None:
        """Note that a step has been taken, and whether the next one belongs to the ramp."""
        for group in self.param_groups:
            motion = self._motion(group)
            if self.phase in (Phase.SEARCH, Phase.FADE):
                passive, decay = PassiveWeight(*group["passive_weight"]), self.passive_decay(group)
                group["passive_weight"] = tuple(passive.step(motion.lr, decay, motion.momentum, motion.nesterov))
            group["highest_lr"] = max(group["highest_lr"], motion.lr)
        self.param_groups[0]["step"] += 1
        self._note_phase(total)

    def _note_phase(self, total: int) -> None:
        if total and not self._fixed:
            ramping = self._active_of(total) > self._kept_of(total)
            self.param_groups[0]["phase"] = (Phase.RAMP if ramping else Phase.SEARCH).value

    # --- the update ---

    def _multiplied(
        self, dense: list[Part], ruled: list[Part], active: list[Tensor], factors: Factors
    ) -> tuple[list[Part], list[Part], list[Tensor]]:
        """Return what to update with multiplied gradients.

        The scores are of the gradients as they are: |w g| is the first-order change of the loss, whatever a weight's
        step is multiplied by.
        """
        updates = self._multiplies_updates
        return multiplied(dense, factors, updates), multiplied(ruled, factors, updates), active

    def _update_(self, parts: Sequence[Part], active: Sequence[Tensor]) -> None:
        """Update parameters by the rule, given which weights are active; masks may be overwritten."""
        for part in parts:
            mine, active = active[: len(part.params)], active[len(part.params) :]
            full, half = part.by_precision()
            self._half_(part.only(half), [mine[number] for number in half])
            if full:
                self._masked_(part.only(full), [mine[number] for number in full])

    def _half_(self, part: Part, active: Sequence[Tensor]) -> None:
        update_half_(self._rule, part, active, self._numbers(part), self._kind(part.group))
        _count([part])

    def _without_half(self, part: Part, active: bool) -> Part:
        """Update what is in half precision, all of it active or passive, and return the rest."""
        full, half = part.by_precision()
        if not half:
            return part
        mine = part.only(half)
        self._half_(mine, [torch.full_like(param, active, dtype=torch.bool) for param in mine.params])
        return part.only(full)

    # --- the cut ---

    @torch.no_grad()
    def finalize(self) -> Masks:
        """Cut: set all prunable weights but the Q largest |w| of the whole model to zero, for good.

        Steps taken afterwards train the kept weights alone, and the gradients of the others are zero as soon as they
        have been computed, so that clipping does not see them. A second call keeps the same weights, and sets the
        others to zero again if other weights have been loaded meanwhile. Of several processes that train one model all
        have to call.

        Warns:
            CutWarning: what is cut still matters, or a layer keeps nothing.

        Returns:
            The masks, exactly Q weights in all.
        """
        cut_already = self.phase is Phase.DONE
        self._fix_masks()
        masks, masked = self.masks, self._masked()
        if not cut_already:
            reason = self._why_passive_weights_stay(self.param_groups[0], self.passive_shrinkage)
            warn_of_cut(masked, masks, reason, self._pattern.spares_layers)
        masks.apply_(masked)
        for key, param in masked.items():
            for name in self._buffer_names_of(param):  # momentum would push a weight that was cut away from zero
                to_local(self.state[param][name]).masked_fill_(~to_local(masks[key]), 0)
        self.param_groups[0]["phase"] = Phase.DONE.value
        self._mask_gradients()
        return masks

    @property
    def _due(self) -> Phase | None:
        """The phase that begins with the next step, if it is the fade or the cut."""
        schedule = self.schedule
        if self.phase is Phase.DONE or not isinstance(schedule, Schedule):
            return None
        due = schedule.phase(self.param_groups[0]["step"])
        return due if due is Phase.DONE or (due is Phase.FADE and not self._fixed) else None

    def _fade_or_cut_if_due(self, check_finite: Callable[[], None]) -> None:
        """Do what is to be done before the first step of the fade, or after the cut."""
        due = self._due
        if due is None or not self.num_prunable:
            return
        check_finite()
        if due is Phase.DONE:
            self.finalize()
        else:
            self._fix_masks()
            self.param_groups[0]["phase"] = Phase.FADE.value
            for group in self.param_groups:
                group["passive_weight"] = tuple(PassiveWeight())

    def _fix_masks(self) -> None:
        """Put masks of the Q largest |w| into the state, unless they are there."""
        if self._fixed:
            return
        governed = self._governed_by_key()
        masks = largest(governed, self.num_kept, self._pattern)
        for param_state in self.state.values():
            param_state.pop("mask", None)  # one that was only a place to load another into
        for key, param in governed.items():
            self.state[param]["mask"] = masks[key]
        self.param_groups[0] |= {"phase": Phase.FADE.value, "unit_scores": None}
        self._buffer = ScoreBuffer()  # nothing is chosen any more

    def _mask_gradients(self) -> None:
        """Keep the gradients of what has been cut at zero, as long as this optimizer lives."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        if self.phase is Phase.DONE:
            masked = self._masked().values()
            self._hooks = mask_gradients((param, ~to_local(self.state[param]["mask"])) for param in masked)
            weakref.finalize(self, self._hooks.remove)

    # --- checks ---

    def _why_passive_weights_stay(self, group: dict[str, Any], left: float | None = None) -> str | None:
        schedule = self.schedule if isinstance(self.schedule, Schedule) else None
        decay = None if group["passive_decay"] == "auto" else self.passive_decay(group)
        return why_passive_weights_stay(schedule, self.param_groups[0]["step"], decay, self._motion(group), left)

    def _check_agreement(self, shards: Shards | None) -> None:
        """Raise ValueError on every process if they would not do the same in this step, as far as it is compared."""
        check = bool(self._check_ranks_always)
        if not is_distributed() or self._check_ranks_always is False or (self._agreed and not check):
            return
        params = [param for group in self.param_groups for param in group["params"]]
        device = to_local(params[0]).device if shards is None else shards.device
        counts = {"parameters": len(params), "parameter groups": len(self.param_groups)}
        settings = {f"the number of {what}": float(count) for what, count in counts.items()}
        total = self.num_prunable
        settings |= {"the number of prunable weights": total}
        settings |= {"the number of active weights": self._active_of(total) if total else 0}
        check_same_settings(settings, device)  # first how many there are: else the next call would not fit
        check_same_settings(self._settings(), device)
        self._agreed = shards is None or not callable(self.schedule)
        if check:
            check_same_replicas(self._all_by_name())

    def _settings(self) -> dict[str, float]:
        """Return all settings of all groups as numbers, for comparing them."""
        found = {}
        for number, group in enumerate(self._plain_groups()):
            where = f" of group {number}" if number else ""
            for key, value in group.items():
                items = {f"{key}[{i}]": v for i, v in enumerate(value)} if isinstance(value, tuple) else value
                for name, item in (items if isinstance(items, dict) else {key: value}).items():
                    text = isinstance(item, str)
                    found[name + where] = -1.0 if item is None else zlib.crc32(item.encode()) if text else float(item)
        return found

    def _is_torchs_initialisation(self, trained: list[Tensor], shards: Shards | None) -> bool:
        """Return whether torch's distributed checkpoints ask for empty state, by a step without rates and gradients.

        Masks are among it, as only what the state has a place for is loaded.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        idle = not any(bool(local_grad(param).any()) for param in trained if not is_sparse(param.grad))
        if not (idle if shards is None else shards.everywhere([idle])[0]):
            return False
        for group in self.param_groups:
            for param in group["params"]:
                if _has_gradient(param):
                    self.state[param].update({name: torch.zeros_like(param) for name in self._buffer_names(group)})
                    self.state[param].update({"step": self._own_step(param, group)} if self._own_steps else {})
                if is_governed(param, group):
                    self.state[param]["mask"] = torch.ones_like(param, dtype=torch.bool)
        return True

    # --- state ---

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: beside the state, what the constructor was given."""
        own = ("_score", "_pattern", "_model_wide", "_check_ranks_always", "_multipliers")
        return {**super().__getstate__(), **{key: getattr(self, key) for key in own}}

    def _plain_groups(self) -> list[dict[str, Any]]:
        """Return the settings of the parameter groups as plain values."""
        groups = [{key: plain(value) for key, value in g.items() if key != "params"} for g in self.param_groups]
        return [
            {key: value for key, value in group.items() if key not in ("param_names", "unit_scores")}
            for group in groups
        ]

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
        if not self._fixed:
            governed = [is_governed(param, group) for group in self.param_groups for param in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for number, (param, by_rule) in enumerate(zip(params, governed, strict=True)):
                if by_rule and number in state["state"]:
                    mask = torch.ones_like(param, dtype=torch.bool)
                    state["state"][number] = {**state["state"][number], "mask": mask}
        total = self.schedule.total_steps if isinstance(self.schedule, Schedule) else math.inf
        if self.phase is not Phase.DONE and self.param_groups[0]["step"] >= total and self.num_kept < self.num_prunable:
            warnings.warn(
                "total_steps are over, and the net of this state has not been cut: call finalize() first",
                CutWarning,
                stacklevel=2,
            )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of torch's; see the class for which settings it brings.

        Raises:
            ValueError: the state is of other parameters, or asks for what is not supported. Nothing has changed.
        """
        groups, given = self.param_groups, self._plan()
        state = check_state(in_order_of(groups, state_dict), groups)
        super().load_state_dict(state)
        for old, new in zip(groups, self.param_groups, strict=True):
            new.update({key: value for key, value in old.items() if key not in new or key in _OF_THE_OBJECT})
        brought = [f"{now} (not {before})" for now, before in zip(self._plan(), given, strict=True) if now != before]
        if brought:
            warnings.warn(
                f"the loaded state brings {', '.join(brought)}: to train by another schedule, assign "
                "optimizer.schedule",
                UserWarning,
                stacklevel=2,
            )
        self._mask_gradients()

    def _plan(self) -> tuple[str, str]:
        """Return budget and schedule in words."""
        kind, value = self.param_groups[0]["budget"]
        return f"{kind}={value:g}", f"schedule={self.schedule}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state; torch casts loaded masks to the parameters' dtype, here they are bool again.

        What is kept for a parameter is sharded as the parameter is, however it was when it was saved.

        Raises:
            ValueError: it is of another shape, and so the state is another model's; or masks are missing. Nothing has
                changed.
        """
        groups: list[dict[str, Any]] = state["param_groups"]
        states: dict[Tensor, dict[str, Any]] = state["state"]
        for param, param_state in states.items():
            localise(param, param_state)
        fixed = groups[0].get("phase") in (Phase.FADE, Phase.DONE)
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
        if "_score" in state:  # a copy, or unpickled: none of the rest is state
            self._prepare()
            self._mask_gradients()
        self._shards, self._agreed = None, False

    # --- parameters ---

    @property
    def _fixed(self) -> bool:
        """Whether the masks are fixed."""
        return bool(self.param_groups) and self.phase in (Phase.FADE, Phase.DONE)

    def _governs(self, group: dict[str, Any]) -> bool:
        return any(is_governed(param, group) for param in group["params"])

    def _governed(self) -> list[Tensor]:
        """Return the parameters that the rule governs now."""
        return [param for group in self.param_groups for param in group["params"] if is_governed(param, group)]

    def _governed_by_key(self) -> dict[str, Tensor]:
        """Return them by the keys that their masks get."""
        governed = set(self._governed())
        return {key: param for key, param in prunable_in(self).items() if param in governed}

    def _masked(self) -> dict[str, Tensor]:
        """Return the parameters that have masks, by the keys of these; none before the masks are fixed."""
        if not self._fixed:
            return {}
        return {key: param for key, param in prunable_in(self).items() if "mask" in self.state.get(param, {})}

    def _buffer_names_of(self, param: Tensor) -> list[str]:
        """Return which of a parameter's state are buffers of its shape."""
        shaped = ((name, value) for name, value in self.state[param].items() if isinstance(value, Tensor))
        return [name for name, value in shaped if name != "mask" and value.shape == param.shape]

    def _named(self, group: dict[str, Any]) -> tuple[list[str], list[Tensor]]:
        """Return the names of a group's governed parameters, or their numbers, and the parameters."""
        names = group.get("param_names") or [str(number) for number in range(len(group["params"]))]
        found = [(name, p) for name, p in zip(names, group["params"], strict=True) if is_governed(p, group)]
        return [name for name, _ in found], [param for _, param in found]

    def _all_by_name(self) -> dict[str, Tensor]:
        """Return all parameters by name, or number."""
        params = (param for group in self.param_groups for param in group["params"])
        return named_in(self) or {f"number {i}": param for i, param in enumerate(params)}

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
            shards = Shards(params)
            check_spread(self._pattern, {key: p for key, p in prunable_in(self).items() if p in set(params)}, shards)
            self._shards = shards
        return self._shards


def _threshold(
    scores_of: ScoresOf, tensors: int, num_active: int, shards: Shards | None, suspect: bool = False
) -> Threshold:
    """Return where the `num_active` largest scores above zero of so many tensors end, of this process or of all."""
    if shards is not None:
        return find_threshold(Sharded(shards, scores_of, suspect), num_active, positive=True)
    if suspect:
        raise NotFiniteError
    return find_threshold(Local(scores_of(range(tensors))), num_active, positive=True)


def _count(parts: Sequence[Part]) -> None:
    """Note that parameters have taken a step, where they count their own."""
    for part in parts:
        for step in part.own_steps:
            step += 1


def _has_gradient(param: Tensor) -> bool:
    """Return whether a parameter is trained in this step: a frozen one is not, whatever gradient is left there."""
    return param.requires_grad and param.grad is not None
