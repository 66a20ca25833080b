"""How fast passive weights have to decay to vanish in the steps given, and how many weights are active meanwhile.

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
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


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


def decay_for_shrinkage(factor: float, lrs: Sequence[float], momentum: float, nesterov: bool = False) -> float:
    """Return the constant decay that shrinks a passive weight by a factor in steps at these learning rates.

    Solved with the exact recurrence, by bisection: up to the decay at which the highest learning rate would make
    the weight oscillate, a higher decay shrinks it more.

    Raises:
        ValueError: the factor is not between 0 and 1, or so few steps cannot shrink a weight that much.
    """
    if not 0 < factor < 1:
        raise ValueError(f"the factor that passive weights shrink by must be above 0 and below 1, not {factor}")
    low, high = 0.0, 0.0
    if max(lrs, default=0.0) > 0:
        high = decay_for_rate(0.0, max(lrs), momentum, nesterov)
    best = shrinkage(high, lrs, momentum, nesterov)
    if best > factor:
        raise ValueError(
            f"{len(lrs)} steps shrink a passive weight by {best:.2g} at best without oscillating, not by {factor:.2g}: "
            "train longer, with a higher learning rate, or with less momentum"
        )
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if shrinkage(middle, lrs, momentum, nesterov) <= factor else (middle, high)
    return high


def cubic_compression(compression: float, step: int, ramp_steps: int) -> float:
    """Return the compression ratio at a step, where the share of passive weights rises to 1 - 1/C by the cubic rule.

    Most weights become passive early, when there are many to choose from (Zhu and Gupta, "To prune, or not to
    prune", 2017): s_t = (1 - 1/C) (1 - (1 - t/T)^3).
    """
    if step >= ramp_steps:
        return compression
    passive = (1 - 1 / compression) * (1 - (1 - step / ramp_steps) ** 3)
    return 1 / (1 - passive)
