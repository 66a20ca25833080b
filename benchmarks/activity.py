"""How far GSM's activity spreads beyond the Q weights that are kept, and what the cut costs for it.

For the GSM net of each finished run, before the cut: an epoch of selections without updates counts the weights that
are active at all, and the share of activity that falls on weights the cut will remove; then the accuracy that is left
when more than Q weights are kept. Passive weights alone have shrunk to nothing: what the cut destroys is weights that
some batches select and others do not.

    python benchmarks/activity.py RUN... [--json FILE]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from gsm_sgd import magnitude_masks, prunable_parameters, select_top
from gsm_sgd.budget import kept_weights
from gsm_sgd.experiments import mnist, models
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.loop import evaluate
from gsm_sgd.experiments.rundir import read_weights
from gsm_sgd.experiments.splits import Dataset
from gsm_sgd.reports.runs import read_run
from gsm_sgd.scores import taylor


def activity(path: Path, dataset: Dataset) -> dict[str, Any]:
    """Return what one run's GSM net shows."""
    recipe = read_run(path).recipe
    trained = read_weights(path / "gsm.safetensors")
    model = models.build(recipe["model"], recipe["seed"])
    model.load_state_dict(trained)
    weights = prunable_parameters(model)
    total = sum(weight.numel() for weight in weights.values())
    kept = kept_weights(total, recipe["compression"])

    times_active = [torch.zeros(weight.numel(), dtype=torch.int64) for weight in weights.values()]
    for images, labels in dataset.train.shuffled(recipe["batch_size"], recipe["seed"], 0):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        scores = [taylor(weight.detach(), weight.grad, {}) for weight in weights.values() if weight.grad is not None]
        for count, active in zip(times_active, select_top(scores, kept), strict=True):
            count += active.view(-1)
    masks = magnitude_masks(weights, num_kept=kept)
    cut_away = torch.cat([~mask.reshape(-1) for mask in masks.values()])
    times = torch.cat(times_active)

    accuracy = {}
    for factor in (1.0, 1.1, 1.25, 1.5, 2.0):
        model.load_state_dict(trained)
        magnitude_masks(weights, num_kept=round(factor * kept)).apply_(model)
        accuracy[f"{factor:g} Q"] = evaluate(model, dataset.test)
    return {
        "run": path.name,
        "Q": kept,
        "active at least once in an epoch": int((times > 0).sum()),
        "activity on weights that are cut, %": round(100 * (times[cut_away].sum() / times.sum()).item(), 2),
        "top-1 when kept": accuracy,
    }


def main() -> None:
    """Print what each run shows, and write it down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    dataset = mnist.load()
    rows = [activity(path, dataset) for path in options.runs]
    for row in rows:
        print(json.dumps(row))
    if options.json:
        record = {"benchmark": "activity", "environment": environment(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
