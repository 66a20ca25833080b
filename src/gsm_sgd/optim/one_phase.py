"""One phase: the optimizer and the learning rate schedule that take a model, fresh or trained, to a sparsity."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.lr_scheduler import LambdaLR

from ..patterns import Pattern
from ..schedules import Schedule, real_number
from .gsm import GSM
from .gsm_adamw import GSMAdamW

_WARM_UP = 0.03  # share of the steps in which the learning rate rises: a trained net survives its first steps
_ANNEAL = 0.5  # share of the steps after which the learning rate falls along a cosine
_ADDED = re.compile(
    r"embed|token|^pos|position|scale|gamma|bias"
)  # names of what is added to activations, or scales them


_DEFAULTS: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 5e-4, "dense": ("embeddings", "depthwise")},
    "adamw": {"weight_decay": 1e-2, "dense": ("embeddings", "depthwise", "head")},
}


def one_phase(
    model: nn.Module,
    total_steps: int,
    lr: float,
    *,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    compression: float | None = None,
    density: float | None = None,
    sparsity: float | None = None,
    num_kept: int | None = None,
    momentum: float | None = None,
    betas: tuple[float, float] | None = None,
    weight_decay: float | None = None,
    dense: Sequence[str] | None = None,
    pattern: Pattern | None = None,
) -> tuple[GSM | GSMAdamW, LambdaLR]:
    """Set up the training of a model to an exact sparsity, from a random start or a trained net.

    The density falls over the first 30 % of the steps. After 70 % the passive weights have vanished and are cut, and
    the kept weights train on. The learning rate rises over 3 % of the steps and falls along a cosine from the middle
    on. Biases and norms are trained without weight decay, and frozen parameters are left out. `optimizer.summary` says
    in a line what is pruned and what stays dense.

    Args:
        model: what to train.
        total_steps: optimizer steps of the training: batches of all epochs, divided by the batches of a step.
        lr: the highest learning rate; begin with what trains the dense net.
        optimizer: "sgd" for `GSM`, or "adamw" for `GSMAdamW`: what trains the dense net well.
        compression, density, sparsity, num_kept: the budget, one of them, as of `GSM`.
        momentum: of SGD, .9 by default.
        betas: of AdamW, (.9, .999) by default.
        weight_decay: of weights of two or more dimensions; by default 5e-4 for SGD, 1e-2 for AdamW.
        dense: what to leave dense, as well as biases and norms: "embeddings", which are also positions, class tokens
            and scales, known by their names and shapes; "depthwise" convolutions; the "head", which is the layer tied
            to an embedding, or else the last linear or convolutional one; or parameter names, in which "*" stands for
            anything. These weights do not count in N. By default embeddings and depthwise convolutions, and with AdamW
            the head; () prunes everything of two or more dimensions.
        pattern: as of `GSM`.

    Returns:
        The optimizer, and the scheduler to step after each optimizer step.

    Raises:
        ValueError: an argument is out of range, a name in `dense` is no parameter's, or nothing is left to prune.

    Example:
        >>> optimizer, scheduler = one_phase(model, total_steps=epochs * len(loader), lr=0.1, compression=10)
        >>> for _ in range(epochs):
        ...     for images, labels in loader:
        ...         optimizer.zero_grad()
        ...         F.cross_entropy(model(images), labels).backward()
        ...         optimizer.step()
        ...         scheduler.step()
        >>> optimizer.finalize().save("masks.safetensors")
    """
    if optimizer not in _DEFAULTS:
        raise ValueError(f"optimizer must be {' or '.join(map(repr, _DEFAULTS))}, not {optimizer!r}")
    own, other = ("momentum", "betas") if optimizer == "sgd" else ("betas", "momentum")
    given = {"momentum": momentum, "betas": betas}
    if given[other] is not None:
        raise ValueError(f"{other} does not go with optimizer={optimizer!r}, which takes {own}")
    defaults = _DEFAULTS[optimizer]
    decay = defaults["weight_decay"] if weight_decay is None else weight_decay
    groups = parameter_groups(model, decay, defaults["dense"] if dense is None else dense)
    settings: dict[str, Any] = {"lr": lr, "schedule": Schedule(total_steps, peak_lr=real_number("lr", lr))}
    settings |= {"compression": compression, "density": density, "sparsity": sparsity, "num_kept": num_kept}
    settings |= {"pattern": pattern} | ({} if given[own] is None else {own: given[own]})
    trainer = GSM(groups, **settings) if optimizer == "sgd" else GSMAdamW(groups, **settings)
    return trainer, LambdaLR(trainer, lr_factor(settings["schedule"].total_steps))


def parameter_groups(model: nn.Module, weight_decay: float, dense: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the named parameters that are not frozen as groups: prunable, dense weights, and what does not decay.

    Args:
        model: whose parameters.
        weight_decay: of weights of two or more dimensions; biases and norms get 0.
        dense: what to leave dense, as of `one_phase`.

    Raises:
        ValueError: a name in `dense` is no parameter's.

    Example:
        >>> groups = parameter_groups(model, weight_decay=0.01, dense=["embeddings", "head"])
        >>> optimizer = GSMAdamW(groups, lr=1e-3, density=0.1)
    """
    dense = (dense,) if isinstance(dense, str) else dense
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    left_dense: set[str] = set()
    for what in dense:
        names = set(_KINDS[what](model)) if what in _KINDS else {name for name in trained if fnmatch(name, what)}
        if not names and what not in _KINDS:
            raise ValueError(f"no parameter that is trained is named {what!r}: {', '.join(_KINDS)} are kinds of layers")
        left_dense |= names
    tied = model.named_parameters(remove_duplicate=False)  # a head may have the weight of an embedding
    stay = {param for name, param in tied if name in left_dense}
    kinds: dict[str, list[tuple[str, Tensor]]] = {"prunable": [], "dense": [], "vectors": []}
    for name, param in trained.items():
        kinds["vectors" if param.ndim < 2 else "dense" if param in stay else "prunable"].append((name, param))
    settings = {
        "prunable": {"weight_decay": weight_decay},
        "dense": {"weight_decay": weight_decay, "prunable": False},
        "vectors": {"weight_decay": 0.0, "prunable": False},
    }
    return [{"params": params, **settings[kind]} for kind, params in kinds.items() if params]


