"""The paper's experiments on real data: recipes, data, models, training and the run folders they leave."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Something that only the user can put right; the message is one line that says how."""


def suggestion(name: str, choices: Iterable[str], otherwise: str | None = None) -> str:
    """Return what to say of a name that is not one of the choices: the nearest one, or all, or `otherwise`."""
    near = difflib.get_close_matches(name.lower(), choices := list(choices), n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose one of {', '.join(choices)}" if otherwise is None else otherwise
