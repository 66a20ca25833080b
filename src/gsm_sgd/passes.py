"""What is compiled of the fused rule: functions of tensors alone, each one or two passes over memory.

Whatever changes from step to step comes in a tensor, so that nothing is compiled twice.
"""

from collections.abc import Callable, Sequence
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from .selection import ROW, importance, memory_order, row_width, score_dtype

Tensors = Sequence[Tensor]
Kinds = tuple[tuple[int, bool, bool], ...]  # of each group: number of parameters, has momentum, is Nesterov's

WIDE = 128  # importances in a row, at most, where they are not stored
_BASE = 256.0  # counts that share a number are its digits in this base: no row is longer
_RUN, _STRIDE = 32, 736  # a sample: runs of so many importances, so far from each other that they visit all columns


class Compiled:
    """A compiled function, with an error that says what to do if it cannot be compiled."""

    _number = count()

    def __init__(self, function: Callable[..., Any]) -> None:
        # A code object of its own: compiled variants are counted, and limited in number, for each code object.
        self.name = function.__name__
        code = function.__code__.replace(co_name=f"{self.name}{next(self._number)}")
        own = FunctionType(code, function.__globals__, self.name, function.__defaults__, function.__closure__)
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
                "fused=True cannot compile its passes: it needs a C++ compiler on a CPU, Triton on a GPU; "
                f"without it GSM runs as well, more slowly ({error})"
            ) from error


def importances(weights: Tensors, grads: Tensors) -> Tensor:
    """Return the importances of all weights in one tensor, with a rest of -1."""
    scores = [importance(flattened(w, w), flattened(g, w)) for w, g in zip(weights, grads, strict=True)]
    rest = -sum(score.numel() for score in scores) % ROW
    return torch.cat([*scores, scores[0].new_full((rest,), -1)]).to(score_dtype(weights))


def count_stored(rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
    """Return for each row the largest importance below the bracket's end, and the counts as `decoded` does."""
    return torch.where(rows >= high, -1.0, rows).amax(1), *decoded(_coded(rows, low, high))


def count_all(weights: Tensors, grads: Tensors, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the counts as one number, and the largest importance below the bracket's end."""
    coded, top = [], []
    for w, g in zip(weights, grads, strict=True):
        rows = importance(rows_of(w, w), rows_of(g, w)).to(low.dtype)
        coded.append(_coded(rows, low, high))
        top.append(torch.where(rows >= high, -1.0, rows).amax(1))
    return torch.cat(coded), torch.cat(top)


def count_equal(weights: Tensors, grads: Tensors, value: Tensor) -> Tensor:
    """Return how many importances of each tensor equal a value."""
    counts = []
    for w, g in zip(weights, grads, strict=True):
        equal = importance(rows_of(w, w), rows_of(g, w)).to(value.dtype) == value
        counts.append(torch.where(equal, 1.0, 0.0).sum(1).sum(dtype=torch.float64))
    return torch.stack(counts)


def count_sample(weights: Tensors, grads: Tensors, grid: Tensor) -> Tensor:
    """Return how many sampled importances are at least each value of the grid, and how many there are."""
    sampled = [importance(_sampled(w, w), _sampled(g, w)).to(grid.dtype) for w, g in zip(weights, grads, strict=True)]
    runs = torch.cat(sampled)
    marks = [torch.where(runs >= value, _BASE ** (i % 3), 0.0) for i, value in enumerate(grid.unbind())]
    numbers = torch.stack([(marks[i] + marks[i + 1] + marks[i + 2]).sum(1) for i in range(0, len(marks), 3)])
    squares = torch.floor(numbers / _BASE**2)
    bases = torch.floor((numbers - squares * _BASE**2) / _BASE)
    ones = numbers - squares * _BASE**2 - bases * _BASE
    each = torch.stack([ones, bases, squares], 1).sum(2, dtype=torch.float64).view(-1)
    return torch.cat([each, each.new_full((1,), runs.numel())])


def _sampled(tensor: Tensor, like: Tensor) -> Tensor:
    """Return runs of a tensor, four of them in a row."""
    size = 4 * _STRIDE
    groups = tensor.numel() // size
    return flattened(tensor, like)[: groups * size].view(4 * groups, _STRIDE)[:, :_RUN].reshape(groups, 4 * _RUN)


def _coded(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return for each row a number with the counts of scores between the two values and of those that reach `high`.

    It is NaN if one is not finite.
    """
    return (torch.where(rows >= high, _BASE, torch.where(rows > low, 1.0, 0.0)) + rows * 0).sum(1)


def decoded(coded: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many scores each row has in the bracket, and how many reach its end in all."""
    reached = torch.floor(coded / _BASE)
    return coded - reached * _BASE, reached.sum(dtype=torch.float64)


def update_(
    weights: Tensors, grads: Tensors, momenta: Tensors, thresholds: Tensor, settings: Tensor, kinds: Kinds
) -> None:
    """Apply the rule to weights that are active if their importance reaches the threshold of their tensor."""
    active = [
        importance(w, g).to(thresholds.dtype) >= threshold
        for w, g, threshold in zip(weights, grads, thresholds.unbind(), strict=True)
    ]
    update_masked_(weights, grads, momenta, active, settings, kinds)


def update_masked_(
    weights: Tensors, grads: Tensors, momenta: Tensors, masks: Tensors, settings: Tensor, kinds: Kinds
) -> None:
    """Apply the rule: D = G + eta W where active, else eta_p W; Z <- beta Z + D; W <- W - alpha Z."""
    owners = [group for group, (size, _, _) in enumerate(kinds) for _ in range(size)]
    for i, (w, g, active, group) in reversed(list(enumerate(zip(weights, grads, masks, owners, strict=True)))):
        alpha, beta, eta, eta_p = settings[group].unbind()
        _, momentum, nesterov = kinds[group]
        direction = torch.where(active, g + eta * w, eta_p * w)
        if momentum:
            momentum_ = momenta[i].mul_(beta).add_(direction)
            direction = direction + beta * momentum_ if nesterov else momentum_
        w.sub_(alpha * direction)


def flattened(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor as one dimension, in the order in which `like`, of the same shape, lies in memory."""
    return (tensor if like.is_contiguous() else tensor.permute(memory_order(like))).reshape(-1)


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the same as a matrix, whose rows are counted."""
    return flattened(tensor, like).view(-1, row_width(like.numel(), WIDE))
