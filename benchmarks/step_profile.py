"""Where the time of a compiled GSM step goes: its compiled passes, and what lies between them.

    python benchmarks/step_profile.py [MODEL ...] [--repeats N] [--json FILE]

Shares are of torch.optim.SGD(fused=True), interleaved with it.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from gsm_sgd import GSM
from gsm_sgd.experiments import bench
from gsm_sgd.experiments.environment import environment
from gsm_sgd.optim import sparse
from gsm_sgd.selection.streamed import Passes

TITLES = {
    "whole": "pass: compute and store the scores",
    "sample": "pass: sample",
    "rows": "pass: count",
    "update": "pass: update",
    "threshold": "find the threshold, its passes included",
    "step": "the whole step",
}


def profile(name: str, repeats: int) -> dict[str, float]:
    """Return for each part of a step its share of an SGD step; medians over steps."""
    work = bench.workload(name)
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape) * 0.05) for shape in work.shapes]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    settings: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
    optimizer = GSM(params, compression=work.compression, compiled=True, **settings)
    sgd = torch.optim.SGD(twins, fused=True, **settings)
    grads = [[torch.randn_like(param) * 0.01 * 1.1**number for param in params] for number in range(3)]

    spent: dict[str, float] = defaultdict(float)  # in this step

    def timed(title: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **options)
            spent[title] += time.perf_counter() - started
            return result

        return call

    engine: Any = optimizer
    engine._passes = Passes(*(timed(key, function) for key, function in engine._passes._asdict().items()))
    engine._update_streamed = timed("update", engine._update_streamed)
    module: Any = sparse
    find_threshold = module.find_threshold
    module.find_threshold = timed("threshold", find_threshold)
    steps: list[dict[str, float]] = []
    for turn in range(-4, repeats):
        for param, twin, grad in zip(params, twins, grads[turn % 3], strict=True):
            param.grad = twin.grad = grad
        spent.clear()
        timed("step", optimizer.step)()
        timed("sgd", sgd.step)()
        if turn >= 0:
            steps.append(dict(spent))
    module.find_threshold = find_threshold
    baseline = median(step["sgd"] for step in steps)
    return {
        title: round(median(step.get(key, 0.0) for step in steps) / baseline, 3)
        for key, title in TITLES.items()
        if any(key in step for step in steps)
    }


def main() -> None:
    """Print each model's profile, and write it down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=["lenet300", "resnet56", "resnet50"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    profiles = {name: profile(name, options.repeats) for name in options.models}
    for name, parts in profiles.items():
        print(f"{name}: share of a step of torch.optim.SGD(fused=True)")
        for title, share in parts.items():
            print(f"  {title:<42} {share:6.2f}")
    if options.json:
        record = {"benchmark": "step_profile", "repeats": options.repeats}
        record |= {"environment": environment(torch.device("cpu")), "profiles": profiles}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
