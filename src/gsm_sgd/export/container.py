"""Our files from the outside: a safetensors file with a few sections, written compactly and read with suspicion.

A section is one row of numbers, named after its type; `code` and `about` are bytes: what `indices` encodes, and JSON
compressed by zlib. The metadata is what is short. Weights differ little in their exponents, so the highest bytes of
numbers stand by themselves, compressed, where that pays. docs/format.md has all of it.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..experiments import UsageError
from ..experiments.reading import open_regular, parse_json

NUMBER_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""The types of safetensors that sections of numbers may have, in the order in which they stand in a file."""

_RESTS = {f"{kind}.rest": kind for kind, width in NUMBER_BYTES.items() if width > 1}
_TOPS = {f"{kind}.top": kind for kind in _RESTS.values()}
_BYTES = (*_RESTS, *_TOPS, "code", "about")
_PAYS = 128  # bytes that must be gained, since one section more takes up to 110 in the header
_LONGEST_HEADER = 2**22
_LONGEST_ABOUT = 2**24  # decompressed; the table of a net of 1,000 layers has some 50,000 bytes


class Container(NamedTuple):
    """The content of a file: its metadata, of which `format` is one, its JSON, and its sections."""

    metadata: dict[str, str]
    about: dict[str, Any]
    sections: dict[str, bytes]


class FormatError(ValueError):
    """A file's content is not of its format."""


def compressed(about: Mapping[str, Any]) -> bytes:
    """Return JSON as a file holds it.

    Raises:
        ValueError: a number is infinite or NaN, which JSON does not have.
    """
    return zlib.compress(json.dumps(about, separators=(",", ":"), allow_nan=False, default=_number).encode(), 9)


def header(metadata: Mapping[str, str], lengths: Mapping[str, int]) -> bytes:
    """Return the head of a file whose sections have these lengths in bytes, in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, length in lengths.items():
        kind = "U8" if name in _BYTES else name
        shape = [length // NUMBER_BYTES[kind]]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_bytes(container: Container) -> bytes:
    """Return the bytes of a file; sections of numbers stand first, the widest first, so that they are aligned."""
    content = {**_divided(container.sections), "about": compressed(container.about)}
    ordered = {name: content[name] for name in (*NUMBER_BYTES, *_BYTES) if name in content}
    head = header(container.metadata, {name: len(section) for name, section in ordered.items()})
    return b"".join([head, *ordered.values()])


def format_of(path: Path) -> str | None:
    """Return what `format` says in a file's metadata, or None if it is none of our containers."""
    try:
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries = _json(stream.read(length)) if length <= _LONGEST_HEADER else {}
        kind = entries["__metadata__"]["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None


def read(path: Path, kind: str) -> Container:
    """Return a file's content.

    Raises:
        UsageError: there is no such file.
        FormatError: it is damaged, or of another format.
    """
    try:
        with open_regular(path) as stream:
            return from_bytes(stream.read(), kind)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error


def from_bytes(content: bytes, kind: str) -> Container:
    """Return a file's content; all that it says of itself is checked against its size before it is believed.

    Raises:
        FormatError: it is damaged, or of another format.
    """
    length = int.from_bytes(content[:8], "little")
    if length > min(_LONGEST_HEADER, len(content) - 8):
        raise FormatError("its header is longer than the file, or than any such file's")
    entries = _json(content[8 : 8 + length])
    metadata = entries.pop("__metadata__", None)
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise FormatError("it has no metadata")
    if "format" not in metadata:
        raise FormatError("it is another safetensors file, gsm export makes one of ours")
    if metadata["format"] != kind:
        raise FormatError(f"its format is {metadata['format'][:40]!r}, not {kind!r}")
    sections = _sections(entries, memoryview(content)[8 + length :])
    about = _json(_decompressed(sections.pop("about", b""), _LONGEST_ABOUT, "about"))
    return Container(metadata, about, _joined(sections))


def _sections(entries: dict[str, Any], data: memoryview) -> dict[str, bytes]:
    """Return the sections, which have to fill the file one after the other."""
    sections, at = {}, 0
    for name, entry in entries.items():
        kind = "U8" if name in _BYTES else name
        if kind not in NUMBER_BYTES or not isinstance(entry, dict) or entry.get("dtype") != kind:
            raise FormatError(f"it has a section {name[:40]!r} of a type that is not its own")
        count = entry.get("shape")
        match count:
            case [int(number)] if number >= 0:
                end = at + number * NUMBER_BYTES[kind]
            case _:
                raise FormatError(f"its section {name} is not one row")
        if entry.get("data_offsets") != [at, end] or end > len(data):
            raise FormatError(f"its section {name} is not where it should be")
        sections[name] = bytes(data[at:end])
        at = end
    if at != len(data):
        raise FormatError("it has bytes that belong to no section")
    return sections


def _divided(sections: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return sections with the highest byte of each number in one of its own, compressed, where that pays."""
    divided = dict(sections)
    for rest, top in zip(_RESTS, _TOPS, strict=True):
        kind = _TOPS[top]
        numbers = np.frombuffer(divided.get(kind, b""), np.uint8).reshape(-1, NUMBER_BYTES[kind])
        highest = zlib.compress(numbers[:, -1].tobytes(), 9)
        if len(highest) + _PAYS <= len(numbers):
            divided |= {rest: numbers[:, :-1].tobytes(), top: highest}
            del divided[kind]
    return divided


def _joined(sections: dict[str, bytes]) -> dict[str, bytes]:
    """Return the sections that `_divided` was given."""
    for rest, top in zip(_RESTS, _TOPS, strict=True):
        kind = _TOPS[top]
        if rest not in sections and top not in sections:
            continue
        lower, width = sections.pop(rest, b""), NUMBER_BYTES[kind] - 1
        count = len(lower) // width
        highest = _decompressed(sections.pop(top, b""), count, top)
        if kind in sections or len(lower) != count * width or len(highest) != count:
            raise FormatError(f"its sections {rest} and {top} do not fit each other")
        numbers = np.empty((count, width + 1), np.uint8)
        numbers[:, :-1] = np.frombuffer(lower, np.uint8).reshape(count, width)
        numbers[:, -1] = np.frombuffer(highest, np.uint8)
        sections[kind] = numbers.tobytes()
    return sections


def _decompressed(content: bytes, most: int, name: str) -> bytes:
    """Return the bytes of a section, of which there may be at most so many."""
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(content, most + 1)
    except zlib.error as error:
        raise FormatError(f"its section {name} is damaged") from error
    if len(text) > most or not unzip.eof or unzip.unused_data:
        raise FormatError(f"its section {name} is cut short, too long, or has something after it")
    return text


def _json(text: bytes) -> dict[str, Any]:
    """Return a JSON object."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise FormatError("its JSON is damaged") from error
    if not isinstance(value, dict):
        raise FormatError("its JSON is no object")
    return value


def _number(value: object) -> Any:
    """Return the number that NumPy has put into a box of its own."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a JSON type")
