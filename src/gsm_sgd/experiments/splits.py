"""Images in batches on a device: shuffled and varied for training, in order for measuring accuracy.

The order of the images, and what becomes of each, are functions of seed and epoch alone, so that a run can go on from
any batch of any epoch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from . import UsageError

Batches = Iterator[tuple[Tensor, Tensor]]


class Split(Protocol):
    """The images that are trained on, or those that accuracy is measured on."""

    @property
    def evaluation_batch(self) -> int:
        """How many to measure accuracy on at a time: few enough for a CPU's memory, for small images for its cache."""

    def __len__(self) -> int:
        """Return the number of images."""

    def batches(self, size: int) -> Batches:
        """Yield normalised images (batch, channels, height, width) and labels (batch,) once, as they are, in order."""

    def shuffled(self, size: int, seed: int, epoch: int, first: int = 0) -> Batches:
        """Yield the batches of an epoch of training, from number `first` on; the last one is perhaps smaller."""

    def subset(self, indices: Tensor, training: bool) -> "Split":
        """Return some of the images, for training or for measuring accuracy."""

    def to(self, device: torch.device) -> "Split":
        """Return the same images, whose batches are on a device."""

    def share(self, rank: int, ranks: int) -> "Split":
        """Return the same images, of which each batch is every `ranks`-th from number `rank` on.

        A batch of training always has an image: where the share has none, the last one of the whole batch.
        """


@dataclass(frozen=True)
class Images:
    """Images in a device's memory.

    Args:
        images: normalised float32 (n, channels, height, width), or bytes, uint8 (n, height, width, channels), which
            are normalised when they are drawn.
        labels: int64 (n,), on the same device.
        mean, std: of the bytes divided by 255, what to normalise with: one number, or one for each channel.
        margin: pixels of black around each image in which training moves it about; it then mirrors half of them too.
        rank, ranks: of each batch, which images to yield: as `Split.share` has it.
    """

    images: Tensor
    labels: Tensor
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    margin: int = 0
    rank: int = 0
    ranks: int = 1
    evaluation_batch: int = 1_000

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(self, size: int) -> Batches:
        """Yield all images as they are."""
        for start in range(self.rank, len(self), size * self.ranks):
            chosen = slice(start, start + size * self.ranks, self.ranks)
            yield self._normalised(self.images[chosen]), self.labels[chosen]

    def shuffled(self, size: int, seed: int, epoch: int, first: int = 0) -> Batches:
        """Yield all images in random order; if there is a margin, moved and mirrored at random."""
        generator = epoch_generator(seed, epoch)
        order = torch.randperm(len(self), generator=generator).to(self.labels.device)
        moves = self._moves(generator) if self.margin else None
        for start in range(first * size, len(self), size):
            mine = share(start, min(start + size, len(self)), self.rank, self.ranks)
            chosen = order[mine]
            images = self.images[chosen] if moves is None else self._moved(chosen, moves[mine])
            yield self._normalised(images), self.labels[chosen]

    def subset(self, indices: Tensor, training: bool) -> "Images":
        """Return some of the images; they stay as they are unless they are to train on."""
        margin = self.margin if training else 0
        return replace(self, images=self.images[indices], labels=self.labels[indices], margin=margin)

    def to(self, device: torch.device) -> "Images":
        """Return the same images in a device's memory."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def share(self, rank: int, ranks: int) -> "Images":
        """Return the same images, of which each batch is a share."""
        return replace(self, rank=rank, ranks=ranks)

    def _moves(self, generator: torch.Generator) -> Tensor:
        """Return for each place in the order how far to move down and right, and whether to mirror: int64 (n, 3)."""
        moves = torch.randint(-self.margin, self.margin + 1, (len(self), 3), generator=generator)
        moves[:, 2] = torch.randint(2, (len(self),), generator=generator)
        return moves.to(self.labels.device)

    def _moved(self, chosen: Tensor, moves: Tensor) -> Tensor:
        """Return images moved and mirrored; what comes in from outside is black."""
        height, width = self.images.shape[1:3]
        rows = torch.arange(height, device=moves.device) - moves[:, :1]
        columns = torch.arange(width, device=moves.device).expand(len(chosen), -1)
        columns = torch.where(moves[:, 2:] == 1, width - 1 - columns, columns) - moves[:, 1:2]
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        moved = self.images[chosen[:, None, None], rows[:, :, None], columns[:, None]]
        return moved.mul_(inside[..., None])

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        # a channels-last tensor, seen as (batch, channels, height, width)
        return images.float().div_(255).sub_(mean).div_(std).permute(0, 3, 1, 2)


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

    def share(self, rank: int, ranks: int) -> "Dataset":
        """Return the same data, of which each batch is a share: for one of several processes."""
        return replace(self, train=self.train.share(rank, ranks), test=self.test.share(rank, ranks))

    def hold_out(self, count: int) -> "Dataset":
        """Return the training set divided: `count` images, chosen once for all seeds, to measure accuracy on."""
        if not 0 < count < len(self.train):
            raise UsageError(f"holdout must be above 0 and below {len(self.train)}, not {count}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        kept, held = order[count:], order[:count]
        return replace(self, train=self.train.subset(kept, True), test=self.train.subset(held, False))


def share(start: int, end: int, rank: int, ranks: int) -> slice:
    """Return which of a batch's places, from `start` to before `end`, are a process's: the last one if none is."""
    return slice(start + rank, end, ranks) if start + rank < end else slice(end - 1, end)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return what an epoch's order, and all else that is random in it, is drawn from: the same in every stage."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)
