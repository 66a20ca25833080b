"""A data set of the user's own: any two of torch's, to train on and to measure accuracy on."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset, TensorDataset

from . import UsageError
from .image_folder import in_workers
from .own import find_function
from .splits import Batches, Dataset, Images, Split


@dataclass(frozen=True)
class Items(Split):
    """The items of one of torch's map-style data sets: an image, a float tensor, and its label, an int.

    What is random in them is the same for the same seed and epoch if it draws from torch's generator.
    """

    items: TorchDataset[tuple[Tensor, int]]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot change
    evaluation_batch: ClassVar[int] = 250

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.items)  # type: ignore[arg-type]  # a map-style data set has a length

    def subset(self, indices: Tensor, training: bool) -> "Items":
        """Return some of the items, augmented as they are: only their owner could tell."""
        return replace(self, items=Subset(self.items, indices.tolist()))

    def to(self, device: torch.device) -> "Items":
        """Return the same items; batches are on the device."""
        return replace(self, device=device)

    def _drawn(self, places: list[slice], order: Tensor | None, generator: torch.Generator) -> Batches:
        numbers = torch.arange(len(self)) if order is None else order
        seed = int(torch.randint(2**62, (), generator=generator))
        for images, labels in in_workers(
            _Seeded(self.items, seed), [numbers[place].tolist() for place in places], self.device
        ):
            pixels = images.to(self.device, non_blocking=True)
            if pixels.ndim == 4:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            yield pixels, labels.to(self.device, non_blocking=True)


class _Seeded(TorchDataset[tuple[Tensor, int]]):
    """Items of a data set, each made with a generator of its own."""

    def __init__(self, items: TorchDataset[tuple[Tensor, int]], seed: int) -> None:
        self._items, self._seed = items, seed

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self._seed + index) % 2**63)
            return self._items[index]


@cache  # an option, a recipe and its checks all ask for it
def load(name: str) -> Dataset:
    """Return what a function of the user's own makes: two data sets, to train on and to measure accuracy on.

    Each is one of torch's that has a length, with items (image, label). The number of classes is that of the attribute
    `classes`, as torchvision's have it, or of the labels of a TensorDataset.

    Raises:
        UsageError: there is no such function, or it makes something else.
    """
    made = find_function("dataset", name)()
    if not (isinstance(made, tuple) and len(made) == 2 and all(_is_map_style(one) for one in made)):
        raise UsageError(f"dataset {name!r} must return two of torch's data sets, with lengths: (train, test)")
    train, test = made
    for one in made:
        if (wrong := _wrong_item(one)) is not None:
            raise UsageError(f"dataset {name!r} has items that are no (float image, int label): {wrong}")
    return Dataset(_split(train), _split(test), _classes(name, train))


def shape_of(name: str) -> tuple[int, ...]:
    """Return the shape of an image of such a data set."""
    return tuple(next(iter(load(name).test.batches(1)))[0].shape[1:])


def _is_map_style(one: Any) -> bool:
    return isinstance(one, TorchDataset) and hasattr(one, "__len__") and len(one) > 0


def _wrong_item(one: Any) -> str | None:
    """Return what is wrong with the first item of a data set, None if nothing is."""
    try:
        image, label = one[0]
        if isinstance(image, Tensor) and image.is_floating_point() and 0 <= int(label) == label:
            return None
        return f"the first is ({type(image).__name__}, {type(label).__name__})"
    except Exception as error:  # a data set of anybody's can fail in any way
        return f"{type(error).__name__}: {error}"


def _split(one: Any) -> Split:
    """Return the items of a data set; those of tensors need no workers."""
    if isinstance(one, TensorDataset):
        images, labels = one.tensors
        return Images(images.float(), labels.long())
    return Items(one)


def _classes(name: str, train: Any) -> int:
    if isinstance(train, TensorDataset):
        return int(train.tensors[1].max()) + 1
    if (classes := getattr(train, "classes", None)) is None:
        raise UsageError(f"dataset {name!r} does not say how many classes there are: give it an attribute `classes`")
    return len(classes)
