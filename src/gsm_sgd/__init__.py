"""Train a neural network to an exact, chosen sparsity with Global Sparse Momentum SGD."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .masks import Masks, keep_masked, magnitude_masks, sparsity_table
    from .names import prunable_parameters
    from .optim.gsm import GSM
    from .optim.one_phase import one_phase
    from .optim.sparse import CutWarning, NonFiniteGradientError
    from .schedules import Phase, Schedule
    from .selection.stored import select_top

__version__ = "0.1.0"

_MODULES = {
    "CutWarning": "optim.sparse",
    "GSM": "optim.gsm",
    "Masks": "masks",
    "NonFiniteGradientError": "optim.sparse",
    "Phase": "schedules",
    "Schedule": "schedules",
    "keep_masked": "masks",
    "magnitude_masks": "masks",
    "one_phase": "optim.one_phase",
    "prunable_parameters": "names",
    "select_top": "selection.stored",
    "sparsity_table": "masks",
}
__all__ = [*_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and the command answers Ctrl-C before that."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
