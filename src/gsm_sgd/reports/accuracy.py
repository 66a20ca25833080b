"""Sections of a report on accuracy: results beside the paper's, and the curves of training."""

import math
from collections.abc import Sequence
from statistics import fmean

from ..experiments.rundir import Record
from . import figures
from .blocks import Block, Group, Picture, Table, listed
from .figures import Line, Row
from .runs import outcomes
from .tables import cut_line, empty_layers_of

_DRAWN = 2_000  # epochs of a stage; a screen has no more columns
_COLOURS = {
    **{"base": "ink", "gsm_before_cut": "blue", "gsm_after_cut": "blue", "pruned": "blue"},
    **{"ticket_gsm": "green", "ticket_magnitude": "orange"},
}
_STAGES = {
    "base": ("base net", "ink", "solid"),
    "gsm": ("GSM", "blue", "solid"),
    "ticket-gsm": ("ticket by GSM", "green", "dash"),
    "ticket-magnitude": ("ticket by magnitude", "orange", "dot"),
}


def comparison(groups: Sequence[Group]) -> Block:
    """Return all groups side by side."""
    rows, marks = [], []
    for group in groups:
        found = {outcome.key: outcome for outcome in outcomes(group.runs)}
        # a run that only retrained a ticket has no pruned net
        last = next(found[key] for key in ("pruned", "gsm_after_cut", *found) if key in found)
        shown = [found[key].figure.shown if key in found else "" for key in ("base", "gsm_before_cut", "gsm_after_cut")]
        paper = ["", ""] if last.paper is None else [f"{last.paper:.2f}", f"{last.figure.mean - last.paper:+.2f}"]
        first = group.results[0]
        epochs = f"{sum(first['epochs'].values())}"
        seconds = f"{fmean(sum(result['seconds'].values()) for result in group.results):,.0f}"
        kept = f"{first['nonzeros']:,} of {first['prunable']:,}"
        seeds = listed(group.seeds)
        pruned = last.figure.shown if last.key in ("pruned", "gsm_after_cut") else f"ticket {last.figure.shown}"
        rows.append([group.title, seeds, kept, *shown, pruned, *paper, epochs, seconds])
        top1 = [result["top1"][last.key] for result in group.results]
        marks.append(Row(group.title, "blue", group.seeds, top1, last.paper))
    columns = ["runs", "seeds", "weights kept", "base net", "GSM, before the cut", "after the cut", "pruned net"]
    return Block(
        "",
        picture=Picture(figures.accuracies(marks), "Top-1 error of the pruned nets of all runs, beside the paper's."),
        tables=[Table("Top-1 in %", [*columns, "the paper", "difference", "epochs", "seconds"], rows, texts=2)],
    )


def results(group: Group) -> list[Block]:
    """Return accuracies beside the paper's, with mean and deviation over the seeds."""
    found = outcomes(group.runs)
    rows, marks = [], []
    for key, title, figure, paper in found:
        top1 = [result["top1"][key] for result in group.results]
        last_ten = "" if figure.last_ten_mean is None else f"{figure.last_ten_mean:.2f}"
        beside = ["", ""] if paper is None else [f"{paper:.2f}", f"{figure.mean - paper:+.2f}"]
        mean = [figure.shown] if len(top1) > 1 else []
        rows.append([title, *mean, *beside, *(f"{value:.2f}" for value in top1), last_ten])
        marks.append(Row(title, _COLOURS[key], group.seeds, top1, paper))
    first = group.results[0]
    several = len(group.runs) > 1
    mean = ["mean ± sd"] if several else []
    seeds = [f"seed {seed}" for seed in group.seeds]
    columns = ["net", *mean, "the paper", "difference", *seeds, "last ten"]
    caption = (
        f"Top-1 in %{', mean ± standard deviation over the seeds' if several else ''}; last ten: mean of ten epochs"
    )
    texts = [
        f"{first['nonzeros']:,} of {first['prunable']:,} weights are kept; {group.runs[0].measured_on}.",
        *([cut_line(group.runs)] if "gsm_after_cut" in first["top1"] else []),
        *empty_layers_of(group.runs),
    ]
    if first["paper"] is None:
        texts.append("The paper has no figure for this net, data set and compression ratio.")
    description = "Top-1 error by net, for each seed, with mean and standard deviation, and the paper's."
    picture = Picture(figures.accuracies(marks), description)
    return [Block("", texts, picture, [Table(caption, columns, rows)])]


