"""Remove channels for good: a smaller dense model, its optimizer's state, and files of both."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.padding import _ConstantPadNd
from torch.optim import Optimizer

from ..masks import write_whole
from ..names import tensors_of
from .channels import ChannelGroups
from .surgery import (
    TOLERANCE,
    Constant,
    Removed,
    difference,
    indices,
    narrowed,
    refit,
    replace,
    silenced,
    sliced,
    window_of,
)

_WIDTHS = "gsm_sgd.widths"  # in the metadata of a file


def remove_channels(
    model: nn.Module,
    groups: ChannelGroups,
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | None = None,
) -> nn.Module:
    """Return a smaller dense model of the same class: without the channels that masks do not keep.

    In evaluation its outputs are those of the model with these channels at zero, which is tried with the inputs that
    the model was traced with. A layer that would read no channel at all becomes a constant. The model itself stays as
    it is.

    Args:
        model: what was traced, trained since.
        groups: its channels.
        masks: what `finalize()` of an optimizer with this pattern returns.
        optimizer: what trains the model, any of torch's kind. From then on it trains the smaller one, with momenta and
            moments carried over.

    Raises:
        ValueError: the model is not what was traced, masks are of other parameters, or the outputs differ. Nothing has
            changed.

    Example:
        >>> groups = ChannelGroups.trace(model, images)
        >>> optimizer = GSM(model.named_parameters(), lr=0.1, pattern=groups, macs=0.5, schedule=Schedule(total_steps))
        >>> ...  # train
        >>> slim = remove_channels(model, groups, optimizer.finalize(), optimizer)
    """
    groups.check_model(dict(model.named_parameters()))
    kept = groups.kept_by(masks)
    slim = narrowed(model, groups.channels, kept)
    try:
        apart = difference(silenced(model, groups.channels, kept), slim, groups.example_inputs)
    except Exception as error:  # the model's forward is anybody's
        raise ValueError(f"the model does not run without these channels, so it stays as it is: {error}") from error
    if not apart <= TOLERANCE:
        raise ValueError(
            f"without these channels the outputs would differ by {apart:.1e} of the largest, so the model stays as it "
            "is: leave out, with ignore=, what computes with the number of channels"
        )
    if optimizer is not None:
        _carry(optimizer, model, slim, indices(groups.channels, kept))
    return slim


def widths(model: nn.Module) -> dict[str, Any]:
    """Return what `narrow` needs to bring a fresh model to the widths of this one, as JSON can hold it."""
    modules = dict(model.named_modules())
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in tensors_of(model).items()},
        "constants": [path for path, module in modules.items() if isinstance(module, Constant)],
        "removed": [path for path, module in modules.items() if isinstance(module, Removed)],
        "paddings": {
            path: list(module.padding) for path, module in modules.items() if isinstance(module, _ConstantPadNd)
        },
    }


def narrow(model: nn.Module, widths: Mapping[str, Any]) -> nn.Module:
    """Return a copy of a fresh model of the same class with these widths, for a narrow model's weights to be loaded.

    Raises:
        ValueError: the widths are another model's.
    """
    slim = copy.deepcopy(model)
    try:
        _narrow_(slim, widths)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the widths are of another model ({error}): build the same one that was narrowed") from error
    return slim


def _narrow_(slim: nn.Module, widths: Mapping[str, Any]) -> None:
    """Bring a model to these widths.

    Raises:
        KeyError, AttributeError, TypeError, ValueError: they are another model's.
    """
    modules, shapes = dict(slim.named_modules()), widths["shapes"]
    for path in widths["removed"]:
        _check(isinstance(modules[path], _BatchNorm) and path, path)
        replace(slim, path, Removed())
    for path in widths["constants"]:
        _check(isinstance(modules[path], _ConvNd | nn.Linear | _BatchNorm) and path, path)
        weight, (size,) = modules[path].get_parameter("weight"), shapes[f"{path}.bias"]
        _check(_is_within(size, max(weight.shape[:2])), f"{path}.bias of {size}")
        replace(slim, path, Constant(weight.new_zeros(size), window_of(modules[path])))
    tensors, new = tensors_of(slim), {}
    for name in shapes.keys() | tensors.keys():
        tensor, shape = tensors[name], shapes[name]
        fits = len(shape) == tensor.ndim and all(map(_is_within, shape, tensor.shape))
        _check(fits, f"{name} of shape {shape}")
        dims = {dim: torch.arange(size) for dim, size in enumerate(shape) if size != tensor.shape[dim]}
        if dims:
            new[id(tensor)] = sliced(tensor, dims)
    refit(slim, new)
    for path, padding in widths["paddings"].items():
        module: Any = modules[path]
        _check(isinstance(module, _ConstantPadNd) and len(padding) == len(module.padding), path)
        _check(
            all(a == b or _is_within(a, b) for a, b in zip(padding, module.padding, strict=True)), f"{path} {padding}"
        )
        module.padding = tuple(padding)


def _is_within(size: Any, limit: int) -> bool:
    """Return whether something is a size of at most this much."""
    return type(size) is int and 0 <= size <= limit


def _check(fits: Any, what: str) -> None:
    if not fits:
        raise KeyError(what)


def save_narrow(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write weights and widths of a narrow model to a safetensors file, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors_of(model).items()}
    write_whole(path, save(tensors, {_WIDTHS: json.dumps(widths(model))}))


def load_narrow(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Return a copy of a fresh model of the same class with widths and weights of a file that `save_narrow` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or another model's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            theirs = json.loads((file.metadata() or {}).get(_WIDTHS, "null"))
            if not isinstance(theirs, dict):
                raise ValueError("it has no widths")
            slim = narrow(model, theirs)
            with torch.no_grad():
                for name, tensor in tensors_of(slim).items():
                    found = file.get_tensor(name)
                    if found.shape != tensor.shape:
                        raise ValueError(f"{name} has shape {tuple(found.shape)}, not {tuple(tensor.shape)}")
                    tensor.copy_(found)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is not a narrow model of this class, or damaged: {error}") from error
    return slim


def _carry(optimizer: Optimizer, model: nn.Module, slim: nn.Module, kept: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Make an optimizer train the narrow model, with its state of what is left."""
    names = {param: name for name, param in model.named_parameters()}
    new = dict(slim.named_parameters())
    for group in optimizer.param_groups:
        left = [
            number for number, param in enumerate(group["params"]) if names.get(param, "") in new or param not in names
        ]
        if "param_names" in group:
            group["param_names"] = [group["param_names"][number] for number in left]
        old = group["params"]
        group["params"] = [new.get(names.get(old[number], ""), old[number]) for number in left]
        for param in old:
            state = optimizer.state.pop(param, None)
            name = names.get(param, "")
            if state is None or (param in names and name not in new):
                continue
            now = new.get(name, param)
            shaped = {key for key, value in state.items() if isinstance(value, Tensor) and value.shape == param.shape}
            cut = {key: sliced(state[key], kept.get(name, {})) for key in shaped}
            for key, value in cut.items():
                if value.shape != now.shape:  # nothing is left of a layer but a constant
                    cut[key] = value.new_zeros(now.shape)
            optimizer.state[now] = {**state, **cut}
    if hasattr(optimizer, "forget_parameters"):
        optimizer.forget_parameters()
