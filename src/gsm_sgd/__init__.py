"""Train a neural network to an exact, chosen sparsity with Global Sparse Momentum SGD."""

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
