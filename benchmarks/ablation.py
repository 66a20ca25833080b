"""What each part of the preset `fast` is worth: accuracy with one thing changed at a time.

    python benchmarks/ablation.py [--model M] [--compression C] [--epochs N] [--seeds 0,1,2] [--json FILE]

Accuracy is on 5,000 held-out training images, never on the test set. What is finished is found again in --runs, so an
interrupted run goes on.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from frontier import over_seeds
from gsm_sgd.experiments import data, prune
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.observers import ProgressBars
from gsm_sgd.experiments.recipes import Recipe, find_recipe
from gsm_sgd.experiments.rundir import RunFolder
from gsm_sgd.experiments.splits import Dataset
from gsm_sgd.rule import EagerRule, Kernel, Part

_FLOOR = 0.002  # least density of a layer
_Importances = tuple[Tensor, list[Tensor], list[int]]


class Averaged(EagerRule):
    """Importance as a moving average over ten steps."""

    _mean: Tensor | None = None

    def _importances(self, parts: Sequence[Part]) -> _Importances:
        whole, views, ends = super()._importances(parts)
        self._mean = whole.clone() if self._mean is None else self._mean.lerp_(whole, 0.1)
        return whole.copy_(self._mean), views, ends


class PerLayer(EagerRule):
    """Importance as a multiple of its root mean square in the layer."""

    def _importances(self, parts: Sequence[Part]) -> _Importances:
        whole, views, ends = super()._importances(parts)
        for start, end in pairwise(ends):
            whole[start:end].div_(whole[start:end].square().mean().sqrt().clamp_min(1e-30))
        return whole, views, ends


class Floor(EagerRule):
    """Importance, but some weights of each layer are active whatever theirs is."""

    def _importances(self, parts: Sequence[Part]) -> _Importances:
        whole, views, ends = super()._importances(parts)
        top = whole.amax()
        for start, end in pairwise(ends):
            layer = whole[start:end]
            layer[layer.topk(max(1, round(_FLOOR * len(layer)))).indices] += top
        return whole, views, ends


class Magnitude(EagerRule):
    """|W| in place of |W G|."""

    def _importances(self, parts: Sequence[Part]) -> _Importances:
        whole, views, ends = super()._importances(parts)
        for view, weight in zip(views, [param for part in parts for param in part.params], strict=True):
            view.copy_(weight)
        whole[: ends[-1]].abs_()
        return whole, views, ends


def _gsm(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, gsm=replace(recipe.gsm, **changes))


VARIANTS: dict[str, tuple[Callable[[Recipe], Recipe], type[EagerRule]]] = {
    "fast": (lambda recipe: recipe, EagerRule),
    "passive decay = weight decay": (lambda recipe: replace(recipe, passive_decay=None), EagerRule),
    "compression constant": (lambda recipe: replace(recipe, ramp=0.0), EagerRule),
    "cut at the end": (lambda recipe: replace(recipe, cut=1.0), EagerRule),
    "no fade": (lambda recipe: replace(recipe, fade=0.0, cut=0.6), EagerRule),
    "no label smoothing": (_gsm(label_smoothing=0.0), EagerRule),
    "batches of 256": (lambda recipe: replace(recipe, batch_size=256), EagerRule),
    "Nesterov": (_gsm(nesterov=True), EagerRule),
    "momentum .9": (_gsm(momentum=0.9), EagerRule),
    "cosine from the start": (_gsm(cosine=0.0), EagerRule),
    "importance averaged": (lambda recipe: recipe, Averaged),
    "importance by layer": (lambda recipe: recipe, PerLayer),
    "floor of 0.2 % a layer": (lambda recipe: recipe, Floor),
    "|w| as importance": (lambda recipe: recipe, Magnitude),
}


def measure(name: str, recipe: Recipe, dataset: Dataset, runs: Path) -> dict[str, float]:
    """Return the accuracies of one run, in percent, from its folder if it is there."""
    change, rule = VARIANTS[name]
    recipe = change(recipe)
    label = "".join(letter if letter.isalnum() else "-" for letter in name)
    path = runs / f"{recipe.model}-x{recipe.compression:g}-e{recipe.gsm.epochs}-{label}-s{recipe.seed}"
    module: Any = prune
    make = module.gsm

    def with_rule(*arguments: Any) -> Any:
        optimizer = make(*arguments)
        optimizer._rule = rule(Kernel(None, None))
        return optimizer

    module.gsm = with_rule
    try:
        with RunFolder(path, recipe, checkpoint_seconds=1e9) as folder:
            if not folder.finished:
                prune.prune(prune.Job(recipe, dataset, folder, ProgressBars(Console(quiet=True)), torch.device("cpu")))
    finally:
        module.gsm = make
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
