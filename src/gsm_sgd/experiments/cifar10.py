"""CIFAR-10, verified to be the real one.

It is looked for in the folder given or `$GSM_DATA`, as torchvision's folder or as Hugging Face's parquet files, then in
a cache; else torchvision downloads it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import filelock
import numpy as np
import torch

from . import UsageError
from .reading import check_regular
from .sources import Pixels, damaged, find_data, read_parquet
from .splits import Dataset, Images

_COUNTS = {"train": 50_000, "test": 10_000}
# of the channels, as bytes divided by 255
_MEANS = {"train": (0.4914, 0.4822, 0.4465), "test": (0.4942, 0.4851, 0.4504)}
_MEAN = _STD = 0.5  # what the published experiments normalise with
_MARGIN = 4
_PLACES = ("", "cifar10", "cifar10/plain_text", "CIFAR10")
_TORCHVISION = "cifar-10-batches-py"


def load(
    data_dir: Path | None = None, mean: float | tuple[float, ...] = _MEAN, std: float | tuple[float, ...] = _STD
) -> Dataset:
    """Return CIFAR-10: 50,000 training images, shifted by up to 4 pixels and mirrored, and 10,000 test images."""
    _, splits = find(data_dir)
    train, test = (
        Images(torch.from_numpy(images), torch.from_numpy(labels).long(), mean, std, _MARGIN if name == "train" else 0)
        for name, (images, labels) in splits.items()
    )
    return Dataset(train, test)


def find(data_dir: Path | None = None) -> tuple[Path, dict[str, Pixels]]:
    """Return where CIFAR-10 is, downloaded first if it is nowhere, and its splits "train" and "test", verified.

    Args:
        data_dir: a folder to look in first; None means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if
            it is given, else into the cache.

    Raises:
        UsageError: a file is damaged or not CIFAR-10's, or there is neither data nor network.
    """
    return find_data(data_dir, _PLACES, _read, _download)


def _read(folder: Path) -> dict[str, Pixels] | None:
    if (folder / _TORCHVISION).is_dir():
        splits = _read_torchvision(folder)
    elif (found := read_parquet("CIFAR-10", folder, "img", _COUNTS, (32, 32), "RGB")) is None:
        return None
    else:
        splits = found
    for name, (images, labels) in splits.items():
        # sums of bytes are exact, and so are their means to four places
        means = torch.from_numpy(images).sum((0, 1, 2)).double() / images[..., 0].size / 255
        classes = np.bincount(labels, minlength=10).tolist()
        if classes != [_COUNTS[name] // 10] * 10 or tuple(round(mean, 4) for mean in means.tolist()) != _MEANS[name]:
            raise damaged(folder, "CIFAR-10")
    return splits


def _read_torchvision(folder: Path) -> dict[str, Pixels]:
    """Return the splits in torchvision's folder, which it compares with the md5 of the official files first."""
    from torchvision.datasets import CIFAR10

    try:
        for path in (folder / _TORCHVISION).iterdir():
            if not path.is_dir():
                check_regular(path)
        sets = {name: CIFAR10(folder, train=name == "train") for name in _COUNTS}
    except Exception as error:  # a damaged file can fail in any way
        raise damaged(folder / _TORCHVISION, "CIFAR-10") from error
    return {name: (split.data, np.array(split.targets, np.uint8)) for name, split in sets.items()}


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
