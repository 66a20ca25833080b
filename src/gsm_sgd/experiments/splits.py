"""Images in batches on a device: shuffled and augmented for training, in order for measuring accuracy.

The order of the images, and how each is augmented, are functions of seed and epoch alone, so a run can go on from any
batch of any epoch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from . import UsageError

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Split(ABC):
    """The images to train on, or those to measure accuracy on; batches are normalised images and their labels.

    Args:
        rank, world_size: this process yields every `world_size`-th image of each batch, from number `rank` on.
    """

    rank: int = 0
    world_size: int = 1
    evaluation_batch: ClassVar[int] = 1_000  # few enough for a CPU's memory, and for small images for its cache

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def subset(self, indices: Tensor, training: bool) -> "Split":
        """Return some of the images; they are augmented only if they are for training."""

    @abstractmethod
    def to(self, device: torch.device) -> "Split":
        """Return the same images; batches are on the device."""

    @abstractmethod
    def _drawn(self, places: list[slice], order: Tensor | None, generator: torch.Generator) -> Batches:
        """Yield the batches at some places: of an order, augmented at random, or without one as they are."""

    def shard(self, rank: int, world_size: int) -> Self:
        """Return the same images; each batch is one process's shard."""
        return replace(self, rank=rank, world_size=world_size)

    def batches(self, size: int) -> Batches:
        """Yield images (batch, channels, height, width) and labels (batch,) once, as they are, in order."""
        stride = size * self.world_size
        places = [slice(start, start + stride, self.world_size) for start in range(self.rank, len(self), stride)]
        return self._drawn(places, None, torch.Generator())

    def shuffled(self, size: int, seed: int, epoch: int, first: int = 0) -> Batches:
        """Yield the batches of an epoch of training, from number `first` on; the last one may be smaller.

        Every shard has an image: where none is left, it repeats the last one of the batch.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(self), generator=generator)
        bounds = [(start, min(start + size, len(self))) for start in range(first * size, len(self), size)]
        places = [slice(min(start + self.rank, end - 1), end, self.world_size) for start, end in bounds]
        return self._drawn(places, order, generator)


@dataclass(frozen=True)
class Images(Split):
    """Images in a device's memory.

    Args:
        images: normalised float32 (n, channels, height, width), or bytes, uint8 (n, height, width, channels), which
            are normalised when a batch is drawn.
        labels: int64 (n,), on the same device.
        mean, std: of the bytes divided by 255, what to normalise with: one number, or one for each channel.
        margin: training shifts each image by up to so many pixels, and mirrors half of them; 0 means neither.
    """

    images: Tensor
    labels: Tensor
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    margin: int = 0

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def subset(self, indices: Tensor, training: bool) -> "Images":
        """Return some of the images."""
        margin = self.margin if training else 0
        return replace(self, images=self.images[indices], labels=self.labels[indices], margin=margin)

    def to(self, device: torch.device) -> "Images":
        """Return the same images in a device's memory."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def _drawn(self, places: list[slice], order: Tensor | None, generator: torch.Generator) -> Batches:
        shifts = torch.randint(-self.margin, self.margin + 1, (len(self), 3), generator=generator)
        shifts[:, 2] = torch.randint(2, (len(self),), generator=generator)
        order, shifts = order if order is None else order.to(self.labels.device), shifts.to(self.labels.device)
        for place in places:
            chosen = place if order is None else order[place]
            images = self.images[chosen]
            if self.margin and order is not None:
                images = random_crop(images, shifts[place], self.margin)
            yield self._normalised(images), self.labels[chosen]

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        # a channels-last tensor, seen as (batch, channels, height, width)
        return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


def random_crop(images: Tensor, shifts: Tensor, margin: int) -> Tensor:
    """Return images shifted and mirrored; what comes in from outside is black.

    Args:
        images: (batch, height, width, channels).
        shifts: int64 (batch, 3): how far down and right each image moves, by at most `margin`, and 1 to mirror it.
        margin: pixels of black around each image.
    """
    count, height, width, _ = images.shape
    padded = F.pad(images, (0, 0, margin, margin, margin, margin))
    columns = torch.arange(width, device=images.device).expand(count, -1)
    columns = torch.where(shifts[:, 2:] == 1, width - 1 - columns, columns) + margin - shifts[:, 1:2]
    rows = torch.arange(height, device=images.device) + margin - shifts[:, :1]
    numbers = torch.arange(count, device=images.device)
    return padded[numbers[:, None, None], rows[:, :, None], columns[:, None]]


@dataclass(frozen=True)
class Dataset:
    """What is trained on and what accuracy is measured on, of how many classes.

    `identity` tells data sets of one name apart; that of verified ones, which are always the same, is empty.
    """

    train: Split
    test: Split
    classes: int = 10
    identity: str = ""

    def to(self, device: torch.device) -> "Dataset":
        """Return the same data on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def shard(self, rank: int, world_size: int) -> "Dataset":
        """Return one process's shard of the data."""
        return replace(self, train=self.train.shard(rank, world_size), test=self.test.shard(rank, world_size))

    def hold_out(self, count: int) -> "Dataset":
        """Return the training set divided: `count` images, the same for all seeds, measure accuracy."""
        if not 0 < count < len(self.train):
            raise UsageError(f"holdout must be above 0 and below {len(self.train)}, not {count}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        kept, held = order[count:], order[:count]
        return replace(self, train=self.train.subset(kept, True), test=self.train.subset(held, False))
