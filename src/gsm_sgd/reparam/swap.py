"""Put blocks of several branches into a model to train it, and take them out again."""

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace

from .blocks import ACB, CSLA, Block
from .partitions import RepMLP


class Watched(nn.Module):
    """A batch norm that a block stands for: it lets everything pass, and only learns mean and variance."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs."""
        if self.training:
            self.norm(inputs.detach())
        return inputs


def widen(model: nn.Module, block: type[Block] = ACB) -> nn.Module:
    """Return a copy of a model with blocks in place of its k x k convolutions, for `fuse` to bring these back.

    A block also stands for the batch norm that alone reads a convolution. Modules keep their names, and their forward
    and backward hooks. The copy computes something else at first, as the other branches begin with random weights.

    Args:
        model: what torch.fx can trace.
        block: `ACB`, `DBB`, `RepVGG`, `LargeKernel` or `CSLA`; `block.takes` says which convolutions it can stand for.

    Raises:
        ValueError: the model has no such convolution, or cannot be traced.
    """
    wide, blocks = copy.deepcopy(model), dict[nn.Module, Block]()
    places = dict(wide.named_modules(remove_duplicate=False))
    norms = _norms_behind(wide) if block.normed else {}
    for path, conv in places.items():
        if not path or not isinstance(conv, nn.Conv2d) or not block.takes(conv):
            continue
        norm: Any = places[norms[path]] if path in norms else None
        blocks[conv] = blocks.get(conv) or block(conv, norm)
        _put(wide, path, blocks[conv], conv)
        if norm is not None:
            blocks[conv].norm_path = norms[path]
            _put(wide, norms[path], Watched(norm))
    if not blocks:
        raise ValueError(f"{block.__name__} takes none of the model's convolutions")
    return wide


def fuse(model: nn.Module) -> nn.Module:
    """Return a copy of a model with a plain layer in place of each block; in evaluation it computes the same.

    What `widen` has changed is of its old class, with its old names. The norms that blocks stood for are back and, by
    the mean and variance that they have seen, change nothing at first, so that the model can be trained further. Where
    no norm followed, a convolution has a bias now. Remove channels afterwards: ValueError if some are gone.
    """
    plain, layers = copy.deepcopy(model), dict[nn.Module, nn.Module]()
    places = dict(plain.named_modules(remove_duplicate=False))
    for path, block in places.items():
        if not path or not isinstance(block, Block | RepMLP):
            continue
        layers[block] = layers.get(block) or block.fuse()
        _put(plain, path, layers[block], block)
        if isinstance(block, Block) and block.norm_path:
            watched: Any = places[block.norm_path]
            _put(plain, block.norm_path, _transparent(watched.norm, layers[block], block.biased))
    return plain


def multipliers(model: nn.Module, power: int = 2) -> dict[str, Tensor]:
    """Return what RepOptimizer multiplies gradients by, for the weights of `fuse(model)` by name.

    A convolution with these multipliers trains as the block of which the scales of the convolutions are constants.

    Args:
        model: has `CSLA` blocks; else ValueError.
        power: of the scales: 2 for SGD; 1 for AdamW, where gradient and update are multiplied.
    """
    blocks = {path: block for path, block in model.named_modules() if isinstance(block, CSLA)}
    if not blocks:
        raise ValueError("the model has no blocks with scales: call widen(model, block=CSLA) first")
    return {f"{path}.weight": block.multiplier(power) for path, block in blocks.items()}


def _norms_behind(model: nn.Module) -> dict[str, str]:
    """Return the path of the batch norm that alone reads a convolution, by the convolution's path."""
    try:
        nodes = symbolic_trace(model).graph.nodes
    except Exception as error:  # the model's forward is anybody's
        raise ValueError(f"torch.fx cannot trace the model, to find norms of convolutions: {error}") from error
    pairs, calls = {}, Counter(node.target for node in nodes)
    for node in nodes:
        norm: Any = model.get_submodule(node.target) if node.op == "call_module" else None
        if type(norm) is nn.BatchNorm2d and norm.running_var is not None and norm.affine:
            (source,) = node.args
            if source.op == "call_module" and len(source.users) == calls[source.target] == calls[node.target] == 1:
                pairs[source.target] = node.target
    return pairs


def _put(model: nn.Module, path: str, new: nn.Module, old: nn.Module | None = None) -> None:
    """Put a module at a path; the hooks of an old one move along."""
    parent, _, name = path.rpartition(".")
    new.train(model.get_submodule(path).training)
    hooks = ("_forward", "_backward", "_is_full")
    vars(new).update({key: value for key, value in vars(old).items() if key.startswith(hooks)} if old else {})
    setattr(model.get_submodule(parent), name, new)


@torch.no_grad()
def _transparent(norm: Any, conv: Any, biased: bool) -> nn.Module:
    """Return a norm that changes nothing behind a convolution or, unless that may have a bias, adds it."""
    if len(norm.weight) != len(conv.weight):
        raise ValueError("channels of the model have been removed: fuse it before that")
    norm.requires_grad_(True)
    norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
    norm.bias.copy_(norm.running_mean)
    if not biased:
        norm.running_mean.sub_(conv.bias)
        conv.bias = None
    return norm  # type: ignore[no-any-return]
