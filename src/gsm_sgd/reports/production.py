"""Sections of a report on what a pruned net costs, and on how it was made."""

from statistics import fmean

import yaml

from . import figures
from .blocks import Block, Group, Table, listed, tried
from .figures import Row
from .runs import read_inference

_OF_A_PROCESS = (
    *("command", "commit", "version", "torch", "python", "processor", "instructions", "cores", "threads", "processes"),
    *("device", "started", "system"),
)
_KIB = 1024
_MOST = 100  # processes of a run: a page for people to read


def size_and_speed(group: Group, missing: list[str]) -> list[Block]:
    """Return the sizes of the pruned net's files, and measured latencies."""
    return [_sizes(group), *_latency(group, missing)]


def _sizes(group: Group) -> Block:
    net = group.runs[0].net
    files: dict[str, list[float]] = {}
    for run in group.runs:
        for path in sorted(run.path.glob(f"{net}.*")):
            if path.is_file() and path.suffix != ".partial":
                files.setdefault(path.name, []).append(path.stat().st_size)
    dense = files.get(f"{net}.safetensors")
    if dense is None:
        return Block("Size", [f"{net}.safetensors is not there."])
    means = {name: fmean(sizes) for name, sizes in sorted(files.items(), key=lambda item: -fmean(item[1]))}
    rows = [
        [name, str(len(files[name])), f"{mean / _KIB:,.1f}", f"{fmean(dense) / mean:.2f}"]
        for name, mean in means.items()
    ]
    texts = [f"{net}.safetensors has every zero."]
    if len(files) == 1:
        texts.append(f"No smaller file of this net has been made yet: gsm export {group.runs[0].path} makes one.")
    marks = [Row(row[0], "blue", [size / _KIB for size in files[row[0]]], f"{row[2]} KiB") for row in rows]
    figure = figures.marks(marks, "KiB") if len(files) > 1 else None
    caption = f"Files of the pruned net{group.over_seeds(' (means over the seeds)')}"
    table = Table(caption, ["file", "runs that have it", "KiB", "times smaller"], rows)
    return Block("Size", texts, figure, "Sizes of the files of the pruned net.", [table])


def _latency(group: Group, missing: list[str]) -> list[Block]:
    measured = [
        (run.recipe["seed"], row) for run in group.runs for row in tried(missing, read_inference, run.path) or []
    ]
    if not measured:
        return [Block("Latency", [f"Not measured yet: gsm bench inference {group.runs[0].path} does it."])]
    rows = []
    for seed, row in measured:
        counts = (str(count) for count in (seed, row["batch"], row["threads"]))
        rows.append([row["engine"], *counts, _short(row["milliseconds"]), f"{row['ratio']:.2f}"])
    columns = ["engine", "seed", "batch", "threads", "milliseconds", "times as fast"]
    table = Table("Inference; times as fast as torch's dense net", columns, rows, folded=True)
    blocks = []
    for threads in sorted({row["threads"] for _, row in measured}):
        found: dict[str, list[float]] = {}
        for _, row in measured:
            if row["threads"] == threads:
                found.setdefault(f"{row['engine']}\nbatch {row['batch']}", []).append(row["milliseconds"])
        marks = [Row(name, "blue", values, f"{_short(fmean(values))} ms") for name, values in found.items()]
        figure = figures.marks(marks, "milliseconds for a batch")
        heading = f"Latency, {threads} thread{'s' if threads > 1 else ''}"
        blocks.append(Block(heading, [], figure, f"{heading}: milliseconds by engine and batch."))
    return [*blocks, Block(tables=[table])]


def recipe_and_environment(group: Group) -> list[Block]:
    """Return what was run, for how long, and by which processes."""
    recipe = {key: value for key, value in group.runs[0].recipe.items() if key != "seed"}
    seconds = [f"{sum(result['seconds'].values()):,.0f} s" for result in group.results]
    text = f"Seed{group.over_seeds('s')} {listed(group.seeds)}{', trained for ' if seconds else ''}{listed(seconds)}. "
    text += "recipe.yaml in a run's folder, which has this, can be the --config of another run."
    blocks = [Block("Recipe", [text], code=yaml.safe_dump(recipe, sort_keys=False))]
    processes = [
        [str(run.recipe["seed"]), *(str(process.get(key, "")) for key in _OF_A_PROCESS)]
        for run in group.runs
        for process in run.processes[-_MOST:]
    ]
    if not processes:
        return [*blocks, Block("Environment", ["environment.json is not there."])]
    columns = ["seed", *_OF_A_PROCESS]
    caption = "What ran these runs; several processes of one seed where it was interrupted"
    if any(len(run.processes) > _MOST for run in group.runs):
        caption += f", the last {_MOST} of each"
    return [*blocks, Block("Environment", tables=[Table(caption, columns, processes, texts=len(columns))])]


def _short(value: float) -> str:
    """Return a number in three digits."""
    return f"{float(f'{value:.3g}'):,g}"
