"""Functions compiled by torch.compile, with an error that says what to do where that fails."""

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

import torch


class Compiled:
    """A compiled function of tensors.

    Whatever changes from step to step comes in a tensor, so that nothing is compiled twice.
    """

    _number = count()

    def __init__(self, function: Callable[..., Any]) -> None:
        # A code object of its own: compiled variants are counted, and limited in number, for each code object.
        code = function.__code__.replace(co_name=f"{function.__name__}{next(self._number)}")
        own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
        self._function = torch.compile(own, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any) -> Any:
        """Call the function, compiled if it is not yet.

        Raises:
            RuntimeError: it cannot be compiled here.
        """
        try:
            return self._function(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            raise RuntimeError(
                "compiled=True cannot compile its passes: it needs a C++ compiler on a CPU, Triton on a GPU; "
                f"leave it out to run the same steps uncompiled ({error})"
            ) from error
