"""The result of runs in one line: a report, and what `gsm prune` prints, begin with it."""

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from rich.filesize import decimal

from ..experiments.recipes import DENSE
from ..experiments.rundir import Record
from .runs import Run, lost_in_the_cut, outcome, sparse_bytes


class Answer(NamedTuple):
    """An accuracy, of what net, and what else one asks first."""

    top1: str
    net: str
    facts: list[str]

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.top1} {self.net}" + (f": {', '.join(self.facts)}" if self.facts else "")


def answer(runs: Sequence[Run]) -> Answer:
    """Return the result of finished runs that differ in the seed alone."""
    results = [run.finished() for run in runs]
    first = results[0]
    net = runs[0].net.replace("-", "_")
    if net != "pruned" or runs[0].method == DENSE:
        what = "by the dense net" if net == "pruned" else f"by the {net.replace('_', ' by ')}, retrained"
        return Answer(f"{outcome(runs, net).shown} %", what, [])
    kept = f"with {first['nonzeros']:,} of {first['prunable']:,} weights ({first['prunable'] / first['nonzeros']:.3g}x)"
    if counts := first.get("macs"):
        kept = f"with {counts['dense'] / counts['pruned']:.2f} times fewer MACs"
    return Answer(f"{outcome(runs, net).shown} %", kept, _facts(runs, results))


def _facts(runs: Sequence[Run], results: Sequence[Record]) -> list[str]:
    facts = [
        f"{title} {outcome(runs, key).shown}"
        for key, title in (("dense", "dense net"), ("base", "base net"))
        if all(key in result["top1"] for result in results)
    ]
    sizes = [size for run in runs if (size := sparse_bytes(run.path)) is not None]
    facts += [decimal(round(fmean(sizes)))] if sizes else []
    lost = lost_in_the_cut(runs)
    return [*facts, f"the cut cost {lost:.2f} points" if round(lost, 2) > 0 else "lossless cut"]
