"""Take channels out of a model's tensors, and out of what its modules know of their sizes."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..rule import HALF
from .graph import Channels

TOLERANCE = 1e-5  # of the largest output


class Constant(nn.Module):
    """What is left of a layer that reads no channels: the same numbers for every image and pixel.

    Args:
        bias: those numbers, one for each output channel.
        window: of a convolution, for each spatial dimension (up, shift, down): of `size` pixels it makes
            `(size * up + shift) // down`; empty for a norm, which keeps sizes; None for a linear layer, whose channels
            lie along the last dimension.
    """

    def __init__(self, bias: Tensor, window: Sequence[Sequence[int]] | None = ()) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias)
        self.window = None if window is None else [list(map(int, side)) for side in window]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, ...) to (batch, outputs, ...), whatever the numbers."""
        if self.window is None:
            return self.bias.expand(*inputs.shape[:-1], -1).clone()
        sizes = list(inputs.shape[2:])
        for dim, (up, shift, down) in enumerate(self.window):
            sizes[dim] = (sizes[dim] * up + shift) // down
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
    stays = with_stays(kept.cpu())
    constants = _make_constants(slim, channels, stays)
    tensors = {**dict(slim.named_parameters()), **dict(slim.named_buffers())}
    left = {name: dims for name, dims in indices(channels, kept).items() if name in tensors.keys() - constants}
    refit(slim, {id(tensors[name]): sliced(tensors[name], dims) for name, dims in left.items()})
    for module_name, place, labels in channels.paddings:
        module: Any = slim.get_submodule(module_name)
        padding = list(module.padding)
        padding[place : place + 2] = [int(stays[side].sum()) for side in labels]
        module.padding = tuple(padding)
    return slim


def indices(channels: Channels, kept: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return what is left of each tensor that loses something: name -> dimension -> indices."""
    stays = with_stays(kept.cpu())
    left: dict[str, dict[int, Tensor]] = {}
    for (name, dim), units in channels.slots.items():
        if not stays[units].all():
            left.setdefault(name, {})[dim] = stays[units].nonzero().squeeze(1)
    return left


def refit(model: nn.Module, new: Mapping[int, Tensor]) -> None:
    """Put new tensors in the place of those with these ids, and tell torch's modules the sizes that they have now."""
    for module in model.modules():
        before = _shapes(module)
        held: dict[str, Any]
        for held in (module._parameters, module._buffers):
            held |= {key: new[id(tensor)] for key, tensor in held.items() if id(tensor) in new}
        if before != _shapes(module):
            _refit(module, before)


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of another, in its mode."""
    parent, _, name = path.rpartition(".")
    module.training = model.get_submodule(path).training
    setattr(model.get_submodule(parent), name, module)


def sliced(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """Return some indices of some dimensions of a tensor, laid out in memory as it is; a parameter of one."""
    part = tensor.detach()
    for dim, index in dims.items():
        part = part.index_select(dim, index.to(part.device))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(part.ndim, torch.contiguous_format)
    as_it_is = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=last)
    part = part.contiguous(memory_format=last if as_it_is else torch.contiguous_format)
    return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part


def silenced(model: nn.Module, channels: Channels, kept: Tensor) -> nn.Module:
    """Return a copy of a model in which the units that are not kept are zero."""
    quiet = copy.deepcopy(model)
    stays = with_stays(kept.cpu())
    parameters = dict(quiet.named_parameters())
    with torch.no_grad():
        for name, (dim, units) in channels.rows.items():
            parameters[name].index_fill_(dim, (~stays[units]).nonzero().squeeze(1).to(parameters[name].device), 0)
    return quiet


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return by how much the outputs of two models differ at most in evaluation, as a share of the largest output.

    Models in half precision are compared in float32. The models stay as they are.
    """
    outputs = []
    for model in (one, other):
        if any(tensor.dtype in HALF for tensor in model.parameters()):
            model = copy.deepcopy(model).float()
        modes = {module: module.training for module in model.modules()}
        with torch.random.fork_rng(devices=[]):
            found = torch.utils._pytree.tree_leaves(model.eval()(*_placed_as(model, inputs)))
        outputs.append([leaf.double() for leaf in found if isinstance(leaf, Tensor)])
        for module, mode in modes.items():
            module.training = mode
    if [leaf.shape for leaf in outputs[0]] != [leaf.shape for leaf in outputs[1]]:
        return math.inf
    largest = max((float(leaf.abs().max()) for leaf in outputs[0] if leaf.numel()), default=0.0)
    apart = max((float((a - b).abs().max()) for a, b in zip(*outputs, strict=True) if a.numel()), default=0.0)
    return apart / largest if apart else 0.0


def _placed_as(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs where a model's weights are, and in their precision."""
    weight = next(model.parameters())
    moved: tuple[Any, ...] = torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.to(weight) if x.is_floating_point() else x.to(weight.device), inputs
    )
    return moved


def with_stays(kept: Tensor) -> Tensor:
    """Return what is kept of units, and last, where `STAYS` looks for it, of what is always kept."""
    return torch.cat([kept, kept.new_ones(1)])


def _make_constants(slim: nn.Module, channels: Channels, stays: Tensor) -> set[str]:
    """Put constants in place of layers that read nothing, give nothing, or both, and of norms behind them.

    Returns the names of their biases, which have only what is kept.
    """
    made = set[str]()
    for layer in channels.layers:
        reads = layer.inputs is None or bool(stays[layer.inputs].any())
        gives = stays[layer.outputs]
        path, norm_path = layer.weight.rpartition(".")[0], channels.norms.get(layer.weight, "").rpartition(".")[0]
        if (reads and gives.any()) or f"{path}.bias" in made:
            continue
        module: Any = slim.get_submodule(path)
        numbers = module.weight.new_zeros(len(gives)) if module.bias is None else module.bias.detach()
        if norm_path:  # the numbers are the norm's, where there are any
            norm: Any = slim.get_submodule(norm_path)
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            after = (norm.bias + (numbers - norm.running_mean) * scale).detach()
            replace(slim, norm_path, Removed() if reads or not gives.any() else Constant(after[gives]))
            made.add(f"{norm_path}.bias")
        replace(slim, path, Constant(numbers[:0] if reads or norm_path else numbers[gives], window_of(module)))
        made.add(f"{path}.bias")
    return made


def window_of(module: nn.Module) -> list[tuple[int, int, int]] | None:
    """Return what a layer makes of sizes, as `Constant` takes it."""
    if isinstance(module, nn.Linear):
        return None
    window: list[tuple[int, int, int]] = []
    if not isinstance(module, _ConvNd):
        return window
    for dim, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        reach = dilation * (kernel - 1)
        around = reach if module.padding == "same" else 0 if module.padding == "valid" else 2 * int(module.padding[dim])
        if isinstance(module, _ConvTransposeNd):
            window.append((stride, reach - around + module.output_padding[dim] + 1 - stride, 1))
        else:
            window.append((1, around - reach - 1 + stride, stride))
    return window


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    held = (*module._parameters.items(), *module._buffers.items())
    return {key: tensor.shape for key, tensor in held if tensor is not None}


def _refit(module: Any, before: Mapping[str, torch.Size]) -> None:
    """Tell one of torch's modules the sizes that its tensors have now."""
    weight: Any = module._parameters.get("weight")
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
        module.num_features = next(iter(_shapes(module).values()))[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * weight.shape[0] // before["weight"][0]
        module.num_channels = weight.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]
