"""Sections of a report on many runs: accuracy against compression and size, and the methods' curves together."""

from collections.abc import Sequence

from . import figures
from .blocks import Block, Group, Table, listed
from .figures import Line, Panel
from .frontier import QUANTITIES, Series, best_of, frontier_figure, ratios_of, series_of, verdicts
from .runs import Run

_PANELS = 4  # of curves, with the most common ratios
_LINES = 10  # of a figure: a legend of more leaves no room for it


def families(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Return groups of finished runs whose accuracies can be compared, by net and data, if there is more than one."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        recipe = group.runs[0].recipe
        held_out = f", {recipe['holdout']:,} images held out" if recipe.get("holdout") else ""
        of = ", by channels" if recipe.get("pattern") == "channel" else ""  # whose ratio is of MACs
        title = f"{recipe.get('model') or recipe['recipe']} on {recipe.get('dataset')}{of}{held_out}"
        found.setdefault(title, []).append(group)
    return {title: of_one for title, of_one in found.items() if len(of_one) > 1}


def leaders(groups: Sequence[Group]) -> list[str]:
    """Return who leads at each ratio, in a sentence each."""
    return verdicts(series_of([group.runs for group in groups]))


def frontier(groups: Sequence[Group]) -> list[Block]:
    """Return accuracy against compression, and against bytes, MACs and milliseconds where these are known."""
    series = series_of([group.runs for group in groups])
    ratios = ratios_of(series)
    if not ratios:
        return []
    rows = [[one.label, *(cell.shown if (cell := one.at(ratio)) else "" for ratio in ratios)] for one in series]
    seeds = sorted({seed for group in groups for seed in group.seeds})
    caption = f"Top-1 in % by method and compression ratio, mean ± standard deviation over the seeds {listed(seeds)}"
    table = Table(caption, ["method", *(f"{ratio:.4g}x" for ratio in ratios)], rows, sortable=True)
    drawn = best_of(series, _LINES)
    fewer = len(drawn) < len(series)
    texts = [f"The figures show the {len(drawn)} best of {len(series)} settings, the table all."] if fewer else []
    blocks = [_against("compression ratio", drawn, texts, table)]
    for quantity in [quantity for quantity in QUANTITIES if quantity != "compression ratio"]:
        cells = [[one.label, *(_shown(one.mean_at(ratio, quantity)) for ratio in ratios)] for one in series]
        if any(cell for row in cells for cell in row[1:]):
            of_it = Table(f"{quantity}, mean over the seeds", table.columns, cells, sortable=True, folded=True)
            blocks.append(_against(quantity, drawn, (), of_it))
    return blocks


def _against(quantity: str, series: Sequence[Series], texts: Sequence[str], table: Table) -> Block:
    description = f"Top-1 error against {quantity}, a line for each method: the numbers are in the table below."
    return Block(f"Accuracy against {quantity}", texts, frontier_figure(series, quantity), description, [table])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{float(f'{value:.3g}'):,g}"


def curves(groups: Sequence[Group]) -> list[Block]:
    """Return the error by epoch of the methods' training, a figure for each ratio."""
    series = best_of(series_of([group.runs for group in groups]), _LINES)
    blocks = []
    for ratio in ratios_of(series)[:_PANELS]:
        lines = []
        for index, one in enumerate(series):
            runs = one.runs.get(ratio) or one.runs.get(1.0, [])
            colour, dash = figures.line_style(index)
            if any(seeds := [_errors(run) for run in runs]):
                lines.append(Line(one.label, colour, dash, seeds))
        if lines:
            description = f"Top-1 error by epoch at {ratio:.4g}x, a line for each method."
            panel = Panel("", "top-1 error, %", lines)
            blocks.append(Block(f"Top-1 error by epoch at {ratio:.4g}x", (), figures.curves([panel]), description))
    return blocks


def _errors(run: Run) -> list[tuple[int, float]]:
    return [(record["epoch"], 100 - record["top1"]) for record in run.metrics if record["stage"] == run.method]
