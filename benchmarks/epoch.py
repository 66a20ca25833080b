"""One epoch of GSM training on MNIST, data included, against a plain loop that does what the published code does.

The plain loop: a DataLoader that decodes, converts and normalises each image in Python; the importances of all
weights concatenated, sorted by `torch.topk`; the gradient masked by the threshold; torch.optim.SGD. Both train the
same network by the same settings from the same start, in one process, by turns; what counts are the ratios.

    python benchmarks/epoch.py [--model lenet5] [--repeats 3] [--threads 2] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from gsm_sgd.experiments import mnist, models, splits
from gsm_sgd.experiments.loop import evaluate
from gsm_sgd.experiments.prune import gsm
from gsm_sgd.experiments.recipes import Recipe, find_recipe
from gsm_sgd.experiments.rundir import environment

CPU = torch.device("cpu")


class PerImageMNIST(Dataset[tuple[Tensor, int]]):
    """MNIST as torchvision serves it: an image at a time, through PIL and transforms."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float32 (1, 28, 28), and its label."""
        return self.transform(to_pil_image(self.pixels[index])), int(self.labels[index])


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


def our_epoch(dataset: splits.Dataset, recipe: Recipe, steps: int, layout: torch.memory_format) -> float:
    """Return the seconds that our loop takes for so many steps."""
    model = models.build(recipe.model, 0).to(memory_format=layout)
    optimizer = gsm(model, recipe, steps)
    began = time.perf_counter()
    batches = dataset.train.shuffled(recipe.batch_size, 0, 0)
    for _, (images, labels) in zip(range(steps), batches, strict=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - began


def evaluation(dataset: splits.Dataset, model: nn.Module) -> float:
    """Return the seconds that measuring accuracy on the test set takes."""
    began = time.perf_counter()
    evaluate(model, dataset.test)
    return time.perf_counter() - began


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def main() -> None:
    """Measure by turns and print medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(models.MODELS), default="lenet300")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=None, help="fewer than an epoch's 235; times are scaled up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    recipe = find_recipe(options.model, "paper")
    dataset = mnist.load()
    steps = options.steps or -(-len(dataset.train) // recipe.batch_size)
    scale = 235 / steps
    raw, raw_labels = (mnist.files()[f"train-{name}-ubyte"] for name in ("images-idx3", "labels-idx1"))
    pixels = torch.frombuffer(raw, dtype=torch.uint8, offset=16).view(-1, 28, 28)
    loader = DataLoader(
        PerImageMNIST(pixels, torch.frombuffer(raw_labels, dtype=torch.uint8, offset=8)),
        recipe.batch_size,
        shuffle=True,
    )

    bfloat16 = replace(recipe, precision="bfloat16")
    ours: dict[str, Callable[[], float]] = {
        "ours (channels_last, float32)": lambda: our_epoch(dataset, recipe, steps, torch.channels_last),
        "ours, bfloat16": lambda: our_epoch(dataset, bfloat16, steps, torch.channels_last),
    }
    if options.model != "lenet300":  # it has no convolution to lay out
        ours["ours, contiguous"] = lambda: our_epoch(dataset, recipe, steps, torch.contiguous_format)
    for run in ours.values():
        run()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in ("plain loop", "its loading", *ours, "our evaluation")}
    for _ in range(options.repeats):
        whole, loading = plain_epoch(loader, recipe, steps)
        seconds["plain loop"].append(whole * scale)
        seconds["its loading"].append(loading * scale)
        for name, run in ours.items():
            seconds[name].append(run() * scale)
        seconds["our evaluation"].append(evaluation(dataset, models.build(recipe.model, 0)))

    plain = median(seconds["plain loop"])
    print(f"{options.model}, an epoch of GSM training, {options.threads} threads, median of {options.repeats}")
    rows = {name: {"seconds": round(median(s), 3), "ratio": round(plain / median(s), 2)} for name, s in seconds.items()}
    for name, row in rows.items():
        print(f"  {name:<32} {row['seconds']:8.3f} s   plain loop / this {row['ratio']:8.2f}")
    if options.json:
        record = {"benchmark": "epoch", "model": options.model, "repeats": options.repeats, "steps": steps}
        record |= {"environment": environment(CPU), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
