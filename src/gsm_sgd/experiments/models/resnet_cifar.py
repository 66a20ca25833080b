"""The residual nets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2."""

from collections import OrderedDict

import torch
from torch import Tensor, nn


class Subsample(nn.ZeroPad3d):
    """A shortcut without weights (option A): every second pixel, with channels of zeros added on both sides."""

    def __init__(self, added: int) -> None:
        super().__init__((0, 0, 0, 0, added // 2, added - added // 2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, channels + added, height / 2, width / 2)."""
        return super().forward(inputs[:, :, ::2, ::2])


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to what came in; a 1x1 convolution fits that where the width changes.

    With `project` false, `Subsample` fits it instead. Maps (batch, inputs, height, width) to (batch, outputs, height /
    stride, width / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if inputs != outputs and not project:
            self.shortcut = Subsample(outputs - inputs)
        elif inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's activations."""
        hidden = torch.relu_(self.bn1(self.conv1(inputs)))
        return torch.relu_(self.bn2(self.conv2(hidden)).add_(self.shortcut(inputs)))


class Mean(nn.Module):
    """The mean over all pixels: (batch, channels, height, width) to (batch, channels)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the means."""
        return inputs.mean((2, 3))


def resnet(depth: int, project: bool = True, names: tuple[str, ...] = ("conv", "bn", "stage", "fc")) -> nn.Sequential:
    """Return a net of 6n + 2 layers: a convolution, three stages of n blocks of 16, 32 and 64 channels, a classifier.

    ResNet-56 has 851,504 prunable weights, 855,770 parameters in all; without weights in the shortcuts, as the paper
    has it for CIFAR-10, 848,944 and 853,018.

    Args:
        depth: how many layers.
        project: whether shortcuts have a convolution where the width changes.
        names: of the first convolution, its batch norm, the stages and the classifier.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a ResNet for CIFAR has 6n + 2 layers, not {depth}")
    conv, bn, stage, fc = names
    parts: dict[str, nn.Module] = {conv: nn.Conv2d(3, 16, 3, padding=1, bias=False), bn: nn.BatchNorm2d(16)}
    parts["relu"] = nn.ReLU(inplace=True)
    inputs = 16
    for number, outputs in enumerate((16, 32, 64), start=1):
        first = Block(inputs, outputs, 1 if inputs == outputs else 2, project)
        parts[f"{stage}{number}"] = nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))
        inputs = outputs
    return nn.Sequential(OrderedDict({**parts, "mean": Mean(), fc: nn.Linear(64, 10)}))


def resnet_a(depth: int) -> nn.Sequential:
    """Return the net without weights in its shortcuts, with parameters named as in akamaster/pytorch_resnet_cifar10."""
    return resnet(depth, project=False, names=("conv1", "bn1", "layer", "linear"))
