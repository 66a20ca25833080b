"""What run folders hold: the result of one run, and of several seeds together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from types import NoneType
from typing import Any, NamedTuple

from ..experiments import UsageError
from ..experiments.reading import cause, read_json, read_yaml
from ..experiments.recipes import OURS, cut_epoch, method_title, net_name
from ..experiments.rundir import DEFAULTS, Record, dotted, in_use, read_metrics, read_processes

TITLES = {
    "base": "base net",
    "gsm_before_cut": "GSM, before the cut",
    "gsm_after_cut": "GSM, after the cut",
    "before_cut": "before the cut",
    "after_cut": "after the cut",
    "pruned": "pruned net",
    "dense": "dense net, as many epochs",
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
"""The stage whose last evaluation, before a cut if it is `gsm_before_cut`, an accuracy in `top1` is.

With other methods than GSM `before_cut` is of the stage that has the method's name.
"""

WEIGHTS = ("init", "base", "gsm", "pruned", "ticket-gsm", "ticket-magnitude")
"""The names of the weight files in a run's folder."""

PROGRESS = ("stage", "epoch", "loss", "top-1 %", "seconds")
"""What a row of `Run.progress` has."""

_NUMBER = (int, float)
_RECIPE: Record = {
    **{"recipe": str, "preset": str, "compression": _NUMBER, "seed": int, "cut": _NUMBER, "holdout": int},
    **{"model": str, "dataset": str, "method": str},
    **{"base": {"epochs": int}, "gsm": {"epochs": int}},
}
_RESULT: Record = {
    **{"recipe": str, "command": str, "preset": str, "compression": _NUMBER, "seed": int, "device": str},
    **{"prunable": int, "nonzeros": int, "epochs": dict, "seconds": dict, "layers": list, "paper": (dict, NoneType)},
    "top1": dict,
}
_PRUNED = ({"gsm_before_cut", "gsm_after_cut", "pruned"}, {"before_cut", "after_cut", "pruned"})
"""What is in `top1`, of GSM and of other methods, unless a ticket is all that was trained."""
_TICKETS = {"ticket_gsm", "ticket_magnitude"}
_COMMANDS = ("prune", "lottery", "replay")
_LAYER: Record = {"name": str, "shape": list, "params": int, "nonzeros": int}
"""What the files of a run have at least, and of which type."""

_ADDED: Record = {"cut": 1.0, "holdout": 0, "model": "", "dataset": "", "method": OURS}  # what a recipe may lack
_MOST_LAYERS = 10_000
_MOST_MEASUREMENTS = 100
_PERCENT = 100

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

    @property
    def net(self) -> str:
        """The name of the file of the net that the run came to: the pruned one, or a ticket's of a replay.

        Raises:
            UsageError: the run is not over.
        """
        top1 = self.finished()["top1"]
        return "pruned" if "pruned" in top1 else next(iter(top1)).replace("_", "-")

    def finished(self) -> Record:
        """Return what the run came to.

        Raises:
            UsageError: it is not over.
        """
        if self.result is None:
            raise UsageError(f"{self.path} is {self.unfinished}")
        return self.result

    @property
    def unfinished(self) -> str:
        """Why a run has no result, and what to do for one."""
        return "still running: wait for it" if in_use(self.path) else "not finished: give its command again to go on"

    @property
    def method(self) -> str:
        """What has pruned the net."""
        return str(self.recipe.get("method", OURS))

    @property
    def stages(self) -> dict[str, str]:
        """STAGES, with that of the run's method."""
        return {**STAGES, "before_cut": self.method}

    def last_ten(self, key: str) -> float | None:
        """Return the mean accuracy of a stage's last ten epochs, in percent, or None if they are not there."""
        records = self.uncut if key == "gsm_before_cut" else self.metrics
        top1 = [record["top1"] for record in records if record["stage"] == self.stages.get(key)]
        return fmean(top1[-_LAST:]) if top1 else None

    @property
    def title(self) -> str:
        """What was run, the seed left out."""
        recipe = self.recipe["recipe"]
        net = net_name(recipe, str(self.recipe.get("model", recipe)))
        settings = f"preset {self.recipe['preset']}" + ("" if net == recipe else f" of {recipe}")
        if self.method != OURS:
            settings = f"{method_title(self.method)}, {settings}"
        size = f"{self.recipe['compression']:.4g}x"
        return f"{net} at {size}{' fewer MACs' if self.recipe.get('pattern') == 'channel' else ''}, {settings}"

    @property
    def settings(self) -> Record:
        """All that tells a finished run from others but its seed; what an older recipe lacks is as it is by default."""
        return {"command": self.finished()["command"], **DEFAULTS, **dotted(self.recipe), "seed": None}

    @property
    def measured_on(self) -> str:
        """What accuracies are of."""
        if self.recipe.get("holdout"):
            return f"on {self.recipe['holdout']:,} held-out training images, not on the test set"
        if self.recipe.get("dataset") == "synthetic":
            return "on made-up data: not comparable with the paper"
        return "on the full test set after the last epoch, or at the cut"

    @property
    def progress(self) -> list[list[str]]:
        """How far each stage has come: a row of PROGRESS for its last epoch."""
        last = {record["stage"]: record for record in self.metrics}
        epochs = {stage: self.recipe["gsm" if stage in ("gsm", self.method) else "base"]["epochs"] for stage in last}
        return [
            [stage, f"{r['epoch']}/{epochs[stage]}", f"{r['loss']:.4f}", f"{r['top1']:.2f}", f"{r['seconds']:.0f}"]
            for stage, r in last.items()
        ]

    @property
    def uncut(self) -> list[Record]:
        """The records of GSM training up to the cut."""
        return [
            record for record in self.metrics if record["stage"] == self.method and record["epoch"] <= self.cut_epoch
        ]

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
    file = path / "recipe.yaml"
    try:
        recipe = read_yaml(file)
        if not isinstance(recipe, dict) or not _has({**_ADDED, **recipe}, _RECIPE):
            raise ValueError("it is no recipe")
        file = path / "result.json"
        result = _checked(read_json(file), str(recipe.get("method", OURS))) if file.exists() else None
    except (OSError, ValueError) as error:
        if file.name == "recipe.yaml" and isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UsageError(f"{path} is not a run's folder: there is no recipe.yaml in it") from error
        raise UsageError(f"{file} is damaged ({cause(error)}): delete it and give the run's command again") from error
    metrics = read_metrics(path)
    run = Run(path, recipe, read_processes(path), metrics, result)
    if not {record["stage"] for record in metrics} <= set(run.stages.values()):
        raise UsageError(f"{path / 'metrics.jsonl'} is damaged (it has a stage that no run has): delete it")
    return run


