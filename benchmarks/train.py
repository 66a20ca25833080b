"""GSM training, data included, against a plain loop that does what the published code does.

The plain loop: float32; a DataLoader that converts, varies and normalises each image in Python; the importances of all
weights concatenated, sorted by `torch.topk`; the gradient masked by the threshold; torch.optim.SGD. Both train the
same network by the same settings, in one process, by turns; what counts are the ratios. Rows of SGD are torch's,
fused, in our loop, so they tell what pruning costs.

    python benchmarks/train.py [--model resnet56] [--steps 20] [--repeats 3] [--threads 2] [--json FILE]

CIFAR-10 is looked for in $GSM_DATA.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from gsm_sgd.experiments import cifar10, data, mnist, models, splits
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.loop import fitting_precision, parameter_groups
from gsm_sgd.experiments.prune import gsm
from gsm_sgd.experiments.recipes import RECIPES, Recipe, find_recipe

CPU = torch.device("cpu")


class PerImage(Dataset[tuple[Tensor, int]]):
    """MNIST or CIFAR-10 as torchvision serves it: an image at a time, through PIL and transforms."""

    def __init__(self, name: str) -> None:
        steps: list[Callable[[Any], Any]] = [transforms.ToTensor()]
        if name == "mnist":
            _, files = mnist.find()
            self.pixels = torch.frombuffer(files["train-images-idx3-ubyte"], dtype=torch.uint8, offset=16)
            self.pixels = self.pixels.view(-1, 28, 28)
            self.labels = torch.frombuffer(files["train-labels-idx1-ubyte"], dtype=torch.uint8, offset=8)
            steps += [transforms.Normalize((0.1307,), (0.3081,))]
        else:
            images, labels = cifar10.find()[1]["train"]
            self.pixels, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
            steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *steps]
            steps += [transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float32 (channels, height, width), and its label."""
        return self.transform(to_pil_image(self.pixels[index].numpy())), int(self.labels[index])


def plain_epoch(loader: DataLoader[tuple[Tensor, int]], recipe: Recipe, steps: int) -> tuple[float, float]:
    """Return the seconds that the plain loop takes for so many steps, in all and for loading alone."""
    model = models.MODELS[recipe.model]()  # the ordinary memory layout
    biases: list[Tensor] = [p for p in model.parameters() if p.ndim < 2]
    weights: list[nn.Parameter] = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": recipe.gsm.weight_decay}, {"params": biases, "weight_decay": 0.0}],
        lr=recipe.gsm.lr,
        momentum=recipe.gsm.momentum,
    )
    kept = int(sum(p.numel() for p in weights) / recipe.compression)
    batches = iter(loader)
    loading = 0.0
    began = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        images, labels = next(batches)
        loading += time.perf_counter() - asked
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            scores = torch.cat([(p * _grad(p)).abs().view(-1) for p in weights])
            threshold = scores.topk(kept).values[-1]
            for p in weights:
                _grad(p).mul_((p * _grad(p)).abs() >= threshold)
        optimizer.step()
    return time.perf_counter() - began, loading


def our_epoch(
    dataset: splits.Dataset, recipe: Recipe, steps: int, layout: torch.memory_format, prunes: bool = True
) -> float:
    """Return the seconds that our loop takes for so many steps of GSM, or of SGD."""
    model = models.build(recipe.model, 0).to(memory_format=layout)
    optimizer: torch.optim.Optimizer = gsm(model, recipe, steps)
    if not prunes:
        groups, lr = parameter_groups(model, recipe.gsm), recipe.gsm.lr
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=recipe.gsm.momentum, fused=True)
    began = time.perf_counter()
    batches = dataset.train.shuffled(recipe.batch_size, 0, 0)
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = F.cross_entropy(model(images.contiguous(memory_format=layout)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def main() -> None:
    """Measure by turns and print medians and their ratios."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=[name for name in RECIPES if name in models.MODELS], default="lenet300")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="of a turn; without it an epoch's")
    parser.add_argument("--batch-size", type=int, default=None, help="without it the paper's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    recipe = find_recipe(options.model, "paper")
    recipe = replace(recipe, batch_size=options.batch_size or recipe.batch_size, precision="float32")
    dataset = data.load(recipe.dataset)
    steps = options.steps or -(-len(dataset.train) // recipe.batch_size)
    loader = DataLoader(PerImage(recipe.dataset), recipe.batch_size, shuffle=True)
    chosen = fitting_precision("auto", CPU)

    bfloat16 = replace(recipe, precision="bfloat16")
    ours: dict[str, Callable[[], float]] = {
        "ours (channels_last, float32)": lambda: our_epoch(dataset, recipe, steps, torch.channels_last),
        "ours, bfloat16": lambda: our_epoch(dataset, bfloat16, steps, torch.channels_last),
        "SGD, float32": lambda: our_epoch(dataset, recipe, steps, torch.channels_last, prunes=False),
        "SGD, bfloat16": lambda: our_epoch(dataset, bfloat16, steps, torch.channels_last, prunes=False),
    }
    if options.model != "lenet300":  # it has no convolution to lay out
        ours["ours, contiguous"] = lambda: our_epoch(dataset, recipe, steps, torch.contiguous_format)
    for run in ours.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ("plain loop", "its loading", *ours)}
    for _ in range(options.repeats):
        whole, loading = plain_epoch(loader, recipe, steps)
        seconds["plain loop"].append(whole)
        seconds["its loading"].append(loading)
        for name, run in ours.items():
            seconds[name].append(run())

    plain, images = median(seconds["plain loop"]), steps * recipe.batch_size
    print(f"{options.model}, {steps} steps of {recipe.batch_size} images, {options.threads} threads, ", end="")
    print(f"median of {options.repeats}; --precision auto is {chosen} here")
    rows = {}
    for name, turns in seconds.items():
        middle = median(turns)
        rows[name] = {"seconds": round(middle, 3), "images_per_second": round(images / middle)}
        rows[name]["ratio"] = round(plain / middle, 2)
        print(f"  {name:<32} {images / middle:10,.0f} images/s   plain loop / this {plain / middle:6.2f}")
    if options.json:
        record = {"benchmark": "train", "model": options.model, "repeats": options.repeats, "steps": steps}
        record |= {"batch_size": recipe.batch_size, "auto": chosen, "environment": environment(CPU), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
