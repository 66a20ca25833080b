"""A parameter group's settings: whether they make sense, and what they come to at a step."""

import math
from typing import Any

from .budget import decay_for_rate, fastest_rate

_FADED = 0.01  # share of a weight that may be left after a fade


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
    most = (1 - momentum) ** 2 / max(lr, float(group["highest_lr"]))
    return max(decay, min(most, decay_for_rate(rate, lr, momentum, nesterov)))


def deadline(group: dict[str, Any]) -> int:
    """Return the number of the step by which passive weights are to have vanished: the fade's first, then the cut."""
    end = min(int(end) for end in (group["cut_step"], group["total_steps"]) if end is not None)
    return end if group["fading"] else end - int(group["fade_steps"])


def vanishes(group: dict[str, Any]) -> bool:
    """Return whether passive weights can shrink as far as they are to, or at all where nothing is aimed at."""
    if group["passive_decay"] != "auto":
        return passive_decay(group) > 0
    fade, rate = int(group["fade_steps"]), fastest_rate(group["momentum"], group["nesterov"])
    if fade:  # what has been passive for long has shrunk before
        return rate**fade <= max(_FADED, float(group["shrink_to"]))
    return rate ** (deadline(group) - int(group["ramp_steps"])) <= float(group["shrink_to"])


def check_hyperparameters(group: dict[str, Any]) -> None:
    """Raise ValueError if a setting of a group is out of range, or does not go with the others."""
    auto = group["passive_decay"] == "auto"
    if isinstance(group["passive_decay"], str) and not auto:
        raise ValueError(f"passive_decay must be a number, 'auto' or None, not {group['passive_decay']!r}")
    for key in ("lr", "weight_decay", *(() if auto else ("passive_decay",))):
        value = group[key]
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{key} must be finite and at least 0, not {value}")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs momentum above 0")
    _check_schedule(group)


def _check_schedule(group: dict[str, Any]) -> None:
    for key in ("total_steps", "ramp_steps", "fade_steps", "cut_step"):
        value = group[key]
        if value is not None and not (isinstance(value, int) and value >= 0):
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
