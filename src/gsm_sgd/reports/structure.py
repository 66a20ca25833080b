"""Sections of a report on the nets: what each layer keeps, where masks agree, how large the weights are."""

from statistics import fmean, stdev

from matplotlib.figure import Figure
from torch import Tensor

from ..experiments.rundir import Record
from . import figures, nets
from .blocks import Block, Group, Table, by, number, percent, tried
from .figures import Bar
from .tables import empty_layers_of

_MANY_LAYERS = 24  # more make a long table
Masks = dict[str, dict[int, dict[str, Tensor]]]
"""Which weights of each layer are kept, by method and seed."""

Kept = dict[str, list[list[int]]]
"""How many weights each layer keeps of each seed, by method; the run's own method first."""


def read_masks(group: Group, missing: list[str]) -> Masks:
    """Return the masks of finished runs, and add what cannot be read to `missing`."""
    masks: Masks = {}
    for run in group.runs:
        for method in nets.methods(run):
            found = tried(missing, nets.mask, run, method)
            if found is not None:
                masks.setdefault(method, {})[run.recipe["seed"]] = found
    return masks


def kept_by(group: Group, masks: Masks) -> Kept:
    """Return what each layer keeps, chosen by the run's own method and by magnitude."""
    own = nets.methods(group.runs[0])[0]
    columns = zip(*(result["layers"] for result in group.results), strict=True)
    kept = {own: [[layer["nonzeros"] for layer in of_seeds] for of_seeds in columns]}
    if own == "GSM" and "magnitude" in masks:
        counts = [nets.kept(mask).values() for mask in masks["magnitude"].values()]
        kept["magnitude"] = [list(of_seeds) for of_seeds in zip(*counts, strict=True)]
    return kept


def density(layers: list[Record], kept: Kept) -> Figure:
    """Return bars of the share of weights that each layer keeps."""
    bars = []
    for (method, counts), colour in zip(kept.items(), ("blue", "orange"), strict=False):
        shares = [[percent(one, layer["params"]) for one in of] for layer, of in zip(layers, counts, strict=True)]
        texts = [f"{number(share, '.2f')} %" for share in shares]
        if len(shares[0]) == 1:
            texts = [f"{text} ({of[0]:,})" for text, of in zip(texts, counts, strict=True)]
        spread = [stdev(share) for share in shares] if len(shares[0]) > 1 else None
        bars.append(Bar(f"chosen by {method}", colour, [fmean(share) for share in shares], texts, spread))
    labels = [f"{layer['name']}\n{by(layer['shape'])}" for layer in layers]
    return figures.bars(labels, bars, "weights kept, % of the layer")


def layers(group: Group, masks: Masks) -> list[Block]:
    """Return what each layer keeps, chosen by GSM and by magnitude."""
    first = group.results[0]["layers"]
    kept = kept_by(group, masks)
    total = sum(layer["params"] for layer in first)
    rows = [[layer["name"], by(layer["shape"]), f"{layer['params']:,}"] for layer in first] + [["all", "", f"{total:,}"]]
    sizes = [*(layer["params"] for layer in first), total]
    for counts in kept.values():
        sums = [sum(of_seed) for of_seed in zip(*counts, strict=True)]
        for row, of, size in zip(rows, [*counts, sums], sizes, strict=True):
            row += [number(of), number([percent(one, size) for one in of], ".2f")]
    columns = ["layer", "shape", "weights", *(title for method in kept for title in (f"kept by {method}", "%"))]
    texts = [f"Global density: {percent(group.results[0]['nonzeros'], total):.2f} %."]
    if "GSM" in kept:
        texts[0] += " GSM has found each layer's by itself."
    texts += empty_layers_of(group.runs)
    if "magnitude" not in masks:
        texts.append("There is no base net to be read here, and so no choice by magnitude to compare with.")
    caption = "What each layer keeps" + group.over_seeds(", mean ± standard deviation over the seeds")
    table = Table(caption, columns, rows, texts=2, folded=len(rows) > _MANY_LAYERS)
    description = "Share of the weights that each layer keeps, by method."
    return [Block("", texts, density(first, kept), description, [table])]


