"""What an optimizer accepts from elsewhere: settings, parameters, and the state of another optimizer."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from ..budget import SHARES, Budget
from ..distributed import like_dtensor, local_slice, to_local
from ..names import bare_name, is_governed
from ..patterns import Unstructured
from ..schedules import Phase, Schedule, real_number, whole_number

UNSUPPORTED = {
    **{"maximize": False, "dampening": 0, "differentiable": False, "amsgrad": False, "capturable": False},
    "decoupled_weight_decay": True,
}
"""Settings of torch's optimizers that stand in each group where theirs have them, and the one value allowed."""

_SINGLE = repr(Unstructured())
_PARTS_OF_A_WEIGHT = re.compile(r"(?:^|\.)(?:parametrizations\.\w+\.original\d+|\w+_[gv])$")


def check_lr(lr: Any) -> None:
    """Raise ValueError unless a learning rate is finite and at least 0."""
    if lr is None or not (math.isfinite(lr) and lr >= 0):
        raise ValueError(f"lr must be finite and at least 0, not {lr}")


def check_group(group: dict[str, Any], schedule: Any) -> None:
    """Turn a group's numbers into Python's, which any state can hold.

    Raises:
        ValueError: a setting is not supported, no number, out of range, or does not go with the schedule.
    """
    check_supported(group)
    if not (schedule is None or isinstance(schedule, Schedule) or callable(schedule)):
        raise ValueError(f"schedule must be a Schedule, a function of the step, or None, not {schedule!r}")
    if not isinstance(group["prunable"], bool | None):
        raise ValueError(f"prunable must be True, False or None, not {group['prunable']!r}")
    auto = group["passive_decay"] == "auto"
    if isinstance(group["passive_decay"], str) and not auto:
        raise ValueError(f"passive_decay must be a number, 'auto' or None, not {group['passive_decay']!r}")
    if auto and not isinstance(schedule, Schedule):
        raise ValueError("passive_decay='auto' needs schedule=Schedule(total_steps)")
    if isinstance(group["lr"], Tensor):
        if group["lr"].numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, not {tuple(group['lr'].shape)}")
    else:
        group["lr"] = real_number("lr", group["lr"])
    check_lr(group["lr"])
    for key in ("weight_decay", *(() if auto or group["passive_decay"] is None else ("passive_decay",))):
        group[key] = real_number(key, group[key])
        if not (math.isfinite(group[key]) and group[key] >= 0):
            raise ValueError(f"{key} must be finite and at least 0, not {group[key]}")
    if "momentum" in group:
        group["momentum"], group["nesterov"] = real_number("momentum", group["momentum"]), bool(group["nesterov"])
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {group['momentum']}")
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov needs momentum above 0")
    if "betas" in group:
        _check_moments(group)
    if group.get("foreach") and group.get("fused"):
        raise ValueError("foreach and fused cannot both be True")


def _check_moments(group: dict[str, Any]) -> None:
    """Raise ValueError unless the settings that only AdamW has are in range."""
    betas = group["betas"]
    if not (isinstance(betas, Sequence) and len(betas) == 2):
        raise ValueError(f"betas must be two numbers, not {betas!r}")
    group["betas"] = beta1, beta2 = tuple(real_number("each of betas", beta) for beta in betas)
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
        raise ValueError(f"betas must be at least 0 and below 1, not {group['betas']}")
    group["eps"] = real_number("eps", group["eps"])
    if not 0 < group["eps"] < math.inf:  # 0 / 0 is what a weight that was cut would come to
        raise ValueError(f"eps must be finite and above 0, not {group['eps']}")
    if isinstance(group["lr"], Tensor) and group["foreach"]:
        raise ValueError("lr as a tensor does not go with foreach=True: leave foreach out, or give lr as a number")


