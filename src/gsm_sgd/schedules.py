"""Schedules: how many weights are active at a step, and when the rest fades and is cut."""

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Literal, Self

CURVES: dict[str, Callable[[float], float]] = {
    "cubic": lambda share: 1 - (1 - share) ** 3,
    "linear": lambda share: share,
}
"""What share of the final sparsity is reached after a share of the ramp. Cubic: Zhu and Gupta, "To prune, or not to
prune", 2017; most weights become passive early, when there are many to choose from."""


class Phase(StrEnum):
    """What a step does."""

    RAMP = "ramp"  #: the number of active weights falls to Q
    SEARCH = "search"  #: Q weights are active, chosen again at every step
    FADE = "fade"  #: the masks are fixed; what they do not keep only decays
    DONE = "done"  #: it has been cut; the kept weights train alone


@dataclass(frozen=True)
class Schedule:
    """One phase of training, from a random start or a trained net: ramp, search, fade, cut, train the kept weights.

    Args:
        total_steps: optimizer steps of the whole training.
        ramp: share of the steps over which the density falls from 1 to that of the budget.
        fade: share of the steps before the cut in which nothing is chosen: the masks are the Q largest |w| as it
            begins, and all else only decays. Without a fade a weight that is passive at the cut may have been active
            shortly before, so the cut costs accuracy however fast passive weights shrink.
        cut: share of the steps after which the passive weights are cut; 1 leaves the cut to `finalize()`.
        curve: how the density falls: "cubic", "linear", or a function from the share of the ramp that is over to the
            share of the final sparsity. A function is not in `state_dict()`.
        peak_lr: the highest learning rate to come, where the rate rises later than in the first tenth of the steps:
            the decay of passive weights allows for it.
        shrink_to: the share of its value to which a weight shrinks that is passive from the end of the ramp on; low,
            since a weight that turns passive later has less time.

    Raises:
        ValueError: an argument is out of range, or nothing is left between ramp, fade and cut.
    """

    total_steps: int
    ramp: float = 0.3
    fade: float = 0.1
    cut: float = 0.7
    curve: Literal["cubic", "linear"] | Callable[[float], float] = "cubic"
    peak_lr: float | None = None
    shrink_to: float = 1e-6

    def __post_init__(self) -> None:
        """Check the arguments."""
        total = whole_number("total_steps", self.total_steps)
        numbers = {key: real_number(key, getattr(self, key)) for key in ("ramp", "fade", "cut", "shrink_to")}
        if self.peak_lr is not None:
            numbers["peak_lr"] = real_number("peak_lr", self.peak_lr)
        for key, value in {"total_steps": total, **numbers}.items():
            object.__setattr__(self, key, value)  # NumPy's numbers become Python's, which any state can hold
        if total < 1:
            raise ValueError(f"total_steps must be at least 1, not {total}")
        for key in ("ramp", "fade", "cut"):
            if not 0 <= numbers[key] <= 1:
                raise ValueError(f"{key} is a share of total_steps, from 0 to 1, not {numbers[key]}")
        if not (callable(self.curve) or self.curve in (*CURVES, "custom")):
            raise ValueError(f"unknown curve {self.curve!r}: choose {', '.join(CURVES)}, or pass a function")
        if not 0 <= numbers.get("peak_lr", 0.0) < math.inf:
            raise ValueError(f"peak_lr must be finite and at least 0, not {self.peak_lr}")
        if not 0 < self.shrink_to < 1:
            raise ValueError(f"shrink_to must be above 0 and below 1, not {self.shrink_to}")
        if not self.ramp_steps < self.fade_start <= self.cut_step:
            raise ValueError(
                f"ramp + fade must be less than cut, with a step between: ramp {self.ramp}, fade {self.fade} and cut "
                f"{self.cut} of {total} steps leave none"
            )

    @property
    def ramp_steps(self) -> int:
        """The first step with the final density."""
        return round(self.ramp * self.total_steps)

    @property
    def fade_start(self) -> int:
        """The first step of the fade; the cut's, if there is none."""
        return self.cut_step - round(self.fade * self.total_steps)

    @property
    def cut_step(self) -> int:
        """The step before which the passive weights are cut."""
        return round(self.cut * self.total_steps)

    def density(self, step: int, final: float) -> float:
        """Return the share of weights that may be active at a step, counted from 0, given that of the budget."""
        if step >= self.ramp_steps:
            return final
        curve = self.curve if callable(self.curve) else CURVES.get(self.curve)
        if curve is None:
            raise ValueError("the loaded schedule has a curve that is a function: assign optimizer.schedule")
        return 1 - (1 - final) * curve(step / self.ramp_steps)

    def phase(self, step: int) -> Phase:
        """Return the phase that a step, counted from 0, falls into."""
        if step < self.ramp_steps:
            return Phase.RAMP
        if step < self.fade_start:
            return Phase.SEARCH
        return Phase.FADE if step < self.cut_step else Phase.DONE

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments as plain values, for a state."""
        return {**asdict(self), "curve": "custom" if callable(self.curve) else self.curve}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the schedule of which `as_dict` made these values."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def whole_number(key: str, value: Any) -> int:
    """Return a setting as Python's int, or raise ValueError."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{key} must be a whole number, not {value!r}")


def real_number(key: str, value: Any) -> float:
    """Return a setting as Python's float, or raise ValueError."""
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"{key} must be a number, not {value!r}")
