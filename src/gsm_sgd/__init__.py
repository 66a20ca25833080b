"""Train a neural network to an exact, chosen sparsity with Global Sparse Momentum SGD."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .masks import apply_masks_, freeze, magnitude_masks, prunable_parameters, sparsity_table
    from .optimizer import GSM, CutWarning, NonFiniteGradientError
    from .selection import select_top

__version__ = "0.1.0"

__all__ = [
    "GSM",
    "CutWarning",
    "NonFiniteGradientError",
    "apply_masks_",
    "freeze",
    "magnitude_masks",
    "prunable_parameters",
    "select_top",
    "sparsity_table",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and the command answers Ctrl-C before that."""
    if name in __all__:
        for module in ("masks", "optimizer", "selection"):
            found = getattr(importlib.import_module(f".{module}", __name__), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
