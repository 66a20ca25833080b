"""The command `gsm compare`: several methods at several ratios, tuned alike, with their results."""

import hashlib
import json
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace

from ..experiments import UsageError
from ..experiments.compare import (
    Cell,
    Settings,
    at_ratio,
    best,
    carry_out,
    parse_grid,
    parse_methods,
    seconds_of_runs,
    share_left,
    top1_of,
    unique,
    with_settings,
)
from ..experiments.environment import environment
from ..experiments.loop import fitting_precision
from ..experiments.plan import dense_of, folder_of, parse_ratios, parse_seeds
from ..experiments.recipes import DENSE, OURS, Recipe, by_method, method_title, net_name
from ..experiments.rundir import Record, RunFolder
from ..experiments.whole_files import atomic_write
from ..export.rebuild import load_data
from ..export.run import export
from ..optim.checks import CutWarning
from ..reports import figures, html
from ..reports.frontier import (
    Series,
    frontier_csv,
    frontier_figure,
    frontier_table,
    ratios_of,
    series_of,
    verdicts,
)
from ..reports.runs import Run, by_recipe, over_seeds, read_run, sparse_bytes
from .console import Console, find_device, set_threads
from .runs import check_net, check_planned, check_running, recipe_of_options

_TUNING = "tuning"  # the folder of trials, in the one of the runs
_DIGITS = 6
Log = Callable[[object], None]


@dataclass(frozen=True)
class Comparison:
    """What is compared: a recipe, methods with their settings, ratios and seeds, and the trials of each method."""

    recipe: Recipe
    recipes: dict[str, Recipe]
    ratios: list[float]
    seeds: list[int]
    trials: dict[str, list[dict[str, str]]]
    out: Path
    device: torch.device

    @property
    def tuned(self) -> bool:
        """Whether settings are to be chosen on held-out images."""
        return any(trial for trials in self.trials.values() for trial in trials)

    def trial(self, method: str, ratio: float, settings: Settings) -> Cell:
        """Return the run of a trial."""
        recipe = at_ratio(with_settings(self.recipes[method], settings), ratio)
        return Cell(recipe, folder_of(self.out / _TUNING, recipe, "prune", self.device))

    def runs(self, method: str, ratio: float, settings: Settings) -> list[Cell]:
        """Return the runs of all seeds with these settings; if they were tuned, measured on the test set."""
        recipe = at_ratio(with_settings(self.recipes[method], settings), ratio)
        recipe = replace(recipe, holdout=0) if self.tuned else recipe
        seeded = [replace(recipe, seed=seed) for seed in self.seeds]
        return [Cell(one, folder_of(self.out, one, "prune", self.device)) for one in seeded]

    @property
    def all_trials(self) -> list[Cell]:
        """Every run that tuning takes, each once."""
        places = [(method, ratio) for method in self.recipes for ratio in self.ratios] if self.tuned else []
        return unique(self.trial(*place, settings) for place in places for settings in self.trials[place[0]])

    @property
    def folder(self) -> Path:
        """The folder of what comes out; another comparison has another one."""
        parts = [sorted(map(repr, self.recipes.items())), self.ratios, self.seeds, self.trials]
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:_DIGITS]
        return self.out / f"{net_name(self.recipe.recipe, self.recipe.model)}-compare-{self.recipe.preset}-{digest}"


def compare_methods(options: Namespace, console: Console, log: Console) -> int:
    """Compare methods, and return the exit status."""
    check_running(options)
    device = find_device(options.device)
    set_threads(options.threads)
    recipe = recipe_of_options(options).scaled(options.epochs_scale)
    if recipe.method != OURS:
        raise UsageError("a comparison starts from a recipe of GSM: leave out --method, name all in --methods")
    recipe = replace(recipe, precision=fitting_precision(recipe.precision, device))
    plan = planned(recipe, options, device)
    runs = {cell.path: cell.recipe for cell in possible_runs(plan)}
    check_planned(runs)
    check_net(runs, load_data(recipe, options.data_dir).classes)
    failures = compare(plan, options, console, log, console.say)
    for failure in failures:
        log.say(f"failed: {failure}")
    return 1 if failures else 0


