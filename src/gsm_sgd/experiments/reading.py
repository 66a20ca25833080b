"""Files that anybody may have made: read only if they are regular, and bounded in size, depth and numbers."""

import errno
import json
import mmap
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_LONGEST_YAML = 2**16  # bytes: PyYAML reads some 200 KB a second
_LONGEST_JSON = 2**22
_DEEPEST = 16
_TOO_DEEP = f"it is nested more than {_DEEPEST} deep"
_LARGEST = 1e100  # of numbers: their sums and squares are still finite


def open_regular(path: Path, most: int | None = None) -> BinaryIO:
    """Open a file to read; OSError if it has more than `most` bytes or is not a regular file, which may never end."""
    stream = open(path, "rb", opener=_without_waiting)  # noqa: SIM115  # it is the caller's
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        reason = "it is not a regular file"
    elif most is not None and status.st_size > most:
        reason = f"it has more than {most:,} bytes"
    else:
        return stream
    stream.close()
    raise OSError(errno.EINVAL, reason, str(path))


def check_regular(path: Path) -> None:
    """Raise OSError unless a path is a regular file that can be read, which may be given to other libraries."""
    open_regular(path).close()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; OSError as of `open_regular`, ValueError as of `parse_json`."""
    with open_regular(path, _LONGEST_JSON) as stream:
        return parse_json(stream.read())


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file of JSON's types alone; errors as of `read_json`, and for an alias.

    An alias can stand for any amount.
    """
    import yaml  # of the experiments: this module is the library's too

    class NoAliases(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias")
            return super().compose_node(parent, index)

    with open_regular(path, _LONGEST_YAML) as stream:
        return _plain(lambda: yaml.load(stream, NoAliases))


def parse_json(text: bytes) -> Any:
    """Return what JSON says; ValueError if it is damaged, too deep, repeats a name, or has a number that is none."""
    return _plain(lambda: json.loads(text, object_pairs_hook=_once))


def load_tensors(path: Path, device: torch.device | str = "cpu") -> Any:
    """Return what `torch.save` has written; any Exception if it is damaged, unsafe, or claims more than its size."""
    with open_regular(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[:4] == b"PK\3\4":
            archive = zipfile.ZipFile(stream)
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed, as torch never does")
            if sum(entry.file_size for entry in entries) > len(content):
                raise ValueError("its entries are larger than the file")
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise ValueError("a checksum differs")
        if content.find(b"bytearray") >= 0:  # the one type that torch loads whose size a file need not hold
            raise ValueError("it holds a bytearray")
    return torch.load(path, map_location=device, weights_only=True)


def is_number(value: object) -> bool:
    """Return whether a value is a number that can be computed with: neither infinite, nor none, nor gigantic."""
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST


def cause(error: Exception) -> str:
    """Return in a few words why a file could not be read."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _without_waiting(path: str, flags: int) -> int:
    """Open a file as usual, but do not wait for someone to write to it if it is a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _plain(load: Callable[[], Any]) -> Any:
    """Return what a parser returns if it is of JSON's types, neither too deep nor with numbers too large."""
    try:
        value = load()
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except Exception as error:  # a damaged text can fail in any way
        raise ValueError(str(error) or "it cannot be parsed") from error
    _check(value, _DEEPEST)
    return value


def _check(value: Any, depth: int) -> None:
    if depth < 0:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("it has a key that is no text")
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check(item, depth - 1)
    elif isinstance(value, int | float):
        if not is_number(value):
            raise ValueError("it has a number that is infinite, none, or gigantic")
    elif not isinstance(value, str | None):
        raise ValueError(f"it has a {type(value).__name__}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name stands twice")
    return names
