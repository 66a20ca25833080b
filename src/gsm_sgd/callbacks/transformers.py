"""For the Trainer of Hugging Face Transformers."""

import os
from typing import Any

from transformers import TrainerCallback

from ..masks import Masks
from .loop import Loop


class TransformersCallback(TrainerCallback):  # type: ignore[misc]
    """Take an optimizer through the Trainer of Transformers: its steps, the cut, the best model, the masks.

    Give the Trainer the optimizer without a schedule; the callback makes one of the Trainer's steps when training
    begins. The learning rate follows the Trainer's own scheduler. The net is cut by the schedule, at the latest after
    the last step and before it is evaluated there. Only nets that have been cut can be the best model, so what
    `load_best_model_at_end` loads has its zeros. A checkpoint is resumed as the Trainer resumes it: the optimizer's
    state brings its schedule, with a warning, and nothing is planned again.

    Args:
        masks: the file that the masks are saved in, within the Trainer's `output_dir`; None saves none.
        shares: what `Schedule` takes besides `total_steps`: `ramp`, `fade`, `cut`, `curve`, `peak_lr`, `shrink_to`.

    Attributes:
        masks: what is kept, once training is over.

    Raises:
        ValueError: a share is out of range; when training begins, the Trainer's optimizer is not one of this library's,
            or has a schedule of another number of steps.

    Example:
        >>> groups = parameter_groups(model, weight_decay=0.01, dense=["embeddings", "head"])
        >>> optimizer = GSMAdamW(groups, lr=1e-3, density=0.1)
        >>> callback = TransformersCallback()
        >>> Trainer(model, arguments, ..., optimizers=(optimizer, None), callbacks=[callback]).train()
        >>> callback.masks.num_kept
    """

    def __init__(self, masks: str | os.PathLike[str] | None = "masks.safetensors", **shares: Any) -> None:
        self._loop = Loop(masks, shares)

    @property
    def masks(self) -> Masks | None:
        """What is kept, once training is over."""
        return self._loop.masks

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Plan the Trainer's steps."""
        self._loop.begin([] if optimizer is None else [optimizer], state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Once the net has been cut, forget which one was the best before."""
        if self._loop.step(state.global_step, state.max_steps):
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the zeros of the best model, which has been loaded by now, and save the masks."""
        self._loop.end(args.output_dir)
