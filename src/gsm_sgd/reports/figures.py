"""Figures of runs, drawn by matplotlib: inline in the page, in the colours of its scheme, or as files of a run."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .blocks import number
from .tables import printable

# Okabe and Ito's colours, which colour blindness leaves distinct. The page replaces each by the variable of its style
# sheet that has the same name, and so by another colour in the dark.
_COLOURS = {
    **{"ink": "#1b1f24", "faint": "#57606a", "rule": "#b4bdc7", "grid": "#e4e8ec", "page": "#ffffff"},
    **{"blue": "#0072b2", "green": "#009e73", "orange": "#d55e00", "purple": "#b3578f"},
}
_VARIABLES = {colour: f"var(--{name})" for name, colour in _COLOURS.items()}
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "gsm-sgd",  # with no date either, the same run gives the same file
    "font.size": 12,
    "axes.titlesize": 12,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["rule"],
    "grid.color": _COLOURS["grid"],
    "hatch.linewidth": 1.5,
    **{f"{text}color": _COLOURS["ink"] for text in ("text.", "axes.label", "xtick.label", "ytick.label")},
    **{f"{tick}tick.color": _COLOURS["rule"] for tick in "xy"},
}
_styled = matplotlib.rc_context(_STYLE)
_WIDTH = 560  # CSS pixels, before the page scales it
_MANY_NETS = 12  # in a matrix: with more there is no room for numbers
_FEW_ROWS = 12  # with more there is room for a line of small print in each only
_MARKERS, _DASHES = "osD^vPX*", ("-", "--", ":", "-.")
_LINES_OF = ("blue", "orange", "green", "purple", "faint")  # the colours of lines, by turns
_LEGEND = 78  # characters in a line of a legend
_LABEL, _LINES = 25, 3  # characters in a line of a label, and lines
ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


class Row(NamedTuple):
    """A row of marks: its values, one for each seed, a reference to compare them with, and a text beside them."""

    label: str
    colour: str
    values: list[float]
    text: str
    reference: float | None = None


class Line(NamedTuple):
    """A quantity over the epochs of a stage: for each seed, pairs of epoch and value."""

    label: str
    colour: str
    dash: str
    seeds: list[list[tuple[int, float]]]


class Panel(NamedTuple):
    """Lines that share their axes, and the epoch of the cut."""

    title: str
    quantity: str
    lines: list[Line]
    cut: int | None = None


class Points(NamedTuple):
    """Errors in percent of one method, means and deviations over the seeds, and where they are."""

    label: str
    places: list[float]
    errors: list[float]
    deviations: list[float]


@_styled
def marks(rows: Sequence[Row], quantity: str, reference: str = "") -> Figure:
    """Return a ring for each seed's value, mean and deviation if there are several, and what to compare them with."""
    figure, axes = _plot(60 + 38 * len(rows))
    for index, row in enumerate(rows):
        colour = _COLOURS[row.colour]
        axes.plot(row.values, [index] * len(row.values), "o", mfc="none", mec=colour, mew=1.6, ms=7, label="a seed")
        if len(row.values) > 1:
            mean = fmean(row.values)
            style: dict[str, Any] = {"fmt": "|", "ms": 16, "mew": 2, "capsize": 4, "label": "mean ± standard deviation"}
            axes.errorbar(mean, index, xerr=stdev(row.values), color=colour, **style)
        if row.reference is not None:
            axes.plot(row.reference, index, "D", color=_COLOURS["purple"], ms=6, label=reference)
        beside: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "annotation_clip": False}
        axes.annotate(row.text, (1, index), (6, 0), textcoords="offset points", va="center", **beside)
    values = [value for row in rows for value in (*row.values, row.reference) if value is not None]
    if min(values) > 0:
        _log(axes.xaxis, values)
    axes.set_xlabel(quantity)
    _name_rows(axes, [_wrapped(row.label) for row in rows])
    _legend(figure, axes)
    return figure


