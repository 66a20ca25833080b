"""Sections of a report on many runs: accuracy against compression and size, and the methods' curves together."""

from collections.abc import Sequence

from . import figures
from .blocks import Block, Group, Table, listed
from .figures import Line, Panel
from .frontier import Series, frontier_figure, ratios_of, series_of, verdicts
from .runs import Run

_PANELS = 4  # of curves, with the most common ratios


def families(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return groups of finished runs whose accuracies can be compared, by net and data, if there is more than one."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        recipe = group.runs[0].recipe
        held_out = f", {recipe['holdout']:,} images held out" if recipe.get("holdout") else ""
        found.setdefault(f"{recipe.get('model') or recipe['recipe']} on {recipe.get('dataset')}{held_out}", []).append(
            group
        )
    return {title: of_one for title, of_one in found.items() if len(of_one) > 1}


def frontier(groups: Sequence[Group]) -> list[Block]:
    """Return accuracy against compression, and against bytes where sparse files are there."""
    series = series_of([group.runs for group in groups])
    ratios = ratios_of(series)
    if not ratios:
        return []
    rows = [[one.label, *(cell.shown if (cell := one.at(ratio)) else "" for ratio in ratios)] for one in series]
    seeds = sorted({seed for group in groups for seed in group.seeds})
    caption = f"Top-1 in % by method and compression ratio, mean ± standard deviation over the seeds {listed(seeds)}"
    table = Table(caption, ["method", *(f"{ratio:g}x" for ratio in ratios)], rows, sortable=True)
    description = "Top-1 error by compression ratio, a line for each method: the numbers are in the table below."
    heading = "Accuracy against compression"
    blocks = [Block(heading, verdicts(series), frontier_figure(series), description, [table])]
    sizes = [[one.label, *(_kib(one, ratio) for ratio in ratios)] for one in series]
    if any(cell for row in sizes for cell in row[1:]):
        of_files = Table("KiB of the sparse file, mean over the seeds", table.columns, sizes, sortable=True)
        description = "Top-1 error by the size of the sparse file, a line for each method."
        blocks.append(
            Block("Accuracy against size", (), frontier_figure(series, by_size=True), description, [of_files])
        )
    return blocks


def _kib(series: Series, ratio: float) -> str:
    size = series.kib_at(ratio)
    return "" if size is None else f"{size:,.1f}"


def curves(groups: Sequence[Group]) -> list[Block]:
    """Return the error by epoch of the methods' training, a figure for each ratio."""
    series = series_of([group.runs for group in groups])
    blocks = []
    for ratio in ratios_of(series)[:_PANELS]:
        lines = []
        for index, one in enumerate(series):
            runs = one.runs.get(ratio) or one.runs.get(1.0, [])
            colour, dash = figures.line_style(index)
            if any(seeds := [_errors(run) for run in runs]):
                lines.append(Line(one.label, colour, dash, seeds))
        if lines:
            description = f"Top-1 error by epoch at {ratio:g}x, a line for each method."
            panel = Panel("", "top-1 error, %", lines)
            blocks.append(Block(f"Top-1 error by epoch at {ratio:g}x", (), figures.curves([panel]), description))
    return blocks


def _errors(run: Run) -> list[tuple[int, float]]:
    return [(record["epoch"], 100 - record["top1"]) for record in run.metrics if record["stage"] == run.method]