def check_supported(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group asks for what only torch's optimizer does."""
    for key, value in UNSUPPORTED.items():
        if group.get(key, value) != value:
            raise ValueError(f"{key}={group[key]!r} is not supported: leave it at {value!r}")


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError if the rule cannot govern a parameter of a group, naming it."""
    params: Sequence[Tensor] = group["params"]
    names = group.get("param_names") or [str(number) for number in range(len(params))]
    halves = {name[:-2] for name in names if name.endswith("_g")} & {name[:-2] for name in names if name.endswith("_v")}
    apart = 'put it into a group with "prunable": False'
    for name, param in zip(names, params, strict=True):
        reason = None
        if is_lazy(param) or param.is_meta:
            reason = (
                "has no data yet: run a batch through the model, or load its weights, before you build the optimizer"
            )
        elif not is_governed(param, group):
            continue
        elif param.is_complex():
            reason = f"is complex, and only real weights can be pruned: {apart}"
        elif _PARTS_OF_A_WEIGHT.search(name) and ("parametrizations." in name or name[:-2] in halves):
            reason = (
                "is a part of a weight (weight norm, say), which pruning would make NaN: remove the "
                f"parametrization, or {apart}"
            )
        if reason:
            raise ValueError(f"parameter {name!r} {reason}")


def check_state(state: dict[str, Any], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a state that is to be loaded, with its schedule as a Schedule.

    Raises:
        ValueError: it asks for what is not supported, or an earlier version saved it.
    """
    groups = [dict(group) for group in state["param_groups"]]
    for group in groups:
        if "betas" in group and "betas" not in ours[0]:
            raise ValueError("the state is of an Adam optimizer, whose rates and moments do not fit")
        if "betas" in ours[0] and "betas" not in group:
            raise ValueError("the state is of an optimizer without the moments of Adam, which do not fit")
        check_supported(group)
        if "compression_schedule" in group:
            raise ValueError("the state was saved by gsm-sgd before schedules had a class: train with that version")
    _check_progress(groups[0])
    ours_of, theirs_of = ours[0]["pattern"], groups[0].get("pattern", _SINGLE if "budget" in groups[0] else None)
    if theirs_of not in (ours_of, None):
        raise ValueError(f"the state is of the pattern {theirs_of}, not {ours_of}: build the optimizer with that one")
    schedule = ours[0]["schedule"]
    theirs = groups[0].get("schedule")
    if theirs is not None and theirs == plain(schedule):
        groups[0]["schedule"] = schedule  # which may have a function
    elif isinstance(theirs, Mapping):
        groups[0]["schedule"] = Schedule.from_dict(dict(theirs))
    elif theirs is not None:
        raise ValueError("the state is of a schedule that is a function: give it to the optimizer as well")
    return {**state, "param_groups": groups}


def _check_progress(group: Mapping[str, Any]) -> None:
    """Raise ValueError if what a first group says of budget, step and phase cannot be; a state of SGD says nothing."""
    if "budget" in group:
        kind, value = group["budget"]
        if kind not in ("compression", "density", "sparsity", "num_kept", *SHARES):
            raise ValueError(f"the state has a budget of {kind!r}, which there is not")
        Budget.of(**{kind: value})
    if group.get("phase", Phase.RAMP) not in list(Phase):
        raise ValueError(f"the state has a phase {group['phase']!r}, which there is not")
    if whole_number("step", group.get("step", 0)) < 0:
        raise ValueError(f"the state has a step of {group['step']}")


def in_order_of(groups: Sequence[Mapping[str, Any]], state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state with its parameters in the order that they have here, by their names.

    Where one of the two has no names, or a name twice, the state stays as it is.

    Raises:
        ValueError: a group of the state has other names than the one here.
    """
    ours, theirs = ([group.get("param_names") for group in side] for side in (groups, state["param_groups"]))
    if len(ours) != len(theirs) or not all(ours) or not all(theirs):
        return dict(state)
    ordered: list[dict[str, Any]] = []
    for own, other, group in zip(ours, theirs, state["param_groups"], strict=True):
        assert own is not None
        assert other is not None
        numbers = dict(zip(map(bare_name, other), group["params"], strict=True))
        wanted = [bare_name(name) for name in own]
        if len(set(wanted)) < len(own) or len(numbers) < len(other):
            return dict(state)
        missing, surplus = set(wanted) - set(numbers), set(numbers) - set(wanted)
        if missing or surplus:
            name, where = (min(missing), "optimizer") if missing else (min(surplus), "state")
            raise ValueError(
                f"the state is of other parameters: only the {where} has {name!r} in group {len(ordered)}; "
                "build the optimizer as the one that was saved"
            )
        ordered.append({**group, "params": [numbers[name] for name in wanted], "param_names": list(own)})
    return {**state, "param_groups": ordered}


def localise(param: Tensor, param_state: dict[str, Any]) -> None:
    """Shard the tensors that a state has for a parameter as the parameter is.

    Raises:
        ValueError: one has another shape, and so the state is another model's.
    """
    for key, value in list(param_state.items()):
        if key != "step" and isinstance(value, Tensor):
            part, shape = local_slice(param, value), to_local(param).shape
            if part.shape != shape:
                raise ValueError(
                    f"{key} has shape {tuple(part.shape)}, its parameter {tuple(shape)}: "
                    "the state that was loaded is of another model"
                )
            param_state[key] = like_dtensor(param, part)
        elif isinstance(value, Mapping):  # a flattened checkpoint that lacks it has an empty dict
            del param_state[key]


def plain(value: Any) -> Any:
    """Return a setting as a plain value: a Schedule as a dict, a NumPy number as Python's."""
    if isinstance(value, Schedule):
        return value.as_dict()
    if callable(value):
        return "custom"
    if isinstance(value, tuple):
        return tuple(value)
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