def lr_factor(total_steps: int, warm_up: float = _WARM_UP, anneal: float = _ANNEAL) -> Callable[[int], float]:
    """Return what to multiply the learning rate by as a function of the step: a linear rise, 1, half a cosine."""

    return partial(_factor, total_steps=total_steps, rise=round(warm_up * total_steps), anneal=anneal)


def _factor(step: int, total_steps: int, rise: int, anneal: float) -> float:
    if step > total_steps:
        warnings.warn(
            f"more than total_steps={total_steps} steps were taken: the learning rate is 0, and nothing is trained",
            UserWarning,
            stacklevel=3,
        )
    if step < rise:
        return (step + 1) / rise
    done = (step / total_steps - anneal) / (1 - anneal)
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, done)))


def _weights_of(model: nn.Module, kinds: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name of the weight of each module of these kinds, and the module."""
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield f"{name}.weight" if name else "weight", module


def _embeddings(model: nn.Module) -> list[str]:
    layers = [name for name, _ in _weights_of(model, (nn.Embedding, nn.EmbeddingBag))]
    own = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear | _ConvNd)}
    added = [
        name
        for name, param in model.named_parameters()
        if name not in own and (_ADDED.search(name.rpartition(".")[2]) or param.numel() == max(param.shape, default=1))
    ]
    return [*layers, *added]


def _depthwise(model: nn.Module) -> list[str]:
    return [name for name, conv in _weights_of(model, _ConvNd) if 1 < conv.groups == conv.in_channels]


def _head(model: nn.Module) -> list[str]:
    embeddings = {layer.weight for _, layer in _weights_of(model, nn.Embedding)}
    layers = list(_weights_of(model, (nn.Linear, _ConvNd)))
    tied = [name for name, layer in layers if layer.weight in embeddings]
    return tied or [name for name, _ in layers][-1:]


_KINDS: dict[str, Callable[[nn.Module], list[str]]] = {
    "embeddings": _embeddings,
    "depthwise": _depthwise,
    "head": _head,
}
