"""What GSM's step costs beside SGD's and the published approach, and how the cost grows with the number of weights.

    python benchmarks/step.py [MODEL ...] [--repeats N] [--json FILE] [--picture FILE] [--sizes N ...]

On the parameter shapes of each model, and then on matrices of N weights in all, every optimizer steps by turns in one
run. Ratios are those of medians, to torch.optim.SGD(fused=True). `gsm bench step` shows the same.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from gsm_sgd.experiments import bench
from gsm_sgd.experiments.environment import environment
from gsm_sgd.reports.tables import costs_table

SIZES = [10**5, 316_228, 10**6, 3_162_278, 10**7, 31_622_777, 10**8]
STYLES = {  # Okabe and Ito's colours
    "SGD, fused": ("#000000", "o"),
    "GSM": ("#0072B2", "s"),
    bench.BY_TORCH: ("#009E73", "D"),
    "published approach": ("#D55E00", "^"),
}


def of_size(total: int) -> bench.Workload:
    """Return about `total` weights as four equal matrices, to see how the cost grows."""
    columns = max(1, round(math.sqrt(total / 4) / 64)) * 64
    return bench.Workload([(round(total / 4 / columns), columns)] * 4, 10)


def picture(curve: list[dict[str, Any]]) -> Figure:
    """Return milliseconds of a step against the number of weights."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, (colour, marker) in STYLES.items():
        points = [
            (point["weights"], cost["milliseconds"])
            for point in curve
            for cost in point["costs"]
            if cost["name"] == name
        ]
        axes.loglog(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.3, label=name)
    axes.set_xlabel("weights")
    axes.set_ylabel("ms for a step")
    axes.grid(alpha=0.25, which="both", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, print, and write down what was asked for."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(bench.WORKLOADS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    console = Console(width=100)
    models, curve = {}, []
    for name in options.models:
        work = bench.workload(name)
        costs = bench.measure(work, options.repeats, options.device)
        console.print(costs_table(name, work, costs))
        models[name] = {
            "parameters": sum(math.prod(shape) for shape in work.shapes),
            "compression": work.compression,
            "costs": [cost._asdict() for cost in costs],
        }
    for size in options.sizes:
        work = of_size(size)
        costs = bench.measure(work, options.repeats, options.device)
        console.print(costs_table(f"{size:.0e} weights", work, costs))
        weights = sum(math.prod(shape) for shape in work.shapes)
        curve.append({"weights": weights, "costs": [cost._asdict() for cost in costs]})
    if options.json:
        record = {"benchmark": "step", "repeats": options.repeats, "environment": environment(options.device)}
        options.json.write_text(json.dumps({**record, "models": models, "sizes": curve}, indent=1) + "\n")
    if options.picture and curve:
        picture(curve).savefig(options.picture, dpi=150)


if __name__ == "__main__":
    main()
