"""Masks at initialisation: what is kept is chosen before the first step, and never again."""

from typing import ClassVar, get_args

from ..masks import Masks
from ..optim.checks import NonFiniteGradientError
from ..schedules import whole_number
from ..scores import evaluate, taylor
from ..selection.stored import select_top
from .layers import Division, check_layers, divide, random_scores, top_by_layer
from .magnitude import ByMagnitude
from .method import Method


class RandomAtInit(Method):
    """Random masks: the control that every other choice has to beat.

    Args:
        layers: the densities of the layers: "erk" in proportion to the sum of a layer's dimensions over their product,
            "uniform" the same for all.
        seed: of the masks.
    """

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "random masks"
    layers: Division = "erk"
    seed: int = 0

    def check(self) -> None:
        """Check the settings, and how the budget is divided."""
        check_layers(self.layers, get_args(Division))
        self.seed = whole_number("seed", self.seed)
        self._kept = divide({key: weight.shape for key, weight in self.weights.items()}, self.kept, self.layers)

    def start(self) -> Masks:
        """Return the masks."""
        return top_by_layer(random_scores(self.weights, self.seed), self._kept)


class MagnitudeAtInit(ByMagnitude):
    """The largest |w| of the initialisation.

    Where layers are initialised on different scales, "global" may leave one of them almost nothing.

    Args:
        layers: "global" keeps the largest of the whole model, "uniform" and "erk" those of each layer.
    """

    name: ClassVar[str] = "magnitude"
    title: ClassVar[str] = "magnitude at initialisation"

    def start(self) -> Masks:
        """Return the masks."""
        return self.final()


class SNIP(Method):
    """SNIP (Lee et al., 2019): the largest |w g| of the whole model on the first batch, which takes no step."""

    name: ClassVar[str] = "snip"
    title: ClassVar[str] = "SNIP"

    def before_step(self) -> Masks | None:
        """Return the masks, of the gradients of the first batch.

        Raises:
            NonFiniteGradientError: a gradient is infinite or NaN.
            ValueError: a parameter has no gradient.
        """
        if self.step:
            return None
        scores = []
        for key, weight in self.weights.items():
            if weight.grad is None or weight.grad.is_sparse:
                raise ValueError(f"{key!r} has no dense gradient in the first step, from which SNIP chooses")
            scores.append(evaluate(taylor, weight, weight.grad, {}))
            if not scores[-1].isfinite().all():
                raise NonFiniteGradientError(f"the gradient of {key!r} is not finite")
        self.skip_step()
        return Masks(zip(self.weights, select_top(scores, self.kept), strict=True))
