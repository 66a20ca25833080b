"""Accuracy against compression: runs of several methods and ratios as one line for each method."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from rich.table import Table

from ..experiments.recipes import DENSE, method_title
from . import figures
from .runs import Outcome, Run, outcome

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

    def kib_at(self, ratio: float) -> float | None:
        """Return the mean size of the nets' sparse files in KiB, if there are any."""
        sizes = [size for run in self.runs.get(ratio, ()) if (size := sparse_bytes(run.path)) is not None]
        return fmean(sizes) / 1024 if sizes else None


def sparse_bytes(folder: Path) -> int | None:
    """Return the size of a run's sparse file, if it has been exported."""
    path = folder / "pruned.sparse.safetensors.xz"
    return path.stat().st_size if path.is_file() else None


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
        table.add_column(f"{ratio:g}x", justify="right")
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
            texts.append(f"At {ratio:g}x one seed tells no lead: {ahead}.")
        elif lead > max(known):
            texts.append(f"At {ratio:g}x {first} leads by {lead:.2f}, more than one deviation: {ahead}.")
        else:
            texts.append(f"At {ratio:g}x nobody leads by more than one deviation: {ahead}.")
    return texts


def frontier_figure(series: Sequence[Series], by_size: bool = False) -> Figure:
    """Return top-1 errors against compression, or the size of the sparse files, with the dense net's."""
    lines, dense = [], None
    for one in series:
        if one.method == DENSE:
            found = one.at(1.0)
            dense = None if found is None else figures.Points(one.label, [1.0], [100 - found.mean], [0.0])
            continue
        places = {ratio: one.kib_at(ratio) if by_size else ratio for ratio in one.runs}
        cells = [(place, one.at(ratio)) for ratio, place in places.items() if place is not None]
        points = [(place, 100 - cell.mean, cell.std or 0.0) for place, cell in cells if cell is not None]
        if points:
            lines.append(figures.Points(one.label, *(list(column) for column in zip(*points, strict=True))))
    return figures.frontier(lines, dense, "KiB of the sparse file" if by_size else "compression ratio")


def frontier_csv(series: Sequence[Series]) -> str:
    """Return a line for each run: method, ratio, seed, accuracy, weights kept, bytes of the sparse file, seconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["method", "compression", "seed", "top1", "kept", "prunable", "bytes", "seconds", "folder"])
    for one in series:
        for ratio, runs in one.runs.items():
            for run in runs:
                result = run.finished()
                size, seconds = sparse_bytes(run.path), round(sum(result["seconds"].values()), 1)
                counts = [result["nonzeros"], result["prunable"], "" if size is None else size]
                row = [one.method, f"{ratio:g}", result["seed"], result["top1"]["pruned"], *counts]
                writer.writerow([*row, seconds, run.path.name])
    return stream.getvalue()
