"""Pictures of a run: what each layer keeps, and the training curves."""

from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from .runs import Run

# Okabe and Ito's colours, which colour blindness leaves distinct.
_COLOURS = {"base": "#000000", "gsm": "#0072B2", "ticket-gsm": "#009E73", "ticket-magnitude": "#D55E00"}
_FEW_LAYERS = 12
_STYLES = {"base": "-", "gsm": "-", "ticket-gsm": "--", "ticket-magnitude": ":"}


def density_figure(run: Run, kept: dict[str, dict[str, int]]) -> Figure:
    """Return bars of the share of weights that each layer keeps.

    Args:
        run: a finished run.
        kept: non-zeros by method and layer name.
    """
    assert run.result is not None
    layers = run.result["layers"]
    colours = [_COLOURS["ticket-gsm"], _COLOURS["ticket-magnitude"]]
    roomy = len(layers) <= _FEW_LAYERS  # else each has room for a line of small print only
    row_height = 0.2 + 0.32 * len(kept) if roomy else 0.11 * (1 + len(kept))
    figure = Figure(figsize=(7, 1.2 + row_height * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(kept)
    for index, (method, counts) in enumerate(kept.items()):
        shares = [100 * counts[layer["name"]] / layer["params"] for layer in layers]
        rows = [row + (index - (len(kept) - 1) / 2) * height for row in range(len(layers))]
        bars = axes.barh(rows, shares, height, label=f"chosen by {method}", color=colours[index])
        numbers = [f"  ({counts[layer['name']]:,})" if roomy else "" for layer in layers]
        labels = [f"{share:.2g} %{number}" for share, number in zip(shares, numbers, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=8 if roomy else 6)
    shapes = ["x".join(map(str, layer["shape"])) for layer in layers]
    names = [f"{r['name']}{chr(10) if roomy else '  '}{s}" for r, s in zip(layers, shapes, strict=True)]
    axes.set_yticks(range(len(layers)), names, fontsize=None if roomy else 6)
    axes.set_ylim(len(layers) - 0.4, -0.6)  # the first layer on top
    axes.margins(x=0.25)
    axes.set_xlabel("weights kept, % of the layer")
    axes.set_title(f"{run.title}, seed {run.recipe['seed']}: what each layer keeps", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(kept) > 1:
        axes.legend(frameon=False)
    return figure


def curves_figure(run: Run) -> Figure:
    """Return training loss and test error by epoch, a line for each stage."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, error = figure.subplots(1, 2)
    for stage, colour in _COLOURS.items():
        records = [record for record in run.metrics if record["stage"] == stage]
        epochs = [record["epoch"] for record in records]
        style = {"color": colour, "linestyle": _STYLES[stage], "linewidth": 1.3}
        if records:
            loss.plot(epochs, [record["loss"] for record in records], label=stage, **style)
            error.plot(epochs, [100 - record["top1"] for record in records], label=stage, **style)
    cut_now = [record for record in run.uncut if "cut_top1" in record]
    if cut_now:
        style = {"color": _COLOURS["gsm"], "linestyle": ":", "linewidth": 1.0}
        (line,) = error.plot([r["epoch"] for r in cut_now], [100 - r["cut_top1"] for r in cut_now], **style)
        error.legend([line], ["gsm, if cut then"], frameon=False, fontsize=8)
    loss.set_title("training loss", fontsize=10)
    error.set_title("top-1 error, %", fontsize=10)
    for axes in (loss, error):
        axes.set_yscale("log")
        axes.set_xlabel("epoch of the stage")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    formatter = FuncFormatter(lambda value, _: f"{value:g}")
    error.yaxis.set_major_formatter(formatter)
    error.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    error.yaxis.set_minor_formatter(formatter)
    figure.suptitle(f"{run.title}, seed {run.recipe['seed']}", fontsize=10)
    if run.metrics:
        loss.legend(frameon=False, fontsize=8)
    return figure


def save(figure: Figure, name: str, put: Callable[[str, Callable[[Any], None]], None]) -> None:
    """Save a figure as `<name>.png` and `<name>.svg` through `put`, which replaces files as a whole."""
    # a fixed salt and no date: the same run gives the same file
    with matplotlib.rc_context({"svg.hashsalt": "gsm-sgd", "svg.fonttype": "none"}):
        put(f"{name}.png", lambda stream: figure.savefig(stream, dpi=150, format="png"))
        put(f"{name}.svg", lambda stream: figure.savefig(stream, format="svg", metadata={"Date": None}))
