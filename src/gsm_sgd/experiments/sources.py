"""Where data sets come from: folders to look in, what to do with damaged files, and images in parquet files."""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import platformdirs
from numpy.typing import NDArray

from . import UsageError
from .reading import check_regular

T = TypeVar("T")
Pixels = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images, uint8 (n, height, width) or (n, height, width, 3), and labels, uint8 (n,)."""


def folders_of(data_dir: Path | None) -> list[Path]:
    """Return the folder given to look for data in, `data_dir` or else `$GSM_DATA`, if any; UsageError if it is not."""
    given = data_dir or (Path(os.environ["GSM_DATA"]) if os.environ.get("GSM_DATA") else None)
    if given is not None and not given.is_dir():
        name = "--data-dir" if data_dir else "GSM_DATA"
        raise UsageError(f"data folder {given} does not exist: make it, or do without {name}")
    return [given] if given else []


def find_data(
    data_dir: Path | None, places: Sequence[str], read: Callable[[Path], T | None], download: Callable[[Path], None]
) -> tuple[Path, T]:
    """Return where a data set is and its content, downloaded first if it is nowhere.

    Args:
        data_dir: the folder to look in first, and to download to; None means `$GSM_DATA`, and a cache to download to.
        places: folders in it that may hold the data.
        read: returns the content of a folder, None if it does not hold the data.
        download: puts the data into a folder.
    """
    cache = platformdirs.user_cache_path("gsm-sgd")
    for folder in [*folders_of(data_dir), cache]:
        for place in places:
            if (found := read(folder / place)) is not None:
                return folder / place, found
    download(data_dir or cache)
    return find_data(data_dir, places, read, download)


def damaged(path: Path, title: str) -> UsageError:
    """Return the error that names a damaged file of a data set."""
    command = f"gsm data {title.lower().replace('-', '')}"
    return UsageError(f"{path} is damaged or not {title}'s: move it away and run `{command}`, or use another folder")


def read_parquet(
    title: str, folder: Path, column: str, counts: Mapping[str, int], size: tuple[int, int], mode: str
) -> dict[str, Pixels] | None:
    """Return the splits in Hugging Face's parquet files, or None if a folder lacks one or has another data set's.

    Args:
        title: the data set's name.
        folder: where the files are, `<split>-*.parquet`.
        column: where the images are, as structs with the bytes of a PNG file; labels are in `label`.
        counts: how many images each split may have at most.
        size: width and height of each.
        mode: Pillow's name of the kind of image, "L" or "RGB".

    Raises:
        UsageError: a file is damaged or holds anything else.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from PIL import Image

    splits = {}
    for split, count in counts.items():
        images, labels = [], []
        for path in sorted(folder.glob(f"{split}-*.parquet")):
            try:
                check_regular(path)
                parquet = pq.ParquetFile(path)
                if not {column, "label"} <= set(parquet.schema_arrow.names):
                    return None
                if parquet.metadata.num_rows > count:
                    raise ValueError("too many rows")
                table = parquet.read(columns=[column, "label"])
                labels.append(np.array(table["label"].to_pylist(), np.uint8))
                for content in pc.struct_field(table[column], "bytes").to_pylist():
                    with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
                        if opened.size != size or opened.mode != mode:  # known before anything is decoded
                            raise ValueError("an image of another kind")
                        images.append(np.asarray(opened))
            except Exception as error:  # a damaged file can fail in any way
                raise damaged(path, title) from error
        if not images:
            return None
        splits[split] = np.stack(images), np.concatenate(labels)
    return splits