def sparse_bytes(folder: Path) -> int | None:
    """Return the size of a run's sparse file, if it has been exported."""
    path = folder / "pruned.sparse.safetensors.xz"
    return path.stat().st_size if path.is_file() else None


def read_inference(folder: Path) -> list[Record] | None:
    """Return what `gsm bench inference` has measured in a run's folder, or None if it has not.

    Raises:
        UsageError: its file is damaged.
    """
    path = folder / "inference.json"
    number = (int, float)
    kinds: dict[str, Any] = {"engine": str, "batch": int, "threads": int, "milliseconds": number, "ratio": number}
    try:
        rows: list[Record] = read_json(path)["rows"]
        if len(rows) > _MOST_MEASUREMENTS or not all(
            isinstance(row[key], kind) for row in rows for key, kind in kinds.items()
        ):
            raise ValueError("it has no such rows")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({cause(error)}): delete it and measure again") from error
    return rows


def _checked(result: object, method: str) -> Record:
    """Return a result of which all that is computed with, or names a file, is what it should be.

    Raises:
        ValueError: it is no result.
    """
    if not (isinstance(result, dict) and _has(result, _RESULT) and result["command"] in _COMMANDS):
        raise ValueError("it is no result")
    top1, layers = result["top1"], result["layers"]
    numbers = [value for key in ("epochs", "seconds", "top1") for value in result[key].values()]
    names = {layer["name"] for layer in layers if _is_layer(layer)}
    replayed = result["command"] == "replay"
    if not (
        (len(top1) == 1 if replayed else set(top1) >= _PRUNED[method != OURS])
        and set(top1) <= (_TICKETS if replayed else set(TITLES))
        and {*result["epochs"], *result["seconds"]} <= {*STAGES.values(), method}
        and all(isinstance(value, _NUMBER) and value >= 0 for value in numbers)
        and max(top1.values()) <= _PERCENT
        and all(isinstance(value, _NUMBER) for value in (result["paper"] or {}).values())
        and 0 < len(names) == len(layers) <= _MOST_LAYERS
    ):
        raise ValueError("it is no result")
    return {**result, "layers": [{key: layer[key] for key in _LAYER} for layer in layers]}


def _is_layer(layer: object) -> bool:
    return (
        isinstance(layer, dict)
        and _has(layer, _LAYER)
        and bool(layer["shape"])
        and all(isinstance(size, int) and size >= 0 for size in [*layer["shape"], layer["params"], layer["nonzeros"]])
    )


def _has(record: object, fields: Mapping[str, Any]) -> bool:
    """Return whether a record has these fields, each of the type given, or in turn with the fields given."""
    return isinstance(record, dict) and all(
        key in record and (_has(record[key], kind) if isinstance(kind, dict) else isinstance(record[key], kind))
        for key, kind in fields.items()
    )


