"""A parameter group's settings: whether they make sense, and what they come to at a step."""

import math
import operator
from typing import Any

from torch import Tensor

from .budget import decay_for_rate, fastest_rate

_WHOLE = ("total_steps", "ramp_steps", "fade_steps", "cut_step")
_REAL = ("lr", "compression", "momentum", "weight_decay", "passive_decay", "shrink_to")
_FADED = 0.01  # share of a weight that may be left after a fade
_WARM_UP = 0.1  # share of the steps in which the learning rate may still rise to where it was first set
_SLOW = 0.1  # share of a weight whose being left at the cut is worth a warning before the first step


def passive_decay(group: dict[str, Any]) -> float:
    """Return the decay of passive weights in the next step."""
    decay = float(group["weight_decay"])
    if group["passive_decay"] is None:
        return decay
    if group["passive_decay"] != "auto":
        return float(group["passive_decay"])
    lr, momentum, nesterov = float(group["lr"]), float(group["momentum"]), bool(group["nesterov"])
    weight, target = abs(float(group["passive_weight"][0])), float(group["shrink_to"])
    if lr == 0 or weight <= target:
        return decay
    steps_left = max(1, deadline(group) - max(group["steps"], group["ramp_steps"]))
    rate = (target / weight) ** (1 / steps_left)
    # With this much, if the learning rate jumped to its highest again, the momentum that a passive weight has would
    # just move it to zero: alpha eta w (1 + beta + beta^2 + ...)^2 = w.
    most = (1 - momentum) ** 2 / max(lr, _highest_lr(group))
    return max(decay, min(most, decay_for_rate(rate, lr, momentum, nesterov)))


def _highest_lr(group: dict[str, Any]) -> float:
    """Return the highest learning rate to expect: of those so far, and while a warm-up may go on, the first one set.

    Later the first one set does not count: it may be a mere unit, of which a scheduler takes a small share.
    """
    warming_up = group["steps"] < _WARM_UP * deadline(group)
    return max(float(group["highest_lr"]), float(group["base_lr"]) if warming_up else 0.0)


def deadline(group: dict[str, Any]) -> int:
    """Return the number of the step by which passive weights are to have vanished: the fade's first, then the cut."""
    end = min(int(end) for end in (group["cut_step"], group["total_steps"]) if end is not None)
    return end if group["fading"] else end - int(group["fade_steps"])


def why_passive_weights_stay(group: dict[str, Any], shrinkage: float | None = None) -> str | None:
    """Return why passive weights will not have shrunk to nothing by the cut, and what to do about it.

    Args:
        group: a group that the rule governs.
        shrinkage: what is left of a passive weight at the cut; None before the first step. Then there may be nothing
            to be said, and None is returned.
    """
    momentum, auto = float(group["momentum"]), group["passive_decay"] == "auto"
    fade, over = int(group["fade_steps"]), shrinkage is not None
    end = min((int(step) for step in (group["cut_step"], group["total_steps"]) if step is not None), default=None)
    if end is not None and over and group["steps"] < end:
        return (
            f"only {group['steps']} of the {end} steps planned before it were taken (steps, not batches, are counted)"
        )
    if not auto:
        decay = passive_decay(group)
        if decay == 0:
            return "passive weights never shrink where weight_decay and passive_decay are both 0"
        advice = "take passive_decay='auto' with total_steps"
        if end is not None and not over and group["lr"]:
            shrinkage = math.exp(-float(group["lr"]) * decay * (end - int(group["ramp_steps"])) / (1 - momentum))
        if shrinkage is not None and (over or shrinkage > _SLOW):
            return f"at this decay {shrinkage:.2g} of a passive weight is left by then; {advice}"
        return None
    rate = fastest_rate(momentum, group["nesterov"])
    if fade and rate**fade > max(_FADED, float(group["shrink_to"])):  # what has been passive for long has shrunk before
        return "fade_steps are too few for passive weights to shrink; take more, or a lower momentum"
    if not fade and rate ** (deadline(group) - int(group["ramp_steps"])) > float(group["shrink_to"]):
        return "there are too few steps for passive weights to shrink; take more, or a lower momentum"
    if not over:
        return None
    if not fade:
        return "weights that were active shortly before had no time to shrink; take fade_steps"
    return "the learning rate was too low for passive weights to shrink; cut before it falls, or take more fade_steps"


