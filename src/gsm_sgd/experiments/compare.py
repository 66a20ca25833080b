"""A comparison of methods: which runs it takes, how long they will take, and how settings are tuned fairly."""

import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentError, ArgumentParser
from rich.console import Console
from torch.nn import functional as F

from ..optim.checks import NonFiniteGradientError
from . import UsageError, models, suggestion
from .channels import find_channels
from .loop import TrainingDivergedError, evaluate, steps_per_epoch
from .observers import ProgressBars
from .prune import Job, gsm, prune, rival
from .reading import read_json, read_yaml
from .recipes import DENSE, OF_GSM, OURS, RIVALS, Recipe, add_settings, find_settings
from .rundir import DEFAULTS, RunFolder, dotted, read_metrics
from .splits import Dataset
from .whole_files import atomic_write

_STEPS = (5, 25)  # to warm up, and to measure
_FIXED = (
    "recipe",
    "preset",
    "method",
    "compression",
    "pattern",
    "macs",
    "latency",
    "seed",
    "holdout",
    "model",
    "dataset",
    "weights",
)
_MOST_TRIALS = 1_000
_SHARE = ".12g"  # of MACs: more digits than anybody writes, fewer than a rounding error takes
_OF_THE_BASE = ("model", "dataset", "weights", "batch_size", "seed", "precision", "holdout", "normalization")

Settings = Mapping[str, Any]
"""Settings of a recipe by dotted names, like gsm.lr or rigl.every."""


class Cell(NamedTuple):
    """A run of the comparison, and its folder."""

    recipe: Recipe
    path: Path


def parse_methods(text: str) -> list[str]:
    """Return the methods that a text like gsm,rigl,dense lists.

    Raises:
        UsageError: there is no such method, or one stands in it twice.
    """
    methods = [word.strip() for word in text.split(",")]
    for method in methods:
        find_settings(method)
    if len(set(methods)) < len(methods):
        raise UsageError(f"a method stands twice in {text!r}")
    return methods


# --- tuning ---


