"""The data sets by name."""

from collections.abc import Callable
from pathlib import Path

import torch

from . import UsageError, cifar10, image_folder, mnist, own_data, suggestion
from .own import is_own
from .recipes import Normalization
from .splits import Dataset, Images

Shape = tuple[int, int, int]
_PATTERNS = 10


def load(name: str, data_dir: Path | None = None, normalization: Normalization = "dataset") -> Dataset:
    """Return a data set by name, fetched first if it is nowhere on this machine; `Recipe` has the normalization."""
    if is_own(name):
        return own_data.load(name)
    if name not in DATASETS:
        known = [*DATASETS, "FILE.py:FUNCTION", "MODULE:FUNCTION"]
        raise UsageError(f"unknown dataset {name!r}: {suggestion(name, known)}")
    if (name, normalization) == ("cifar10", "imagenet"):
        return cifar10.load(data_dir, image_folder.MEAN, image_folder.STD)
    return DATASETS[name](data_dir)


def describe(name: str, data_dir: Path | None = None) -> str:
    """Return a line that says where a data set is, fetched first if it is nowhere, and what has been verified of it."""
    if name not in FETCHED:
        raise UsageError(f"unknown data set {name!r}: {suggestion(name, FETCHED)}")
    if name == "mnist":
        place, files = mnist.find(data_dir)
        return f"MNIST: {len(files)} files, {sum(map(len, files.values())):,} bytes, md5 verified, in {place}"
    place, splits = cifar10.find(data_dir)
    counts = " + ".join(f"{len(labels):,}" for _, labels in splits.values())
    return f"CIFAR-10: {counts} images, classes and channel means verified, in {place}"


def synthetic(train: int = 2_048, test: int = 512, shape: Shape = (1, 28, 28), classes: int = _PATTERNS) -> Dataset:
    """Return made-up images: ten random patterns, or as many as there are classes, under heavy noise, always the same.

    Args:
        train, test: how many images.
        shape: of each: (channels, height, width).
        classes: how many a net is to tell apart.
    """
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(min(classes, _PATTERNS), *shape, generator=generator)

    def split(count: int) -> Images:
        labels = torch.randint(len(patterns), (count,), generator=generator)
        return Images(patterns[labels] + 3 * torch.randn(count, *shape, generator=generator), labels)

    return Dataset(split(train), split(test), classes)


IMAGE_SHAPES: dict[str, Shape] = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}
"""(channels, height, width) of what a data set's batches hold; synthetic ones have the first that fits the net."""

FETCHED = ("mnist", "cifar10")  # others have to be there already
DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "mnist": mnist.load,
    "cifar10": cifar10.load,
    "imagenet": image_folder.load,
    "synthetic": lambda _: synthetic(),
}
