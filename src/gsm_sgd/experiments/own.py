"""Functions of the user's own that build a net or a data set: "file.py:function" or "module:function"."""

import importlib
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from . import UsageError


class Trusted(NamedTuple):
    """The functions that the user has named, and so trusts: a file may name no other."""

    model: str | None = None
    dataset: str | None = None

    def check(self, kind: str, name: str, source: Path) -> None:
        """Raise UsageError if a file, `source`, names a function that builds its `kind`, model or dataset, but these.

        A name without a colon, or torchvision's, is no function of anybody's own.
        """
        trusted = getattr(self, kind)
        what = {"model": "net", "dataset": "data set"}[kind]
        if trusted not in (None, name):
            raise UsageError(f"{source} says that {name!r} builds its {what}, not {trusted!r}: leave out --{kind}")
        if is_own(name) and name != trusted:
            raise UsageError(
                f"{source} says that {name!r} builds its {what}, which is not part of gsm-sgd: "
                f"if you trust that code, add --{kind} {name}"
            )


NOTHING = Trusted()


def is_own(name: str) -> bool:
    """Return whether this is the name of a function of the user's own."""
    return ":" in name and not name.startswith("torchvision:")


def find_function(kind: str, name: str) -> Callable[[], Any]:
    """Return a function by its name; `kind` is what it builds, as an option has it.

    Raises:
        UsageError: there is no such function.
    """
    module_name, _, function = name.rpartition(":")
    try:
        make = getattr(_module(module_name), function)
    except Exception as error:  # a module of anybody's can fail in any way
        raise UsageError(f"{kind} {name!r} cannot be imported from {Path.cwd()}: {error}") from error
    if not callable(make):
        raise UsageError(f"{kind} {name!r} is not a function")
    return make  # type: ignore[no-any-return]  # what it returns is checked when it is called


def _module(name: str) -> ModuleType:
    """Return a module of the user's own, by its name or its file, and let it import its neighbours."""
    file = Path(name).resolve()
    folder = str(file.parent if file.suffix == ".py" else Path.cwd())
    if folder not in sys.path:  # a console command does not look there
        sys.path.insert(0, folder)
    return _load(file) if file.suffix == ".py" else importlib.import_module(name)


@cache
def _load(file: Path) -> ModuleType:
    spec = spec_from_file_location(str(file), file)  # under its whole path: its name may be another module's too
    assert spec is not None  # the suffix is Python's
    assert spec.loader is not None
    sys.modules[spec.name] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
