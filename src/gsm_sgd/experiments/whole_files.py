"""Files that are there whole or not at all, whatever happens while they are written."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import UsageError


def atomic_write(path: Path, content: bytes | bytearray | Callable[[Any], None], partial: str = "partial") -> None:
    """Replace a file, so that whatever happens either the old or the new one is there, whole.

    Args:
        path: the file.
        content: its bytes, or a function that writes them to a stream.
        partial: ending of the file's name until it is whole. A kill leaves that file, and the next try replaces it.

    Raises:
        OSError: it cannot be written, or a folder has the name of the unfinished file.
    """
    unfinished = path.with_name(f"{path.name}.{partial}")
    unfinished.unlink(missing_ok=True)
    try:
        with _named(path), unfinished.open("xb") as stream:  # which follows no link that somebody has put there
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_output(path: Path, content: bytes | bytearray, option: str) -> None:
    """Write a file where a user wants it, and its folder; other processes may be writing the same one.

    Raises:
        UsageError: it cannot be written; `option` is what chooses its place.
    """
    try:
        with suppress(FileExistsError):  # if it is no folder, opening the file says so
            path.parent.mkdir(parents=True)
        atomic_write(path, content, f"{secrets.token_hex(8)}.partial")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another {option}") from error


def append(path: Path, content: bytes) -> None:
    """Add bytes to the end of a file, to the disk; a link is not followed."""
    with _named(path), open(path, "ab", opener=_no_link) as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Have an error in writing a file name it and the disk's reason, in whose place torch gives its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError) or cause.filename is not None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
