"""What an optimizer accepts from elsewhere: parameters when it is built, and the state of another optimizer."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .masks import bare_name, is_governed

UNSUPPORTED = {"maximize": False, "dampening": 0, "differentiable": False}
"""Settings of `torch.optim.SGD` that stand in each group, so that it loads our states, and the one value allowed."""

_PARTS_OF_A_WEIGHT = re.compile(r"(?:^|\.)(?:parametrizations\.\w+\.original\d+|\w+_[gv])$")


def check_supported(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group asks for what only `torch.optim.SGD` does."""
    for key, value in UNSUPPORTED.items():
        if group.get(key, value) != value:
            raise ValueError(f"GSM does not support {key}={group[key]!r}: leave it at {value!r}")


def check_parameters(group: Mapping[str, Any]) -> None:
    """Raise ValueError if the rule cannot govern a parameter of a group, naming it."""
    params: Sequence[Tensor] = group["params"]
    names = group.get("param_names") or [str(number) for number in range(len(params))]
    halves = {name[:-2] for name in names if name.endswith("_g")} & {name[:-2] for name in names if name.endswith("_v")}
    apart = 'put it into a group with "prunable": False'
    for name, param in zip(names, params, strict=True):
        reason = None
        if is_lazy(param) or param.is_meta:
            reason = "has no data yet: run a batch through the model, or load its weights, before you build GSM"
        elif not is_governed(param, group):
            continue
        elif param.is_complex():
            reason = f"is complex, and GSM prunes real weights only: {apart}"
        elif _PARTS_OF_A_WEIGHT.search(name) and ("parametrizations." in name or name[:-2] in halves):
            reason = (
                "is a part of a weight (weight norm, say), which pruning would make NaN: remove the "
                f"parametrization, or {apart}"
            )
        if reason:
            raise ValueError(f"parameter {name!r} {reason}")


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


def plain(value: Any) -> Any:
    """Return a NumPy number as Python's, which `torch.load(weights_only=True)` reads; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and hasattr(value, "item") else value
