"""Sections of a report on the nets: what each layer keeps, and where masks agree."""

import itertools

from matplotlib.figure import Figure
from torch import Tensor

from . import figures, nets
from .blocks import Block, Group, Table, by, number, percent, tried
from .tables import costs_line, empty_layers_of

_MANY_LAYERS = 24  # more make a long table
_DRAWN = 300  # layers in a figure
Masks = dict[str, dict[int, dict[str, Tensor]]]
"""Which weights of each layer are kept, by method and seed."""

Kept = dict[str, list[tuple[int, ...]]]
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
    counts = {own: [[layer["nonzeros"] for layer in result["layers"]] for result in group.results]}
    if own != "magnitude" and "magnitude" in masks:
        counts["magnitude"] = [list(nets.kept(mask).values()) for mask in masks["magnitude"].values()]
    return {method: list(zip(*of_seeds, strict=True)) for method, of_seeds in counts.items()}


def widths(group: Group) -> Figure:
    """Return bars of the share of channels that each layer keeps, of the first 300 if there are more."""
    layers = group.results[0]["widths"][:_DRAWN]
    kept = [[row["widths"][index]["pruned"] for row in group.results] for index in range(len(layers))]
    shares = [[percent(one, layer["dense"]) for one in of] for layer, of in zip(layers, kept, strict=True)]
    names = [f"{layer['name']}\n{layer['dense']} channels" for layer in layers]
    return figures.bars(names, {nets.methods(group.runs[0])[0]: shares}, "channels kept, % of the layer")


def channels(group: Group) -> list[Block]:
    """Return the widths of layers before and after, if the runs have pruned channels."""
    if not all("widths" in result for result in group.results):
        return []
    results = group.results
    cells = []
    for index, layer in enumerate(results[0]["widths"]):
        kept = [result["widths"][index]["pruned"] for result in results]
        shares = [percent(one, layer["dense"]) for one in kept]
        cells.append([layer["name"], str(layer["dense"]), number(kept), number(shares, ".1f")])
    caption = "Channels of each layer" + group.over_seeds(", mean ± standard deviation over the seeds")
    table = Table(caption, ["layer", "dense", "kept", "%"], cells, folded=len(cells) > _MANY_LAYERS)
    texts = [costs_line(result) for result in results]
    return [Block("Channels", texts, widths(group), "Share of the channels that each layer keeps.", [table])]


def density(group: Group, kept: Kept) -> Figure:
    """Return bars of the share of weights that each layer keeps, of the first 300 if there are more."""
    layers = group.results[0]["layers"][:_DRAWN]
    shares = {
        method: [[percent(one, layer["params"]) for one in of] for layer, of in zip(layers, counts, strict=False)]
        for method, counts in kept.items()
    }
    names = [f"{layer['name']}\n{by(layer['shape'])}" for layer in layers]
    return figures.bars(names, shares, "weights kept, % of the layer")


def layers(group: Group, masks: Masks) -> list[Block]:
    """Return what each layer keeps, chosen by GSM and by magnitude."""
    rows = [(layer["name"], by(layer["shape"]), layer["params"]) for layer in group.results[0]["layers"]]
    rows.append(("all", "", sum(size for *_, size in rows)))
    kept = kept_by(group, masks)
    cells = [[name, shape, f"{size:,}"] for name, shape, size in rows]
    for counts in kept.values():
        totals = tuple(map(sum, zip(*counts, strict=True)))
        for row, of, (*_, size) in zip(cells, [*counts, totals], rows, strict=True):
            row += [number(of), number([percent(one, size) for one in of], ".2f")]
    columns = ["layer", "shape", "weights", *(title for method in kept for title in (f"kept by {method}", "%"))]
    texts = [f"Global density: {cells[-1][4]} %."]
    if "GSM" in kept:
        texts[0] += " GSM has found each layer's by itself."
    texts += empty_layers_of(group.runs)
    if "magnitude" not in masks and "widths" not in group.results[0]:
        texts.append("There is no base net to be read here, and so no choice by magnitude to compare with.")
    caption = "What each layer keeps" + group.over_seeds(", mean ± standard deviation over the seeds")
    table = Table(caption, columns, cells, texts=2, folded=len(rows) > _MANY_LAYERS)
    block = Block("", texts, density(group, kept), "Share of the weights that each layer keeps, by method.", [table])
    return [*channels(group), block]


def agreement(group: Group, masks: Masks) -> list[Block]:
    """Return how far the masks of methods and seeds agree, against what chance would give."""
    found = [(method, seed, mask) for method, of_seeds in masks.items() for seed, mask in of_seeds.items()]
    if len(found) < 2:
        return []  # a second seed, or a base net, would give something to compare it with
    pairs: dict[str, list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = {}
    for (method, seed, ours), (other, other_seed, theirs) in itertools.combinations(found, 2):
        seeds = "same seed" if seed == other_seed else "different seeds"
        pairs.setdefault(f"{method} and {other}, {seeds}", []).append((ours, theirs))
    rows = []
    for kind, of_kind in pairs.items():
        agreed = [nets.agreement(ours, theirs) for ours, theirs in of_kind]
        shares = [[100 * share for share in of] for of in zip(*agreed, strict=True)]
        rows.append([kind, str(len(of_kind)), *(number(of, ".2f") for of in shares)])
    text = (
        "Overlap: of the weights that one mask keeps, the share that the other keeps too. Jaccard index: of the "
        "weights that either keeps, the share that both keep. By chance: the same for random masks that keep as many "
        "weights of each layer. Masks are named by method and seed; each seed starts from other weights."
    )
    titles = ["overlap %", "by chance %", "Jaccard index %", "by chance %"]
    table = Table("Agreement of pairs of masks", ["masks", "pairs", *titles], rows)
    figure = None
    if len(found) > 2:
        overlaps = [[100 * nets.agreement(ours, theirs).overlap for *_, theirs in found] for *_, ours in found]
        figure = figures.matrix([f"{method}, {seed}" for method, seed, _ in found], overlaps)
    return [
        Block("Agreement of masks", [text], figure, "Overlap in % between the masks of all methods and seeds.", [table])
    ]
