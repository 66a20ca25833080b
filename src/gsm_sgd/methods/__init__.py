"""What GSM is compared with: pruning methods that work on any torch optimizer, by name."""

import difflib

from .at_init import SNIP, MagnitudeAtInit, RandomAtInit
from .dynamic import SET, RigL
from .magnitude import ACDC, Dense, Gradual, OneShot
from .method import Method

__all__ = [
    "ACDC",
    "METHODS",
    "SET",
    "SNIP",
    "Dense",
    "Gradual",
    "MagnitudeAtInit",
    "Method",
    "OneShot",
    "RandomAtInit",
    "RigL",
    "find_method",
]

_ALL: tuple[type[Method], ...] = (
    *(OneShot, Gradual, RigL, SET, RandomAtInit, MagnitudeAtInit, SNIP, ACDC),
    Dense,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}
"""The methods that have a name."""


def find_method(name: str) -> type[Method]:
    """Return a method by name.

    Raises:
        ValueError: no method has that name; the nearest is suggested.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}"
    raise ValueError(f"unknown method {name!r}: {hint}")
