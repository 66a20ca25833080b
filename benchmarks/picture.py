"""Draw docs/weights.png: weights of LeNet-300-100 by step as GSM trains it on real MNIST, and its accuracy.

python benchmarks/picture.py
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from gsm_sgd import one_phase, prunable_parameters
from gsm_sgd.experiments import data, models
from gsm_sgd.experiments.loop import evaluate

EPOCHS, BATCH, EVERY = 12, 128, 20  # steps between two points
DRAWN = 40  # weights of either kind
SMALLEST = 1e-9
KEPT, CUT = "#0072b2", "#d55e00"  # Okabe and Ito's blue and orange


def train(sparsity: float) -> tuple[list[int], Tensor, Tensor, list[float], int]:
    """Return steps, |w| of the first layer at each (points, weights), what is kept, errors, and the step of the cut."""
    images = data.load("mnist")
    model = models.build("lenet300", seed=0)
    steps = EPOCHS * len(range(0, len(images.train), BATCH))
    optimizer, scheduler = one_phase(model, total_steps=steps, lr=0.1, sparsity=sparsity, momentum=0.95)
    name, weight = next(iter(prunable_parameters(model).items()))
    marks, values, errors, cut, step = [], [], [], steps, 0
    for epoch in range(EPOCHS):
        for pixels, labels in images.train.shuffled(BATCH, seed=0, epoch=epoch):
            if step % EVERY == 0:
                marks.append(step)
                values.append(weight.detach().abs().flatten().clone())
                errors.append(100 - evaluate(model, images.test) if step % (5 * EVERY) == 0 else float("nan"))
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if optimizer.phase.name == "DONE" and cut == steps:
                cut = step
    return marks, torch.stack(values), optimizer.finalize()[name].flatten(), errors, cut


def draw(sparsity: float, path: Path) -> None:
    """Train, and draw what happened."""
    steps, values, kept, errors, cut = train(sparsity)
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for colour, which, label in ((CUT, ~kept, "cut"), (KEPT, kept, "kept")):
        chosen = which.nonzero().flatten()
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:DRAWN]]
        for number, index in enumerate(chosen.tolist()):
            above.plot(
                steps, values[:, index], color=colour, linewidth=0.7, alpha=0.55, label=None if number else label
            )
    above.set_ylabel("|w|")
    above.set_yscale("log")
    above.set_ylim(SMALLEST, 1)
    legend = above.legend(frameon=False, loc="lower left")
    for line in legend.get_lines():
        line.set(linewidth=2, alpha=1)
    shown = [(step, error) for step, error in zip(steps, errors, strict=True) if error == error]
    below.plot(*zip(*shown, strict=True), color="black", linewidth=1.2)
    below.set_ylim(0, 10)
    below.set_ylabel("test error, %")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.axvline(cut, color="grey", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    above.annotate(" the cut", (cut, 1), xycoords=("data", "axes fraction"), va="top")
    figure.savefig(path, dpi=150)
    print(f"{path}: error {shown[-1][1]:.2f} % at {1 / (1 - sparsity):.0f}x")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--png", type=Path, default=Path("docs/weights.png"))
    arguments = parser.parse_args()
    draw(arguments.sparsity, arguments.png)
