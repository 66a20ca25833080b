"""Sections of a report on what a pruned net costs, and on how it was made."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from ..experiments import UsageError
from ..experiments.rundir import Record
from . import figures, nets
from .blocks import Block, Group, Picture, Table, listed, tried
from .figures import Bar

_OF_A_PROCESS = (
    *("command", "commit", "version", "torch", "python", "processor", "cores", "threads", "processes", "device"),
    *("started", "system"),
)
_KIB = 1024


def size_and_speed(group: Group, missing: list[str]) -> list[Block]:
    """Return the sizes of the pruned net's files beside the least that it needs, and measured latencies."""
    return [_sizes(group, missing), _latency(group, missing)]


def _sizes(group: Group, missing: list[str]) -> Block:
    files: dict[str, list[float]] = {"the least possible": []}
    for run in group.runs:
        least = tried(missing, nets.smallest_size, run)
        if least is not None:
            files["the least possible"].append(least)
        for path in sorted(run.path.glob("pruned.*")):
            if path.is_file() and path.suffix != ".partial":
                files.setdefault(path.name, []).append(path.stat().st_size)
    files = {name: sizes for name, sizes in files.items() if sizes}
    dense = files.get("pruned.safetensors")
    if dense is None:
        return Block("Size", ["pruned.safetensors is not there."])
    means = {name: fmean(sizes) for name, sizes in sorted(files.items(), key=lambda item: -fmean(item[1]))}
    rows = [
        [name, str(len(files[name])), f"{mean / _KIB:,.1f}", f"{fmean(dense) / mean:.2f}"]
        for name, mean in means.items()
    ]
    texts = [
        "The least possible: kept weights in 32 bits, their positions in as many bits as there are choices, and all "
        "else as it is. pruned.safetensors has every zero."
    ]
    if len(files) <= 2:
        texts.append(f"No smaller file of this net has been made yet: gsm export {group.runs[0].path} makes one.")
    bar = Bar("KiB", "blue", [mean / _KIB for mean in means.values()], [f"{row[2]} KiB" for row in rows])
    picture = Picture(figures.bars(list(means), [bar], "KiB"), "Sizes of the files of the pruned net.")
    mean = " (means over the seeds)" if len(group.runs) > 1 else ""
    table = Table(f"Files of the pruned net{mean}", ["file", "runs that have it", "KiB", "times smaller"], rows)
    return Block("Size", texts, picture, [table])


def _latency(group: Group, missing: list[str]) -> Block:
    measured = [
        (str(run.recipe["seed"]), row) for run in group.runs for row in tried(missing, _inference, run.path) or []
    ]
    if not measured:
        return Block("Latency", [f"Not measured yet: gsm bench inference {group.runs[0].path} does it."])
    labels = [f"{row['engine']}\nbatch {row['batch']}, seed {seed}" for seed, row in measured]
    milliseconds = [row["milliseconds"] for _, row in measured]
    bar = Bar("ms", "blue", milliseconds, [f"{_short(value)} ms" for value in milliseconds])
    figure = figures.bars(labels, [bar], "milliseconds for a batch", log=True)
    rows = [
        [row["engine"], seed, str(row["batch"]), str(row["threads"]), _short(ms), f"{row['ratio']:.2f}"]
        for (seed, row), ms in zip(measured, milliseconds, strict=True)
    ]
    table = Table("Inference", ["engine", "seed", "batch", "threads", "milliseconds", "ratio"], rows)
    return Block("Latency", (), Picture(figure, "Milliseconds of inference by engine."), [table])


def _inference(folder: Path) -> list[Record] | None:
    """Return what `gsm bench inference` has measured, or None if it has not."""
    path = folder / "inference.json"
    if not path.exists():
        return None
    kinds: dict[str, Any] = {
        "engine": str,
        "batch": int,
        "threads": int,
        "milliseconds": (int, float),
        "ratio": (int, float),
    }
    try:
        rows: list[Record] = json.loads(path.read_text())["rows"]
        if not all(isinstance(row[key], kind) for row in rows for key, kind in kinds.items()):
            raise ValueError("not such rows")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: delete it and measure again") from error
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
        for process in run.processes
    ]
    if not processes:
        return [*blocks, Block("Environment", ["environment.json is not there."])]
    columns = ["seed", *_OF_A_PROCESS]
    caption = "What ran these runs; several processes of one seed where it was interrupted"
    return [*blocks, Block("Environment", tables=[Table(caption, columns, processes, texts=len(columns))])]


def _short(value: float) -> str:
    """Return a number in three digits."""
    return f"{float(f'{value:.3g}'):,g}"
