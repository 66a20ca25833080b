"""Decay: how fast must passive weights decay to vanish in the steps that are left?

A weight w that stays passive is moved by its own decay alone. With learning rate alpha, momentum coefficient beta and
decay eta, a step is linear in it and its momentum z:

    z <- beta z + eta w
    w <- w - alpha z                         Nesterov: w <- w - alpha (eta w + beta z)

With x = alpha eta, a constant step multiplies both by an eigenvalue lambda of that map, which solves

    x = (1 - lambda) (lambda - beta) / lambda
    Nesterov:  x = (1 - lambda) (lambda - beta) / ((1 + beta) lambda - beta)

For small x that is the paper's w_k = w_0 exp(-alpha eta k / (1 - beta)) (Ding et al., 2019, section 3.3). x is largest
at lambda = sqrt(beta), where it is (1 - sqrt(beta))^2; Nesterov: at 2 beta / (1 + beta), where it is
((1 - beta) / (1 + beta))^2. Any more, and lambda is complex: the weight oscillates about zero, and by |lambda| it
shrinks no faster, with Nesterov's by |lambda| = sqrt(beta (1 - x)).

Decoupled decay is the case beta = 0, in closed form: x = 1 - lambda. AdamW's first moment, which shrinks by beta1 in
each step, still moves a weight that turns passive; were lambda smaller, that motion would be all that is left of it. So
lambda is at least beta1.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from .schedules import Schedule

_WARM_UP = 0.1  # share of the steps in which the learning rate may still rise to where it was first set
_FADED = 0.01  # share of a weight that may be left after a fade
_SLOW = 0.1  # share of a weight whose being left at the cut is worth a warning before the first step


class PassiveWeight(NamedTuple):
    """A weight that is passive, and its momentum."""

    weight: float = 1.0
    momentum: float = 0.0

    def step(self, lr: float, decay: float, momentum: float, nesterov: bool = False) -> "PassiveWeight":
        """Return what a step makes of it: the recurrence, exactly."""
        pull = decay * self.weight
        moved = momentum * self.momentum + pull
        return PassiveWeight(self.weight - lr * (pull + momentum * moved if nesterov else moved), moved)


def shrinkage(decay: float, lrs: Iterable[float], momentum: float, nesterov: bool = False) -> float:
    """Return by what factor steps at these learning rates shrink a weight that stays passive, |w_T / w_0|."""
    passive = PassiveWeight()
    for lr in lrs:
        passive = passive.step(lr, decay, momentum, nesterov)
    return abs(passive.weight)


def fastest_rate(momentum: float, nesterov: bool = False) -> float:
    """Return the smallest factor per step that a passive weight can shrink by without oscillating."""
    return 2 * momentum / (1 + momentum) if nesterov else math.sqrt(momentum)


def decay_for_rate(rate: float, lr: float, momentum: float, nesterov: bool = False) -> float:
    """Return the decay at which a step at this learning rate multiplies a passive weight by `rate` in the long run.

    Args:
        rate: lambda, at most 1; below `fastest_rate` the decay for that one is returned.
        lr: alpha, above 0.
        momentum: beta.
        nesterov: whether momentum is Nesterov's.
    """
    rate = max(rate, fastest_rate(momentum, nesterov))
    if momentum == 0:  # the momentum is not there, so lambda = 1 - x
        return (1 - rate) / lr
    return (1 - rate) * (rate - momentum) / ((1 + momentum) * rate - momentum if nesterov else rate) / lr


class Motion(NamedTuple):
    """How a group's passive weights move: learning rate, momentum, and the learning rates set first and seen so far.

    `coasting` is what a step leaves of the motion that a weight has when it turns passive, apart from that momentum:
    beta1 of AdamW.
    """

    lr: float
    momentum: float
    nesterov: bool
    first_lr: float
    highest_lr: float
    coasting: float = 0.0

    @property
    def fastest_rate(self) -> float:
        """The smallest factor per step by which passive weights can vanish."""
        return max(fastest_rate(self.momentum, self.nesterov), self.coasting)


def auto_decay(weight: float, step: int, fading: bool, schedule: Schedule, motion: Motion) -> float:
    """Return the decay with which passive weights shrink to `shrink_to` by the fade, and in the fade once more.

    Args:
        weight: what is left of a weight that has been passive since the ramp, or since the fade began.
        step: the number of the step, counted from 0.
        fading: whether the fade has begun.
        schedule: what is planned.
        motion: how passive weights move.
    """
    lr, momentum, nesterov = motion.lr, motion.momentum, motion.nesterov
    if lr == 0 or weight <= schedule.shrink_to:
        return 0.0
    deadline = schedule.cut_step if fading else schedule.fade_start
    rate = (schedule.shrink_to / weight) ** (1 / max(1, deadline - max(step, schedule.ramp_steps)))
    decay = decay_for_rate(max(rate, motion.fastest_rate), lr, momentum, nesterov)
    if momentum == 0:  # the next step does not depend on this one
        return decay
    # The rate to come is at least the highest so far, and while a warm-up may go on, the first one set. Later that does
    # not count: it may be a mere unit, of which a scheduler takes a small share.
    first_lr = motion.first_lr if step < _WARM_UP * schedule.fade_start else 0.0
    highest = max(lr, motion.highest_lr, first_lr, schedule.peak_lr or 0.0)
    # With this much, if the learning rate jumped to its highest again, the momentum that a passive weight has would
    # just move it to zero: alpha eta w (1 + beta + beta^2 + ...)^2 = w.
    most = (1 - momentum) ** 2 / highest
    return min(most, decay)


def why_passive_weights_stay(
    schedule: Schedule | None, step: int, decay: float | None, motion: Motion, left: float | None = None
) -> str | None:
    """Return why passive weights will not have vanished at the cut, and what to do about it; None if nothing is known.

    Args:
        schedule: what is planned, if anything is.
        step: how many steps have been taken.
        decay: that of passive weights if it is given, None if it is "auto".
        motion: how passive weights move.
        left: what is left of a passive weight at the cut; None before the first step.
    """
    momentum = motion.momentum
    if schedule is not None and left is not None and step < schedule.cut_step:
        return f"only {step} of the {schedule.cut_step} steps before it were taken (steps, not batches, are counted)"
    if decay is not None or schedule is None:
        if not decay:
            return "passive weights never shrink where weight_decay and passive_decay are both 0"
        over = left is not None
        if schedule is not None and left is None and motion.lr:
            steps = schedule.cut_step - schedule.ramp_steps
            left = math.exp(-motion.lr * decay * steps / (1 - momentum))
        if left is not None and (over or left > _SLOW):
            return (
                f"at this decay {left:.2g} of a passive weight is left by then; use passive_decay='auto' and a Schedule"
            )
        return None
    rate, fade = motion.fastest_rate, schedule.cut_step - schedule.fade_start
    lower = "lower beta1" if motion.coasting else "lower the momentum"
    if fade and rate**fade > max(_FADED, schedule.shrink_to):  # what has been passive for long has shrunk before
        return f"the fade is too short for passive weights to shrink: lengthen it, or {lower}"
    if not fade and rate ** (schedule.cut_step - schedule.ramp_steps) > schedule.shrink_to:
        return f"there are too few steps for passive weights to shrink: train longer, or {lower}"
    if left is None:
        return None
    if not fade:
        return "weights that were active shortly before had no time to shrink: add a fade"
    return "the learning rate was too low for passive weights to shrink: cut before it falls, or lengthen the fade"
