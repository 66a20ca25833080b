"""The table of a file: which tensors it holds, of what shapes and types, and how each prunable one is stored."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experiments import UsageError
from .container import NUMBER_BYTES, FormatError
from .indices import LARGEST_TENSOR, Coding

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_CODING = re.compile(r"d|b([0-9]{1,10})|r([0-9]{1,2})\.([0-9]{1,10})")
_MOST_SIDES = 64  # more than torch makes
_SMALL = 2**26  # bytes that any file may decode to, and
_GROWTH = 1_024  # times its own size that a file may


class Row(NamedTuple):
    """A tensor in a file's table: its name, its shape, and the type of its numbers as safetensors calls it."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "F32"

    @property
    def size(self) -> int:
        """The number of its numbers."""
        return math.prod(self.shape)


def row_of(name: str, tensor: Tensor) -> Row:
    """Return a tensor's row in a table."""
    if tensor.dtype not in NAMES:
        raise UsageError(f"{name} is {tensor.dtype}, which the format does not have: convert it, or leave it out")
    if tensor.numel() > LARGEST_TENSOR:
        raise UsageError(f"{name} has more than 2**31 numbers, which the format does not have")
    return Row(name, tuple(tensor.shape), NAMES[tensor.dtype])


def rows_to_json(rows: Iterable[Row]) -> list[list[Any]]:
    """Return a table in JSON's types; float32 goes without saying."""
    return [[row.name, list(row.shape), *([] if row.dtype == "F32" else [row.dtype])] for row in rows]


def rows_from_json(table: Any) -> list[Row]:
    """Return the table of which `rows_to_json` made this.

    Raises:
        FormatError: it is none.
    """
    rows = []
    for entry in table if isinstance(table, list) else [None]:
        match entry:
            case [str(name), list(shape)]:
                rows.append(_row(name, shape, "F32"))
            case [str(name), list(shape), str(dtype)]:
                rows.append(_row(name, shape, dtype))
            case _:
                raise FormatError("its table is damaged")
    return rows


def _row(name: str, shape: list[Any], dtype: str) -> Row:
    """Return a row whose parts have been checked."""
    if dtype not in DTYPES:
        raise FormatError(f"{name[:40]!r} has an unknown type")
    if not (len(shape) <= _MOST_SIDES and all(type(side) is int and side >= 0 for side in shape)):
        raise FormatError(f"the shape of {name[:40]!r} is none")
    if math.prod(max(1, side) for side in shape) > LARGEST_TENSOR:
        raise FormatError(f"the shape of {name[:40]!r} is too large")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FormatError("a name is no text") from error
    return Row(name, tuple(shape), dtype)


def codings_to_text(codings: Iterable[Coding]) -> str:
    """Return codings as metadata has them: d, b<values>, r<parameter>.<values>, with spaces between."""
    words = {"whole": "d", "bitmask": "b{0.stored}", "rice": "r{0.parameter}.{0.stored}"}
    return " ".join(words[coding.kind].format(coding) for coding in codings)


def codings_from_text(text: str | None, rows: list[Row]) -> list[Coding]:
    """Return the codings of which `codings_to_text` made this, one for each row.

    Raises:
        FormatError: they are none.
    """
    words = (text or "").split()
    found = [_CODING.fullmatch(word) for word in words]
    if len(words) != len(rows):
        raise FormatError("it has not as many codes as tensors")
    codings = []
    for one, row in zip(found, rows, strict=True):
        if one is None:
            raise FormatError("its codes are damaged")
        bitmask, parameter, rice = one.groups()
        if rice is not None:
            codings.append(Coding("rice", int(rice), int(parameter)))
        else:
            codings.append(Coding("whole", row.size) if bitmask is None else Coding("bitmask", int(bitmask)))
    return codings


def check_rows(rows: Iterable[Row], file_bytes: int, max_bytes: int | None = None) -> None:
    """Raise FormatError if a name stands twice, or what a file decodes to has too many bytes for its own size."""
    rows = list(rows)
    if len({row.name for row in rows}) < len(rows):
        raise FormatError("a name stands twice in its table")
    size = sum(row.size * NUMBER_BYTES[row.dtype] for row in rows)
    most = max(_SMALL, _GROWTH * file_bytes) if max_bytes is None else max_bytes
    if size > most:
        raise FormatError(
            f"its {file_bytes:,} bytes claim to hold tensors of {size:,}, over {most:,} "
            "(of a sparse file that you trust, gsm_sgd.export.load_sparse takes max_bytes)"
        )
