"""Callbacks that take an optimizer of this library through another library's training loop.

`TransformersCallback` is for the Trainer of Hugging Face Transformers, `LightningCallback` for Lightning's. Each
imports its library when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lightning import LightningCallback
    from .transformers import TransformersCallback

__all__ = ["LightningCallback", "TransformersCallback"]


def __getattr__(name: str) -> Any:
    """Import a callback, and with it its library."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = name.removesuffix("Callback").lower()
    return getattr(importlib.import_module(f".{module}", __name__), name)
