"""Figures of runs, drawn by matplotlib: inline in the page, in the colours of its scheme, or as files of a run."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .nets import BINS_PER_DECADE, HIGHEST, LOWEST
from .tables import printable

# Okabe and Ito's colours, which colour blindness leaves distinct. The page replaces each by the variable of its style
# sheet that has the same name, and so by another colour in the dark.
_COLOURS = {
    **{"ink": "#1b1f24", "faint": "#57606a", "rule": "#b4bdc7", "grid": "#e4e8ec", "page": "#ffffff"},
    **{"blue": "#0072b2", "green": "#009e73", "orange": "#d55e00", "purple": "#b3578f"},
}
_STYLE = {
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "gsm-sgd",  # with no date either, the same run gives the same file
    "font.size": 11,
    "axes.titlesize": 11,
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
_LABEL, _LINES = 25, 3  # characters in a line of a label, and lines
_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)
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


class Bar(NamedTuple):
    """A value for each category, with a text beside it."""

    label: str
    colour: str
    values: list[float]
    texts: list[str]
    spread: list[float] | None = None


@_styled
def marks(rows: Sequence[Row], quantity: str, reference: str = "") -> Figure:
    """Return a ring for each seed's value, mean and deviation if there are several, and what to compare them with."""
    figure, axes = _plot(60 + 34 * len(rows))
    for index, row in enumerate(rows):
        colour = _COLOURS[row.colour]
        axes.plot(row.values, [index] * len(row.values), "o", mfc="none", mec=colour, mew=1.6, ms=7, label="a seed")
        if len(row.values) > 1:
            mean = fmean(row.values)
            style: dict[str, Any] = {"fmt": "|", "ms": 16, "mew": 2, "capsize": 4, "label": "mean ± standard deviation"}
            axes.errorbar(mean, index, xerr=stdev(row.values), color=colour, **style)
        if row.reference is not None:
            axes.plot(row.reference, index, "D", color=_COLOURS["purple"], ms=6, label=reference)
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(row.text, (1, index), (6, 0), va="center", **beside)
    _log(axes.xaxis, [value for row in rows for value in (*row.values, row.reference) if value is not None])
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
            for points in line.seeds if len(line.seeds) > 1 else ():
                axes.plot(*_columns(points), linewidth=0.8, alpha=0.5, **style)
            mean = mean_by_epoch(line)
            axes.plot(*_columns(mean), linewidth=2, marker="o" if len(mean) == 1 else "", label=line.label, **style)
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
def bars(categories: Sequence[str], groups: Sequence[Bar], quantity: str) -> Figure:
    """Return horizontal bars, the first category on top.

    A category is a name, and in a second line, for which there is room if there are few, what is to be said of it.
    """
    few = len(categories) <= _FEW_ROWS
    figure, axes = _plot(60 + (14 + 20 * len(groups) if few else 4 + 9 * len(groups)) * len(categories))
    height = 0.8 / len(groups)
    for index, group in enumerate(groups):
        rows = [row + (index - (len(groups) - 1) / 2) * height for row in range(len(categories))]
        style: dict[str, Any] = {"color": _COLOURS[group.colour], "ecolor": _COLOURS["ink"], "capsize": 2}
        hatch = "///" if index else ""  # tells them apart without colours as well
        drawn = axes.barh(rows, group.values, height, xerr=group.spread, label=group.label, **style)
        for patch in drawn:
            patch.set(hatch=hatch, edgecolor=_COLOURS["page"], linewidth=0)
        if few:
            axes.bar_label(drawn, group.texts, padding=4)
    axes.margins(x=0.22 if few else 0.03)
    axes.set_xlabel(quantity)
    _name_rows(axes, [_wrapped(name) if few else _shortened(name.partition("\n")[0]) for name in categories])
    if not few:
        axes.tick_params("y", labelsize=9)
    _legend(figure, axes)
    return figure


@_styled
def histograms(lines: Sequence[tuple[str, str, str, list[float]]]) -> Figure:
    """Return how many weights there are of each size, by label, colour, marker and counts."""
    width = 1 / BINS_PER_DECADE
    middles = [LOWEST + width * (index + 0.5) for index in range((HIGHEST - LOWEST) * BINS_PER_DECADE)]
    figure, axes = _plot(290)
    for label, colour, marker, counts in lines:
        shown = [count or math.nan for count in counts]
        style: dict[str, Any] = {"color": _COLOURS[colour], "marker": marker, "ms": 4, "drawstyle": "steps-mid"}
        axes.plot(middles, shown, label=label, **style)
    _log(axes.yaxis, [count for *_, counts in lines for count in counts])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{10**power:g}"))
    axes.set_xlabel("|w|")
    axes.set_ylabel("weights in a bin")
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
                axes.text(column, row, text, ha="center", va="center", color="white" if value < most / 2 else "black")
    axes.grid(visible=False)
    _name_rows(axes, [_shortened(name) for name in names])
    axes.set_xticks(range(len(names)), [_shortened(name) for name in names], rotation=40, ha="right")
    return figure


# --- what they share ---


def _plot(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [epoch for epoch, _ in points], [value for _, value in points]


def _log(axis: Axis, values: Sequence[float]) -> None:
    """Let an axis be logarithmic if there is anything above zero, with as many of the ticks 1, 2, 5 as fit."""
    positive = [value for value in values if value > 0]
    if not positive:
        return
    decades = math.log10(max(positive) / min(positive))
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
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
    entries = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if len(entries) > 1:
        figure.legend(entries.values(), entries.keys(), loc="outside upper left", ncols=3)


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
    """Save a figure under a title as `<name>.png` and `<name>.svg` through `put`, which replaces files as a whole."""
    figure.suptitle(printable(title))
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
    names = {colour: name for name, colour in _COLOURS.items()}
    for element in root.iter():
        element.tail = None
        for attribute, value in element.items():
            match attribute:
                case "id":
                    value = f"{key}-{value}"
                case "style":
                    value = re.sub(r" font-family: [^;]*;", "", value)
                    value = re.sub(r"#\w{6}", lambda found: f"var(--{names[found[0]]})" if found[0] in names else found[0], value)
                case "d":
                    value = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.2f}", value)
            value = re.sub(r"(?<=url\()#|^#", f"#{key}-", value)
            element.set(attribute, value)
    root.attrib |= {"role": "img", "aria-label": description}
    return ElementTree.tostring(root, encoding="unicode")


def _write(figure: Figure, stream: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts may have it
        figure.savefig(stream, **options)
