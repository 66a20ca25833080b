"""The residual nets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Subsample(nn.Module):
    """A shortcut without weights (option A): every second pixel, with channels of zeros added on both sides."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.margin = added // 2

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to (batch, channels + added, height / 2, width / 2)."""
        return F.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, self.margin, self.margin))


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
        elif stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's activations."""
        hidden = torch.relu_(self.bn1(self.conv1(inputs)))
        return torch.relu_(self.bn2(self.conv2(hidden)).add_(self.shortcut(inputs)))


class ResNet(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks of 16, 32 and 64 channels, a mean, a classifier.

    ResNet-56 has 851,504 prunable weights, 855,770 parameters in all.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = _blocks(depth)
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, blocks, 1)
        self.stage2 = _stage(16, 32, blocks, 2)
        self.stage3 = _stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        hidden = torch.relu_(self.bn(self.conv(images)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class ResNetA(nn.Module):
    """The same layers with shortcuts without weights, as the paper has them for CIFAR-10.

    Its parameters have the names of github.com/akamaster/pytorch_resnet_cifar10, so that its trained nets fit.
    ResNet-56 has 848,944 prunable weights, 853,018 parameters in all.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = _blocks(depth)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, 1, project=False)
        self.layer2 = _stage(16, 32, blocks, 2, project=False)
        self.layer3 = _stage(32, 64, blocks, 2, project=False)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        hidden = torch.relu_(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.linear(hidden.mean((2, 3)))
        return logits


def _blocks(depth: int) -> int:
    """Return the number of blocks in each stage of a net of so many layers."""
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a ResNet for CIFAR has 6n + 2 layers, not {depth}")
    return blocks


def _stage(inputs: int, outputs: int, blocks: int, stride: int, project: bool = True) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, outputs, stride, project), *rest)
