"""Dynamic sparse training: from the first step to the last Q weights are active, and some of them are replaced."""

import math
from collections.abc import Mapping
from typing import ClassVar, get_args

from torch import Tensor

from ..masks import Masks
from ..optim.checks import NonFiniteGradientError
from ..schedules import whole_number
from ..scores import score_dtype
from ..selection.stored import select_top
from .layers import Division, check_layers, divide, random_scores, top_by_layer
from .method import Method, check_every, check_share


class RigL(Method):
    """RigL (Evci et al., 2020): drop the smallest |w| of each layer, grow where the gradient is largest.

    Every few steps, in place of an optimizer step, a share of each layer's active weights is dropped and as many are
    grown, those with the largest |g| among all others; new ones begin at zero, with fresh momentum. The share falls
    along a cosine from `fraction` to zero. The densities of the layers, and so Q, never change.

    Args:
        layers: the densities of the layers: "erk" in proportion to the sum of a layer's dimensions over their product,
            "uniform" the same for all.
        every: steps between two replacements.
        fraction: share of the active weights that is replaced at first.
        until: share of the steps after which nothing is replaced any more.
        seed: of the first masks, which are random.
    """

    name: ClassVar[str] = "rigl"
    title: ClassVar[str] = "RigL"
    layers: Division = "erk"
    every: int = 100
    fraction: float = 0.3
    until: float = 0.75
    seed: int = 0

    def check(self) -> None:
        """Check the settings, and how the budget is divided."""
        check_layers(self.layers, get_args(Division))
        self.fraction, self.until = check_share("fraction", self.fraction), check_share("until", self.until)
        self.every = check_every(self.every)
        self.seed = whole_number("seed", self.seed)
        self._kept = divide({key: weight.shape for key, weight in self.weights.items()}, self.kept, self.layers)

    def start(self) -> Masks:
        """Return random masks."""
        return top_by_layer(random_scores(self.weights, self.seed), self._kept)

    def before_step(self) -> Masks | None:
        """Replace weights if that is due."""
        last = round(self.until * self.total_steps)
        if self.step % self.every or not 0 < self.step < last:
            return None
        fraction = self.fraction / 2 * (1 + math.cos(math.pi * self.step / last))
        grow, masks = self.grow_scores(), self.masks
        self.skip_step()
        return Masks({key: self._replaced(w, masks[key], grow[key], fraction) for key, w in self.weights.items()})

    def grow_scores(self) -> Mapping[str, Tensor]:
        """Return by what new weights are chosen: |g|.

        Raises:
            NonFiniteGradientError: a gradient is infinite or NaN.
        """
        scores = {}
        for key, weight in self.weights.items():
            grad = weight.new_zeros(()).expand_as(weight) if weight.grad is None else weight.grad
            scores[key] = (grad.to_dense() if grad.is_sparse else grad).abs()
            if not scores[key].isfinite().all():
                raise NonFiniteGradientError(f"the gradient of {key!r} is not finite")
        return scores

    @staticmethod
    def _replaced(weight: Tensor, mask: Tensor, grow: Tensor, fraction: float) -> Tensor:
        """Return the mask of a layer with a share of its weights replaced; one that was dropped may be grown again."""
        active = int(mask.sum())
        dropped = int(fraction * active)
        size = weight.abs().to(score_dtype([weight])).masked_fill(~mask, -1)
        (stay,) = select_top([size], active - dropped)
        (new,) = select_top([grow.to(size.dtype).masked_fill(stay, -1)], dropped)
        return stay | new


class SET(RigL):
    """SET (Mocanu et al., 2018): as RigL, but new weights are chosen at random, by a seed.

    With RigL's cosine, as Evci et al. compare with it.

    Args:
        layers: the densities of the layers, "erk" or "uniform", as of RigL.
        every: steps between two replacements.
        fraction: share of the active weights that is replaced at first.
        until: share of the steps after which nothing is replaced any more.
        seed: of the first masks and of the new weights.
    """

    name: ClassVar[str] = "set"
    title: ClassVar[str] = "SET"

    def grow_scores(self) -> Mapping[str, Tensor]:
        """Return random numbers, others at each step."""
        return random_scores(self.weights, self.seed, self.step)
