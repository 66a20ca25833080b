"""Where data sets come from: folders to look in, files to keep, and images in parquet files."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from . import UsageError
from .reading import check_regular


def folders_of(data_dir: Path | None) -> tuple[list[Path], Path]:
    """Return the folders to look for data in, and the one that gets what has to be downloaded.

    The first is `data_dir` or else `$GSM_DATA`, the last a cache, which is where downloads go unless there is a
    `data_dir`.

    Raises:
        UsageError: the folder given does not exist.
    """
    given = data_dir or (Path(os.environ["GSM_DATA"]) if os.environ.get("GSM_DATA") else None)
    if given is not None and not given.is_dir():
        name = "--data-dir" if data_dir else "GSM_DATA"
        raise UsageError(f"data folder {given} does not exist: make it, or do without {name}")
    cache = cache_folder()
    return [*([given] if given else []), cache], data_dir or cache


def cache_folder() -> Path:
    """Return the folder for what was downloaded or decoded before."""
    return platformdirs.user_cache_path("gsm-sgd")


def read_parquet(
    paths: Sequence[Path], column: str, count: int, size: tuple[int, int], mode: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]] | None:
    """Return the images and labels of Hugging Face's parquet files, or None if there are none or another data set's.

    Args:
        paths: the files of a split, in order.
        column: where the images are, as structs with the bytes of a PNG file; labels, 0 to 9, are in `label`.
        count: how many images there may be at most.
        size: width and height of each.
        mode: Pillow's name of the kind of image, "L" or "RGB".

    Returns:
        Pixels, uint8 (n, height, width) or (n, height, width, 3), and labels, uint8 (n,).

    Raises:
        OSError: a file, its `filename`, is damaged or holds anything else.
    """
    import pyarrow.parquet as pq
    from PIL import Image

    images, labels = [], []
    for path in paths:
        try:
            check_regular(path)
            parquet = pq.ParquetFile(path)
            if not {column, "label"} <= set(parquet.schema_arrow.names):
                return None
            if parquet.metadata.num_rows > count:
                raise ValueError("too many rows")
            table = parquet.read(columns=[column, "label"])
            labels += table["label"].to_pylist()
            for image in table[column]:
                with Image.open(io.BytesIO(image["bytes"].as_py()), formats=["PNG"]) as opened:
                    if opened.size != size or opened.mode != mode:  # known before anything is decoded
                        raise ValueError("an image of another kind")
                    images.append(np.asarray(opened))
            if not all(isinstance(label, int) and 0 <= label <= 9 for label in labels):
                raise ValueError("a label that is none")
        except Exception as error:  # a damaged file can fail in any way
            raise OSError(None, "damaged", str(path)) from error
    return (np.stack(images), np.array(labels, np.uint8)) if images else None
