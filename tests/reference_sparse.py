"""A naive reader of sparse files, written from docs/format.md with the standard library alone."""

import json
import lzma
import math
import struct

WIDTH = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "float16": 2, "bfloat16": 2, "int16": 2}  # others 1


def read(content):
    """Return the bytes of each tensor by name, little-endian and row-major, and the JSON."""
    if content.startswith(b"\xfd7zXZ\0"):
        content = lzma.decompress(content)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = json.loads(header.pop("__metadata__")["gsm-sgd"])
    tensors = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    code = tensors.pop("gsm-sgd.positions")
    kept = sum(header[name]["shape"][0] for name, _, _ in about["pruned"])
    size = sum(math.prod(shape) for _, shape, _ in about["pruned"])
    if kept + (size - kept) // 255 > math.ceil(size / 8):
        mask = [code[i // 8] >> (7 - i % 8) & 1 for i in range(size)]
    else:
        mask, place = [0] * size, 0
        for byte in code:
            place += byte
            if byte < 255:
                mask[place] = 1
                place += 1
    start = 0
    for name, shape, dtype in about["pruned"]:
        width, count = WIDTH.get(dtype, 1), header[name]["shape"][0]
        stored = len(tensors[name]) // max(count, 1)
        numbers = iter([tensors[name][i * stored : (i + 1) * stored] for i in range(count)])
        if header[name]["dtype"] == "F16" and dtype == "float32":
            numbers = (struct.pack("<f", struct.unpack("<e", number)[0]) for number in numbers)
        if header[name]["dtype"] == "BF16" and dtype == "float32":
            numbers = (b"\0\0" + number for number in numbers)
        end = start + math.prod(shape)
        tensors[name] = b"".join(next(numbers) if one else bytes(width) for one in mask[start:end])
        start = end
    return tensors, about
