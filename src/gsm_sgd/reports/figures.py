"""Interactive pictures of runs, as Plotly's figures. The page gives them the colours of its scheme.

The colour of a trace stands in its `meta`, as one of the names that the page's style sheet has a colour for in light
and in dark. Names that come from a run are escaped, since Plotly reads its labels as markup.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import plotly.graph_objects as go

from ..experiments.rundir import Record
from .nets import BINS_PER_DECADE, HIGHEST, LOWEST

_MARGINS = {"l": 8, "r": 12, "t": 8, "b": 8}
_MANY_NETS = 12  # in a matrix: with more there is no room for numbers
_FEW_ROWS = 12  # with more there is room for a line of small print in each only
_LABEL, _LINES = 25, 3  # characters in a line of a label, and lines
_LINE = 26  # characters of a label that has one line only
_NARROW, _MANY_DECADES = 0.5, 3  # on a logarithmic axis: Plotly's own ticks fit below, one for each decade above
_SYMBOLS = ("circle", "diamond", "square", "cross", "triangle-up")


class Row(NamedTuple):
    """A net in a picture of accuracies: the top-1 of each seed, in percent, and the paper's."""

    label: str
    colour: str
    seeds: list[int]
    top1: list[float]
    paper: float | None


class Line(NamedTuple):
    """A quantity over the epochs of a stage, for each seed: pairs of epoch and value."""

    label: str
    colour: str
    dash: str
    seeds: dict[str, list[tuple[int, float]]]


class Bar(NamedTuple):
    """A value for each category, with a text beside it."""

    label: str
    colour: str
    values: list[float]
    texts: list[str]
    spread: list[float] | None = None


def accuracies(rows: Sequence[Row]) -> Record:
    """Return top-1 error by net: a ring for each seed, mean and deviation, the paper's figure."""
    means = [fmean(row.top1) for row in rows]
    several = any(len(row.top1) > 1 for row in rows)
    figure = _figure(height=90 + 46 * len(rows))
    for index, row in enumerate(rows):
        figure.add_scatter(
            x=[_error(value) for value in row.top1],
            y=[index] * len(row.top1),
            text=[
                _escaped(f"{row.label}, seed {seed}: {value:.2f} %")
                for seed, value in zip(row.seeds, row.top1, strict=True)
            ],
            **_marks(row.colour, "circle-open", 9 if several else 11, name="a seed", first=index == 0),
        )
    if several:
        for index, row in enumerate(rows):
            spread = stdev(row.top1) if len(row.top1) > 1 else 0.0
            figure.add_scatter(
                x=[_error(means[index])],
                y=[index],
                error_x={"array": [spread], "thickness": 2, "width": 6},
                text=[_escaped(f"{row.label}, mean of {len(row.top1)}: {means[index]:.2f} ± {spread:.2f} %")],
                **_marks(row.colour, "line-ns-open", 20, name="mean ± standard deviation", first=index == 0),
            )
    paper = [(row.paper, index) for index, row in enumerate(rows) if row.paper is not None]
    if paper:
        figure.add_scatter(
            x=[_error(value) for value, _ in paper],
            y=[index for _, index in paper],
            text=[_escaped(f"{rows[index].label}, the paper: {value:.2f} %") for value, index in paper],
            **_marks("purple", "diamond", 10, name="the paper", first=True),
        )
    values = [value for row in rows for value in [*row.top1, *([row.paper] if row.paper is not None else [])]]
    figure.update_xaxes(
        title_text="top-1 error, %", **(_log_axis([_error(v) for v in values]) if max(values) < 100 else {})
    )
    _name_rows(figure, [_wrapped(row.label) for row in rows])
    return _plain(figure)