def by_recipe(runs: Sequence[Run]) -> list[list[Run]]:
    """Return finished runs in groups that differ in the seed alone, each run once."""
    groups: dict[str, dict[Path, Run]] = {}
    for run in runs:
        if run.result is not None:
            key = repr([run.net, sorted(run.settings.items())])  # a replay is of one of two tickets
            groups.setdefault(key, {})[run.path.resolve()] = run
    return [list(group.values()) for group in groups.values()]


def comparable(runs: Sequence[Run], missing: list[str]) -> list[Run]:
    """Return the runs of one recipe, each seed once, that have pruned the same layers as the first."""
    kept: dict[int, Run] = {}
    for run in runs:
        seed = run.recipe["seed"]
        first = next(iter(kept.values()), run)
        if seed in kept:
            missing.append(f"{run.path} is left out: it is the same recipe and seed as {kept[seed].path}")
        elif _layers(run) != _layers(first):
            missing.append(f"{run.path} is left out: its layers are not those of {first.path}")
        else:
            kept[seed] = run
    return sorted(kept.values(), key=lambda run: run.recipe["seed"])


def _layers(run: Run) -> list[Record]:
    assert run.result is not None
    return [{**layer, "nonzeros": None} for layer in run.result["layers"]]


class Outcome(NamedTuple):
    """An accuracy of each run, in percent, the mean of their last ten epochs, and the paper's."""

    key: str
    values: list[float]
    last_ten_mean: float | None
    paper: float | None

    @property
    def title(self) -> str:
        """What it is the accuracy of."""
        return TITLES[self.key]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def std(self) -> float | None:
        """The sample deviation over the seeds, if there are several."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def shown(self) -> str:
        """The mean, and the deviation if there is one."""
        return f"{self.mean:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def over_seeds(values: Sequence[float]) -> Record:
    """Return mean, sample deviation if there are several, and the values, rounded for results/."""
    std = round(stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(fmean(values), 4), "std": std, "values": list(values)}


def outcome(runs: Sequence[Run], key: str, paper: float | None = None) -> Outcome:
    """Return an accuracy of finished runs; no last ten of what is no stage's."""
    last_ten = [value for run in runs if (value := run.last_ten(key)) is not None]
    values = [run.finished()["top1"][key] for run in runs]
    return Outcome(key, values, fmean(last_ten) if last_ten else None, paper)


def outcomes(runs: Sequence[Run]) -> list[Outcome]:
    """Return the accuracies of finished runs that differ in the seed alone, in the order of TITLES.

    Where the pruned net is the one after the cut, in all runs, there is one for both.
    """
    results = [run.finished() for run in runs]
    paper = dict(results[0]["paper"] or {})
    shown = [key for key in TITLES if all(key in result["top1"] for result in results)]

    def same(one: str, other: str) -> bool:
        return all(result["top1"].get(one) == result["top1"].get(other) for result in results)

    if same("gsm_after_cut", "pruned"):
        paper |= {"gsm_after_cut": paper["pruned"]} if "pruned" in paper else {}
        shown = [key for key in shown if key != "pruned"]
    if same("before_cut", "after_cut") and same("after_cut", "pruned"):  # most methods are sparse long before the end
        shown = [key for key in shown if key not in ("before_cut", "after_cut")]
    return [outcome(runs, key, paper.get(key)) for key in shown]


def lost_in_the_cut(runs: Sequence[Run]) -> float:
    """Return how many points of accuracy the cut of finished runs of one method cost, the mean over the seeds."""
    before, after = ("gsm_before_cut", "gsm_after_cut") if runs[0].method == OURS else ("before_cut", "after_cut")
    return fmean(top1[before] - top1[after] for top1 in (run.finished()["top1"] for run in runs))


def summary(runs: Sequence[Run]) -> Record:
    """Return finished runs of one recipe that differ in the seed alone as one record, for results/.

    Raises:
        UsageError: a run is not over, or the recipes differ in more than the seed.
    """
    for run in runs:
        run.finished()
    groups = by_recipe(runs)
    if len(groups) > 1:
        raise UsageError(f"{groups[0][0].path} and {groups[1][0].path} differ in more than the seed")
    runs = groups[0]
    seeds = [run.recipe["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"there are several runs of one seed among {', '.join(str(run.path) for run in runs)}")
    results = [run.finished() for run in runs]
    top1: Record = {}
    for key in results[0]["top1"]:
        found = outcome(runs, key)
        top1[key] = {"mean": round(found.mean, 4), "std": None if found.std is None else round(found.std, 4)}
        if found.last_ten_mean is not None:
            top1[key]["last_ten_mean"] = round(found.last_ten_mean, 4)
    return {
        "recipe": runs[0].recipe,
        "seeds": [result["seed"] for result in results],
        "top1": top1,
        "paper": results[0]["paper"],
        "seconds": [round(sum(result["seconds"].values()), 1) for result in results],
        "processes": [run.processes for run in runs],
        "runs": results,
    }
