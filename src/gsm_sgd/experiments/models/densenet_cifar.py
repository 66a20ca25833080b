"""The densely connected net for 32x32 images of Huang et al., "Densely Connected Convolutional Networks", 2017."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from .resnet_cifar import Mean


class Layer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, whose outputs are concatenated to the inputs.

    Maps (batch, inputs, height, width) to (batch, inputs + growth, height, width).
    """

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs with the layer's own channels after them."""
        return torch.cat([inputs, self.conv(torch.relu_(self.bn(inputs)))], 1)


def densenet(depth: int, growth: int) -> nn.Sequential:
    """Return a net of 3n + 4 layers: a convolution, three dense blocks of n layers, a mean, a classifier.

    Between the blocks the size is halved. DenseNet-40 with growth 12 has 1,001,616 prunable weights.
    """
    layers, rest = divmod(depth - 4, 3)
    if rest or layers < 1:
        raise ValueError(f"a DenseNet for CIFAR has 3n + 4 layers, not {depth}")
    channels = 16
    features: list[nn.Module] = []
    for block in range(3):
        if block:
            features.append(_transition(channels))
        features.append(nn.Sequential(*(Layer(channels + i * growth, growth) for i in range(layers))))
        channels += layers * growth
    first = {"conv": nn.Conv2d(3, 16, 3, padding=1, bias=False), "features": nn.Sequential(*features)}
    last = {
        "bn": nn.BatchNorm2d(channels),
        "relu": nn.ReLU(inplace=True),
        "mean": Mean(),
        "fc": nn.Linear(channels, 10),
    }
    return nn.Sequential(OrderedDict({**first, **last}))


def _transition(channels: int) -> nn.Sequential:
    norm = {"bn": nn.BatchNorm2d(channels), "relu": nn.ReLU(inplace=True)}
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    return nn.Sequential(OrderedDict(norm, conv=conv, pool=nn.AvgPool2d(2)))
