"""The bytes of a sparse file: a safetensors file, compressed by xz. docs/format.md has the layout."""

import json
import lzma
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from ..experiments.reading import open_regular, parse_json

FORMAT = "gsm-sgd sparse 2"
DTYPES = {
    "float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
_METADATA = "gsm-sgd"  # the only key, since safetensors writes several in any order
_POSITIONS = "gsm-sgd.positions"
_XZ = b"\xfd7zXZ\0"
# Every fourth byte of numbers is alike, and they hardly ever repeat.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**20, "lc": 0, "lp": 2, "pb": 0}]
_MEMORY = 2**24  # bytes that decompression may take beside its output
_LONGEST_HEADER = 2**23
_SMALL = 2**26  # bytes that any file may decode to, and
_GROWTH = 1_024  # times its own size that a file may


class FormatError(ValueError):
    """A file's content is not of its format."""


def is_sparse(path: Path) -> bool:
    """Return whether a file begins like a sparse file, of this version or another."""
    try:
        with open_regular(path) as stream:
            start = stream.read(48)
    except OSError:
        return False
    return start.startswith(_XZ) or b'"gsm-sgd' in start


def to_bytes(tensors: Mapping[str, Tensor], pruned: Mapping[str, torch.dtype], about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a file of tensors, and of JSON about them.

    Of the pruned ones, given by name, only what is not zero is stored, as numbers of the type given.
    """
    stored = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    masks = [torch.empty(0, dtype=torch.bool)]
    for name, dtype in pruned.items():
        flat = stored[name].reshape(-1)
        masks.append(flat != 0)
        stored[name] = as_bits(flat)[masks[-1]].view(flat.dtype).to(dtype)
    stored[_POSITIONS] = torch.from_numpy(encode_positions(torch.cat(masks).numpy()))
    raw = save(stored, _metadata(tensors, pruned, about))
    return min(raw, lzma.compress(raw, filters=_FILTERS), key=len)


def most_bytes(
    tensors: Mapping[str, Tensor], pruned: Mapping[str, torch.dtype], about: Mapping[str, Any], kept: int
) -> int:
    """Return the most bytes of a file of such tensors with so many numbers kept, and of JSON that is no longer."""
    data = most_position_bytes(sum(tensors[name].numel() for name in pruned), kept)
    data += kept * max((dtype.itemsize for dtype in pruned.values()), default=0)
    data += sum(tensor.nbytes for name, tensor in tensors.items() if name not in pruned)
    at = 10 ** len(str(data)) - 1  # as long as any offset
    header: dict[str, Any] = {"__metadata__": _metadata(tensors, pruned, about)}
    for name, shape in {_POSITIONS: [at], **{name: list(tensor.shape) for name, tensor in tensors.items()}}.items():
        header[name] = {"dtype": "BOOL", "shape": [at] if name in pruned else shape, "data_offsets": [at, at]}
    return 8 + len(_json(header)) + 7 + data  # 7 spaces at most align the data


def from_bytes(content: bytes, max_bytes: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON of a file, and its tensors, pruned ones first; FormatError if it is damaged or too large."""
    most = _most_decoded(len(content), max_bytes)
    raw = _decompressed(content, most + most // 8 + _LONGEST_HEADER)
    try:
        header = parse_json(raw[8 : 8 + min(int.from_bytes(raw[:8], "little"), _LONGEST_HEADER)])
        about = parse_json(header.get("__metadata__", {}).get(_METADATA, "{}").encode())
        if about.get("format") != FORMAT:
            raise FormatError(f"its format is not {FORMAT!r}, which gsm export of this version makes from a run")
        stored = load(raw)
        if any((tensor.view(torch.uint8) > 1).any() for tensor in stored.values() if tensor.dtype == torch.bool):
            raise FormatError("a truth value is neither 0 nor 1")
        positions = stored.pop(_POSITIONS).numpy()
        rows = {name: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for name, shape, dtype in about["pruned"]}
        values = [stored.pop(name) for name in rows]
    except FormatError:
        raise
    except Exception as error:  # a damaged file can fail in any way
        raise FormatError("its header or a tensor is damaged") from error
    check_size(sum(tensor.nbytes for tensor in [*stored.values(), *rows.values()]), len(content), max_bytes)
    sizes = [row.numel() for row in rows.values()]
    mask = torch.from_numpy(decode_positions(positions, sum(sizes), sum(numbers.numel() for numbers in values)))
    tensors = {}
    for (name, row), numbers, where in zip(rows.items(), values, mask.split(sizes), strict=True):
        if numbers.shape != (int(where.sum()),):
            raise FormatError(f"{name[:40]!r} has not as many numbers as positions")
        tensors[name] = torch.zeros(len(where), dtype=row.dtype)
        as_bits(tensors[name])[where] = as_bits(numbers.to(row.dtype))
        tensors[name] = tensors[name].reshape(row.shape)
    return about, tensors | dict(sorted(stored.items()))  # which safetensors returns in any order


def as_bits(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as integers: torch makes quiet NaNs of signaling ones when it moves float16 numbers."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def check_size(size: int, file_bytes: int, max_bytes: int | None = None) -> None:
    """Raise FormatError if a file would decode to too many bytes, `size`, for its own size."""
    most = _most_decoded(file_bytes, max_bytes)
    if size > most:
        raise FormatError(
            f"its {file_bytes:,} bytes claim to hold tensors of {size:,}, over {most:,} "
            "(of a sparse file that you trust, gsm_sgd.export.load_sparse takes max_bytes)"
        )


def encode_positions(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return where a mask is true, as bits, or as gaps of a byte each where these cannot take more.

    A gap is the number of places left out since the one before; a byte 255 adds to the next one.
    """
    where = np.flatnonzero(mask)
    if _as_bits(mask.size, len(where)):
        return np.packbits(mask)
    more, last = np.divmod(np.diff(where, prepend=-1) - 1, 255)
    code = np.full(len(where) + more.sum(), 255, np.uint8)
    code[np.cumsum(more + 1) - 1] = last
    return code


def decode_positions(code: NDArray[np.uint8], size: int, kept: int) -> NDArray[np.bool_]:
    """Return a mask of which `encode_positions` might have made a code; FormatError if there is none of that size."""
    if code.dtype != np.uint8 or code.ndim != 1 or len(code) > most_position_bytes(size, kept):
        raise FormatError("its positions are damaged")
    if _as_bits(size, kept):
        return np.unpackbits(code, count=size).astype(bool)
    mask, last = np.zeros(size, bool), code < 255
    where = np.cumsum(code + last, dtype=np.int64)[last] - 1
    if len(where) and where[-1] >= size:
        raise FormatError("a position is beyond the end")
    mask[where] = True
    return mask


def most_position_bytes(size: int, kept: int) -> int:
    """Return the most bytes that the positions of `kept` of `size` weights take, wherever they are."""
    return min(kept + (size - kept) // 255, math.ceil(size / 8))


def _as_bits(size: int, kept: int) -> bool:
    return most_position_bytes(size, kept) < kept + (size - kept) // 255


def _json(value: object) -> str:
    """Return JSON; numbers may be NumPy's."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, default=operator.methodcaller("item"))


def _metadata(
    tensors: Mapping[str, Tensor], pruned: Mapping[str, torch.dtype], about: Mapping[str, Any]
) -> dict[str, str]:
    rows = [[name, list(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")] for name in pruned]
    return {_METADATA: _json({"format": FORMAT, **about, "pruned": rows})}


def _decompressed(content: bytes, most: int) -> bytes:
    """Return the safetensors file in a file, of at most so many bytes."""
    if not content.startswith(_XZ):
        return content
    xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
    try:
        raw = xz.decompress(content, most)
    except lzma.LZMAError as error:
        raise FormatError(f"xz says: {error}") from error
    if not xz.eof or xz.unused_data:
        raise FormatError("it is cut short, has something after its end, or decompresses to too much")
    return raw


def _most_decoded(file_bytes: int, max_bytes: int | None) -> int:
    return max(_SMALL, _GROWTH * file_bytes) if max_bytes is None else max_bytes
