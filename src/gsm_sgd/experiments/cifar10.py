"""CIFAR-10, verified to be the real one, decoded once.

It is looked for in the folder given or `$GSM_DATA`, as torchvision's folder or as Hugging Face's parquet files, then in
a cache; else torchvision downloads it.
"""

import contextlib
import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from . import UsageError
from .reading import check_regular
from .sources import cache_folder, folders_of, read_parquet
from .splits import Dataset, Images
from .whole_files import write_whole

_COUNTS = {"train": 50_000, "test": 10_000}
# of the channels, as bytes divided by 255
_MEANS = {"train": (0.4914, 0.4822, 0.4465), "test": (0.4942, 0.4851, 0.4504)}
_MEAN = _STD = 0.5  # what the published experiments normalise with
_MARGIN = 4
_TORCHVISION = "cifar-10-batches-py"
_DECODED = "cifar10.safetensors"
_HASH = "gsm_sgd.sha256"  # in that file's metadata
_SIZE = 3_073 * sum(_COUNTS.values()) + 100_000  # bytes of that file, its header included, at most


class Pixels(NamedTuple):
    """Images, uint8 (n, 32, 32, 3), and labels, uint8 (n,), of the training and the test set."""

    train: NDArray[np.uint8]
    train_labels: NDArray[np.uint8]
    test: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]


def load(
    data_dir: Path | None = None, mean: float | tuple[float, ...] = _MEAN, std: float | tuple[float, ...] = _STD
) -> Dataset:
    """Return CIFAR-10: 50,000 training images, moved by up to 4 pixels and mirrored, and 10,000 test images."""
    _, pixels = find(data_dir)
    train, train_labels, test, test_labels = (torch.from_numpy(array) for array in pixels)
    return Dataset(Images(train, train_labels.long(), mean, std, _MARGIN), Images(test, test_labels.long(), mean, std))


def find(data_dir: Path | None = None) -> tuple[Path, Pixels]:
    """Return where CIFAR-10 is, fetched first if it is nowhere, and its pixels, verified.

    Args:
        data_dir: a folder to look in first; None means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if
            it is given, else into the cache.

    Raises:
        UsageError: a file is damaged or not CIFAR-10's, or there is neither data nor network.
    """
    folders, store = folders_of(data_dir)
    for folder in folders:
        for place in (folder, folder / "cifar10", folder / "cifar10" / "plain_text", folder / "CIFAR10"):
            if (place / _TORCHVISION).is_dir():
                return place / _TORCHVISION, _read_torchvision(place)
            if (parquet := _read_parquet(place)) is not None:
                return place, parquet
    _download(store)
    return store / _TORCHVISION, _read_torchvision(store)


def _read_torchvision(folder: Path) -> Pixels:
    """Return the pixels in torchvision's folder, which it compares with the md5 of the official files first."""
    from torchvision.datasets import CIFAR10

    try:
        for path in (folder / _TORCHVISION).iterdir():
            if not path.is_dir():
                check_regular(path)
        train, test = (CIFAR10(folder, train=train) for train in (True, False))
    except Exception as error:  # a damaged file can fail in any way
        raise _damaged(folder / _TORCHVISION) from error
    labels = (np.array(split.targets, np.uint8) for split in (train, test))
    pixels = Pixels(train.data, next(labels), test.data, next(labels))
    _verify(pixels, folder / _TORCHVISION)
    return pixels


def _read_parquet(folder: Path) -> Pixels | None:
    """Return the pixels of Hugging Face's parquet files, or None if the folder has none of CIFAR-10.

    Decoding takes a while, so they are kept in the cache, for files of these names, sizes and times.
    """
    files = {split: sorted(folder.glob(f"{split}-*.parquet")) for split in _COUNTS}
    if not all(files.values()):
        return None
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for f in files.values() for path in f]
    source = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    decoded = cache_folder() / f"{source[:16]}-{_DECODED}"
    if (pixels := _read_decoded(decoded)) is not None:
        return pixels
    arrays: list[NDArray[np.uint8]] = []
    for split, paths in files.items():
        try:
            found = read_parquet(paths, "img", _COUNTS[split], (32, 32), "RGB")
        except OSError as error:
            raise _damaged(Path(str(error.filename))) from error
        if found is None:
            return None
        arrays += found
    pixels = Pixels(*arrays)
    _verify(pixels, folder)
    with contextlib.suppress(UsageError):  # then it is decoded again next time
        write_whole(decoded, save(pixels._asdict(), {_HASH: _hash(pixels)}), "--data-dir")
    return pixels


def _read_decoded(path: Path) -> Pixels | None:
    """Return the pixels decoded before, or None if there are none, or damaged ones."""
    try:
        if path.stat().st_size > _SIZE:
            return None
        with safe_open(path, "np") as file:
            pixels = Pixels(*(file.get_tensor(name) for name in Pixels._fields))
            if (file.metadata() or {}).get(_HASH) != _hash(pixels):
                return None
        _verify(pixels, path)
    except (OSError, SafetensorError, TypeError, UsageError):
        return None
    return pixels


def _hash(pixels: Pixels) -> str:
    digest = hashlib.sha256()
    for array in pixels:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


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
        count = _COUNTS[split]
        if images.shape != (count, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (count,):
            raise _damaged(path)
        if np.bincount(labels, minlength=10).tolist() != [count // 10] * 10:
            raise _damaged(path)
        # sums of bytes are exact; so is what comes of them to four places
        means = torch.from_numpy(images).sum((0, 1, 2)).double() / (255 * 32 * 32 * count)
        if tuple(round(mean, 4) for mean in means.tolist()) != _MEANS[split]:
            raise _damaged(path)


def _damaged(path: Path) -> UsageError:
    return UsageError(
        f"{path} is damaged or not CIFAR-10's: move it away and run `gsm data cifar10`, or use another folder"
    )
