"""Train a neural network to an exact, chosen sparsity with Global Sparse Momentum SGD."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .masks import Masks, keep_masked, magnitude_masks, sparsity_table
    from .methods import METHODS, Method
    from .names import prunable_parameters
    from .optim.checks import CutWarning, NonFiniteGradientError
    from .optim.gsm import GSM
    from .optim.gsm_adamw import GSMAdamW
    from .optim.multipliers import multiply_gradients
    from .optim.one_phase import one_phase, parameter_groups
    from .patterns import NM, Block
    from .reports.rows import load_metrics, load_runs
    from .schedules import Phase, Schedule
    from .selection.stored import select_top

__version__ = "0.1.0"

__all__ = [
    "GSM",
    "METHODS",
    "NM",
    "Block",
    "CutWarning",
    "GSMAdamW",
    "Masks",
    "Method",
    "NonFiniteGradientError",
    "Phase",
    "Schedule",
    "keep_masked",
    "load_metrics",
    "load_runs",
    "magnitude_masks",
    "multiply_gradients",
    "one_phase",
    "parameter_groups",
    "prunable_parameters",
    "select_top",
    "sparsity_table",
]

_MODULES = (
    "masks",
    "names",
    "optim.gsm",
    "optim.gsm_adamw",
    "optim.multipliers",
    "optim.one_phase",
    "optim.checks",
    "patterns",
    "schedules",
    "selection.stored",
    "methods",
    "reports.rows",
)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and the command answers Ctrl-C before that."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f".{module}", __name__), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
