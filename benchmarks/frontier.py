"""Accuracy against compression: GSM, gradual magnitude pruning, and one-shot magnitude pruning with retraining.

    python benchmarks/frontier.py [--model M] [--compressions 10,60,...] [--seeds 0,1,2] [--epochs N] [--json FILE]

Every method has the same epochs in all, from the same initialisations; GSM and gradual pruning have the settings that
were best for each on 5,000 held-out training images (--holdout), one-shot pruning those of gradual pruning. The masks
of the baselines are torch.nn.utils.prune's:

- GSM, fast: the preset, one phase from a random start;
- GSM, paper: the published schedule, base net and GSM training shortened alike;
- gradual magnitude: masks from |w| every 50 steps, the share of zeros rising by the cubic rule (Zhu and Gupta, 2017);
- one-shot magnitude: half of the epochs for the dense net, one cut to the largest |w|, half for training on with it.

What is finished is found again in --runs, so an interrupted run goes on.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.console import Console
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim import Optimizer

from gsm_sgd import Schedule, prunable_parameters
from gsm_sgd.budget import kept_weights
from gsm_sgd.experiments import data, models
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.loop import evaluate, steps_per_epoch, train
from gsm_sgd.experiments.observers import ProgressBars
from gsm_sgd.experiments.prune import Job, plain_sgd, prune
from gsm_sgd.experiments.recipes import Recipe, find_recipe
from gsm_sgd.experiments.rundir import RunFolder
from gsm_sgd.experiments.splits import Dataset

METHODS = ("GSM, fast", "GSM, paper", "gradual magnitude", "one-shot magnitude")
_EVERY = 50  # steps between two masks of gradual magnitude pruning
_CPU = torch.device("cpu")


def prune_to(model: nn.Module, kept: int) -> None:
    """Cut all but the `kept` largest |w| of the weights that are left, for good."""
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for module, name in layers:
        if not torch_prune.is_pruned(module):
            torch_prune.identity(module, name)
    left = sum(int(module.get_buffer(f"{name}_mask").sum()) for module, name in layers)
    if left > kept:
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=left - kept)


def gradual(job: Job) -> float:
    """Return the accuracy, in percent, that gradual magnitude pruning reaches."""
    recipe = job.recipe
    model = models.build(recipe.model, recipe.seed)
    prunable = sum(weight.numel() for weight in prunable_parameters(model).values())
    steps = steps_per_epoch(job.data, recipe) * recipe.gsm.epochs
    ramp = math.ceil(recipe.ramp * steps / _EVERY) * _EVERY
    schedule = Schedule(steps, ramp=ramp / steps, fade=0.0, cut=1.0)
    kept = kept_weights(prunable, recipe.compression)
    prune_to(model, prunable)
    optimizer = plain_sgd(model, recipe.gsm)
    taken = 0

    def mask_when_due(*_: Any) -> None:
        nonlocal taken
        taken += 1
        if taken % _EVERY == 0 and taken <= ramp:
            prune_to(model, max(kept, math.floor(prunable * schedule.density(taken, kept / prunable))))

    optimizer.register_step_post_hook(mask_when_due)
    return trained(job, model, optimizer, recipe)


def one_shot(job: Job) -> float:
    """Return the accuracy, in percent, that one cut and as much training after it as before reach."""
    half = replace(job.recipe, gsm=replace(job.recipe.gsm, epochs=job.recipe.gsm.epochs // 2))
    model = models.build(half.model, half.seed)
    trained(job, model, plain_sgd(model, half.gsm), half)
    prunable = sum(weight.numel() for weight in prunable_parameters(model).values())
    prune_to(model, kept_weights(prunable, half.compression))
    return trained(job, model, plain_sgd(model, half.gsm), half)


def trained(job: Job, model: nn.Module, optimizer: Optimizer, recipe: Recipe) -> float:
    """Train, and return the accuracy in percent."""
    stage = job.run.stage("baseline")
    stage.discard_checkpoint()
    train(model, optimizer, recipe.gsm, recipe, job.data, stage, job.observer)
    stage.discard_checkpoint()
    return evaluate(model, job.data.test)


def measure(method: str, recipe: Recipe, dataset: Dataset, runs: Path) -> float:
    """Return the accuracy of one run, in percent, from its folder if it is there."""
    epochs = recipe.gsm.epochs + (recipe.base.epochs if recipe.start == "base" else 0)
    size = f"x{recipe.compression:g}-e{epochs}-h{recipe.holdout}-s{recipe.seed}"
    path = runs / f"{recipe.model}-{method.replace(',', '').replace(' ', '-')}-{size}"
    with RunFolder(path, recipe, checkpoint_seconds=1e9) as folder:
        if not folder.finished:
            job = Job(recipe, dataset, folder, ProgressBars(Console(quiet=True)), _CPU)
            if method.startswith("GSM"):
                prune(job)
            else:
                top1 = gradual(job) if method.startswith("gradual") else one_shot(job)
                folder.finish({"top1": {"pruned": top1}})
    result: dict[str, Any] = json.loads((path / "result.json").read_text())
    return float(result["top1"]["pruned"])


def settings(method: str, model: str, epochs: int) -> Recipe:
    """Return the recipe that was best for a method on held-out images, with as many epochs in all."""
    if method == "GSM, paper":
        paper = find_recipe(model, "paper")
        paper = paper.scaled(epochs / (paper.base.epochs + paper.gsm.epochs))
        return replace(paper, base=replace(paper.base, epochs=epochs - paper.gsm.epochs))  # rounding aside
    fast = find_recipe(model)
    fast = replace(fast, gsm=replace(fast.gsm, epochs=epochs))
    if method == "GSM, fast":
        return fast
    # momentum .9 (of .9, .95), ramp .4 and cosine from .67 (of .3, .5 and .25, .5), weight decay 1e-4 (of 1e-4, 5e-4)
    training = replace(fast.gsm, momentum=0.9, weight_decay=1e-4, cosine=0.67)
    return replace(fast, gsm=training, ramp=0.4, cut=1.0, passive_decay=None)


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Return mean and sample deviation."""
    std = round(stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(fmean(values), 4), "std": std, "values": values}


