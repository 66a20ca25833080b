"""CIFAR-10, verified to be the real one.

It is looked for in the folder given or `$GSM_DATA`, as torchvision's folder or as Hugging Face's parquet files, then in
a cache; else torchvision downloads it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import filelock
import numpy as np
import torch
from numpy.typing import NDArray

from . import UsageError
from .reading import check_regular
from .sources import damaged, find_data, read_parquet
from .splits import Dataset, Images

_COUNTS = {"train": 50_000, "test": 10_000}
# of the channels, as bytes divided by 255
_MEANS = {"train": (0.4914, 0.4822, 0.4465), "test": (0.4942, 0.4851, 0.4504)}
_MEAN = _STD = 0.5  # what the published experiments normalise with
_MARGIN = 4
_PLACES = ("", "cifar10", "cifar10/plain_text", "CIFAR10")
_TORCHVISION = "cifar-10-batches-py"


class Pixels(NamedTuple):
    """Images, uint8 (n, 32, 32, 3), and labels, uint8 (n,), of the training and the test set."""

    train: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def load(
    data_dir: Path | None = None, mean: float | tuple[float, ...] = _MEAN, std: float | tuple[float, ...] = _STD
) -> Dataset:
    """Return CIFAR-10: 50,000 training images, shifted by up to 4 pixels and mirrored, and 10,000 test images."""
    _, pixels = find(data_dir)
    train, train_labels, test, test_labels = (torch.from_numpy(array) for array in pixels)
    return Dataset(Images(train, train_labels.long(), mean, std, _MARGIN), Images(test, test_labels.long(), mean, std))


def find(data_dir: Path | None = None) -> tuple[Path, Pixels]:
    """Return where CIFAR-10 is, downloaded first if it is nowhere, and its pixels, verified.

    Args:
        data_dir: a folder to look in first; None means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if
            it is given, else into the cache.

    Raises:
        UsageError: a file is damaged or not CIFAR-10's, or there is neither data nor network.
    """
    return find_data(data_dir, _PLACES, _read, _download)


def _read(folder: Path) -> Pixels | None:
    if (folder / _TORCHVISION).is_dir():
        pixels = _read_torchvision(folder)
    else:
        arrays: list[NDArray[np.uint8]] = []
        for split, count in _COUNTS.items():
            paths = sorted(folder.glob(f"{split}-*.parquet"))
            if (found := read_parquet("CIFAR-10", paths, "img", count, (32, 32), "RGB")) is None:
                return None
            arrays += found
        pixels = Pixels(*arrays)
    _verify(pixels, folder)
    return pixels


def _read_torchvision(folder: Path) -> Pixels:
    """Return the pixels in torchvision's folder, which it compares with the md5 of the official files first."""
    from torchvision.datasets import CIFAR10

    try:
        for path in (folder / _TORCHVISION).iterdir():
            if not path.is_dir():
                check_regular(path)
        train, test = (CIFAR10(folder, train=train) for train in (True, False))
    except Exception as error:  # a damaged file can fail in any way
        raise damaged(folder / _TORCHVISION, "CIFAR-10") from error
    return Pixels(train.data, np.array(train.targets, np.uint8), test.data, np.array(test.targets, np.uint8))


def _download(folder: Path) -> None:
    """Let torchvision put CIFAR-10 into a folder: as a whole, and once if several processes ask for it."""
    from torchvision.datasets import CIFAR10

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / ".cifar10.lock"), TemporaryDirectory(dir=folder, prefix=".partial.") as partial:
            if not (folder / _TORCHVISION).is_dir():
                CIFAR10(partial, download=True)
                (Path(partial) / _TORCHVISION).replace(folder / _TORCHVISION)
    except Exception as error:  # whatever the network, the disk and an archive can do
        raise UsageError(
            "CIFAR-10 is not on this machine and cannot be downloaded. Two ways to get it: connect to the network and "
            f"run `gsm data cifar10`; or put torchvision's folder {_TORCHVISION}, or Hugging Face's parquet files, "
            f"into a folder FOLDER and pass --data-dir FOLDER (or set GSM_DATA). The cause: {error}"
        ) from error


def _verify(pixels: Pixels, path: Path) -> None:
    """Raise UsageError unless the counts, the classes and the channels' means are CIFAR-10's."""
    for split, images, labels in (("train", *pixels[:2]), ("test", *pixels[2:])):
        # sums of bytes are exact, and so are their means to four places
        means = torch.from_numpy(images).sum((0, 1, 2)).double() / images[..., 0].size / 255
        classes = np.bincount(labels, minlength=10).tolist()
        if classes != [_COUNTS[split] // 10] * 10 or tuple(round(mean, 4) for mean in means.tolist()) != _MEANS[split]:
            raise damaged(path, "CIFAR-10")
