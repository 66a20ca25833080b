"""Scores: how much would removing a weight cost?

A score is a function of a weight tensor w, its gradient g and its state, and returns a tensor of the weight's shape.
The higher the score, the rather a weight is active; a weight whose score is not above zero is passive. To add one,
write such a function, pass it as `score=` or put it into `SCORES`.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

Score = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
"""(weight, grad, state) -> scores. Half-precision weights and gradients arrive as float32. `state` is what the
optimizer keeps for the weight, such as `momentum_buffer`, and `seed`, a number of its own that is the same on every
replica. Of DTensors a score sees the local part."""


def taylor(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w g|, the first-order Taylor estimate of how removing w changes the loss (Ding et al., 2019, eq. 6)."""
    return (weight * grad).abs_()


def first_order(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return w g, of which the sum over several weights tells how removing them together changes the loss."""
    return weight * grad


def magnitude(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w|."""
    return weight.abs()


def random(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return numbers drawn once for all steps: the control that every other score has to beat."""
    generator = torch.Generator(weight.device).manual_seed(state["seed"])
    return 1 - torch.rand(weight.shape, generator=generator, device=weight.device)


def fisher(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w| sqrt(v), the root of the empirical Fisher estimate of that change, for an optimizer of Adam's kind.

    v is the second moment before the step, so in the first step no weight has a score above zero.
    """
    second: Tensor = state["exp_avg_sq"]
    return weight.abs() * second.to(weight.dtype).sqrt()


SCORES: dict[str, Score] = {"taylor": taylor, "magnitude": magnitude, "random": random, "fisher": fisher}
"""The scores that have a name."""


def find_score(score: str | Score) -> Score:
    """Return a score by its name, a function as it is.

    Raises:
        ValueError: no score has that name.
    """
    if callable(score):
        return score
    if not isinstance(score, str) or score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose {', '.join(SCORES)}, or pass a function")
    return SCORES[score]


def evaluate(score: Score, weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return the scores of a weight in float32 at least: in half precision |w g| underflows, or ties.

    Raises:
        ValueError: the function returns something else than a number for each weight.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    copy = score not in (*SCORES.values(), first_order)  # a user's function may work in place
    scores = score(weight.to(dtype, copy=copy), grad.to(dtype, copy=copy), state)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape or not scores.is_floating_point():
        found = f"{scores.dtype} of {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"the score must return a floating-point tensor of the weight's shape {tuple(weight.shape)}, not {found}"
        )
    return scores


def score_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """Return the precision in which all scores can be compared: float32 at least."""
    return reduce(torch.promote_types, (weight.dtype for weight in weights), torch.float32)


def seed_of(key: str, offsets: Sequence[int]) -> int:
    """Return a seed for the part at these offsets of the parameter of this name, or position among the prunable."""
    return zlib.crc32(repr((key, *offsets)).encode())
