"""The cut-now curve: what a cut at this moment would do to a net that is still in GSM training."""

from typing import Any

import torch
from torch import Tensor, nn

from ..decay import shrinkage
from ..optim.gsm import GSM
from ..schedules import Phase, Schedule
from .loop import evaluate, lr_factor
from .recipes import Recipe
from .rundir import Record
from .splits import Split

_POINTS = 0.1  # of accuracy that a cut may cost before anybody is warned
_LEFT = 0.1  # share of a passive weight that may be left at the cut before anybody is warned


class CutNow:
    """Measures at each evaluation what a cut would do now.

    Args:
        model: the net in training.
        optimizer: what trains it.
        recipe: of the run.
        test: the images that accuracy is measured on.
        steps_per_epoch: of the training.
    """

    def __init__(self, model: nn.Module, optimizer: GSM, recipe: Recipe, test: Split, steps_per_epoch: int) -> None:
        self._model, self._optimizer, self._recipe, self._test = model, optimizer, recipe, test
        self._steps_per_epoch = steps_per_epoch
        size = sum(weight.numel() for weight in optimizer.governed.values())
        # Of all weights, those that the last cut kept, and those that any cut has kept.
        self._kept, self._ever = (torch.zeros(size, dtype=torch.bool) for _ in range(2))

    @torch.no_grad()
    def measure(self, top1: float, steps_left: int) -> Record:
        """Return what a cut would do now.

        Returns:
            `cut_top1` accuracy if the net were cut, in percent; `gap` the largest weight that would be cut as a share
            of the smallest that would be kept, 0 when nothing is left to cut; `entered` how many weights are kept
            that would not have been kept at the last evaluation, and `returned` how many of them had been before;
            `passive` is the optimizer's `passive_shrinkage`; and a `warning` if the
            cut, when it comes, will cost accuracy.
        """
        weights, masks = self._optimizer.governed, self._optimizer.would_keep()
        kept = torch.cat([mask.view(-1) for mask in masks.values()]).cpu()
        entered = kept & ~self._kept
        counts = {"entered": int(entered.sum()), "returned": int((entered & self._ever).sum())}
        self._kept, self._ever = kept, self._ever | kept

        cut_top1 = top1
        if self._optimizer.phase is not Phase.DONE:  # else it is cut already
            before = {name: weight.clone() for name, weight in weights.items()}
            masks.apply_(weights)
            cut_top1 = evaluate(self._model, self._test)
            for name, weight in weights.items():
                weight.copy_(before[name])
        record: Record = {
            "cut_top1": cut_top1,
            "gap": _gap(list(weights.values()), list(masks.values())),
            **counts,
            "passive": self._optimizer.passive_shrinkage,
        }
        if top1 - cut_top1 > _POINTS and (left := self._left(steps_left)) > _LEFT:
            more = "lower --shrink_to" if self._recipe.passive_decay == "auto" else "raise --passive_decay"
            record["warning"] = (
                f"the cut will not be lossless: now it would cost {top1 - cut_top1:.2f} points, and until it comes "
                f"a weight that turns passive now shrinks to {left:.0%} only; train longer, or {more}"
            )
        return record

    def _left(self, steps_left: int) -> float:
        """Return what is left at the cut of a weight that turns passive now, 0 if the cut is due or a fade comes."""
        schedule, group = self._optimizer.schedule, self._optimizer.param_groups[0]
        assert isinstance(schedule, Schedule)
        now = self._recipe.gsm.epochs * self._steps_per_epoch - steps_left
        fade_comes = self._recipe.fade > 0 and self._optimizer.phase is not Phase.FADE
        if not schedule.ramp_steps <= now < schedule.cut_step or fade_comes:
            return 0.0
        factor = lr_factor(self._recipe.gsm, self._steps_per_epoch)
        lrs = [self._recipe.gsm.lr * factor(step) for step in range(now, schedule.cut_step)]
        return shrinkage(self._optimizer.passive_decay(group), lrs, group["momentum"], group["nesterov"])

    def state_dict(self) -> dict[str, Any]:
        """Return what later measurements depend on."""
        return {"kept": self._kept, "ever": self._ever}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self._kept, self._ever = state["kept"].cpu(), state["ever"].cpu()


def _gap(weights: list[Tensor], masks: list[Tensor]) -> float:
    """Return the largest |w| outside the masks as a share of the smallest inside."""
    outside = max(float(weight.masked_fill(mask, 0).abs().amax()) for weight, mask in zip(weights, masks, strict=True))
    inside = min(
        float(weight.abs().masked_fill(~mask, float("inf")).amin()) for weight, mask in zip(weights, masks, strict=True)
    )
    return outside / inside if inside > 0 else 0.0