def picture(record: dict[str, Any], path: Path) -> None:
    """Draw the error, on a scale where a tenth of a point shows, against compression."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    ratios = sorted({float(ratio) for cells in record["methods"].values() for ratio in cells})
    colours = ("#0072B2", "#56B4E9", "#D55E00", "#000000")
    for method, colour, style in zip(METHODS, colours, ("o-", "v-.", "s--", "^:"), strict=True):
        cells = record["methods"].get(method, {})
        places = [float(ratio) for ratio in cells]
        errors = [cell["std"] or 0.0 for cell in cells.values()]
        means = [100 - cell["mean"] for cell in cells.values()]
        axes.errorbar(places, means, errors, fmt=style, color=colour, label=method, capsize=3, linewidth=1.3)
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{ratio:g}x" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("compression ratio")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("top-1 error, %")
    axes.set_title(f"{record['model']} on MNIST, {record['epochs']} epochs in all", fontsize=10)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what is not there yet, print means, and write them down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet300")
    parser.add_argument("--compressions", default="10,30,60,100,200,500,1000")
    parser.add_argument("--methods", default="0,1,2,3", help="numbers of: " + "; ".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--holdout", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--png", type=Path, default=None)
    options = parser.parse_args()
    if options.epochs % 2:
        parser.error("--epochs must be even: one-shot pruning takes half of them before the cut")
    dataset = data.load("mnist")
    if options.holdout:
        dataset = dataset.hold_out(options.holdout)
    record: dict[str, Any] = {"benchmark": "frontier", "model": options.model, "epochs": options.epochs}
    record |= {"seeds": [int(seed) for seed in options.seeds.split(",")], "holdout": options.holdout}
    record |= {"environment": environment(_CPU), "methods": {}}
    for method in (METHODS[int(number)] for number in options.methods.split(",")):
        cells = record["methods"][method] = {}
        for ratio in (float(word) for word in options.compressions.split(",")):
            recipe = settings(method, options.model, options.epochs)
            recipe = replace(recipe, compression=ratio, holdout=options.holdout)
            values = [measure(method, replace(recipe, seed=seed), dataset, options.runs) for seed in record["seeds"]]
            cells[f"{ratio:g}"] = cell = over_seeds(values)
            print(f"{method:<20} {ratio:>6g}x  {cell['mean']:.2f} ± {cell['std'] or 0:.2f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.png:
        picture(record, options.png)


if __name__ == "__main__":
    main()
