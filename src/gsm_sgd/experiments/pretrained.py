"""Weights that were trained elsewhere, as a start."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import UsageError
from .models import torchvision_name
from .reading import load_tensors
from .rundir import read_weights
from .states import load_state, plain_state

_WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep a model's state


def load_pretrained(model: nn.Module, name: str, source: str) -> None:
    """Load weights into a model, in place.

    Args:
        model: the network.
        name: the network's name.
        source: a safetensors file, or one that `torch.save` wrote, of a state dict; or "torchvision" for the weights
            that it recommends for its own networks, "torchvision:WEIGHTS" for others of them.

    Raises:
        UsageError: there are no such weights, a file is damaged or not safe to load, or they do not fit the model.
    """
    state = _torchvision(name, source) if is_torchvisions(source) else _read(Path(source))
    try:
        state = plain_state(state)
    except UsageError as error:
        raise UsageError(f"{source} holds no state dict: save model.state_dict() alone ({error})") from error
    # torchvision's classifiers that are for training alone are None in ours
    state = {key: value for key, value in state.items() if getattr(model, key.partition(".")[0], "") is not None}
    try:
        load_state(model, state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        hint = "give others, or --weights null to train a base net"
        raise UsageError(f"the weights {source} do not fit {name}: {hint} ({reason})") from error


def is_torchvisions(source: str) -> bool:
    """Return whether a source of weights is torchvision, and not a file."""
    return source.partition(":")[0] == "torchvision"


def _torchvision(name: str, source: str) -> dict[str, Tensor]:
    from torchvision.models import get_model_weights

    if (theirs := torchvision_name(name)) is None:
        raise UsageError(f"torchvision has no weights of {name}: give a file")
    wanted = source.partition(":")[2] or "DEFAULT"
    weights = getattr(get_model_weights(theirs), wanted, None)
    if weights is None:
        raise UsageError(f"torchvision has no weights {wanted!r} of {theirs}")
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # whatever the network and the disk can do
        raise UsageError(
            f"torchvision's weights of {theirs} cannot be downloaded, or their file in {torch.hub.get_dir()} is "
            f"damaged: connect to the network, delete that file, give another, or --weights null to train a base net "
            f"({error})"
        ) from error
    return state


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors" or not path.exists():
        return read_weights(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = load_tensors(path)
    except Exception as error:  # a file of anybody's can fail in any way
        raise UsageError(
            f"{path} is neither safetensors nor a state dict that can be loaded safely: save model.state_dict() alone"
        ) from error
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    return loaded
