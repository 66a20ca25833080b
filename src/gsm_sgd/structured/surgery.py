"""Take channels out of a model's tensors, and out of what its modules know of their sizes."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.padding import _ConstantPadNd

from .graph import Channels

TOLERANCE = 1e-5  # of the largest output


class Constant(nn.Module):
    """What is left of a layer that reads no channels: the same numbers for every image and pixel.

    Args:
        bias: those numbers, one for each output channel.
        window: for each spatial dimension of a convolution kernel size, stride, padding and dilation.
    """

    def __init__(self, bias: Tensor, window: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.window = [list(map(int, side)) for side in window]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, ...) to (batch, outputs, ...), whatever the numbers."""
        sizes = [
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, (kernel, stride, padding, dilation) in zip(inputs.shape[2:], self.window, strict=False)
        ] or list(inputs.shape[2:])
        return self.bias.view(-1, *[1] * len(sizes)).expand(len(inputs), -1, *sizes).clone()


class Removed(nn.Identity):
    """What is left of a norm of no channels."""


def narrowed(model: nn.Module, channels: Channels, kept: Tensor) -> nn.Module:
    """Return a copy of a model without the units that are not kept; of branches that are left without any, a constant.

    Args:
        model: as it was traced.
        channels: what has been found there.
        kept: bool, one for each unit.
    """
    slim = copy.deepcopy(model)
    stays = _with_stays(kept)
    _make_constants(slim, channels, stays)
    tensors = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    left = {name: dims for name, dims in indices(channels, kept).items() if name in tensors}
    refit(slim, {id(tensors[name]): sliced(tensors[name], dims) for name, dims in left.items()})
    for module_name, place, labels in channels.paddings:
        module = slim.get_submodule(module_name)
        padding = list(module.padding)  # type: ignore[arg-type]
        padding[place : place + 2] = [int(stays[side].sum()) for side in labels]
        module.padding = tuple(padding)
    return slim


def indices(channels: Channels, kept: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return what is left of each tensor that loses something: name -> dimension -> indices."""
    stays = _with_stays(kept)
    left: dict[str, dict[int, Tensor]] = {}
    for (name, dim), units in channels.slots.items():
        if not stays[units].all():
            left.setdefault(name, {})[dim] = stays[units].nonzero().squeeze(1)
    return left


def refit(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put new tensors in the place of those with these ids, and tell torch's modules the sizes that they have now."""
    for module in model.modules():
        before = sizes(module)
        for held in (module._parameters, module._buffers):
            held.update({key: new[id(tensor)] for key, tensor in held.items() if id(tensor) in new})
        if before != sizes(module):
            _refit(module, before)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, in its mode."""
    parent, _, name = path.rpartition(".")
    module.training = model.get_submodule(path).training
    setattr(model.get_submodule(parent), name, module)


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return a tensor with some indices of some of its dimensions; a parameter if it is one, in the same memory format."""
    part = tensor.detach()
    for dim, index in dims.items():
        part = part.index_select(dim, index.to(part.device))
    last = part.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    part = part.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def silenced(model: nn.Module, channels: Channels, kept: Tensor) -> nn.Module:
    """Return a copy of a model in which the units that are not kept are zero."""
    quiet = copy.deepcopy(model)
    stays = _with_stays(kept)
    parameters = dict(quiet.named_parameters())
    with torch.no_grad():
        for name, (dim, units) in channels.rows.items():
            parameters[name].index_fill_(dim, (~stays[units]).nonzero().squeeze(1).to(parameters[name].device), 0)
    return quiet


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return by how much the outputs of two models differ at most in evaluation, as a share of the largest output."""
    outputs = []
    for model in (one, other):
        modes = {module: module.training for module in model.modules()}
        with torch.random.fork_rng(devices=[]):
            found = torch.utils._pytree.tree_leaves(model.eval()(*inputs))
        outputs.append([leaf.double() for leaf in found if isinstance(leaf, Tensor)])
        for module, mode in modes.items():
            module.training = mode
    if [leaf.shape for leaf in outputs[0]] != [leaf.shape for leaf in outputs[1]]:
        return math.inf
    largest = max((float(leaf.abs().max()) for leaf in outputs[0] if leaf.numel()), default=0.0)
    apart = [float((a - b).abs().max()) for a, b in zip(*outputs, strict=True) if a.numel()]
    return max(apart, default=0.0) / max(largest, 1.0)


def _with_stays(kept: Tensor) -> Tensor:
    """Return what is kept of units, and last, where `STAYS` looks for it, of what is always kept."""
    return torch.cat([kept.cpu(), torch.ones(1, dtype=torch.bool)])


def _make_constants(slim: nn.Module, channels: Channels, stays: Tensor) -> None:
    """Put constants in place of layers that read nothing, give nothing, or both, and of norms around them."""
    for layer in channels.layers:
        nothing_read = layer.inputs is not None and not stays[layer.inputs].any()
        if not nothing_read and stays[layer.outputs].any():
            continue
        path = layer.weight.rpartition(".")[0]
        module: Any = slim.get_submodule(path)
        norm_path = channels.norms.get(layer.weight, "").rpartition(".")[0]
        norm: Any = slim.get_submodule(norm_path) if norm_path else None
        outputs = stays[layer.outputs] if nothing_read else stays.new_zeros(len(layer.outputs))
        bias = module.bias.detach() if module.bias is not None else module.weight.new_zeros(len(outputs))
        if norm is not None:
            if outputs.any():
                scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
                replace(slim, norm_path, Constant((norm.bias + (bias - norm.running_mean) * scale).detach()))
            else:
                replace(slim, norm_path, Removed())
            bias = bias[:0]
        elif not outputs.any():
            bias = bias[:0]
        replace(slim, path, Constant(bias, _window(module)))


def _window(module: nn.Module) -> list[tuple[int, ...]]:
    if not isinstance(module, _ConvNd):
        return []
    sides = (module.kernel_size, module.stride, module.padding, module.dilation)
    return [tuple(side) for side in zip(*sides, strict=True)]  # type: ignore[arg-type]


def sizes(module: nn.Module) -> dict[str, torch.Size]:
    return {
        key: held.shape for key, held in (*module._parameters.items(), *module._buffers.items()) if held is not None
    }


def _refit(module: Any, before: Mapping[str, torch.Size]) -> None:
    """Tell one of torch's modules the sizes that its tensors have now."""
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd):
        was, now = before["weight"][0], weight.shape[0]
        if module.groups > 1:
            module.groups = module.groups * now // was
        ways = (weight.shape[1] * module.groups, now)
        transposed = isinstance(module, _ConvTransposeNd)
        module.out_channels, module.in_channels = ways if transposed else ways[::-1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        module.num_features = (weight if weight is not None else module.running_mean).shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * weight.shape[0] // before["weight"][0]
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
