"""What every callback does: give the optimizer the loop's steps, notice the cut, save the masks."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..masks import Masks
from ..optim.sparse import SparseOptimizer
from ..schedules import Phase, Schedule


class Loop:
    """The training loop of another library, as the optimizer sees it.

    Args:
        masks: the file for the masks, or None.
        shares: what a Schedule has besides `total_steps`.

    Raises:
        ValueError: a share is out of range.
    """

    def __init__(self, masks: str | os.PathLike[str] | None, shares: dict[str, Any]) -> None:
        Schedule(10**9, **shares)
        self._file, self._shares = masks, shares
        self._optimizer: SparseOptimizer | None = None
        self._cut = False  # whether the net is known to have been cut
        self.masks: Masks | None = None

    def begin(self, optimizers: Iterable[Any], total_steps: int) -> None:
        """Plan so many steps, unless the optimizer has a plan: a state that was loaded brings one.

        Raises:
            ValueError: the loop does not train by one optimizer of this library, or its plan is of other steps.
        """
        found = [_unwrapped(optimizer) for optimizer in optimizers]
        ours = [optimizer for optimizer in found if isinstance(optimizer, SparseOptimizer)]
        if len(ours) != 1:
            names = ", ".join(type(optimizer).__name__ for optimizer in found)
            raise ValueError(f"the trainer must train by one GSM or GSMAdamW, not by {names or 'nothing'}")
        self._optimizer = optimizer = ours[0]
        self._cut = optimizer.phase is Phase.DONE
        planned = optimizer.schedule
        if planned is None and not self._cut:
            for group in optimizer.param_groups:
                group["passive_decay"] = "auto" if group["passive_decay"] is None else group["passive_decay"]
            optimizer.schedule = Schedule(total_steps, **self._shares)
        elif isinstance(planned, Schedule) and planned.total_steps != total_steps and not self._cut:
            raise ValueError(
                f"the optimizer's schedule has {planned.total_steps} steps, and the trainer takes {total_steps}: leave "
                "the schedule to the callback, or resume with as many steps as before"
            )

    def step(self, taken: int, total_steps: int) -> bool:
        """Cut after the last step if no step has cut before, and return whether the net has been cut since the last."""
        assert self._optimizer is not None
        if self._cut or not (self._optimizer.phase is Phase.DONE or taken >= total_steps):
            return False
        self._cut = True
        self._optimizer.finalize()
        return True

    def end(self, folder: str | os.PathLike[str]) -> None:
        """Keep the masks, and the zeros if other weights have been loaded; save the masks in a folder."""
        assert self._optimizer is not None
        self.masks = self._optimizer.finalize()
        if self._file is not None:
            path = Path(folder, self._file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.masks.save(path)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer within the wrappers of Accelerate and Lightning."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
