"""Sections of a report on accuracy: results beside the paper's, and the curves of training."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..experiments.recipes import OURS, method_title
from . import figures
from .blocks import Block, Group, Table, listed
from .figures import Line, Panel, Row
from .runs import Outcome, outcomes
from .tables import cut_line, empty_layers_of

_MANY = 6  # groups of runs
_DRAWN = 500  # epochs of a stage; a screen shows no more
_COLOURS = {"base": "ink", "ticket_gsm": "green", "ticket_magnitude": "orange"}  # blue: of GSM training
_STAGES = {
    "base": Line("base net", "ink", "-", []),
    "gsm": Line("GSM", "blue", "-", []),
    "ticket-gsm": Line("ticket by GSM", "green", "--", []),
    "ticket-magnitude": Line("ticket by magnitude", "orange", ":", []),
}


def comparison(groups: Sequence[Group]) -> Block:
    """Return all groups side by side."""
    rows, marks = [], []
    for group in groups:
        found = {outcome.key: outcome for outcome in outcomes(group.runs)}
        # a run that only retrained a ticket has no pruned net
        last = next(found[key] for key in ("pruned", "gsm_after_cut", *found) if key in found)
        keys = (("base",), ("gsm_before_cut", "before_cut"), ("gsm_after_cut", "after_cut"), ("dense",))
        shown = [next((found[key].shown for key in either if key in found), "") for either in keys]
        pruned = last.shown if last.key in ("pruned", "gsm_after_cut") else f"ticket {last.shown}"
        first = group.results[0]
        kept = f"{first['nonzeros']:,} of {first['prunable']:,}"
        seconds = fmean(sum(result["seconds"].values()) for result in group.results)
        cost = [f"{sum(first['epochs'].values())}", f"{seconds:,.0f}"]
        rows.append(
            [group.title, pruned, shown[3], kept, *shown[:3], listed(group.seeds), *cost, *_beside_the_papers(last)]
        )
        marks.append(_errors_of(last, group.title))
    columns = ["runs", "pruned net", "dense net", "weights kept", "base net", "before the cut", "after the cut"]
    columns += ["seeds", "epochs", "seconds", "the paper", "difference"]
    used = [index for index in range(len(columns)) if any(row[index] for row in rows)]
    columns, rows = [columns[index] for index in used], [[row[index] for index in used] for row in rows]
    many = len(groups) > _MANY
    table = Table("Top-1 in % of all runs", columns, rows, sortable=True, folded=many)
    if many:  # the figure would be as long as the table
        return Block(tables=[table])
    return _top1(marks, "Top-1 error of the pruned nets of all runs, beside the paper's.", table)


def results(group: Group) -> list[Block]:
    """Return accuracies beside the paper's, with mean and deviation over the seeds."""
    found = outcomes(group.runs)
    has_paper = any(one.paper is not None for one in found)
    several = len(group.runs) > 1
    rows = []
    for one in found:
        last_ten = "" if one.last_ten_mean is None else f"{one.last_ten_mean:.2f}"
        own = [*([one.shown] if several else []), *(f"{value:.2f}" for value in one.values), last_ten]
        rows.append([one.title, *own, *(_beside_the_papers(one) if has_paper else [])])
    columns = ["net", *(["mean ± sd"] if several else []), *(f"seed {seed}" for seed in group.seeds), "last ten"]
    columns += ["the paper", "difference"] if has_paper else []
    over_seeds = group.over_seeds(", mean ± standard deviation over the seeds")
    table = Table(f"Top-1 in %{over_seeds}; last ten: mean of ten epochs", columns, rows)
    first = group.results[0]
    texts = [
        f"{first['nonzeros']:,} of {first['prunable']:,} weights are kept; accuracy is {group.runs[0].measured_on}.",
        *([cut_line(group.runs)] if "pruned" in first["top1"] and cut_line(group.runs) else []),
        *empty_layers_of(group.runs),
    ]
    if first["paper"] is None:
        texts.append("The paper has no result for this net, data set and compression ratio.")
    description = "Top-1 error by net, for each seed, with mean and standard deviation, and the paper's."
    return [_top1([_errors_of(one, one.title) for one in found], description, table, texts)]


def _beside_the_papers(found: Outcome) -> list[str]:
    return ["", ""] if found.paper is None else [f"{found.paper:.2f}", f"{found.mean - found.paper:+.2f}"]


def _errors_of(found: Outcome, title: str) -> Row:
    paper = None if found.paper is None else 100 - found.paper
    errors = [100 - value for value in found.values]
    return Row(title, _COLOURS.get(found.key, "blue"), errors, f"{fmean(errors):.2f}", paper)


def _top1(marks: list[Row], description: str, table: Table, texts: Sequence[str] = ()) -> Block:
    return Block("", texts, figures.marks(marks, "top-1 error, %", "the paper"), description, [table])