def parse_grid(words: Sequence[str], methods: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    """Return the trials of each method, settings by dotted names, that texts like gsm.lr=0.05,0.1 span.

    A setting of one method alone, such as rigl.every, or ramp, which is GSM's, is tuned for that one; METHOD:NAME=...
    tunes any setting for one method; and every other one is tuned for all.

    Raises:
        UsageError: a text is of another form, or the methods would not have the same number of trials.
    """
    axes: dict[str, dict[str, list[str]]] = {method: {} for method in methods}
    for word in words:
        name, equals, values = word.partition("=")
        only, colon, name = name.rpartition(":")
        if not (equals and values and name):
            raise UsageError(f"--tune takes settings like gsm.lr=0.05,0.1 or rigl:gsm.momentum=0.9,0.95, not {word!r}")
        owner = name.partition(".")[0]
        if owner in RIVALS:
            only = only or owner
        elif name in OF_GSM:
            only = only or OURS
        if (only or colon) and only not in methods:
            raise UsageError(f"--tune {word}: {only!r} is not compared, {suggestion(only, methods)}")
        if name in _FIXED:
            raise UsageError(f"--tune {word}: {name} is not for tuning")
        for method in [only] if only else methods:
            axes[method][name] = values.split(",")
    counts = {method: math.prod(len(values) for values in of.values()) for method, of in axes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{method} {count}" for method, count in counts.items())
        raise UsageError(f"every method needs as many trials, not {listed}: add values, for one by METHOD:NAME=...")
    if max(counts.values()) > _MOST_TRIALS:
        raise UsageError(f"--tune spans {max(counts.values())} trials of each method: {_MOST_TRIALS:,} are the most")
    return {
        method: [dict(zip(of, values, strict=True)) for values in itertools.product(*of.values())]
        for method, of in axes.items()
    }


def with_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return a recipe with some settings changed, values as a file or the command line may have them.

    Raises:
        UsageError: there is no such setting, or the value is not of its type.
    """
    fields = recipe.as_dict()
    for name, value in settings.items():
        if name not in dotted(fields):
            raise UsageError(f"--tune: {recipe.method} has no setting {name!r}: {suggestion(name, dotted(fields))}")
        *groups, last = name.split(".")
        for group in groups:
            fields = {**fields, group: {**fields[group], last: value}}
        if not groups:
            fields[name] = value
    types = ArgumentParser(exit_on_error=False)
    types.add_class_arguments(Recipe, skip={"settings"})
    add_settings(types, recipe.method)
    try:
        return Recipe.from_dict(types.parse_object(fields).as_dict())
    except ArgumentError as error:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        raise UsageError(f"--tune: {shown} is of a wrong type") from error


def best(trials: Sequence[tuple[Settings, float | None]]) -> Settings:
    """Return the settings of the most accurate trial, the first of several, one that failed last of all."""
    return max(trials, key=lambda trial: -1.0 if trial[1] is None else trial[1])[0]


# --- running ---


def top1_of(path: Path) -> float | None:
    """Return the accuracy of a run's pruned net, in percent, None if the run is not over."""
    try:
        return float(read_json(path / "result.json")["top1"]["pruned"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path / 'result.json'} is damaged: delete it and give the command again") from error


def carry_out(cell: Cell, data: Dataset, device: torch.device, log: Console, checkpoint_seconds: float) -> str | None:
    """Carry out a run, or what is left of it, and return None, or why it failed: its training has diverged."""
    with RunFolder(cell.path, cell.recipe, checkpoint_seconds) as folder:
        folder.check_data(data.identity)
        if folder.finished:
            return None
        folder.note_environment(device)
        adopt_base(folder)
        with ProgressBars(log) as bars:
            try:
                prune(Job(cell.recipe, data, folder, bars, device))
            except (TrainingDivergedError, NonFiniteGradientError) as error:
                return str(error)
    return None


def adopt_base(folder: RunFolder) -> None:
    """Take over the base net, and its metrics, of a run beside this one whose base training was the same."""
    recipe, path = folder.recipe, folder.path
    if recipe.start != "base" or recipe.weights is not None or (path / "base.checkpoint").exists():
        return
    if folder.has_weights("base"):
        return
    for other in sorted(path.parent.iterdir()):
        if (other / "base.safetensors").exists() and _same_base(other, path, recipe):
            for record in read_metrics(other):
                if record["stage"] == "base":
                    folder.stage("base").log(record)
            atomic_write(path / "base.safetensors", (other / "base.safetensors").read_bytes())
            return


def _same_base(other: Path, path: Path, recipe: Recipe) -> bool:
    """Return whether another run, in its own folder, has trained the base net of this recipe on the same data."""
    try:
        theirs = {**DEFAULTS, **dotted(read_yaml(other / "recipe.yaml"))}
        data = [(one / "data.json").read_bytes() if (one / "data.json").exists() else b"" for one in (other, path)]
    except (OSError, ValueError, AttributeError):
        return False
    ours = dotted(recipe.as_dict())
    same = [key for key in ours if key.startswith("base.") or key in _OF_THE_BASE]
    return data[0] == data[1] and all(theirs.get(key) == ours[key] for key in same) and theirs["start"] == "base"


# --- how long it takes ---


def share_left(cell: Cell) -> float:
    """Return what share of a run's epochs is still to come."""
    if (cell.path / "result.json").exists():
        return 0.0
    total = _epochs(cell.recipe)
    done = len(read_metrics(cell.path)) if cell.path.is_dir() else 0
    return max(0.0, 1 - done / total)


def seconds_of_runs(cells: Iterable[Cell], data: Dataset, device: torch.device) -> dict[str, float]:
    """Return about how long a run of each method takes, from a few measured steps and an evaluation."""
    one_of_each = {cell.recipe.method: cell.recipe for cell in cells}
    return {method: _seconds(recipe, data, device) for method, recipe in one_of_each.items()}


def _seconds(recipe: Recipe, data: Dataset, device: torch.device) -> float:
    model = models.build(recipe.model, recipe.seed, data.classes).to(device)
    steps = steps_per_epoch(data, recipe)
    groups = find_channels(model, next(iter(data.test.batches(1)))[0]) if recipe.pattern == "channel" else None
    if recipe.method == OURS:
        optimizer: torch.optim.Optimizer = gsm(model, recipe, steps, groups)
    else:
        model, optimizer, _ = rival(recipe, model, steps, groups)
    warm_up, measured = _STEPS
    began, taken = 0.0, 0
    for images, labels in data.train.shuffled(recipe.batch_size, recipe.seed, epoch=0):
        if taken == min(warm_up, steps - 1):
            began = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        taken += 1
        if taken == warm_up + measured:
            break
    step = (time.perf_counter() - began) / max(1, taken - min(warm_up, steps - 1))
    began = time.perf_counter()
    evaluate(model, data.test)
    return _epochs(recipe) * (steps * step + time.perf_counter() - began)


def _epochs(recipe: Recipe) -> int:
    base = recipe.base.epochs if recipe.start == "base" and recipe.weights is None else 0
    return base + recipe.gsm.epochs


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """Return cells, each folder once: the dense net is the same at every ratio."""
    return list({cell.path: cell for cell in cells}.values())


def at_ratio(recipe: Recipe, ratio: float) -> Recipe:
    """Return a recipe with another compression ratio, of channels that of the MACs; the dense net has none."""
    if recipe.method == DENSE:
        return recipe
    if recipe.pattern == "channel":
        return replace(recipe, compression=ratio, macs=float(f"{1 / ratio:{_SHARE}}"))
    return replace(recipe, compression=ratio)
