"""GSM in a Lightning module: configure_optimizers returns it, and a callback takes it through the training.

pip install lightning
python examples/lightning_loop.py [mnist|synthetic] [EPOCHS]
"""

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gsm_sgd import GSM, sparsity_table
from gsm_sgd.callbacks import LightningCallback
from gsm_sgd.experiments import data, models


class Pruned(lightning.LightningModule):
    """A LeNet-300-100 that ends with one weight in sixty."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.build("lenet300", seed=0)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss, as in any Lightning module."""
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> GSM:
        """Return GSM; the callback gives it the trainer's steps."""
        return GSM(self.named_parameters(), 0.05, compression=60, weight_decay=5e-4)


def main(dataset: str = "mnist", epochs: str = "10") -> None:
    """Train, and show that exactly Q weights are left."""
    images = data.load(dataset)
    loader = DataLoader(TensorDataset(images.train.images, images.train.labels), batch_size=128, shuffle=True)
    model = Pruned()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    callback = LightningCallback(masks=None)  # or the file to save them in
    trainer = lightning.Trainer(max_epochs=int(epochs), accelerator="cpu", devices=1, callbacks=[callback], **quiet)
    trainer.fit(model, loader)
    masks = callback.masks
    print(f"masks: {masks.num_kept:,} of {sum(row.params for row in masks.table()):,} weights")

    with torch.no_grad():
        correct = (model.net(images.test.images).argmax(1) == images.test.labels).float().mean()
    rows = sparsity_table(model)
    print(f"{sum(row.nonzeros for row in rows):,} of {sum(row.params for row in rows):,} weights, {correct:.2%} top-1")


if __name__ == "__main__":
    main(*sys.argv[1:])
