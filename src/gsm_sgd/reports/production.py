"""Sections of a report on what a pruned net costs, and on how it was made."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..experiments import UsageError
from ..experiments.reading import cause, read_json
from ..experiments.rundir import Record
from . import figures, nets
from .blocks import Block, Group, Picture, Table, listed, tried
from .figures import Bar

_OF_A_PROCESS = (
    *("command", "commit", "version", "torch", "python", "processor", "instructions", "cores", "threads", "processes"),
    *("device", "started", "system"),
)
_KIB = 1024
_MOST = 100  # measurements, and processes, of a run: a page for people to read
_BY_PARTS = "values and positions"


def size_and_speed(group: Group, missing: list[str]) -> list[Block]:
    """Return the sizes of the pruned net's files beside what its parts come to, and measured latencies."""
    return [_sizes(group, missing), *_latency(group, missing)]


def _sizes(group: Group, missing: list[str]) -> Block:
    net = group.runs[0].net
    files: dict[str, list[float]] = {_BY_PARTS: []}
    for run in group.runs:
        size = tried(missing, nets.size_by_parts, run)
        if size is not None:
            files[_BY_PARTS].append(size)
        for path in sorted(run.path.glob(f"{net}.*")):
            if path.is_file() and path.suffix != ".partial":
                files.setdefault(path.name, []).append(path.stat().st_size)
    files = {name: sizes for name, sizes in files.items() if sizes}
    dense = files.get(f"{net}.safetensors")
    if dense is None:
        return Block("Size", [f"{net}.safetensors is not there."])
    means = {name: fmean(sizes) for name, sizes in sorted(files.items(), key=lambda item: -fmean(item[1]))}
    rows = [
        [name, str(len(files[name])), f"{mean / _KIB:,.1f}", f"{fmean(dense) / mean:.2f}"]
        for name, mean in means.items()
    ]
    texts = [
        f"{_BY_PARTS[0].upper()}{_BY_PARTS[1:]}: kept weights in 32 bits, their positions in as many bits as it takes "
        f"to tell the choices of as many weights of each layer apart, and all else as it is. {net}.safetensors has "
        "every zero. A sparse file can be smaller where the weights' exponents differ little."
    ]
    if len(files) <= 2:
        texts.append(f"No smaller file of this net has been made yet: gsm export {group.runs[0].path} makes one.")
    bar = Bar("KiB", "blue", [mean / _KIB for mean in means.values()], [f"{row[2]} KiB" for row in rows])
    picture = Picture(figures.bars(list(means), [bar], "KiB"), "Sizes of the files of the pruned net.")
    mean = " (means over the seeds)" if len(group.runs) > 1 else ""
    table = Table(f"Files of the pruned net{mean}", ["file", "runs that have it", "KiB", "times smaller"], rows)
    return Block("Size", texts, picture, [table])


def _latency(group: Group, missing: list[str]) -> list[Block]:
    measured = [
        (str(run.recipe["seed"]), row) for run in group.runs for row in tried(missing, _inference, run.path) or []
    ]
    if not measured:
        return [Block("Latency", [f"Not measured yet: gsm bench inference {group.runs[0].path} does it."])]
    rows = [
        [
            row["engine"],
            seed,
            str(row["batch"]),
            str(row["threads"]),
            _short(row["milliseconds"]),
            f"{row['ratio']:.2f}",
        ]
        for seed, row in measured
    ]
    columns = ["engine", "seed", "batch", "threads", "milliseconds", "times as fast"]
    table = Table("Inference; times as fast as torch's dense net", columns, rows)
    pictures = [
        Block(f"Latency, {threads} thread{'s' if threads > 1 else ''}", picture=_latencies(measured, threads))
        for threads in sorted({row["threads"] for _, row in measured})
    ]
    return [*pictures, Block("", tables=[table])]


def _latencies(measured: Sequence[tuple[str, Record]], threads: int) -> Picture:
    """Return a picture of what a batch takes with so many threads, means over the seeds."""
    found: dict[str, list[float]] = {}
    for _, row in measured:
        if row["threads"] == threads:
            found.setdefault(f"{row['engine']}\nbatch {row['batch']}", []).append(row["milliseconds"])
    means = [fmean(values) for values in found.values()]
    bar = Bar("ms", "blue", means, [f"{_short(value)} ms" for value in means])
    figure = figures.bars(list(found), [bar], "milliseconds for a batch", log=True)
    return Picture(figure, f"Milliseconds of inference by engine and batch, with {threads} of the processor's threads.")


def _inference(folder: Path) -> list[Record] | None:
    """Return what `gsm bench inference` has measured, or None if it has not."""
    path = folder / "inference.json"
    kinds: dict[str, Any] = {
        "engine": str,
        "batch": int,
        "threads": int,
        "milliseconds": (int, float),
        "ratio": (int, float),
    }
    try:
        rows: list[Record] = read_json(path)["rows"]
        if len(rows) > _MOST or not all(isinstance(row[key], kind) for row in rows for key, kind in kinds.items()):
            raise ValueError("it has no such rows")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({cause(error)}): delete it and measure again") from error
    return rows


def recipe_and_environment(group: Group) -> list[Block]:
    """Return what was run, for how long, and by which processes."""
    recipe = {key: value for key, value in group.runs[0].recipe.items() if key != "seed"}
    seeds = f"Seed{'s' if len(group.runs) > 1 else ''} {listed(group.seeds)}"
    text = f"{seeds}. recipe.yaml in a run's folder, which has this, can be the --config of another run."
    blocks = [Block("Recipe", [text], code=yaml.safe_dump(recipe, sort_keys=False))]
    stages = list(group.results[0]["epochs"]) if group.results else []
    rows = []
    for seed, result in zip(group.seeds, group.results, strict=False):
        cells = (f"{result['epochs'].get(stage, 0)} / {result['seconds'].get(stage, 0):,.0f}" for stage in stages)
        rows.append([str(seed), *cells])
    if rows:
        blocks.append(Block("Time", tables=[Table("Epochs / seconds of training", ["seed", *stages], rows)]))
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