def curves(lines: Sequence[Line], quantity: str, *, log: bool, cut: tuple[int, str] | None = None) -> Record:
    """Return a quantity by epoch: a thin line for each seed, a thick one for their mean, and when the cut came."""
    figure = _figure(height=340)
    drawn: list[float] = []

    def add(line: Line, name: str, points: Sequence[tuple[int, float]], width: float, **options: Any) -> None:
        values = [_drawn(value, log) for _, value in points]
        drawn.extend(value for value in values if value is not None)
        figure.add_scatter(
            x=[epoch for epoch, _ in points],
            y=values,
            name=_escaped(name),
            hovertemplate="%{fullData.name}, epoch %{x}: %{y:.4~g}<extra></extra>",
            legendgroup=line.label,
            meta={"colour": line.colour},
            mode="lines" if len(points) > 1 else "markers",
            line={"width": width, "dash": line.dash},
            **options,
        )

    for line in lines:
        for seed, points in line.seeds.items() if len(line.seeds) > 1 else ():
            add(line, f"{line.label}, {seed}", points, width=1, opacity=0.45, showlegend=False)
        add(line, line.label, mean_by_epoch(line), width=2.5, showlegend=len(lines) > 1)
    if cut is not None:
        epoch, text = cut
        figure.add_vline(x=epoch, line={"width": 1, "dash": "dot"})
        figure.add_annotation(x=epoch, y=1, yref="paper", text=text, showarrow=False, xanchor="right", yanchor="top")
    figure.update_xaxes(title_text="epoch of the stage", rangemode="tozero")
    figure.update_yaxes(title_text=quantity, **(_log_axis(drawn) if log else {}))
    return _plain(figure)


def mean_by_epoch(line: Line) -> list[tuple[int, float]]:
    """Return the mean over the seeds, for each epoch that any of them has."""
    by_epoch: dict[int, list[float]] = {}
    for points in line.seeds.values():
        for epoch, value in points:
            by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, fmean(values)) for epoch, values in sorted(by_epoch.items())]


def bars(categories: Sequence[str], groups: Sequence[Bar], quantity: str, *, log: bool = False) -> Record:
    """Return horizontal bars, the first category on top; on a logarithmic axis, which has no zero, markers.

    A category is a name, and in a second line, for which there is room if there are few, what is to be said of it.
    """
    few = len(categories) <= _FEW_ROWS
    row_height = 30 + 18 * len(groups) if few else 8 + 11 * len(groups)
    figure = _figure(height=90 + row_height * len(categories))
    for index, group in enumerate(groups):
        options: dict[str, Any] = {
            "y": list(range(len(categories))),
            "x": [_drawn(value, log) for value in group.values],
            "name": _escaped(group.label),
            "meta": {"colour": group.colour},
            "text": [_escaped(text) for text in group.texts] if len(groups) == 1 and few and not group.spread else None,
            "customdata": [_escaped(f"{name}: {text}") for name, text in zip(categories, group.texts, strict=True)],
            "hovertemplate": "%{customdata}<extra></extra>",
        }
        if log:
            figure.add_scatter(
                mode="markers", marker={"size": 11, "symbol": _SYMBOLS[index % len(_SYMBOLS)]}, **options
            )
        else:
            pattern = {"shape": "/", "size": 6, "solidity": 0.35, "fillmode": "overlay"} if index else {}
            spread = {"array": group.spread, "thickness": 1, "width": 3} if group.spread else None
            options |= {"textposition": "auto", "textangle": 0}
            figure.add_bar(orientation="h", marker={"pattern": pattern}, error_x=spread, **options)
    figure.update_layout(barmode="group", bargap=0.25, showlegend=len(groups) > 1)
    figure.update_xaxes(
        title_text=quantity, **(_log_axis([x for group in groups for x in group.values]) if log else {})
    )
    _name_rows(figure, [_wrapped(name) if few else _shortened(name.partition("\n")[0]) for name in categories])
    if not few:
        figure.update_yaxes(tickfont={"size": 10})
    return _plain(figure)


