"""For Lightning's Trainer."""

import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from ..masks import Masks
from .loop import Loop


class LightningCallback(Callback):  # type: ignore[misc]
    """Take an optimizer through Lightning's Trainer: its steps, the cut, the best checkpoint, the masks.

    Let `configure_optimizers` return the optimizer without a schedule; the callback makes one of the Trainer's
    `estimated_stepping_batches` when training begins. The net is cut by the schedule, at the latest after the last
    step. `ModelCheckpoint` takes none for the best that was not cut. A checkpoint is resumed as Lightning resumes it:
    the optimizer's state brings its schedule, with a warning, and nothing is planned again.

    Args:
        masks: the file that the masks are saved in, within the Trainer's `default_root_dir`; None saves none.
        shares: what `Schedule` takes besides `total_steps`: `ramp`, `fade`, `cut`, `curve`, `peak_lr`, `shrink_to`.

    Attributes:
        masks: what is kept, once training is over.

    Raises:
        ValueError: a share is out of range; when training begins, the module does not train by one optimizer of this
            library, or that has a schedule of another number of steps.

    Example:
        >>> callback = LightningCallback(ramp=0.5)
        >>> Trainer(max_epochs=10, callbacks=[callback]).fit(module, loader)
        >>> callback.masks.num_kept
    """

    def __init__(self, masks: str | os.PathLike[str] | None = "masks.safetensors", **shares: Any) -> None:
        self._loop, self._total = Loop(masks, shares), 0

    @property
    def masks(self) -> Masks | None:
        """What is kept, once training is over."""
        return self._loop.masks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the Trainer's steps."""
        self._total = int(trainer.estimated_stepping_batches)
        self._loop.begin(trainer.optimizers, self._total)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Once the net has been cut, forget which checkpoints were the best before."""
        if not self._loop.step(trainer.global_step, self._total):
            return
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                checkpoint.best_k_models, checkpoint.kth_best_model_path = {}, ""
                checkpoint.best_model_path, checkpoint.best_model_score = "", None
                checkpoint.kth_value = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the masks."""
        self._loop.end(trainer.default_root_dir)
