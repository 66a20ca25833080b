"""The networks by name: those of the paper, torchvision's, and the user's own."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...names import is_prunable, prunable_parameters
from .. import UsageError, suggestion
from ..data import IMAGE_SHAPES, Shape
from ..own import find_function, is_own
from ..states import plain_state
from .densenet_cifar import densenet
from .lenet import lenet5, lenet300
from .resnet_cifar import resnet, resnet_a

CLASSES = 10  # of each of the following
MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet300": lenet300,
    "lenet5": lenet5,
    "resnet20": partial(resnet, 20),
    "resnet56": partial(resnet, 56),
    "resnet110": partial(resnet, 110),
    "resnet20a": partial(resnet_a, 20),
    "resnet56a": partial(resnet_a, 56),
    "densenet40": partial(densenet, 40, 12),
}


def build(name: str, seed: int, classes: int | None = None) -> nn.Module:
    """Return a network, initialised in the same way for the same seed, with convolutions in channels-last memory.

    That makes LeNet-5's epoch 1.4 times as fast on a CPU.

    Args:
        name: a key of `MODELS`, with Xavier-uniform weights and zero biases; "torchvision:NAME", or "resnet50" for
            torchvision's; or "file.py:function" or "module:function", a function without arguments that returns a
            network, of a file, or of a module that can be imported from here. These are initialised as they do it
            themselves.
        seed: of the initial weights.
        classes: how many the network is to tell apart; None means as many as it does.

    Raises:
        UsageError: there is no such network, or it tells another number of classes apart.
    """
    if name in MODELS:
        if classes not in (None, CLASSES):
            raise UsageError(f"{name} tells {CLASSES} classes apart, the data have {classes}: choose another --model")
        model = MODELS[name]()
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    else:
        make = _maker(name, classes)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # torchvision's of its own initialisation
            torch.manual_seed(seed)
            model = make()
        if not isinstance(model, nn.Module):
            raise UsageError(f"{name} returned {type(model).__name__}, not a torch.nn.Module")
    return model.to(memory_format=torch.channels_last)


def check_fits(model: nn.Module, name: str, dataset: str, shape: Sequence[int], classes: int) -> None:
    """Raise UsageError unless a recipe can train all of a network on images of a shape, to tell classes apart."""
    try:
        plain_state(model.state_dict())
        prunable_parameters(model)
    except (UsageError, ValueError) as error:
        raise UsageError(f"{name} has a state that no file can hold: {error}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for parameter, weight in parameters.items():
        if is_prunable(weight) and not weight.requires_grad:
            raise UsageError(f"{name} has frozen weights, {parameter}: recipes train and prune all, use GSM directly")
    if len({id(weight) for weight in parameters.values()}) < len(parameters):
        raise UsageError(f"{name} has a weight under two names, which a recipe cannot save: use GSM directly")
    try:
        found = _outputs(model, shape)
    except Exception as error:  # a network of anybody's can fail in any way
        images = f"{_times(shape)} images of {dataset}"
        raise UsageError(f"{name} does not take the {images}: choose another --model ({error})") from error
    if found != (2, classes):
        raise UsageError(
            f"{name} makes of 2 images of {dataset} something of shape {found}, not a tensor of (2, {classes}), a "
            "logit for each class: choose another --model"
        )


def fitting_images(name: str) -> tuple[Shape, int]:
    """Return the shape of images that a network takes, of those that data sets have, and the number of its classes."""
    model = build(name, seed=0)
    for shape in IMAGE_SHAPES.values():
        with suppress(Exception):  # a network of anybody's can fail in any way
            count, classes = _outputs(model, shape)
            if count == 2:
                return shape, classes
    shapes = ", ".join(map(_times, IMAGE_SHAPES.values()))
    raise UsageError(f"{name} makes no logits of images of any of {shapes}: choose another --model")


def _outputs(model: nn.Module, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what a network makes of two black images, and leave it as it was."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            found = model.eval()(torch.zeros(2, *shape))
    finally:
        model.train()
    if not isinstance(found, Tensor):
        raise TypeError(f"it returns a {type(found).__name__}, not a tensor")
    return tuple(found.shape)


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def torchvision_name(name: str) -> str | None:
    """Return torchvision's name of a network, or None if it is not torchvision's."""
    if name == "resnet50":
        return name
    return name.removeprefix("torchvision:") if name.startswith("torchvision:") else None


def _maker(name: str, classes: int | None) -> Callable[[], nn.Module]:
    """Return what makes a network that is not ours."""
    theirs = torchvision_name(name)
    if theirs is not None:
        from torchvision import models  # slow to import

        if theirs not in (known := models.list_models(module=models)):
            hint = suggestion(theirs, known, "torchvision.models.list_models() names them")
            raise UsageError(f"torchvision has no classifier {theirs!r}: {hint}")
        options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
        if theirs in ("googlenet", "inception_v3"):
            # without the classifiers that are for training alone, with the pixels that torchvision's weights are for
            options |= {"aux_logits": False, "transform_input": True}
        return partial(models.get_model, theirs, weights=None, **options)
    if not is_own(name):
        known = [*MODELS, "resnet50", "torchvision:NAME", "FILE.py:FUNCTION", "MODULE:FUNCTION"]
        raise UsageError(f"unknown model {name!r}: {suggestion(name, known)}")
    return find_function("model", name)
