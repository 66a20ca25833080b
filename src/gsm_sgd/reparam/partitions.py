"""RepMLP's layer: fully connected over partitions of the image, with convolutions beside it while it is trained."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .blocks import read_off


class RepMLP(nn.Module):
    """A linear layer over the pixels and channels of each partition, and parallel convolutions inside; all with norms.

    Ding et al., "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition", 2021: the
    partition perceptron with the local one. Maps (batch, inputs, height, width) to (batch, outputs, height, width).

    Args:
        inputs, outputs: numbers of channels.
        size: (height, width) of a partition; they tile the image.
        kernels: odd sizes of the convolutions' kernels.
    """

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], kernels: Sequence[int] = (1, 3)) -> None:
        super().__init__()
        self.inputs, self.outputs, self.size = inputs, outputs, size
        self.fc = nn.Linear(inputs * size[0] * size[1], outputs * size[0] * size[1], bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding="same", bias=False), nn.BatchNorm2d(outputs))
            for kernel in kernels
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the layer's activations; ValueError if the partitions do not tile the image."""
        (rows, columns), (height, width) = self.size, images.shape[2:]
        if height % rows or width % columns:
            raise ValueError(f"partitions of {rows} x {columns} do not tile an image of {height} x {width}")
        down, across = height // rows, width // columns
        tiles = images.reshape(-1, self.inputs, down, rows, across, columns).permute(0, 2, 4, 1, 3, 5)
        after = self._map(tiles.reshape(-1, self.inputs, rows, columns))
        tiles = after.reshape(-1, down, across, self.outputs, rows, columns).permute(0, 3, 1, 4, 2, 5)
        return tiles.reshape(-1, self.outputs, height, width)

    def _map(self, tiles: Tensor) -> Tensor:
        """Map tiles of (all, inputs, rows, columns) to (all, outputs, rows, columns)."""
        after: Tensor = self.norm(self.fc(tiles.flatten(1)).view(-1, self.outputs, *self.size))
        for branch in self.branches:
            after = after + branch(tiles)
        return after

    def fuse(self) -> "RepMLP":
        """Return the layer without convolutions and norms that computes the same in evaluation: W + conv(I, K)^T."""
        like, wide = self.fc.weight, copy.deepcopy(self).double().eval()
        tile = torch.zeros(self.inputs, *self.size, dtype=torch.float64, device=like.device)
        weight, bias = read_off(wide._map, tile, self.fc.out_features)
        plain = RepMLP(self.inputs, self.outputs, self.size, kernels=())
        plain.norm, plain.fc = nn.Identity(), nn.Linear(like.shape[1], len(like)).to(weight)
        plain.fc.weight.data.copy_(weight.flatten(1))
        plain.fc.bias.data.copy_(bias)
        return plain.to(like).train(self.training)
