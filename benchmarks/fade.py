"""What the fade before the cut costs, and what training on with the mask brings back, by the metrics of finished runs.

    python benchmarks/fade.py RUN... [--json FILE]

Top-1 in percent, means over the runs of a compression ratio and a number of epochs: of the last three evaluations
before the fade, of what a cut would have left then, the lowest in the fade, before the cut, and in the end.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gsm_sgd.experiments.environment import environment
from gsm_sgd.reports.runs import Run, over_seeds, read_run


def phases(run: Run) -> dict[str, float]:
    """Return the accuracies of a run's phases."""
    records = {record["epoch"]: record for record in run.metrics if record["stage"] == "gsm"}
    epochs = run.recipe["gsm"]["epochs"]
    begins = math.floor(run.cut_epoch - run.recipe["fade"] * epochs)  # the last evaluation before the fade
    before = [records[epoch] for epoch in range(begins - 2, begins + 1)]
    return {
        "before the fade": fmean(record["top1"] for record in before),
        "if cut then": fmean(record["cut_top1"] for record in before),
        "lowest in the fade": min(records[epoch]["top1"] for epoch in range(begins + 1, run.cut_epoch + 1)),
        "before the cut": records[run.cut_epoch]["top1"],
        "in the end": records[epochs]["top1"],
    }


def main() -> None:
    """Print the phases of runs, and write them down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    commits = set()
    for path in options.runs:
        run = read_run(path)
        commits |= {process["commit"] for process in run.processes}
        if run.result is None or not run.recipe.get("fade"):
            parser.error(f"{path} is not a finished run with a fade")
        name = f"{run.recipe['model']} {run.recipe['compression']:g}x, {run.recipe['gsm']['epochs']} epochs"
        for phase, value in phases(run).items():
            figures[name][phase].append(value)
    rows: dict[str, Any] = {}
    for name, row in figures.items():
        rows[name] = {phase: over_seeds(values) for phase, values in row.items()}
        print(name, *(f"{phase} {cell['mean']:.2f}" for phase, cell in rows[name].items()), sep="  ")
    if options.json:
        record = {"benchmark": "fade", "environment": environment(torch.device("cpu")), "runs": sorted(commits)}
        options.json.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