def agreement(group: Group, masks: Masks) -> list[Block]:
    """Return how far the masks of methods and seeds agree, against what chance would give."""
    found = [(method, seed, mask) for method, of_seeds in masks.items() for seed, mask in of_seeds.items()]
    if len(found) < 2:
        return [Block(texts=["There is one mask only: a second seed, or a base net, gives something to compare it with."])]
    pairs: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = {}
    for index, (method, seed, theirs) in enumerate(found):
        for other, other_seed, ours in found[:index]:
            seeds = "same seed" if seed == other_seed else "different seeds"
            pairs.setdefault(f"{other} and {method}, {seeds}", []).append((ours, theirs))
    rows, layer_rows = [], [[name] for name in found[0][2]]
    for kind, of_kind in pairs.items():
        agreed = [nets.agreement(ours, theirs) for ours, theirs in of_kind]
        shares = [[100 * share for share in of] for of in zip(*agreed, strict=True)]
        rows.append([kind, str(len(of_kind)), *(number(of, ".2f") for of in shares)])
        for row in layer_rows:
            name = row[0]
            layer = [nets.agreement({name: ours[name]}, {name: theirs[name]}) for ours, theirs in of_kind]
            row += [f"{100 * fmean(one.overlap for one in layer):.2f}"]
            row += [f"{100 * fmean(one.chance_overlap for one in layer):.2f}"]
    text = (
        "Overlap: of the weights that one mask keeps, the share that the other keeps too. Jaccard index: of the "
        "weights that either keeps, the share that both keep. By chance: the same for random masks that keep as many "
        "weights of each layer. Masks are named by method and seed; nets of different seeds start from different weights."
    )
    titles = ["overlap %", "by chance %", "Jaccard index %", "by chance %"]
    layer_columns = [title for kind in pairs for title in (f"{kind}: overlap %", "by chance %")]
    tables = [
        Table("Agreement of pairs of masks", ["masks", "pairs", *titles], rows),
        Table("By layer", ["layer", *layer_columns], layer_rows, folded=len(layer_rows) > _MANY_LAYERS),
    ]
    figure = None
    if len(found) > 2:
        overlaps = [[100 * nets.agreement(ours, theirs).overlap for *_, theirs in found] for *_, ours in found]
        figure = figures.matrix([f"{method}, {seed}" for method, seed, _ in found], overlaps)
    return [Block("", [text], figure, "Overlap in % between the masks of all methods and seeds.", tables)]


def weights(group: Group, missing: list[str]) -> list[Block]:
    """Return the distribution of |w| before and after the cut, means over the seeds."""
    run = group.runs[0]
    start = "init" if run.recipe.get("start") == "init" else "base"
    titles = {start: f"start of GSM training ({start})", "gsm": "end of GSM training", "pruned": "pruned net"}
    if run.net != "pruned":
        titles = {"init": "initialisation", run.net: "ticket, retrained"}
    drawn = dict(zip(titles, (("ink", "o"), ("orange", "D"), ("blue", "s")), strict=False))
    found: dict[str, list[nets.Histogram]] = {}
    for one in group.runs:
        for name in titles:
            read = tried(missing, nets.histogram, one, name)
            if read is not None:
                found.setdefault(name, []).append(read)
    texts = []
    if run.net == "pruned" and run.cut_epoch < run.recipe["gsm"]["epochs"]:
        texts.append(
            f"The cut came after epoch {run.cut_epoch} of {run.recipe['gsm']['epochs']}, and no file has the weights "
            "as they were before it: gsm.safetensors, the net at the end of training, is cut already."
        )
    if "gsm" in found and found["gsm"] == found.get("pruned"):
        del found["gsm"]
        texts.append("The net at the end of training is the pruned net.")
    if not found:
        return [Block(texts=[*texts, "The files of the weights are not there, or damaged."])]
    counts = {name: [fmean(of) for of in zip(*(one.counts for one in found[name]), strict=True)] for name in found}
    zeros = {titles[name]: f"{fmean(one.zeros for one in found[name]):,.0f}" for name in found}
    exact = "; ".join(f"{title} {count}" for title, count in zeros.items())
    texts.append(f"Exactly zero, and so not in the figure: {exact}.")
    rows = [["exactly 0", "", *zeros.values()]]
    for index, of_bin in enumerate(zip(*counts.values(), strict=True)):
        if any(of_bin):
            edges = (10 ** (nets.LOWEST + edge / nets.BINS_PER_DECADE) for edge in (index, index + 1))
            rows.append([*(f"{edge:.2g}" for edge in edges), *(f"{count:,.0f}" for count in of_bin)])
    caption = f"Weights by |w|{group.over_seeds(', means over the seeds')}"
    table = Table(caption, ["|w| from", "to", *zeros], rows, folded=True)
    figure = figures.histograms([(titles[name], *drawn[name], counts[name]) for name in found])
    return [Block("", texts, figure, "How many weights there are of each size, before and after the cut.", [table])]
