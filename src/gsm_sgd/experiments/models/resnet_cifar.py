"""The residual nets for 32x32 images: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to what came in; a 1x1 convolution fits that where the width changes.

    Maps (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride).
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
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
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a ResNet for CIFAR has 6n + 2 layers, not {depth}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.stage1 = self._stage(16, 16, blocks, 1)
        self.stage2 = self._stage(16, 32, blocks, 2)
        self.stage3 = self._stage(32, 64, blocks, 2)
        self.fc = nn.Linear(64, 10)

    def _stage(self, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Block(inputs, outputs, stride), *rest)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        hidden = torch.relu_(self.bn(self.conv(images)))
        hidden = self.stage3(self.stage2(self.stage1(hidden)))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits
