"""Accuracy against compression: runs of several methods and ratios as one line for each method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure
from rich.table import Table

from ..experiments import UsageError
from ..experiments.recipes import DENSE, method_title
from ..experiments.rundir import Record
from . import figures
from .rows import as_csv
from .runs import Outcome, Run, outcome, read_inference, sparse_bytes

_SETTING = 40  # characters of a setting in a label


@dataclass(frozen=True)
class Series:
    """Finished runs of one method, by compression ratio."""

    label: str
    method: str
    runs: dict[float, list[Run]]

    def at(self, ratio: float) -> Outcome | None:
        """Return the accuracies of the pruned nets at a ratio, if there are any; the dense net's at every ratio."""
        runs = self.runs.get(1.0 if self.method == DENSE else ratio)
        return outcome(runs, "pruned") if runs else None

    def mean_at(self, ratio: float, quantity: str) -> float | None:
        """Return the mean of one of `QUANTITIES` at a ratio, of the runs that have it."""
        found = [QUANTITIES[quantity](run) for run in self.runs.get(ratio, ())]
        known = [value for value in found if value is not None]
        return fmean(known) if known else None


def _kib(run: Run) -> float | None:
    size = sparse_bytes(run.path)
    return None if size is None else size / 1024


def _macs(run: Run) -> float | None:
    counts = run.finished().get("macs")
    return None if counts is None else float(counts["pruned"])


def _milliseconds(run: Run) -> float | None:
    """Return what the fastest form of the pruned net takes."""
    try:
        rows = read_inference(run.path) or []
    except UsageError:
        return None  # the section on speed says so
    return min((row["milliseconds"] for row in rows if (row["batch"], row["threads"]) == (1, 1)), default=None)


QUANTITIES: dict[str, Callable[[Run], float | None]] = {
    "compression ratio": lambda run: float(run.recipe["compression"]),
    "KiB of the sparse file": _kib,
    "MACs": _macs,
    "milliseconds, batch 1, one thread": _milliseconds,
}
"""What accuracy stands against, as runs have it."""


def series_of(groups: Sequence[Sequence[Run]]) -> list[Series]:
    """Return groups of finished runs that differ in the seed alone as series: one ratio after the other, else the same.

    Where there is one group for each method and ratio, all of a method are one series: tuned settings may be other ones
    at each ratio.
    """
    groups = [runs for runs in groups if "pruned" in runs[0].finished()["top1"]]  # others only trained a ticket again
    places = [(runs[0].method, runs[0].recipe["compression"]) for runs in groups]
    by_method = len(set(places)) == len(places)
    found: dict[str, dict[float, list[Run]]] = {}
    settings = {}
    for runs in groups:
        own = {**runs[0].settings, "compression": None}
        key = runs[0].method if by_method else repr(sorted(own.items()))
        settings[key] = own
        found.setdefault(key, {}).setdefault(float(runs[0].recipe["compression"]), []).extend(runs)
    made = [(key, next(iter(runs.values()))[0].method, runs) for key, runs in found.items()]
    labelled = []
    for key, method, by_ratio in made:
        alike = [settings[other] for other, its, _ in made if its == method]
        differing = [one for one, value in settings[key].items() if any(other.get(one) != value for other in alike)]
        said = [] if by_method else [f"{one} {settings[key][one]}"[:_SETTING] for one in differing]
        labelled.append(Series(", ".join([method_title(method), *said]), method, dict(sorted(by_ratio.items()))))
    return labelled


def ratios_of(series: Sequence[Series]) -> list[float]:
    """Return the compression ratios at which something is pruned."""
    return sorted({ratio for one in series if one.method != DENSE for ratio in one.runs})


def frontier_table(series: Sequence[Series], title: str, caption: str) -> Table:
    """Return accuracies, mean and deviation over the seeds, by method and ratio."""
    ratios = ratios_of(series)
    table = Table("method", title=title, caption=caption)
    for ratio in ratios:
        table.add_column(f"{ratio:.4g}x", justify="right")
    for one in series:
        found = [one.at(ratio) for ratio in ratios]
        table.add_row(one.label, *("" if cell is None else cell.shown for cell in found))
    return table


def verdicts(series: Sequence[Series]) -> list[str]:
    """Return a sentence for each ratio on who leads, and whether by more than the deviation over the seeds."""
    texts = []
    for ratio in ratios_of(series):
        found = [(one.label, cell) for one in series if one.method != DENSE and (cell := one.at(ratio)) is not None]
        found.sort(key=lambda pair: -pair[1].mean)
        if len(found) < 2:
            continue
        (first, best), (second, next_best) = found[:2]
        lead, deviations = best.mean - next_best.mean, [best.std, next_best.std]
        ahead = f"{first} {best.shown} against {second} {next_best.shown}"
        known = [one for one in deviations if one is not None]
        if len(known) < len(deviations):
            texts.append(f"At {ratio:.4g}x one seed tells no lead: {ahead}.")
        elif lead > max(known):
            texts.append(f"At {ratio:.4g}x {first} leads by {lead:.2f}, more than one deviation: {ahead}.")
        else:
            texts.append(f"At {ratio:.4g}x nobody leads by more than one deviation: {ahead}.")
    return texts


def frontier_figure(series: Sequence[Series], quantity: str = "compression ratio") -> Figure:
    """Return top-1 errors against one of `QUANTITIES`, with the dense net's."""
    lines, dense = [], None
    for one in series:
        if one.method == DENSE:
            found = one.at(1.0)
            dense = None if found is None else figures.Points(one.label, [1.0], [100 - found.mean], [0.0])
            continue
        places = {ratio: one.mean_at(ratio, quantity) for ratio in one.runs}
        cells = [(place, one.at(ratio)) for ratio, place in places.items() if place is not None]
        points = sorted((place, 100 - cell.mean, cell.std or 0.0) for place, cell in cells if cell is not None)
        if points:
            lines.append(figures.Points(one.label, *(list(column) for column in zip(*points, strict=True))))
    return figures.frontier(lines, dense, quantity)


def best_of(series: Sequence[Series], most: int) -> list[Series]:
    """Return the series with the best accuracies at the ratios that they have, at most so many, in their order."""
    ranks: dict[str, list[int]] = {}
    for ratio in ratios_of(series):
        found = [(one.label, cell.mean) for one in series if (cell := one.at(ratio)) is not None]
        for rank, (label, _) in enumerate(sorted(found, key=lambda pair: -pair[1])):
            ranks.setdefault(label, []).append(rank)
    best = sorted(series, key=lambda one: fmean(ranks.get(one.label, [len(series)])))[:most]
    return [one for one in series if one in best]


def frontier_csv(series: Sequence[Series]) -> str:
    """Return a line for each run: method, ratio, seed, accuracy, weights kept, bytes of the sparse file, seconds."""
    return as_csv([_line(one.method, ratio, run) for one in series for ratio, runs in one.runs.items() for run in runs])


def _line(method: str, ratio: float, run: Run) -> Record:
    result = run.finished()
    return {
        **{"method": method, "compression": f"{ratio:g}", "seed": result["seed"], "top1": result["top1"]["pruned"]},
        **{"kept": result["nonzeros"], "prunable": result["prunable"], "bytes": sparse_bytes(run.path)},
        **{"seconds": round(sum(result["seconds"].values()), 1), "folder": run.path.name},
    }
