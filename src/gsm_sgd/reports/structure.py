"""Sections of a report on the nets: what each layer keeps, where masks agree, how large the weights are."""

from statistics import fmean, stdev

from torch import Tensor

from . import figures, nets
from .blocks import Block, Group, Picture, Table, by, number, percent, tried
from .figures import Bar
from .tables import empty_layers_of

_MANY_LAYERS = 24  # more make a long table
Masks = dict[str, dict[int, dict[str, Tensor]]]
"""Which weights of each layer are kept, by method and seed."""


def read_masks(group: Group, missing: list[str]) -> Masks:
    """Return the masks of finished runs, and add what cannot be read to `missing`."""
    masks: Masks = {}
    for run in group.runs:
        for method in nets.methods(run):
            found = tried(missing, nets.mask, run, method)
            if found is not None:
                masks.setdefault(method, {})[run.recipe["seed"]] = found
    return masks


def layers(group: Group, masks: Masks) -> list[Block]:
    """Return what each layer keeps, chosen by GSM and by magnitude."""
    first = group.results[0]["layers"]
    own = nets.methods(group.runs[0])[0]
    counts = {own: [[layer["nonzeros"] for layer in result["layers"]] for result in group.results]}
    if own == "GSM" and "magnitude" in masks:
        counts["magnitude"] = [list(nets.kept(found).values()) for found in masks["magnitude"].values()]
    sizes = [layer["params"] for layer in first]
    bars, columns, cells = [], [], []
    for (method, of_seeds), colour in zip(counts.items(), ("blue", "orange"), strict=False):
        by_layer = [list(column) for column in zip(*of_seeds, strict=True)]
        shares = [[percent(kept, size) for kept in column] for column, size in zip(by_layer, sizes, strict=True)]
        means = [fmean(column) for column in shares]
        spread = [stdev(column) for column in shares] if len(of_seeds) > 1 else None
        texts = [
            f"{method} keeps {number(column)}, {number(s, '.2f')} %" for column, s in zip(by_layer, shares, strict=True)
        ]
        bars.append(Bar(f"chosen by {method}", colour, means, texts, spread))
        columns += [f"kept by {method}", "%"]
        total = [sum(column) for column in of_seeds]
        cells.append([number(column) for column in [*by_layer, total]])
        cells.append([number(column, ".2f") for column in [*shares, [percent(kept, sum(sizes)) for kept in total]]])
    names = [[layer["name"], by(layer["shape"]), f"{layer['params']:,}"] for layer in first]
    names.append(["all", "", f"{sum(sizes):,}"])
    rows = [[*lead, *(column[index] for column in cells)] for index, lead in enumerate(names)]
    texts = [f"Global density: {percent(sum(counts[own][0]), sum(sizes)):.2f} %."]
    if own == "GSM":
        texts[0] += " GSM has found each layer's by itself."
    texts += empty_layers_of(group.runs)
    if "magnitude" not in masks:
        texts.append("There is no base net to be read here, and so no choice by magnitude to compare with.")
    labels = [f"{layer['name']}\n{by(layer['shape'])}" for layer in first]
    figure = figures.bars(labels, bars, "weights kept, % of the layer")
    caption = "What each layer keeps" + (", mean ± standard deviation over the seeds" if len(group.runs) > 1 else "")
    table = Table(caption, ["layer", "shape", "weights", *columns], rows, texts=2, folded=len(rows) > _MANY_LAYERS)
    return [Block("", texts, Picture(figure, "Share of the weights that each layer keeps, by method."), [table])]