def planned(recipe: Recipe, options: Namespace, device: torch.device) -> Comparison:
    """Return what the options ask for; nothing is written.

    Raises:
        UsageError: an option makes no sense.
    """
    methods = parse_methods(options.methods)
    if methods == [DENSE]:
        raise UsageError("methods must name something that prunes, not dense alone")
    if options.jobs < 1:
        raise UsageError(f"jobs must be at least 1, not {options.jobs}")
    trials = parse_grid(options.tune or [], methods)
    if options.tune and not recipe.holdout:
        raise UsageError("--tune chooses settings on held-out training images: add --holdout 5000, say")
    recipes = {}
    for method in methods:
        one = dense_of(recipe) if method == DENSE else by_method(recipe, method)
        own = options.get(method) if one.settings else None
        recipes[method] = replace(one, settings={**one.settings, **own.as_dict()}) if own else one
    seeds = [recipe.seed] if options.seeds is None else parse_seeds(options.seeds)
    ratios = parse_ratios(options.compression)
    if recipe.pattern == "channel":
        ratios = [1 / share for share in parse_ratios(options.macs)]
    return Comparison(recipe, recipes, ratios, seeds, trials, options.out, device)


def possible_runs(plan: Comparison) -> list[Cell]:
    """Return every run that may come: the trials, and final ones with the settings of any trial."""
    places = [(method, ratio) for method in plan.recipes for ratio in plan.ratios]
    finals = [cell for place in places for trial in plan.trials[place[0]] for cell in plan.runs(*place, trial)]
    return unique([*plan.all_trials, *finals])


def compare(plan: Comparison, options: Namespace, console: Console, log: Console, say: Log) -> list[str]:
    """Carry out what is missing, show and write what came out, and return which runs have failed, and why."""
    places = [(method, ratio) for method in plan.recipes for ratio in plan.ratios]
    untuned = unique(cell for method, ratio in places for cell in plan.runs(method, ratio, plan.trials[method][0]))
    _say_how_long([*plan.all_trials, *untuned], options, plan.device, say)
    failures = _carry_out(plan.all_trials, options, plan.device, log, say)

    tuning: Record = {}
    cells: list[Cell] = []
    for method, ratio in places:
        tried = [(one, top1_of(plan.trial(method, ratio, one).path)) for one in plan.trials[method] if plan.tuned]
        chosen = best(tried) if tried else {}
        tuning.setdefault(method, {})[f"{ratio:g}"] = {
            "chosen": chosen,
            "trials": [{"settings": settings, "top1": top1} for settings, top1 in tried],
        }
        cells += plan.runs(method, ratio, chosen)
    cells = unique(cells)
    failures += _carry_out(cells, options, plan.device, log, say)

    runs = [read_run(cell.path) for cell in cells if top1_of(cell.path) is not None]
    if not runs:
        raise UsageError(f"every run has failed: {'; '.join(failures)}")
    _note_dense(runs, cells, options)
    series = _in_order(series_of(by_recipe(runs)), plan)
    _write(plan, series, runs, tuning if plan.tuned else None)
    _show(plan, series, tuning, console, say)
    return failures