@_styled
def curves(panels: Sequence[Panel]) -> Figure:
    """Return quantities by epoch, panels side by side: a thin line for each seed, a thick one for their mean."""
    figure = Figure(figsize=(max(_WIDTH, 400 * len(panels)) / 72, 270 / 72), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            style = {"color": _COLOURS[line.colour], "linestyle": line.dash}
            for points in filter(None, line.seeds if len(line.seeds) > 1 else ()):
                axes.plot(*zip(*points, strict=True), linewidth=0.8, alpha=0.5, **style)
            mean = mean_by_epoch(line)
            if mean:
                style |= {"label": line.label, "marker": "" if len(mean) > 1 else "o"}
                axes.plot(*zip(*mean, strict=True), linewidth=2, **style)
        if panel.cut is not None:
            axes.axvline(panel.cut, color=_COLOURS["faint"], linestyle=":", linewidth=1)
            axes.annotate("cut ", (panel.cut, 1), xycoords=("data", "axes fraction"), ha="right", va="top")
        _log(axes.yaxis, [value for line in panel.lines for points in line.seeds for _, value in points])
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch of the stage")
        axes.set_ylabel(panel.quantity)
    _legend(figure, *figure.axes)
    return figure


def mean_by_epoch(line: Line) -> list[tuple[int, float]]:
    """Return the mean over the seeds, for each epoch that any of them has."""
    by_epoch: dict[int, list[float]] = {}
    for points in line.seeds:
        for epoch, value in points:
            by_epoch.setdefault(epoch, []).append(value)
    return [(epoch, fmean(values)) for epoch, values in sorted(by_epoch.items())]


@_styled
def frontier(lines: Sequence[Points], dense: Points | None, unit: str = "compression ratio") -> Figure:
    """Return top-1 errors with their deviations against compression, or size, a line for each method."""
    figure, axes = _plot(380)
    for index, line in enumerate(lines):
        colour, dash = line_style(index)
        style: dict[str, Any] = {"color": _COLOURS[colour], "linestyle": dash, "marker": _MARKERS[index % 8]}
        style |= {"mfc": "none", "capsize": 3}
        spread = line.deviations if any(line.deviations) else None
        axes.errorbar(line.places, line.errors, spread, label=line.label, linewidth=1.5, ms=6, **style)
    if dense is not None:
        axes.axhline(fmean(dense.errors), color=_COLOURS["ink"], linewidth=1, linestyle=(0, (1, 2)), label=dense.label)
    places = sorted({place for line in lines for place in line.places})
    _log(axes.yaxis, [error for line in (*lines, *([dense] if dense else [])) for error in line.errors])
    if len(places) > 1:
        axes.set_xscale("log")
    if len(places) <= _FEW_ROWS and unit == "compression ratio":
        axes.set_xticks(places, [f"{place:.4g}x" for place in places])
    else:
        _log(axes.xaxis, places)
    axes.minorticks_off()
    axes.set_xlabel(unit)
    axes.set_ylabel("top-1 error, %")
    _legend(figure, axes)
    return figure


def line_style(index: int) -> tuple[str, str]:
    """Return the colour and the dash of a line, which tell it from 19 others."""
    return _LINES_OF[index % len(_LINES_OF)], _DASHES[index // len(_LINES_OF) % len(_DASHES)]


@_styled
def bars(categories: Sequence[str], shares: Mapping[str, Sequence[Sequence[float]]], quantity: str) -> Figure:
    """Return horizontal bars of a share in percent, by what has chosen it, category and seed; the first one on top.

    A category is a name, and in a second line, for which there is room if there are few, what is to be said of it.
    """
    few = len(categories) <= _FEW_ROWS
    figure, axes = _plot(60 + (14 + 20 * len(shares) if few else 4 + 7 * len(shares)) * len(categories))
    height = 0.8 / len(shares)
    for index, (method, of_method) in enumerate(shares.items()):
        rows = [row + (index - (len(shares) - 1) / 2) * height for row in range(len(categories))]
        spread = [stdev(share) if len(share) > 1 else 0 for share in of_method]
        style: dict[str, Any] = {"color": _COLOURS[("blue", "orange")[index]], "ecolor": _COLOURS["ink"], "capsize": 2}
        drawn = axes.barh(rows, [*map(fmean, of_method)], height, xerr=spread if any(spread) else None, **style)
        drawn.set_label(f"chosen by {method}")
        for patch in drawn:  # hatched, to be told apart without colours as well
            patch.set(hatch="///" if index else "", edgecolor=_COLOURS["page"], linewidth=0)
        if few:
            axes.bar_label(drawn, [f"{number(share, '.2f')} %" for share in of_method], padding=4)
    axes.margins(x=0.22 if few else 0.03)
    axes.set_xlabel(quantity)
    _name_rows(axes, [_wrapped(name) if few else _shortened(name.partition("\n")[0]) for name in categories])
    if not few:
        axes.tick_params("y", labelsize=9)
    _legend(figure, axes)
    return figure


@_styled
def matrix(names: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Return a value for each pair of different names, as shades and, if there is room, as numbers."""
    cells = [[math.nan if row == column else value for column, value in enumerate(of)] for row, of in enumerate(values)]
    most = max(value for of in cells for value in of if not math.isnan(value))
    figure, axes = _plot(110 + 30 * len(names))
    image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=most or 1, aspect="auto", interpolation="none")
    if len(names) > _MANY_NETS:
        figure.colorbar(image, label="%")
    else:
        for row, of in enumerate(cells):
            for column, value in enumerate(of):
                text = "" if math.isnan(value) else f"{value:.1f}"
                colour = "#fafafa" if value < most / 2 else "#000000"  # on shades that are the same in the dark
                axes.text(column, row, text, ha="center", va="center", color=colour)
    axes.grid(visible=False)
    _name_rows(axes, [_shortened(name) for name in names])
    axes.set_xticks(range(len(names)), [_shortened(name) for name in names], rotation=40, ha="right")
    return figure


# --- what they share ---


def _plot(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _log(axis: Axis, values: Sequence[float]) -> None:
    """Let an axis be logarithmic if there is anything above zero, with as many of the ticks 1, 2, 5 as fit."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    decades = math.log10(max(positive) / min(positive))
    (axis.axes.set_xscale if axis is axis.axes.xaxis else axis.axes.set_yscale)("log", nonpositive="mask")
    narrow = MaxNLocator(5, steps=[1, 2, 5, 10])
    axis.set_major_locator(narrow if decades < 0.7 else LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    """Let the rows 0, 1, ... be named, the first on top; two may have the same name."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params("y", length=0)
    axes.grid(visible=False, axis="y")


def _legend(figure: Figure, *axes: Axes) -> None:
    """Put what tells the marks apart on top of a figure, each label once."""
    entries: dict[str, Artist] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if len(entries) > 1:
        columns = max(1, min(3, _LEGEND // max(map(len, entries))))
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=columns)


def _wrapped(text: str) -> str:
    """Return a label in short lines."""
    lines = [short for line in text.split("\n") for short in textwrap.wrap(printable(line), _LABEL)]
    return "\n".join(lines[:_LINES])


def _shortened(text: str) -> str:
    """Return a label in one line, without its middle if it is long."""
    return printable(text if len(text) <= _LABEL else f"{text[: _LABEL // 2]}…{text[-_LABEL // 2 + 1 :]}")


# --- where they go ---


@_styled
def save(figure: Figure, name: str, title: str, put: Callable[[str, Callable[[Any], None]], None]) -> None:
    """Save a figure and a title as `<name>.png` and `<name>.svg` through `put`, which replaces files as a whole."""
    figure.supxlabel(printable(title))  # below: the legend is above
    put(f"{name}.png", lambda stream: _write(figure, stream, format="png", dpi=150))
    put(f"{name}.svg", lambda stream: _write(figure, stream, format="svg", metadata={"Date": None}))


@_styled
def inline(figure: Figure, description: str, key: str) -> str:
    """Return a figure as an SVG element for a page, in which no other has this key."""
    stream = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    _write(figure, stream, format="svg", metadata=metadata, transparent=True)
    root = ElementTree.fromstring(stream.getvalue())
    root.remove(root[0])  # a style that would be the whole page's
    for name in ("width", "height", "version"):
        del root.attrib[name]
    for element in root.iter():
        element.tail = None
        for name, value in element.items():
            element.set(name, _for_page(name, value, key))
    root.attrib |= {"role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _for_page(name: str, value: str, key: str) -> str:
    """Return an attribute of an SVG element with the page's colours and fonts, and a name that no other figure has."""
    match name.rpartition("}")[2]:
        case "id":
            return f"{key}-{value}"
        case "href":
            return re.sub("^#", f"#{key}-", value)
        case "d":
            return re.sub(r"\d+\.\d+", lambda digits: f"{float(digits[0]):.2f}", value)
        case "style" | "fill":
            value = re.sub(r" font-family: [^;]*;", "", value)
            value = re.sub("|".join(_VARIABLES), lambda colour: _VARIABLES[colour[0]], value)
    return value.replace("url(#", f"url(#{key}-")


def _write(figure: Figure, stream: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts may have it
        figure.savefig(stream, **options)