def settle(group: dict[str, Any]) -> None:
    """Turn the numbers among a group's settings into Python's, which any state can hold.

    Raises:
        ValueError: a setting is not a number where it has to be one.
    """
    for key in _WHOLE:
        value = group[key]
        if value is None:
            continue
        try:
            group[key] = operator.index(value)
        except TypeError:
            raise ValueError(f"{key} must be a whole number, not {value!r}") from None
        if isinstance(value, bool):
            raise ValueError(f"{key} must be a whole number, not {value!r}")
    for key in _REAL:
        value = group[key]
        if value is None or (key == "passive_decay" and isinstance(value, str)):
            continue
        if key == "lr" and isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"lr must be a number or a tensor with one element, not {tuple(value.shape)}")
            continue
        try:
            if isinstance(value, str):
                raise TypeError
            group[key] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{key} must be a number, not {value!r}") from None
    group["nesterov"] = bool(group["nesterov"])


def check_lr(lr: Any) -> None:
    """Raise ValueError unless a learning rate is finite and at least 0."""
    if lr is None or not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and at least 0, not {lr}")


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ValueError if a setting of a group is out of range, or does not go with the others."""
    auto = group["passive_decay"] == "auto"
    if isinstance(group["passive_decay"], str) and not auto:
        raise ValueError(f"passive_decay must be a number, 'auto' or None, not {group['passive_decay']!r}")
    check_lr(group["lr"])
    for key in ("weight_decay", *(() if auto else ("passive_decay",))):
        value = group[key]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key} must be finite and at least 0, not {value}")
    if group["weight_decay"] is None or group["momentum"] is None:
        raise ValueError("weight_decay and momentum must be numbers, not None")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs momentum above 0")
    _check_schedule(group)


def _check_schedule(group: dict[str, Any]) -> None:
    for key in _WHOLE:
        value = group[key]
        if value is not None and value < 0:
            raise ValueError(f"{key} must be a whole number of at least 0, not {value!r}")
    total, ramp, fade, cut = (group[key] for key in ("total_steps", "ramp_steps", "fade_steps", "cut_step"))
    if group["compression_schedule"] not in ("constant", "cubic", "custom"):
        raise ValueError(
            f"unknown compression_schedule {group['compression_schedule']!r}: "
            "choose constant or cubic, or give a function of the step"
        )
    if group["compression_schedule"] == "cubic" and ramp is None:
        raise ValueError("compression_schedule='cubic' needs ramp_steps or total_steps")
    auto = group["passive_decay"] == "auto"
    if auto and total is None:
        raise ValueError("passive_decay='auto' needs total_steps, the number of steps to be taken")
    if total is not None and cut is not None and cut >= total:
        raise ValueError(
            f"cut_step must be below total_steps, not {cut} of {total}: call finalize() at the end instead"
        )
    if not 0 < group["shrink_to"] < 1:
        raise ValueError(f"shrink_to must be above 0 and below 1, not {group['shrink_to']}")
    if fade and total is None and cut is None:
        raise ValueError("fade_steps needs cut_step or total_steps: before one of them the passive weights fade")
    end = min(step for step in (total, cut, math.inf) if step is not None) - fade
    if (auto or ramp or fade) and (ramp or 0) >= end:
        before = f", {fade} steps of fading aside" if fade else ""
        raise ValueError(f"ramp_steps must be below cut_step and total_steps{before}: {ramp} leaves nothing of {end}")
