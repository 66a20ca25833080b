"""A naive reader of sparse files, written from docs/format.md with the standard library alone."""

import json
import math
import struct
import zlib

WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
ROUNDED = {"float16": "F16", "bfloat16": "BF16"}


def widened(number, kind):
    """Return the bytes of an F32 that has the value of an F16 or BF16."""
    return b"\0\0" + number if kind == "BF16" else struct.pack("<f", struct.unpack("<e", number)[0])


def read(content):
    """Return the bytes of each tensor by name, little-endian and row-major, and the metadata."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__")
    data = content[8 + length :]
    sections = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items()}
    for kind, width in WIDTH.items():
        if f"{kind}.rest" in sections:
            rest, top = sections[f"{kind}.rest"], zlib.decompress(sections[f"{kind}.top"])
            lower = [rest[i : i + width - 1] for i in range(0, len(rest), width - 1)]
            sections[kind] = b"".join(low + top[i : i + 1] for i, low in enumerate(lower))
    about = json.loads(zlib.decompress(sections["about"]))
    bits = iter("".join(f"{byte:08b}" for byte in sections.get("code", b"")))
    at = dict.fromkeys(sections, 0)

    def numbers(kind, count):
        start, at[kind] = at[kind], at[kind] + count * WIDTH[kind]
        return [sections[kind][i : i + WIDTH[kind]] for i in range(start, at[kind], WIDTH[kind])]

    rows = [(name, math.prod(shape), (kind or ["F32"])[0]) for name, shape, *kind in about["prunable"]]
    codes = metadata["codes"].split()
    low = {}
    for (name, size, _), code in zip(rows, codes, strict=True):
        if code[0] == "b":
            low[name] = [position for position in range(size) if next(bits) == "1"]
        elif code[0] == "r":
            parameter, count = map(int, code[1:].split("."))
            low[name] = [int("0" + "".join(next(bits) for _ in range(parameter)), 2) for _ in range(count)]
    tensors = {}
    for (name, size, kind), code in zip(rows, codes, strict=True):
        stored = ROUNDED.get(metadata.get("values"), kind) if kind == "F32" else kind
        positions = low.get(name, range(size))
        if code[0] == "r":
            parameter, position, positions = int(code[1:].split(".")[0]), -1, []
            for remainder in low[name]:
                quotient = 0
                while next(bits) == "0":
                    quotient += 1
                position += 1 + (quotient << parameter) + remainder
                positions.append(position)
        parts = [bytes(WIDTH[kind])] * size
        for position, number in zip(positions, numbers(stored, len(positions)), strict=True):
            parts[position] = number if stored == kind else widened(number, stored)
        tensors[name] = b"".join(parts)
    for name, shape, *kind in about["whole"]:
        tensors[name] = b"".join(numbers(*(kind or ["F32"]), math.prod(shape)))
    return tensors, metadata
