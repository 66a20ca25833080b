"""HDF5 files as the published code has them: one data set for each tensor of a net's state.

The published code (github.com/DingXiaoH/GSM-SGD) finds a tensor by the name that its own net gives it, with + for /.
Its LeNets and ResNets are ours under other names, so its scripts load these files, and `gsm show` reads its.
"""

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..experiments import UsageError
from ..experiments.reading import check_regular, open_regular
from .container import FormatError, check_size
from .extras import needed

_MAGIC = b"\x89HDF\r\n\x1a\n"

_LENET = [(r"^fc", "linear")]
_RESNET = [
    (r"^conv\.", "conv1.conv."),
    (r"^bn\.", "conv1.bn."),
    (r"\.(conv[12])\.", r".\1.conv."),
    (r"\.bn([12])\.", r".conv\1.bn."),
    (r"\.shortcut\.0\.", ".shortcut.conv."),
    (r"\.shortcut\.1\.", ".shortcut.bn."),
    (r"^fc\.", "linear."),
]
_THEIR_NAMES = {  # patterns to replace in our names, one after the other
    "lenet300": _LENET,
    "lenet5": [*_LENET, (r"^conv", "stem.conv")],
    **dict.fromkeys(("resnet20", "resnet56", "resnet110"), _RESNET),
}


def to_hdf5(tensors: Mapping[str, Tensor], model: str) -> bytes:
    """Return a file of a net's state, under the names of the published code if it has that net.

    Raises:
        UsageError: h5py is missing, or a tensor is of a type that NumPy does not have.
    """
    h5py = needed("h5py", "HDF5")
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        for name, tensor in tensors.items():
            if tensor.dtype == torch.bfloat16:
                raise UsageError(f"{name} is {tensor.dtype}, which HDF5 does not have: choose another --format")
            file.create_dataset(published_name(name, model).replace("/", "+"), data=tensor.cpu().contiguous().numpy())
    return stream.getvalue()


def published_name(name: str, model: str) -> str:
    """Return the published code's name of a tensor of one of our nets; its own name if it does not have the net."""
    for pattern, replacement in _THEIR_NAMES.get(model, []):
        name = re.sub(pattern, replacement, name)
    return name


def is_hdf5(path: Path) -> bool:
    """Return whether a file begins like HDF5."""
    try:
        with open_regular(path) as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_hdf5(path: Path) -> dict[str, Tensor]:
    """Return the tensors of such a file.

    Raises:
        UsageError: h5py is missing, or the file is damaged, or holds anything else.
    """
    h5py = needed("h5py", "HDF5")
    try:
        check_regular(path)
        with h5py.File(path, "r") as file:
            found = {name: _data_set(h5py, file, name) for name in file}
            # A chunk is decompressed as a whole, however much of it is used.
            sizes = [
                math.prod(map(max, data.shape, data.chunks or data.shape)) * data.dtype.itemsize
                for data in found.values()
            ]
            check_size(sum(sizes), path.stat().st_size)
            return {name.replace("+", "/"): torch.from_numpy(np.asarray(data)) for name, data in found.items()}
    except FormatError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    except UsageError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise UsageError(f"{path} is not an HDF5 file of tensors, or damaged") from error


def _data_set(h5py: Any, file: Any, name: str) -> Any:
    """Return a data set that lies in the file itself, and not, by a link, in another."""
    data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.external is not None or data.is_virtual:
        raise FormatError(f"{name[:40]!r} is no data set in this file")
    settings = data.id.get_create_plist()
    filters = {settings.get_filter(index)[0] for index in range(settings.get_nfilters())}
    # each compression multiplies what the one before it could
    if len(filters) < settings.get_nfilters() or not any(filters <= allowed for allowed in _filters(h5py)):
        raise FormatError(f"{name[:40]!r} is compressed by more, or other, than gzip or lzf")
    return data


def _filters(h5py: Any) -> list[set[int]]:
    """Return which filters data may have gone through: one compression, and what leaves sizes as they are."""
    h5z = h5py.h5z
    return [{h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32, kind} for kind in (h5z.FILTER_DEFLATE, h5z.FILTER_LZF)]
