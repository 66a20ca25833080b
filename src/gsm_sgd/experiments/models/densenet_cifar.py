"""The densely connected net for 32x32 images of Huang et al., "Densely Connected Convolutional Networks", 2017."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, whose outputs are put beside what came in.

    Maps (batch, inputs, height, width) to (batch, inputs + growth, height, width).
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the layer's own channels after them."""
        return torch.cat([inputs, self.conv(torch.relu_(self.bn(inputs)))], 1)


class Transition(nn.Module):
    """Batch norm, ReLU, a 1x1 convolution and a mean over 2x2 pixels; the number of channels stays."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (batch, channels, height / 2, width / 2)."""
        return F.avg_pool2d(self.conv(torch.relu_(self.bn(inputs))), 2)


class DenseNet(nn.Module):
    """3n + 4 layers: a convolution, three dense blocks of n layers with transitions between, a mean, a classifier.

    DenseNet-40 with growth 12 has 1,001,616 prunable weights.
    """

    def __init__(self, depth: int, growth: int) -> None:
        super().__init__()
        layers, rest = divmod(depth - 4, 3)
        if rest or layers < 1:
            raise ValueError(f"a DenseNet for CIFAR has 3n + 4 layers, not {depth}")
        channels = 16
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for block in range(3):
            if block:
                parts.append(Transition(channels))
            parts.append(nn.Sequential(*(Layer(channels + i * growth, growth) for i in range(layers))))
            channels += layers * growth
        self.features = nn.Sequential(*parts)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 3, 32, 32) to logits (batch, 10)."""
        hidden = torch.relu_(self.bn(self.features(self.conv(images))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits
