"""GSM in a Hugging Face Accelerate loop, then AdamW with its masks; `accelerate launch` runs it on several processes.

pip install accelerate
python examples/accelerate_loop.py [mnist|synthetic] [EPOCHS]
"""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gsm_sgd import GSM, Schedule, keep_masked, sparsity_table
from gsm_sgd.experiments import data, models


def main(dataset: str = "mnist", epochs: str = "10") -> None:
    """Train, and show that exactly Q weights are left."""
    images = data.load(dataset)
    model = models.build("lenet300", seed=0)
    loader = DataLoader(TensorDataset(images.train.images, images.train.labels), batch_size=128, shuffle=True)
    accelerator = Accelerator(cpu=True)
    # Of every process: Accelerate divides the batches among them, so each takes fewer steps.
    steps = int(epochs) * len(loader) // accelerator.num_processes
    optimizer = GSM(model.named_parameters(), 0.05, compression=60, weight_decay=5e-4, schedule=Schedule(steps))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for _ in range(int(epochs)):
        for inputs, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()

    # GSM is inside Accelerate's wrapper; it has cut already: these are its masks
    masks = optimizer.optimizer.finalize()
    net = accelerator.unwrap_model(model)
    finetuner = accelerator.prepare(torch.optim.AdamW(net.parameters(), 1e-3))
    keep_masked(finetuner, masks, net)
    for inputs, labels in loader:
        finetuner.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
        finetuner.step()

    with torch.no_grad():
        correct = (net(images.test.images).argmax(1) == images.test.labels).float().mean()
    rows = sparsity_table(net)
    kept, total = sum(row.nonzeros for row in rows), sum(row.params for row in rows)
    accelerator.print(f"{kept:,} of {total:,} weights, {correct:.2%} top-1")


if __name__ == "__main__":
    main(*sys.argv[1:])