def agreement(group: Group, masks: Masks) -> list[Block]:
    """Return how far the masks of methods and seeds agree, beside what chance would give."""
    found = [(method, seed, mask) for method, of_seeds in masks.items() for seed, mask in of_seeds.items()]
    if len(found) < 2:
        return [
            Block("", ["There is one mask only: a second seed, or a base net, gives something to compare it with."])
        ]
    pairs: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = {}
    for index, (method, seed, theirs) in enumerate(found):
        for other, other_seed, ours in found[:index]:
            seeds = "same seed" if seed == other_seed else "different seeds"
            pairs.setdefault(f"{other} and {method}, {seeds}", []).append((ours, theirs))
    rows, layer_rows = [], [[name] for name in found[0][2]]
    for kind, of_kind in pairs.items():
        agreed = [nets.agreement(ours, theirs) for ours, theirs in of_kind]
        in_percent = [[100 * share for share in shares] for shares in zip(*agreed, strict=True)]
        rows.append([kind, str(len(of_kind)), *(number(shares, ".2f") for shares in in_percent)])
        for cells in layer_rows:
            layer = [nets.agreement({cells[0]: a[cells[0]]}, {cells[0]: b[cells[0]]}) for a, b in of_kind]
            cells += [f"{100 * fmean(one.overlap for one in layer):.2f}"]
            cells += [f"{100 * fmean(one.chance_overlap for one in layer):.2f}"]
    titles = ["overlap %", "by chance %", "Jaccard index %", "by chance %"]
    layer_columns = [title for kind in pairs for title in (f"{kind}: overlap %", "by chance %")]
    text = (
        "Overlap: of the weights that one mask keeps, the share that the other keeps too. Jaccard index: of the "
        "weights that either keeps, the share that both keep. By chance: what masks would have in common that keep as "
        "many weights of each layer, but any. Masks are named by method and seed; nets of different seeds start from "
        "different weights."
    )
    names = [f"{method}, {seed}" for method, seed, _ in found]
    overlaps = [[100 * nets.agreement(ours, theirs).overlap for *_, theirs in found] for *_, ours in found]
    described = "Overlap in % between the masks of all methods and seeds."
    picture = Picture(figures.matrix(names, overlaps, "overlap"), described)
    tables = [
        Table("Agreement of pairs of masks", ["masks", "pairs", *titles], rows),
        Table("By layer", ["layer", *layer_columns], layer_rows, folded=len(layer_rows) > _MANY_LAYERS),
    ]
    return [Block("", [text], picture if len(found) > 2 else None, tables)]


def weights(group: Group, missing: list[str]) -> list[Block]:
    """Return the distribution of |w| before and after the cut, means over the seeds."""
    run = group.runs[0]
    start = "init" if run.recipe.get("start") == "init" else "base"
    titles = {start: f"start of GSM training ({start})", "gsm": "end of GSM training", "pruned": "pruned net"}
    if run.net != "pruned":
        titles = {"init": "initialisation", run.net: "ticket, retrained"}
    drawn = dict(zip(titles, (("ink", "circle"), ("orange", "diamond"), ("blue", "square")), strict=False))
    found: dict[str, list[nets.Histogram]] = {}
    for one in group.runs:
        for name in titles:
            read = tried(missing, nets.histogram, one, name)
            if read is not None:
                found.setdefault(name, []).append(read)
    texts = []
    if run.net == "pruned" and run.cut_epoch < run.recipe["gsm"]["epochs"]:
        texts.append(
            f"The cut came on the way, after epoch {run.cut_epoch} of {run.recipe['gsm']['epochs']}, and no file has "
            "the weights as they were before it: gsm.safetensors, the net at the end of training, is cut already."
        )
    if "gsm" in found and found["gsm"] == found.get("pruned"):
        del found["gsm"]
        texts.append("The net at the end of training is the pruned net.")
    if not found:
        return [Block("", [*texts, "The files of the weights are not there, or damaged."])]
    counts = {name: [fmean(column) for column in zip(*(h.counts for h in found[name]), strict=True)] for name in found}
    zeros = {name: fmean(h.zeros for h in found[name]) for name in found}
    exact = "; ".join(f"{titles[name]} {count:,.0f}" for name, count in zeros.items())
    texts.append(f"Exactly zero, and so not in the picture: {exact}.")
    lines = [(titles[name], *drawn[name], counts[name]) for name in found]
    bounds = [nets.LOWEST + index / nets.BINS_PER_DECADE for index in range(len(next(iter(counts.values()))) + 1)]
    rows = [["exactly 0", "", *(f"{count:,.0f}" for count in zeros.values())]]
    rows += [
        [
            f"{10 ** bounds[index]:.2g}",
            f"{10 ** bounds[index + 1]:.2g}",
            *(f"{counts[name][index]:,.0f}" for name in found),
        ]
        for index in range(len(bounds) - 1)
        if any(counts[name][index] for name in found)
    ]
    mean = ", means over the seeds" if len(group.runs) > 1 else ""
    table = Table(f"Weights by |w|{mean}", ["|w| from", "to", *(titles[name] for name in found)], rows, folded=True)
    picture = Picture(figures.histograms(lines), "How many weights there are of each size, before and after the cut.")
    return [Block("", texts, picture, [table])]