def _carry_out(cells: Sequence[Cell], options: Namespace, device: torch.device, log: Console, say: Log) -> list[str]:
    """Carry out runs, several at a time if so asked, export them, and return which have failed, and why."""
    missing = [cell for cell in cells if top1_of(cell.path) is None or sparse_bytes(cell.path) is None]
    if not missing:
        return []
    common = (options.data_dir, str(device), options.threads, options.checkpoint_seconds)
    failures: list[str] = []

    def over(number: int, cell: Cell, failure: str | None) -> None:
        came_to = f"failed, {failure}" if failure else f"{top1_of(cell.path):.2f} %"
        say(f"{number}/{len(missing)} {cell.path.name}: {came_to}")
        failures.extend([f"{cell.path}: {failure}"] if failure else [])

    if options.jobs == 1:
        for number, cell in enumerate(missing, 1):
            over(number, cell, _run_one(cell, *common, log))
        return failures
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, spawn, initializer=_end_quietly) as pool:
        waiting = {pool.submit(_run_one, cell, *common): cell for cell in missing}
        try:
            for number, done in enumerate(as_completed(waiting), 1):
                over(number, waiting[done], done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(pool._processes.values()):
                process.terminate()
            raise
    return failures


def _run_one(
    cell: Cell,
    data_dir: Path | None,
    device: str,
    threads: int | None,
    checkpoint_seconds: float,
    log: Console | None = None,
) -> str | None:
    """Carry out a run and export it, in this process or in another one; return why it failed, if it did."""
    if threads is not None:
        torch.set_num_threads(threads)
    key = repr((cell.recipe.dataset, cell.recipe.normalization, cell.recipe.holdout, cell.recipe.model, data_dir))
    if key not in _DATA:
        _DATA.clear()  # one data set in memory
        _DATA[key] = load_data(cell.recipe, data_dir).to(torch.device(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutWarning)  # of many runs, some with settings on trial
        quiet = log or Console(quiet=True)
        failure = carry_out(cell, _DATA[key], torch.device(device), quiet, checkpoint_seconds)
    if failure is None and sparse_bytes(cell.path) is None:
        export(cell.path, "sparse")
    return failure


_DATA: dict[str, Any] = {}  # the data set that this process has loaded


def _end_quietly() -> None:
    """Let Ctrl-C end a worker without a traceback: its parent says what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _say_how_long(cells: Sequence[Cell], options: Namespace, device: torch.device, say: Log) -> None:
    """Say how many runs there are, how many are over, and how long the others will take."""
    left = {cell.path: share for cell in cells if (share := share_left(cell))}
    text = f"{len(cells)} runs, {len(cells) - len(left)} of them over"
    if left:
        going = [cell for cell in cells if cell.path in left]
        data = load_data(going[0].recipe, options.data_dir).to(device)
        each = seconds_of_runs(going, data, device)
        seconds = sum(each[cell.recipe.method] * left[cell.path] for cell in going) / min(options.jobs, len(going))
        shown = ", ".join(f"{method} {seconds:.0f} s" for method, seconds in each.items())
        text += f"; the others take about {timedelta(seconds=round(seconds))} (a run of {shown}, as measured now)"
    say(text)


def _note_dense(runs: Sequence[Run], cells: Sequence[Cell], options: Namespace) -> None:
    """Add to each result what the dense net of its seed reaches, if that is compared."""
    recipes = {cell.path: cell.recipe for cell in cells}
    dense = {run.recipe["seed"]: run.finished()["top1"]["pruned"] for run in runs if run.method == DENSE}
    for run in runs:
        if run.method != DENSE and run.recipe["seed"] in dense:
            with RunFolder(run.path, recipes[run.path], options.checkpoint_seconds) as folder:
                folder.add_top1({"dense": dense[run.recipe["seed"]]})


def _in_order(series: Sequence[Series], plan: Comparison) -> list[Series]:
    """Return series in the order in which the methods were named."""
    order = list(plan.recipes)
    return sorted(series, key=lambda one: order.index(one.method))


def _write(plan: Comparison, series: Sequence[Series], runs: Sequence[Run], tuning: Record | None) -> None:
    """Write figure, CSV, report, and all of it as JSON."""
    plan.folder.mkdir(parents=True, exist_ok=True)

    def put(name: str, write: Callable[[Any], None]) -> None:
        atomic_write(plan.folder / name, write)

    figures.save(frontier_figure(series), "frontier", _title(plan), put)
    atomic_write(plan.folder / "frontier.csv", frontier_csv(series).encode())
    record = _record(plan, series, tuning)
    atomic_write(plan.folder / "compare.json", (json.dumps(record, indent=1) + "\n").encode())
    html.write_report([run.path for run in runs], plan.folder / "report.html")


def _title(plan: Comparison) -> str:
    """Return what was compared."""
    recipe = plan.recipe
    return f"{net_name(recipe.recipe, recipe.model)} on {recipe.dataset}, {recipe.gsm.epochs} epochs"


def _record(plan: Comparison, series: Sequence[Series], tuning: Record | None) -> Record:
    cells: Record = {}
    for one in series:
        found = {ratio: one.at(ratio) for ratio in ratios_of(series)}
        cells[one.label] = {f"{ratio:g}": over_seeds(cell.values) for ratio, cell in found.items() if cell is not None}
    holdout = plan.recipe.holdout
    return {
        "benchmark": "compare",
        **{"model": plan.recipe.model, "epochs": plan.recipe.gsm.epochs, "seeds": plan.seeds},
        **{"holdout": 0 if plan.tuned else holdout, "environment": environment(plan.device), "methods": cells},
        **({} if tuning is None else {"tuning": {"holdout": holdout, "seed": plan.recipe.seed, "methods": tuning}}),
        "recipes": {method: recipe.as_dict() for method, recipe in plan.recipes.items()},
    }


def _show(plan: Comparison, series: Sequence[Series], tuning: Record, console: Console, say: Log) -> None:
    """Print the table, who leads, what was chosen, and where all of it is."""
    seeds = ", ".join(map(str, plan.seeds))
    held = plan.recipe.holdout and not plan.tuned
    where = f"{plan.recipe.holdout:,} held-out training images" if held else "the test set"
    caption = f"top-1 % on {where}, mean ± deviation over seeds {seeds}"
    console.print(frontier_table(series, _title(plan), caption))
    for text in verdicts(series):
        say(text)
    if plan.tuned:
        for method, by_ratio in tuning.items():
            chosen = [f"{ratio}x {_shown(found['chosen'])}" for ratio, found in by_ratio.items()]
            count = len(plan.trials[method])
            say(f"{method_title(method)}: {count} trials; {'; '.join(chosen)}")
    say(f"frontier.png, frontier.csv, compare.json and report.html in {plan.folder}")


def _shown(settings: Settings) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