def curves(group: Group) -> list[Block]:
    """Return loss, error and what a cut would have done, by epoch."""
    stages = _stages(group)
    if not stages:
        return [Block(texts=["No epoch has been logged yet."])]
    loss, error = training_panels(group)
    since = [run.lossless_since for run in group.runs]
    lossless = f"A cut would have cost nothing since epoch {listed(since)}." if None not in since else ""
    return [
        _curve(loss, group.over_seeds("Thin lines are the seeds, thick ones their mean.")),
        _curve(error, lossless),
        Block(tables=[_epochs(group, stage) for stage in stages]),
    ]


def training_panels(group: Group) -> list[Panel]:
    """Return training loss and error by epoch, with the error after a cut at that epoch."""
    stages = _stages(group)
    errors = [_errors(_line(group, stage, "top1")) for stage in stages]
    cut = None
    if _has_cuts(group):
        errors.append(_errors(_line(group, "gsm", "cut_top1", label="GSM, if cut then", colour="purple", dash="-.")))
        cut = group.runs[0].cut_epoch
    losses = [_line(group, stage, "loss", label=_style(stage).label + _smoothed(group, stage)) for stage in stages]
    loss = Panel("Training loss", "training loss", losses)
    return [loss, Panel("Top-1 error", "top-1 error, %", errors, cut)]


def cut_now(group: Group) -> list[Block]:
    """Return the curves of what a cut would take at each epoch of GSM training, if that was measured."""
    if not _has_cuts(group):
        return []
    entered = _line(group, "gsm", "entered", label="entered")
    returned = _line(group, "gsm", "returned", label="of these kept before", colour="orange", dash="--")
    panels = {
        "The largest weight that a cut would remove, as a share of the smallest that it would keep. The line ends "
        "where nothing is left to cut.": Panel("The gap at rank Q", "gap", [_line(group, "gsm", "gap")]),
        "The share that is left of a weight that has been passive since the end of the ramp, or the start of the "
        "fade.": Panel("What is left of a passive weight", "share", [_line(group, "gsm", "passive")]),
        "Weights that a cut would keep, and would have removed an epoch earlier. The line ends where there are "
        "none.": Panel("Weights that entered the top Q", "weights", [entered, returned]),
    }
    return [_curve(panel._replace(cut=group.runs[0].cut_epoch), note) for note, panel in panels.items()]


def _curve(panel: Panel, note: str) -> Block:
    description = f"{panel.title}, by epoch: the numbers are in the tables below."
    return Block(panel.title, [note] if note else [], figures.curves([panel]), description)


def _line(group: Group, stage: str, key: str, **changes: Any) -> Line:
    """Return a quantity of a stage as a line, drawn as the stage is but for the changes, and thinned."""
    seeds = []
    for run in group.runs:
        points = [(one["epoch"], one[key]) for one in run.metrics if one["stage"] == stage and key in one]
        seeds.append(points[:: -math.ceil(len(points) / _DRAWN) or -1][::-1])  # with the last one
    return _style(stage)._replace(seeds=seeds, **changes)


def _style(stage: str) -> Line:
    """Return how a stage is drawn: one of a method other than GSM has its name."""
    return _STAGES.get(stage) or _STAGES[OURS]._replace(label=method_title(stage))


def _smoothed(group: Group, stage: str) -> str:
    """Return the label smoothing of a stage for a legend, if it has any: such a loss is no other's like."""
    training = group.runs[0].recipe["base" if stage == "base" or stage.startswith("ticket") else "gsm"]
    smoothing = training.get("label_smoothing", 0.0)
    return f", labels smoothed by {smoothing:g}" if smoothing else ""


def _errors(line: Line) -> Line:
    """Return a line of accuracies as one of errors."""
    return line._replace(seeds=[[(epoch, 100 - top1) for epoch, top1 in points] for points in line.seeds])


def _epochs(group: Group, stage: str) -> Table:
    """Return the quantities of a stage by epoch, as means over the seeds."""
    formats = {"loss": ".4f", "top1": ".2f"}
    if stage == "gsm" and _has_cuts(group):
        formats |= {"cut_top1": ".2f", "gap": ".3g", "passive": ".3g", "entered": ",.0f", "returned": ",.0f"}
    titles = {"top1": "top-1 %", "cut_top1": "top-1 % if cut", "passive": "left of a passive weight"}
    columns = {key: dict(figures.mean_by_epoch(_line(group, stage, key))) for key in formats}
    rows = []
    for epoch in columns["loss"]:
        cells = (f"{columns[key][epoch]:{form}}" if epoch in columns[key] else "" for key, form in formats.items())
        rows.append([str(epoch), *cells])
    caption = f"{_style(stage).label}, by epoch{group.over_seeds(' (means over the seeds)')}"
    if any(sum(record["stage"] == stage for record in run.metrics) > _DRAWN for run in group.runs):
        caption += f", {len(rows):,} of all epochs"
    return Table(caption, ["epoch", *(titles.get(key, key) for key in formats)], rows, folded=True)


def _stages(group: Group) -> list[str]:
    found = {record["stage"] for record in group.metrics}
    order = [*_STAGES, *(run.method for run in group.runs)]
    return [stage for stage in dict.fromkeys(order) if stage in found]


def _has_cuts(group: Group) -> bool:
    return any("cut_top1" in record for record in group.metrics)