def histograms(lines: Sequence[tuple[str, str, str, list[float]]]) -> Record:
    """Return how many weights there are of each size, by label, colour, symbol and counts."""
    width = 1 / BINS_PER_DECADE
    edges = [LOWEST + width * index for index in range((HIGHEST - LOWEST) * BINS_PER_DECADE)]
    figure = _figure(height=360)
    for label, colour, symbol, counts in lines:
        figure.add_scatter(
            x=[edge + width / 2 for edge in edges],
            y=[_drawn(count, log=True) for count in counts],
            customdata=[f"10^{edge:.1f} to 10^{edge + width:.1f}" for edge in edges],
            hovertemplate="|w| from %{customdata}: %{y:,.6~g} weights",
            name=_escaped(label),
            meta={"colour": colour},
            mode="lines+markers",
            line={"shape": "hvh", "width": 2},
            marker={"size": 6, "symbol": symbol},
        )
    figure.update_layout(showlegend=True)
    present = [index for *_, counts in lines for index, count in enumerate(counts) if count]
    ticks = range(LOWEST, HIGHEST + 1)
    figure.update_xaxes(
        title_text="|w|", zeroline=False, tickvals=list(ticks), ticktext=[f"10<sup>{tick}</sup>" for tick in ticks]
    )
    if present:
        figure.update_xaxes(range=[edges[min(present)] - width, edges[max(present)] + 2 * width])
    figure.update_yaxes(title_text="weights in a bin", type="log", exponentformat="power", dtick=1)
    return _plain(figure)


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], quantity: str) -> Record:
    """Return a value in percent for each pair of different names, as shades and, if there is room, as numbers."""
    figure = _figure(height=120 + max(34 * len(names), 120))
    figure.add_heatmap(
        z=[[None if row == column else value for column, value in enumerate(of)] for row, of in enumerate(values)],
        zmin=0,
        zmax=max(value for row, of in enumerate(values) for column, value in enumerate(of) if row != column),
        colorscale="Cividis",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.1f}" if len(names) <= _MANY_NETS else None,
        text=[[_escaped(f"{one} and {other}") for other in names] for one in names],
        hovertemplate=f"%{{text}}: {quantity} %{{z:.2f}} %<extra></extra>",
        showscale=len(names) > _MANY_NETS,
        colorbar={"title": {"text": "%"}, "thickness": 12, "outlinewidth": 0},
    )
    labels = [_shortened(name) for name in names]
    _name_rows(figure, labels)
    figure.update_yaxes(showgrid=False)
    figure.update_xaxes(showgrid=False, tickvals=list(range(len(names))), ticktext=labels, tickangle=-45)
    return _plain(figure)


# --- what they share ---


def _figure(height: int) -> go.Figure:
    """Return an empty figure: a line of legend on top, and margins as wide as the labels need."""
    figure = go.Figure(layout={"height": height, "margin": _MARGINS, "template": None})
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def _log_axis(values: Sequence[float]) -> Record:
    """Return the settings of a logarithmic axis: of the ticks 1, 2, 5 as many as there is room for."""
    positive = [math.log10(value) for value in values if value > 0 and math.isfinite(value)] or [0.0]
    first, last = math.floor(min(positive)), math.ceil(max(positive))
    span = max(positive) - min(positive)
    if span < _NARROW:
        return {"type": "log"}
    if span > _MANY_DECADES:
        return {"type": "log", "dtick": 1, "exponentformat": "power"}
    digits = (1, 2, 5) if span > 1 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _name_rows(figure: go.Figure, labels: Sequence[str]) -> None:
    """Let the rows 0, 1, ... of a picture be named, the first on top; two may have the same name."""
    rows = len(labels)
    figure.update_yaxes(tickvals=list(range(rows)), ticktext=list(labels), range=[rows - 0.5, -0.5], zeroline=False)


def _marks(colour: str, symbol: str, size: int, *, name: str, first: bool) -> Record:
    """Return the options of points that share an entry of the legend with all of their name."""
    return {
        "mode": "markers",
        "marker": {"symbol": symbol, "size": size, "line": {"width": 2}},
        "meta": {"colour": colour},
        "name": name,
        "legendgroup": name,
        "showlegend": first,
        "hovertemplate": "%{text}<extra></extra>",
    }


def _plain(figure: go.Figure) -> Record:
    """Return a figure as JSON has it: six digits are more than a screen shows, and JSON has no NaN."""
    record: Record = figure.to_plotly_json()
    return {key: _rounded(record[key]) for key in ("data", "layout")}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _drawn(value: float, log: bool) -> float | None:
    """Return a value, or None where a logarithmic axis has no place for it."""
    return None if log and value <= 0 else value


def _error(top1: float) -> float:
    return 100 - top1


def _escaped(text: str) -> str:
    return html.escape(text)


def _wrapped(text: str) -> str:
    """Return a label in short lines."""
    lines = [short for line in text.splitlines() for short in textwrap.wrap(line, _LABEL)]
    return "<br>".join(_escaped(line) for line in lines[:_LINES])


def _shortened(text: str) -> str:
    """Return a label in one line, without its middle if it is long."""
    return _escaped(text if len(text) <= _LINE else f"{text[: _LINE // 2]}…{text[-_LINE // 2 + 1 :]}")
