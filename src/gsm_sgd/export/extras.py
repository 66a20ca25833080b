"""What some formats need beyond the experiments' packages."""

import importlib
from typing import Any

from ..experiments import UsageError


def needed(module: str, purpose: str) -> Any:
    """Return a module, imported.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(f"{purpose} needs {error.name}: in a clone of gsm-sgd, pip install -e '.[export]'") from error
