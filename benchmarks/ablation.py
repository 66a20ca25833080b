"""What each part of the preset `fast` is worth: accuracy with one thing changed at a time.

    python benchmarks/ablation.py [--model M] [--compression C] [--epochs N] [--seeds 0,1,2] [--json FILE]

Accuracy is on 5,000 held-out training images, never on the test set. What is finished is found again in --runs, so an
interrupted run goes on.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from gsm_sgd.experiments import data
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.observers import ProgressBars
from gsm_sgd.experiments.prune import Job, prune
from gsm_sgd.experiments.recipes import Recipe, find_recipe
from gsm_sgd.experiments.rundir import RunFolder
from gsm_sgd.experiments.splits import Dataset
from gsm_sgd.reports.runs import over_seeds
from gsm_sgd.scores import SCORES, taylor

_FLOOR = 0.002  # least density of a layer
_LARGE = 1e6


class Averaged:
    """|w g| as a moving average over ten steps."""

    def __init__(self) -> None:
        self._means: dict[int, Tensor] = {}

    def __call__(self, weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
        """Return the average so far."""
        scores = taylor(weight, grad, state)
        return self._means.setdefault(state["seed"], scores.clone()).lerp_(scores, 0.1)


def by_layer(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w g| as a multiple of its root mean square in the layer."""
    scores = taylor(weight, grad, state)
    return scores / scores.square().mean().sqrt().clamp_min(1e-30)


def with_floor(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w g|, but so large for some weights of each layer that they are active in any case."""
    scores = taylor(weight, grad, state)
    largest = scores.flatten().topk(max(1, round(_FLOOR * scores.numel()))).indices
    scores.view(-1)[largest] += _LARGE
    return scores


SCORES |= {"by_layer": by_layer, "with_floor": with_floor}


def _gsm(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, gsm=replace(recipe.gsm, **changes))


def _score(name: str) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, score=name)


VARIANTS: dict[str, Callable[[Recipe], Recipe]] = {
    "fast": lambda recipe: recipe,
    "passive decay = weight decay": lambda recipe: replace(recipe, passive_decay=None),
    "density constant": lambda recipe: replace(recipe, ramp=0.0),
    "cut at the end": lambda recipe: replace(recipe, cut=1.0),
    "no fade": lambda recipe: replace(recipe, fade=0.0, cut=0.6),
    "no label smoothing": _gsm(label_smoothing=0.0),
    "batches of 256": lambda recipe: replace(recipe, batch_size=256),
    "Nesterov": _gsm(nesterov=True),
    "momentum .9": _gsm(momentum=0.9),
    "cosine from the start": _gsm(cosine=0.0),
    "score averaged": _score("averaged"),
    "score by layer": _score("by_layer"),
    "floor of 0.2 % a layer": _score("with_floor"),
    "|w| as score": _score("magnitude"),
    "random score": _score("random"),
}


def measure(name: str, recipe: Recipe, dataset: Dataset, runs: Path) -> dict[str, float]:
    """Return the accuracies of one run, in percent, from its folder if it is there."""
    recipe = VARIANTS[name](recipe)
    SCORES["averaged"] = Averaged()  # of this run
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    path = runs / f"{recipe.model}-x{recipe.compression:g}-e{recipe.gsm.epochs}-{label}-s{recipe.seed}"
    with RunFolder(path, recipe, checkpoint_seconds=1e9) as folder:
        if not folder.finished:
            prune(Job(recipe, dataset, folder, ProgressBars(Console(quiet=True)), torch.device("cpu")))
    result: dict[str, dict[str, float]] = json.loads((path / "result.json").read_text())
    return result["top1"]


def main() -> None:
    """Run what is not there yet, print means, and write them down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="lenet300")
    parser.add_argument("--compression", type=float, default=60.0)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", default=",".join(str(number) for number in range(len(VARIANTS))))
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    holdout = 5_000
    dataset = data.load("mnist").hold_out(holdout)
    recipe = find_recipe(options.model)
    recipe = replace(recipe, gsm=replace(recipe.gsm, epochs=options.epochs), compression=options.compression)
    record: dict[str, Any] = {"benchmark": "ablation", "model": options.model, "compression": options.compression}
    record |= {"epochs": options.epochs, "seeds": [int(seed) for seed in options.seeds.split(",")]}
    record |= {"holdout": holdout, "environment": environment(torch.device("cpu")), "variants": {}}
    names = list(VARIANTS)
    for name in (names[int(number)] for number in options.variants.split(",")):
        seeded = [replace(recipe, holdout=holdout, seed=seed) for seed in record["seeds"]]
        results = [measure(name, one, dataset, options.runs) for one in seeded]
        keys = ("gsm_before_cut", "gsm_after_cut", "pruned")
        cell = {key: over_seeds([result[key] for result in results]) for key in keys}
        record["variants"][name] = cell
        shown = "  ".join(f"{cell[key]['mean']:.2f} ± {cell[key]['std'] or 0:.2f}" for key in cell)
        print(f"{name:<30} before, after the cut, in the end: {shown}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
