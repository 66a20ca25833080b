"""One-shot magnitude pruning of the base nets of runs, beside what GSM made of them.

    python benchmarks/one_shot.py RUN... [--threads N] [--json FILE]

The base net of each run is cut to the run's compression ratio by magnitude, all layers together, and measured; then it
is trained on with the mask, for as many epochs as GSM took and with its learning rates. What is finished is found again
in each run's folder, in RUN/one-shot, so an interrupted run goes on. That needs the base net only, so it may run beside
`gsm prune`; the figures need the finished run. CIFAR-10 is looked for in $GSM_DATA.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import torch
from rich.console import Console

from frontier import over_seeds
from gsm_sgd import magnitude_masks, prunable_parameters
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.loop import evaluate
from gsm_sgd.experiments.observers import ProgressBars
from gsm_sgd.experiments.prune import Job, plain_sgd, train_stage
from gsm_sgd.experiments.recipes import Recipe
from gsm_sgd.experiments.rundir import RunFolder, read_weights
from gsm_sgd.export.rebuild import build, load_data
from gsm_sgd.reports.runs import read_run

CPU = torch.device("cpu")


def one_shot(path: Path, recipe: Recipe) -> dict[str, float]:
    """Return the accuracies, in percent, of a run's base net after the cut and after training on with the mask."""
    with RunFolder(path / "one-shot", recipe) as folder:
        if not folder.finished:
            dataset = load_data(recipe, None)
            model = build(recipe, read_weights(path / "base.safetensors"), dataset.classes)
            prunable = prunable_parameters(model)
            masks = magnitude_masks(prunable, compression=recipe.compression)
            masks.apply_(prunable)
            top1 = {"one_shot": evaluate(model, dataset.test)}
            with ProgressBars(Console(stderr=True)) as bars:
                job = Job(recipe, dataset, folder, bars, CPU)
                train_stage(job, "retrained", model, recipe.gsm, plain_sgd(model, recipe.gsm), masks)
            folder.finish({"top1": {**top1, "retrained": evaluate(model, dataset.test)}})
        result: dict[str, dict[str, float]] = json.loads((folder.path / "result.json").read_text())
    return result["top1"]


def main() -> None:
    """Run what is not there yet, print means over the runs of a compression ratio, and write them down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of `gsm prune` runs with a base net")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    for path in options.runs:
        if not (path / "base.safetensors").exists():
            parser.error(f"{path} has no base net yet")
    cut = {path: one_shot(path, Recipe.from_dict(read_run(path).recipe)) for path in options.runs}

    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in options.runs:
        run = read_run(path)
        if run.result is None:
            parser.error(f"{path} is not over yet: go on with its `gsm prune`, then give this command again")
        recipe = Recipe.from_dict(run.recipe)
        title = f"{recipe.model} {recipe.compression:g}x, {recipe.base.epochs} + {recipe.gsm.epochs} epochs"
        for name, value in (run.result["top1"] | cut[path]).items():
            figures[title][name].append(value)
    cells = {key: {name: over_seeds(values) for name, values in row.items()} for key, row in figures.items()}
    for key, row in cells.items():
        print(key, *(f"{name} {cell['mean']:.2f} ± {cell['std'] or 0:.2f}" for name, cell in row.items()), sep="  ")
    if options.json:
        record = {"benchmark": "one-shot", "environment": environment(CPU), "rows": cells}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
