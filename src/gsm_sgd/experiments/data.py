"""The data sets by name."""

from collections.abc import Callable
from pathlib import Path

import torch

from . import UsageError, cifar10, image_folder, mnist, suggestion
from .splits import Dataset, Images


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Return a data set by name, fetched first if it is nowhere on this machine.

    Raises:
        UsageError: no data set has that name, a file is damaged, or none can be had.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown dataset {name!r}: {suggestion(name, DATASETS)}")
    return DATASETS[name](data_dir)


def describe(name: str, data_dir: Path | None = None) -> str:
    """Return a line that says where a data set is, fetched first if it is nowhere, and what has been verified of it.

    Raises:
        UsageError: as of `load`.
    """
    match name:
        case "mnist":
            place, files = mnist.find(data_dir)
            return f"MNIST: {len(files)} files, {sum(map(len, files.values())):,} bytes, md5 verified, in {place}"
        case "cifar10":
            place, pixels = cifar10.find(data_dir)
            return (
                f"CIFAR-10: {len(pixels.train):,} + {len(pixels.test):,} images, classes and channel means verified, "
                f"in {place}"
            )
        case _:
            raise UsageError(f"unknown data set {name!r}: {suggestion(name, FETCHED)}")


def synthetic(train: int = 2_048, test: int = 512) -> Dataset:
    """Return made-up images like MNIST's in shape: ten random patterns under heavy noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 28, 28, generator=generator)

    def split(count: int) -> Images:
        labels = torch.randint(10, (count,), generator=generator)
        return Images(patterns[labels] + 3 * torch.randn(count, 1, 28, 28, generator=generator), labels)

    return Dataset(split(train), split(test))


IMAGE_SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224), "synthetic": (1, 28, 28)}
"""(channels, height, width) of what a data set's batches hold."""

FETCHED = ("mnist", "cifar10")  # others have to be there already
DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "imagenet": image_folder.load,
    "synthetic": lambda _: synthetic(),
}