def curves(group: Group) -> list[Block]:
    """Return loss, error and what a cut would have done, by epoch."""
    stages = [stage for stage in _STAGES if any(record["stage"] == stage for record in _metrics(group))]
    if not stages:
        return [Block("", ["No epoch has been logged yet."])]
    note = "Thin lines are the seeds, thick ones their mean." if len(group.runs) > 1 else ""
    blocks = [
        _curve("Training loss", "loss", [_line(group, stage, "loss") for stage in stages], note=note),
        _curve("Top-1 error", "top-1 error, %", [_errors(_line(group, stage, "top1")) for stage in stages]),
    ]
    if any("cut_top1" in record for record in _metrics(group)):
        blocks += _cut_now(group)
    blocks.append(Block("", tables=[_epochs(group, stage) for stage in stages]))
    return blocks


def _cut_now(group: Group) -> list[Block]:
    """Return the pictures of what a cut would have done at each epoch of GSM training."""
    cut = (group.runs[0].cut_epoch, "cut")
    as_it_is = _errors(_line(group, "gsm", "top1"))._replace(label="as it is")
    if_cut = _errors(_line(group, "gsm", "cut_top1", "if cut then", "orange", "dash"))
    entered = _line(group, "gsm", "entered", "entered")
    returned = _line(group, "gsm", "returned", "of these kept before", "orange", "dash")
    since = [run.lossless_since for run in group.runs]
    return [
        _curve(
            "If the net were cut at that epoch",
            "top-1 error, %",
            [as_it_is, if_cut],
            cut=cut,
            note="" if None in since else f"A cut would have cost nothing since epoch {listed(since)}.",
        ),
        _curve(
            "The gap at rank Q",
            "gap",
            [_line(group, "gsm", "gap")],
            cut=cut,
            note="The largest weight that a cut would remove, as a share of the smallest that it would keep. The line "
            "ends where nothing is left to cut.",
        ),
        _curve(
            "What is left of a passive weight",
            "share",
            [_line(group, "gsm", "passive")],
            cut=cut,
            note="What share is left of a weight that has been passive since the ramp's end, or since the fade began.",
        ),
        _curve(
            "Weights that entered the top Q",
            "weights",
            [entered, returned],
            cut=cut,
            note="Those that a cut would keep, and would not have kept an epoch earlier. The line ends where none did.",
        ),
    ]


def _curve(
    heading: str, quantity: str, lines: list[Line], *, cut: tuple[int, str] | None = None, note: str = ""
) -> Block:
    positive = any(value > 0 for line in lines for points in line.seeds.values() for _, value in points)
    figure = figures.curves(lines, quantity, log=positive, cut=cut)
    description = f"{heading}, by epoch: the figures are in the tables below."
    return Block(heading, [note] if note else [], Picture(figure, description))


def _line(group: Group, stage: str, key: str, label: str = "", colour: str = "", dash: str = "") -> Line:
    """Return a quantity of a stage as a line for each seed, drawn as the stage is if nothing else is said."""
    own_label, own_colour, own_dash = _STAGES[stage]
    points = {
        f"seed {run.recipe['seed']}": _thinned(
            [(r["epoch"], r[key]) for r in run.metrics if r["stage"] == stage and key in r]
        )
        for run in group.runs
    }
    return Line(label or own_label, colour or own_colour, dash or own_dash, points)


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most `_DRAWN` points, at equal distances, with the last one."""
    return points[:: -math.ceil(len(points) / _DRAWN) or -1][::-1]


def _errors(line: Line) -> Line:
    """Return a line of accuracies as one of errors."""
    return line._replace(
        seeds={seed: [(epoch, 100 - top1) for epoch, top1 in points] for seed, points in line.seeds.items()}
    )


def _epochs(group: Group, stage: str) -> Table:
    """Return the quantities of a stage by epoch, as means over the seeds."""
    formats = {"loss": ".4f", "top1": ".2f"}
    if any("cut_top1" in record for record in _metrics(group) if record["stage"] == stage):
        formats |= {"cut_top1": ".2f", "gap": ".3g", "passive": ".3g", "entered": ",.0f", "returned": ",.0f"}
    titles = {"top1": "top-1 %", "cut_top1": "top-1 % if cut", "passive": "left of a passive weight"}
    columns = {key: dict(figures.mean_by_epoch(_line(group, stage, key))) for key in formats}
    rows = [
        [
            str(epoch),
            *(f"{columns[key][epoch]:{form}}" if epoch in columns[key] else "" for key, form in formats.items()),
        ]
        for epoch in columns["loss"]
    ]
    mean = " (means over the seeds)" if len(group.runs) > 1 else ""
    caption = f"{_STAGES[stage][0]}, by epoch{mean}"
    if any(sum(r["stage"] == stage for r in run.metrics) > _DRAWN for run in group.runs):
        caption += f", {len(rows):,} of all epochs"
    return Table(caption, ["epoch", *(titles.get(key, key) for key in formats)], rows, folded=True)


def _metrics(group: Group) -> list[Record]:
    return [record for run in group.runs for record in run.metrics]
