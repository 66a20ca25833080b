"""Tables for the terminal."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import get_args

from rich.table import Table

from ..experiments.bench import CAPTION, Cost, Workload
from ..experiments.recipes import OURS, RECIPES, Preset, published
from ..experiments.rundir import Record
from ..masks import LayerSparsity
from .runs import PROGRESS, Run, lost_in_the_cut, outcomes

_NAMED = 5  # layers that a sentence names
_TEXTS = ("net", "stage", "layer", "shape", "recipe", "preset", "optimizer")  # columns of text, not of numbers


def results_table(runs: Sequence[Run]) -> Table:
    """Return accuracies beside the paper's, means over finished runs that differ in the seed alone."""
    results = [run.result for run in runs if run.result is not None]
    first = results[0]
    seeds = ", ".join(str(result["seed"]) for result in results)
    title = f"{runs[0].title}, seed{'s' if len(results) > 1 else ''} {seeds}: "
    title += f"{first['nonzeros']:,} of {first['prunable']:,} weights"
    caption = f"accuracy {runs[0].measured_on}; last ten: mean of the ten epochs up to it"
    table = _table(title, ("net", "top-1 %", "last ten", "paper"), caption)
    for found in outcomes(runs):
        last_ten, paper = ("" if one is None else f"{one:.2f}" for one in (found.last_ten_mean, found.paper))
        table.add_row(found.title, found.shown, last_ten, paper)
    return table


def costs_line(result: Record) -> str:
    """Return what a net without channels costs beside the dense one, or nothing if it has all its channels."""
    parts = [
        f"{counts['pruned']:,} of {counts['dense']:,} {name} ({counts['dense'] / counts['pruned']:.2f} times fewer)"
        for kind, name in (("macs", "MACs"), ("parameters", "parameters"))
        if (counts := result.get(kind))
    ]
    if counts := result.get("latency"):
        dense, pruned = (f"{counts[which] / 1e6:.3g}" for which in ("dense", "pruned"))
        parts.append(f"an expected latency of {pruned} ms, the dense net {dense} ms")
    return f"The narrow net, narrow.safetensors, has {' and '.join(parts)}." if parts else ""


def cut_line(runs: Sequence[Run]) -> str:
    """Return a sentence on what the cut cost, and since when it would have cost nothing; or no text."""
    results = [run.result["top1"] for run in runs if run.result is not None]
    if runs[0].method != OURS:
        lost = lost_in_the_cut(runs)
        return f"The cut in the end cost {lost:.2f} points." if lost else ""
    text = f"The cut after epoch {runs[0].cut_epoch} of GSM training "
    since = [str(run.lossless_since) for run in runs if run.lossless_since is not None]
    if len(since) == len(runs):
        text += f"was lossless, and would have been since epoch {', '.join(since)}"
    else:
        text += f"cost {lost_in_the_cut(runs):.2f} points"
    gained = fmean(top1["pruned"] - top1["gsm_after_cut"] for top1 in results)
    how = "training on with the mask" if runs[0].cut_epoch < runs[0].recipe["gsm"]["epochs"] else "recalibrating"
    return text + (f"; {how} gained {gained:.2f}." if gained else ".")


def empty_layers(layers: Iterable[tuple[str, int, int]]) -> str:
    """Return a sentence on the layers that keep nothing, of (name, weights, kept), and what it means; or no text."""
    names = [printable(name) for name, weights, kept in layers if weights and not kept]
    if not names:
        return ""
    keep, it = ("keep", "them") if len(names) > 1 else ("keeps", "it")
    if len(names) > _NAMED:
        names[_NAMED:] = [f"{len(names) - _NAMED} more"]
    listed = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    return (
        f"{listed} {keep} no weight: nothing passes through {it}. Unless another path leads around {it}, such as a "
        "residual connection, the output is the same for every input."
    )


def empty_layers_of(runs: Sequence[Run]) -> list[str]:
    """Return such a sentence for each finished run that has such layers, with its seed if there are several runs.

    Of channels none: only what another path leads around is ever left without any.
    """
    texts = []
    for run in runs:
        layers = [] if "widths" in run.finished() else run.finished()["layers"]
        text = empty_layers((layer["name"], layer["params"], layer["nonzeros"]) for layer in layers)
        if text:
            texts.append(f"Seed {run.recipe['seed']}: {text}" if len(runs) > 1 else text)
    return texts


def progress_table(run: Run) -> Table:
    """Return how far each stage of an unfinished run has come."""
    table = _table(f"{run.path.name}, {run.unfinished}", PROGRESS)
    for row in run.progress:
        table.add_row(*row)
    return table


def printable(text: str) -> str:
    """Return a text in which all that a terminal would take for a command, or not show, is escaped."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def layers_table(layers: Sequence[LayerSparsity], title: str) -> Table:
    """Return what each layer keeps, and the total."""
    table = _table(title, ("layer", "shape", "weights", "kept", "kept %"))
    params, nonzeros = sum(row.params for row in layers), sum(row.nonzeros for row in layers)
    for row in layers:
        shape = "x".join(map(str, row.shape))
        table.add_row(row.name, shape, f"{row.params:,}", f"{row.nonzeros:,}", _percent(row.nonzeros, row.params))
    table.add_section()
    ratio = f"{params / nonzeros:.2f}x" if nonzeros else ""
    table.add_row("all", ratio, f"{params:,}", f"{nonzeros:,}", _percent(nonzeros, params))
    return table


def recipes_table() -> Table:
    """Return the recipes with the paper's figures, the presets and their epochs."""
    columns = ("recipe", "C", "paper's pruned top-1 %", "preset", "epochs: prune", "epochs: lottery")
    table = _table("recipes", columns)
    for name, make in RECIPES.items():
        figures = published(name)
        for row, preset in enumerate(get_args(Preset)):
            recipe = make(preset)
            trained_here = recipe.start == "base" and recipe.weights is None
            prune = str(recipe.gsm.epochs + (recipe.base.epochs if trained_here else 0))
            lottery = str(recipe.gsm.epochs + 3 * recipe.base.epochs) if recipe.weights is None else ""
            lead = ("", "", "")
            if row == 0:
                ratios = "\n".join(f"{ratio:g}x" for ratio in figures)
                lead = (name, ratios, "\n".join(f"{top1['pruned']:.2f}" for top1 in figures.values()))
            table.add_row(*lead, preset, prune, lottery)
        table.add_section()
    return table


def costs_table(name: str, work: Workload, costs: Sequence[Cost]) -> Table:
    """Return what a step of each optimizer costs."""
    total = sum(math.prod(shape) for shape in work.shapes)
    columns = ("optimizer", "ms", "times fused", "extra MiB", "first step, s")
    caption = f"times fused: of torch's SGD or AdamW, fused; {CAPTION}"
    table = _table(f"a step on {name}'s {total:,} parameters, {work.compression:g}x", columns, caption)
    for cost in costs:
        extra = "" if cost.extra_mib is None else f"{cost.extra_mib:.1f}"
        milliseconds = f"{cost.milliseconds:.3g} ± {cost.milliseconds_spread:.0%}"
        ratio = f"{cost.ratio:.2f} ± {cost.ratio_spread:.0%}"
        table.add_row(cost.name, milliseconds, ratio, extra, f"{cost.first_seconds:.2f}")
    return table


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXTS else "right")
    return table


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}" if whole else ""
