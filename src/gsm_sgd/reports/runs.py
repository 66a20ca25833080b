"""Run folders as figures: what one run came to, and several seeds together."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import yaml

from ..experiments import UsageError
from ..experiments.recipes import cut_epoch
from ..experiments.rundir import Record, read_metrics, read_processes

TITLES = {
    "base": "base net",
    "gsm_before_cut": "GSM, before the cut",
    "gsm_after_cut": "GSM, after the cut",
    "pruned": "pruned net",
    "ticket_gsm": "ticket by GSM, retrained",
    "ticket_magnitude": "ticket by magnitude, retrained",
}
"""What the keys of a result's `top1` mean, in the order in which tables show them."""

STAGES = {
    "base": "base",
    "gsm_before_cut": "gsm",
    "ticket_gsm": "ticket-gsm",
    "ticket_magnitude": "ticket-magnitude",
}
"""The stage whose last evaluation, before a cut if it is `gsm_before_cut`, a `top1` figure is."""

_LAST = 10  # evaluations in the mean that the authors' code reports
_SAME = 0.05  # points of accuracy that a cut may cost and still be called lossless


@dataclass(frozen=True)
class Run:
    """What a run's folder holds; `result` is None until the run is over."""

    path: Path
    recipe: Record
    processes: list[Record]
    metrics: list[Record]
    result: Record | None

    def last_ten(self, key: str) -> float | None:
        """Return the mean accuracy of a stage's last ten epochs, in percent, or None if they are not there."""
        records = self.uncut if key == "gsm_before_cut" else self.metrics
        top1 = [record["top1"] for record in records if record["stage"] == STAGES.get(key)]
        return fmean(top1[-_LAST:]) if top1 else None

    @property
    def uncut(self) -> list[Record]:
        """The records of GSM training up to the cut."""
        return [record for record in self.metrics if record["stage"] == "gsm" and record["epoch"] <= self.cut_epoch]

    @property
    def cut_epoch(self) -> int:
        """The epoch of GSM training at whose end the cut comes."""
        return cut_epoch(self.recipe.get("cut", 1.0), self.recipe["gsm"]["epochs"])

    @property
    def lossless_since(self) -> int | None:
        """The epoch of GSM training from which on a cut would have cost nothing, or None if the cut cost something."""
        epoch = None
        for record in reversed(self.uncut):
            if record["top1"] - record.get("cut_top1", 0.0) > _SAME:
                break
            epoch = record["epoch"]
        return epoch


def read_run(path: Path) -> Run:
    """Return what a run's folder holds.

    Raises:
        UsageError: it is not a run's folder, or a file in it is damaged.
    """
    if not (path / "recipe.yaml").is_file():
        raise UsageError(f"{path} is neither a run's folder nor a safetensors file")
    file = path / "recipe.yaml"
    try:
        recipe = yaml.safe_load(file.read_text())
        if not isinstance(recipe, dict):
            raise ValueError("not a mapping")
        file = path / "result.json"
        result = json.loads(file.read_text()) if file.exists() else None
        if result is not None and not {"command", "seed", "seconds", "top1", "layers", "paper"} <= set(result):
            raise ValueError("not a result")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UsageError(f"{file} is damaged: delete it and give the run's command again") from error
    return Run(path, recipe, read_processes(path), read_metrics(path), result)


def by_recipe(runs: Sequence[Run]) -> list[list[Run]]:
    """Return finished runs in groups that differ in the seed alone, each run once."""
    groups: dict[str, dict[Path, Run]] = {}
    for run in runs:
        if run.result is not None:
            key = json.dumps([run.result["command"], {**run.recipe, "seed": None}])
            groups.setdefault(key, {})[run.path.resolve()] = run
    return [list(group.values()) for group in groups.values()]


class Figure(NamedTuple):
    """An accuracy over the seeds, in percent: final mean, sample deviation, and mean of the last ten epochs."""

    mean: float
    std: float | None
    last_ten_mean: float | None


def figure(runs: Sequence[Run], key: str) -> Figure:
    """Return a `top1` figure over finished runs; no deviation of one run, no last ten of what is no stage's."""
    values = [run.result["top1"][key] for run in runs if run.result is not None]
    last_ten = [value for run in runs if (value := run.last_ten(key)) is not None]
    return Figure(fmean(values), stdev(values) if len(values) > 1 else None, fmean(last_ten) if last_ten else None)


def summary(runs: Sequence[Run]) -> Record:
    """Return finished runs of one recipe that differ in the seed alone as one record, for results/.

    Raises:
        UsageError: a run is not over, or the recipes differ in more than the seed.
    """
    for run in runs:
        if run.result is None:
            raise UsageError(f"{run.path} is not finished: give its command again to go on")
    groups = by_recipe(runs)
    if len(groups) > 1:
        raise UsageError(f"{groups[0][0].path} and {groups[1][0].path} differ in more than the seed")
    runs = groups[0]
    results = [run.result for run in runs if run.result is not None]
    top1: dict[str, Any] = {}
    for key in results[0]["top1"]:
        mean, std, last_ten = figure(runs, key)
        top1[key] = {"mean": round(mean, 4), "std": None if std is None else round(std, 4)}
        if last_ten is not None:
            top1[key]["last_ten_mean"] = round(last_ten, 4)
    return {
        "recipe": runs[0].recipe,
        "seeds": [result["seed"] for result in results],
        "top1": top1,
        "paper": results[0]["paper"],
        "seconds": [round(sum(result["seconds"].values()), 1) for result in results],
        "processes": [run.processes for run in runs],
        "runs": results,
    }
