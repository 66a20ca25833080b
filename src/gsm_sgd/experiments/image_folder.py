"""ImageNet, or any images in folders by class: too many for memory, so workers decode them as they are needed."""

import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from . import UsageError
from .reading import check_regular
from .sources import folders_of
from .splits import Batches, Dataset, Split

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_WORKERS = max(1, min(8, _CORES // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))  # of each process on this machine
_SLIMMEST = 50  # of the sides' ratios; the shorter one is scaled to a fixed length, whatever becomes of the other
_LOOKED_AT = 1_000  # files, at most, whose sizes tell data sets apart
Sample = tuple[str, int]  # a file and its class


@dataclass(frozen=True)
class Folder(Split):
    """Images in files; training crops at random and mirrors half of them, else the middle is cropped.

    Args:
        samples: the files and their classes.
        training: whether they are trained on.
        size: height and width of what the net sees.
        device: where the batches are to be.
    """

    samples: list[Sample]
    training: bool
    size: int = 224
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot change
    evaluation_batch: ClassVar[int] = 100

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.samples)

    def subset(self, indices: Tensor, training: bool) -> "Folder":
        """Return some of the images."""
        return replace(self, samples=[self.samples[index] for index in indices.tolist()], training=training)

    def to(self, device: torch.device) -> "Folder":
        """Return the same images; batches are on the device."""
        return replace(self, device=device)

    def _drawn(self, places: list[slice], order: Tensor | None, generator: torch.Generator) -> Batches:
        numbers = torch.arange(len(self)) if order is None else order
        batches = [numbers[place].tolist() for place in places]
        seed = int(torch.randint(2**62, (), generator=generator))
        decoded = _Decoded(self.samples, self.size, seed if self.training and order is not None else None)
        loader = in_workers(decoded, batches, self.device)
        mean, std = (torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (MEAN, STD))
        for images, labels in loader:
            if labels.min() < 0:
                path, _ = self.samples[-1 - int(labels.min())]
                raise UsageError(f"{path} is damaged, no image, or far too slim: replace it")
            pixels = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            yield pixels.contiguous(memory_format=torch.channels_last), labels.to(self.device, non_blocking=True)


class _Decoded(TorchDataset[tuple[Tensor, int]]):
    """The images as bytes, uint8 (3, size, size), and their classes, by number; a damaged one's is -1 - number."""

    def __init__(self, samples: list[Sample], size: int, seed: int | None) -> None:
        from torchvision.transforms import v2

        self._samples, self._size, self._seed = samples, size, seed
        # the published experiments' and torchvision's own way
        crop = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
        middle = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
        self._transform = v2.Compose([*(middle if seed is None else crop), v2.PILToTensor()])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import default_loader

        path, label = self._samples[index]
        try:
            check_regular(Path(path))
            image = default_loader(path)
            if max(image.size) > _SLIMMEST * min(image.size):
                raise ValueError("too slim")
            with torch.random.fork_rng(devices=[], enabled=self._seed is not None):
                if self._seed is not None:
                    torch.manual_seed((self._seed + index) % 2**63)
                return self._transform(image), label
        except Exception:  # a damaged file can fail in any way, and what a worker raises loses its message
            return torch.zeros(3, self._size, self._size, dtype=torch.uint8), -1 - index


def in_workers(
    dataset: TorchDataset[tuple[Tensor, int]], batches: list[list[int]], device: torch.device
) -> DataLoader[tuple[Tensor, int]]:
    """Return what yields batches of a data set, by the numbers of their items, made by workers ahead of time."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(_WORKERS, len(batches)),
        worker_init_fn=_say_nothing,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws a number from the one that dropout draws from
    )


def _say_nothing(_worker: int) -> None:
    """Keep a worker's warnings, as of an image's metadata, from the terminal on which another process draws bars."""
    warnings.simplefilter("ignore")


def load(data_dir: Path | None = None) -> Dataset:
    """Return the images of the folders `train` and `val`, each of which has a folder for each class.

    Args:
        data_dir: what holds the two folders; None means `$GSM_DATA`, or its folder `imagenet`.

    Raises:
        UsageError: they are not there, hold no images, or differ in their classes.
    """
    places = [place for folder in folders_of(data_dir) for place in (folder, folder / "imagenet")]
    place = next((place for place in places if (place / "train").is_dir()), None)
    if place is None:
        raise UsageError(
            "ImageNet has to be there already: pass --data-dir FOLDER (or set GSM_DATA), where FOLDER/train and "
            "FOLDER/val have a folder of images for each class"
        )
    try:
        (classes, train), (theirs, val) = (_samples(place / name) for name in ("train", "val"))
        identity = _identity(place, classes, [*train, *val])
    except OSError as error:
        raise UsageError(f"{place} does not have images in folders by class: {error}") from error
    if classes != theirs:
        raise UsageError(f"{place}: train and val differ in their folders, and so in their classes")
    return Dataset(Folder(train, True), Folder(val, False), len(classes), identity)


def _samples(place: Path) -> tuple[list[str], list[Sample]]:
    """Return the classes and images of a folder, in the order of torchvision's ImageFolder.

    Links to folders are followed, but as they may lead back to where they are, none is entered twice for a class.

    Raises:
        OSError: there is no class, or one without an image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

    classes, _ = find_classes(str(place))
    samples: list[Sample] = []
    for label, name in enumerate(classes):
        seen: set[tuple[int, int]] = set()
        found: list[str] = []
        for folder, folders, files in os.walk(place / name, followlinks=True):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders.sort()  # which of two ways to a folder is taken is not to be left to the disk
            found += [f"{folder}{os.sep}{file}" for file in files if file.lower().endswith(IMG_EXTENSIONS)]
        if not found:
            raise FileNotFoundError(f"no image in {place / name}")
        samples += [(path, label) for path in sorted(found, key=os.path.split)]
    return classes, samples


def _identity(place: Path, classes: list[str], samples: list[Sample]) -> str:
    """Return a hash of the classes, the files' names, and the sizes of some."""
    prefix = f"{place}{os.sep}"
    names = [path.removeprefix(prefix) for path, _ in samples]  # os.path.relpath takes 9 s for ImageNet's
    sizes = [Path(path).stat().st_size for path, _ in samples[:: math.ceil(len(samples) / _LOOKED_AT)]]
    return hashlib.sha256(json.dumps([classes, names, sizes]).encode()).hexdigest()
