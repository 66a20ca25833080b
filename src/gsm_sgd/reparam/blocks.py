"""Blocks of several branches in training that are one convolution in use (Ding et al.).

ACB: "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks", 2019. RepVGG:
"RepVGG: Making VGG-style ConvNets Great Again", 2021. DBB: "Diverse Branch Block", 2021. LargeKernel: "Scaling Up Your
Kernels to 31x31", 2022. CSLA: "Re-parameterizing Your Optimizers rather than Architectures", 2023.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Scale(nn.Module):
    """Multiply each channel by a number, one at the start: in the place of a norm where training must stay linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to the same shape."""
        return inputs * self.weight.view(-1, 1, 1)


class Branch(nn.Module):
    """A convolution in the middle of a larger one's window, or without a size the input itself, and its norm."""

    def __init__(self, like: nn.Conv2d, size: Sequence[int] | None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Identity() if size is None else _convolution(like, size)
        self.norm = norm or nn.BatchNorm2d(like.out_channels)
        mine = (0, 0) if size is None else _half(self.conv)
        self.crop = [outer - inner for outer, inner in zip(_half(like), mine, strict=True)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the branch's share of the output, of a padded input."""
        rows, columns = self.crop
        middle = inputs[:, :, rows : -rows or None, columns : -columns or None]
        outputs: Tensor = self.norm(self.conv(middle))
        return outputs


class Chain(nn.Sequential):
    """A 1 x 1 convolution with norm, and behind it a k x k one, or the mean over the window, with another norm."""

    def __init__(self, like: nn.Conv2d, mean: bool = False) -> None:
        inner = like.out_channels if mean else like.in_channels
        first = nn.Conv2d(like.in_channels, inner, 1, groups=like.groups, bias=False)
        second = _convolution(like, like.kernel_size, in_channels=inner, groups=inner if mean else like.groups)
        if mean:
            nn.init.constant_(second.weight, 1 / second.weight[0].numel()).requires_grad_(False)
        super().__init__(first, nn.BatchNorm2d(inner), second, nn.BatchNorm2d(like.out_channels))


class Block(nn.Module):
    """The sum of branches, which in evaluation is one convolution, of the shape of the one that it is made from.

    The first branch begins with that one's weights and, if a norm is given, with a copy of it: the block stands for
    both. A subclass defines `_branches`.

    Args:
        conv: of any stride, dilation, groups and zero padding, with a square kernel of odd size; else ValueError.
        norm: the batch norm behind it; None is a fresh one.
    """

    smallest: ClassVar[int] = 3  # kernel that the block makes sense for
    normed: ClassVar[bool] = True  # whether branches have norms
    norm_path = ""  # of the norm in a model that it stands for

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None = None) -> None:
        super().__init__()
        if not self.takes(conv):
            what = f"square kernels of odd size from {self.smallest}{'' if self.normed else ', without bias'}"
            raise ValueError(f"{type(self).__name__} takes {what}, padded by zeros, which is not so of {conv}")
        self.branches, self.biased = nn.ModuleList(self._branches(conv)), conv.bias is not None
        self.padding: Sequence[Any] = {"same": _half(conv), "valid": (0, 0)}.get(str(conv.padding), conv.padding)
        first: Any = self.branches[0]
        with torch.no_grad():
            first.conv.weight.copy_(conv.weight)
        if norm is not None:
            first.norm = copy.deepcopy(norm)
        self.to(conv.weight)

    @classmethod
    def takes(cls, conv: nn.Module) -> bool:
        """Return whether the block can stand for a module."""
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or "weight" not in conv._parameters:
            return False
        (rows, columns), fits = conv.kernel_size, cls.normed or conv.bias is None  # a bias is in the norms
        return fits and rows == columns and rows % 2 == 1 and rows >= cls.smallest

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        """Return the branches; the first is the convolution itself, with norm."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of the branches; all see the zeros at the borders, so norms in between are exact there."""
        rows, columns = self.padding
        inputs = F.pad(inputs, (columns, columns, rows, rows)) if rows or columns else inputs
        outputs: Tensor = sum(branch(inputs) for branch in self.branches)
        return outputs

    def fuse(self) -> nn.Conv2d:
        """Return the convolution that computes in evaluation what the block does, with a bias if there are norms."""
        like: Any = self.branches[0].conv
        probed = copy.deepcopy(self).double().eval()
        probed.padding = (0, 0)
        window = torch.zeros(like.in_channels, *(2 * half + 1 for half in _half(like)))
        weight, bias = read_off(probed.forward, window.to(like.weight.device, torch.float64), like.out_channels)
        weight = weight[:, :, :: like.dilation[0], :: like.dilation[1]].unflatten(1, (like.groups, -1)).sum(1)
        conv = _convolution(like, like.kernel_size, bias=self.normed, padding=self.padding).to(weight)
        conv.weight.data.copy_(weight)
        if conv.bias is not None:
            conv.bias.data.copy_(bias)
        return conv.to(like.weight).train(self.training)


class ACB(Block):
    """A k x k, a k x 1 and a 1 x k convolution, each with norm."""

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        rows, columns = conv.kernel_size
        return [Branch(conv, size) for size in ((rows, columns), (rows, 1), (1, columns))]


class RepVGG(Block):
    """A k x k and a 1 x 1 convolution and, where the shape stays, the input itself, each with norm."""

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        return [Branch(conv, kernel) for kernel in (conv.kernel_size, (1, 1), *_itself(conv))]


class DBB(Block):
    """A k x k, a 1 x 1, a 1 x 1 and k x k one behind the other, a 1 x 1 and a mean over the window; all with norms."""

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        return [Branch(conv, conv.kernel_size), Branch(conv, (1, 1)), Chain(conv), Chain(conv, mean=True)]


class LargeKernel(Block):
    """A large kernel, most often depthwise, and a parallel one of 5 x 5, each with norm, as RepLKNet has them."""

    smallest = 7

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        return [Branch(conv, conv.kernel_size), Branch(conv, (5, 5))]


class CSLA(Block):
    """A k x k and a 1 x 1 convolution and, where the shape stays, the input, each times a number for each channel.

    Linear in its weights, so it trains as one convolution does whose gradients are multiplied: see `multipliers`. A
    training finds these numbers; after it those of the two convolutions are constants.
    """

    normed = False

    def _branches(self, conv: nn.Conv2d) -> list[nn.Module]:
        sizes = (conv.kernel_size, (1, 1), *_itself(conv))
        return [Branch(conv, size, Scale(conv.out_channels)) for size in sizes]

    @torch.no_grad()
    def multiplier(self, power: int = 2) -> Tensor:
        """Return for each weight of the fused kernel the sum of |scale|^power; the input's own scale is trained."""
        ones: Any = copy.deepcopy(self)
        for branch in ones.branches:
            itself = isinstance(branch.conv, nn.Identity)
            branch.norm.weight.abs_().pow_(0 if itself else power)
            if not itself:
                branch.conv.weight.fill_(1)
        return ones.fuse().weight.detach()  # type: ignore[no-any-return]


def read_off(function: Callable[[Tensor], Tensor], zeros: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """Return matrix and bias of an affine function: the gradients of its outputs, each from an input of its own."""
    with torch.enable_grad():
        inputs = zeros.expand(outputs, *zeros.shape).clone().requires_grad_()
        seen = function(inputs).flatten(1)
        (matrix,) = torch.autograd.grad(seen.trace(), inputs)
    return matrix, seen[0].detach()


def _convolution(like: nn.Conv2d, size: Sequence[int], **others: Any) -> nn.Conv2d:
    """Return a convolution of this size, and otherwise like one, without padding and bias, or as these say."""
    same = {key: getattr(like, key) for key in ("in_channels", "out_channels", "stride", "dilation", "groups")}
    return nn.Conv2d(**{**same, "kernel_size": tuple(size), "bias": False, **others})


def _itself(conv: nn.Conv2d) -> list[None]:
    """Return a branch's size for the input itself, if a convolution's output can have its input added."""
    stays = conv.in_channels == conv.out_channels and conv.stride == (1, 1)
    return [None] if stays and conv.padding in ("same", _half(conv)) else []


def _half(conv: Any) -> tuple[int, ...]:
    """Return by how many pixels a convolution's window reaches out on each side."""
    return tuple(reach * (size - 1) // 2 for reach, size in zip(conv.dilation, conv.kernel_size, strict=True))
