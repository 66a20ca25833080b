"""The command `gsm`: recipes, pruning and lottery runs, what they came to, and the data."""

import errno
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from .arguments import in_options, parse
from .comparing import compare, planned, possible_runs
from .experiments import UsageError, bench, data, models, ranks, suggestion
from .experiments.channels import find_channels
from .experiments.loop import fitting_precision
from .experiments.lottery import lottery
from .experiments.observers import ProgressBars
from .experiments.plan import dense_of, folder_of, parse_ratios, parse_seeds
from .experiments.pretrained import is_torchvisions, load_pretrained
from .experiments.prune import Job, gsm, prune, rival
from .experiments.reading import read_yaml
from .experiments.recipes import DENSE, OURS, Recipe, net_name
from .experiments.rundir import Record, RunFolder, check_recipe
from .experiments.states import tensors_hash
from .experiments.whole_files import write_output
from .export.files import layers_in
from .export.inference import MEASUREMENTS, Latency, latency_table, measure_inference, verdict
from .export.rebuild import image_shape, load_data, recipe_of, verify_accuracy
from .export.run import export, export_name
from .export.sparse import read_sparse
from .export.target import compression_for, parse_size
from .export.ticket import check_fits, read_ticket, replay, save_ticket
from .masks import LayerSparsity, sparsity_rows
from .names import is_prunable
from .reports import accuracy, figures, html, structure, sweep, tables
from .reports.blocks import Group, tried
from .reports.frontier import frontier_table, ratios_of, series_of, verdicts
from .reports.runs import WEIGHTS, Run, by_recipe, comparable, read_run, summary

_COMMANDS = {"prune": prune, "lottery": lottery}
_MANY = 6  # groups of runs, of which more are shown together alone
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a user's share of it, of what a file may have


class _Console(Console):
    """A console to which names, whoever has given them, are text: neither markup nor commands to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:  # of all that is printed, in tables too
        """Return a string as it is shown."""
        return super().render_str("\n".join(map(tables.printable, text.split("\n"))), **options)

    def say(self, text: object) -> None:
        """Print one line, however long, without colours."""
        self.print(str(text), highlight=False, soft_wrap=True)


def run(argv: Sequence[str]) -> int:
    """Run `gsm` with its arguments and return the exit status: 0 done, 1 failed, 2 bad usage."""
    # tables in a file are not squeezed into 80 columns; of several processes the first one speaks
    console, log = (_Console(stderr=stderr, markup=False, quiet=ranks.rank() > 0) for stderr in (False, True))
    if not console.is_terminal:
        console.width = 100
    try:
        options = parse([word for word in argv if word != "--debug"])
        if ranks.is_distributed() and options.command not in _COMMANDS:
            raise UsageError(f"gsm {options.command} takes one process: start it without torchrun")
        match options.command:
            case "list":
                console.print(tables.recipes_table())
            case "data":
                console.say(data.describe(options.dataset, options.data_dir))
            case "bench":
                _bench(options, console, log)
            case "show":
                _show(options.runs, options.json, console, log)
            case "report":
                for missing in html.write_report(options.runs, options.output):
                    log.say(f"missing: {missing}")
                console.say(options.output)
            case "export":
                where = (options.out, options["values"], options.data_dir, options.model)
                console.say(export(options.run, options.format, *where))
            case "verify":
                _verify(options, console)
            case "ticket save":
                console.say(save_ticket(options.run, options.method, options.out))
            case "ticket replay":
                _replay(options, console, log)
            case "compare":
                return _compare(options, console, log)
            case command:
                with warnings.catch_warnings():
                    warnings.showwarning = lambda message, *_: log.say(f"warning: {in_options(str(message))}")
                    _run(command, options, console, log)
    except Exception as error:
        if "--debug" in argv:
            raise
        return _complain(error)
    return 0


def _complain(error: Exception) -> int:
    """Print one line that says what is wrong, and return the exit status."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        again = "; make room, then give the same command again" if error.errno in _FULL else ""
        text = f"{error.filename}: {error.strerror}{again}"
    elif not isinstance(error, UsageError):
        text += f" ({type(error).__name__}; --debug shows where)"
    who = f"gsm, process {ranks.rank()}" if ranks.rank() else "gsm"
    print(f"{who}: error: {tables.printable(text)}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


# --- prune and lottery ---


def _run(command: str, options: Namespace, console: _Console, log: _Console) -> None:
    """Run a recipe for each seed and show what came out."""
    device = _device(options.device)
    planned, dense = _plan(command, options, device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dataset = load_data(next(iter(planned.values())), options.data_dir).shard(ranks.rank(), ranks.world_size())
    _check_net(planned, dataset.classes)

    with ranks.process_group(device) as device:
        for path, recipe in planned.items():
            with RunFolder(path, recipe, options.checkpoint_seconds) as folder:
                log.say(f"{path}{_already(folder)}")
                folder.check_data(dataset.identity)
                if not folder.finished:
                    folder.note_environment(device)
                    tensorboard = path / "tensorboard" if options.tensorboard and folder.writes else None
                    with ProgressBars(log, tensorboard) as bars:
                        _COMMANDS[command](Job(recipe, dataset.to(device), folder, bars, device))
                if recipe.seed in dense and recipe.method != DENSE:
                    folder.add_top1({"dense": read_run(dense[recipe.seed]).finished()["top1"]["pruned"]})
                if folder.writes:
                    _save_figures(read_run(path), folder)
    if folder.writes:
        _print_groups(by_recipe([read_run(path) for path in planned]), console)
        for path in planned if options.get("target_size") is not None else ():
            _export_small(path, parse_size(options.target_size), console)


def _compare(options: Namespace, console: _Console, log: _Console) -> int:
    """Compare methods, and return the exit status."""
    _check_running(options)
    device = _device(options.device)
    recipe = _recipe(options).scaled(options.epochs_scale)
    if recipe.method != OURS:
        raise UsageError("a comparison starts from a recipe of GSM: leave out --method, name all in --methods")
    if recipe.pattern == "channel":
        raise UsageError("gsm compare is of single weights: compare runs of channels by gsm report")
    recipe = replace(recipe, precision=fitting_precision(recipe.precision, device))
    plan = planned(recipe, options, device)
    runs = {cell.path: cell.recipe for cell in possible_runs(plan)}
    _check_planned(runs)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    _check_net(runs, load_data(recipe, options.data_dir).classes)
    failures = compare(plan, options, console, log, console.say)
    for failure in failures:
        log.say(f"failed: {failure}")
    return 1 if failures else 0


def _already(folder: RunFolder) -> str:
    """Return what is to be said of a run that an earlier command has begun, or ended; a stage says how far it was."""
    if folder.finished:
        return ": finished already, nothing to do"
    done = [
        name for name in dict.fromkeys((*WEIGHTS, folder.recipe.method)) if name != "init" and folder.has_weights(name)
    ]
    if done:
        return f": resumes, {', '.join(done)} done already"
    return ": resumes" if any(folder.path.glob("*.checkpoint")) else ""


def _plan(command: str, options: Namespace, device: torch.device) -> tuple[dict[Path, Recipe], dict[int, Path]]:
    """Return the folders and recipes of all runs, checked before anything is written, and dense runs' by seed."""
    _check_running(options)
    recipe = _recipe(options)
    if 0 < recipe.batch_size < ranks.world_size():
        processes = f"some of {ranks.world_size()} processes"
        raise UsageError(f"batch_size {recipe.batch_size} leaves {processes} without an image")
    # what is chosen for this machine stands in the run's recipe, so that no other goes on with something else
    recipe = replace(recipe, precision=fitting_precision(recipe.precision, device))
    seeds = [recipe.seed] if options.seeds is None else parse_seeds(options.seeds)
    channels = recipe.pattern == "channel"  # of which the ratio follows from the MACs
    ratios = [recipe.compression] if channels else parse_ratios(options.compression)
    if options.get("target_size") is not None:
        ratios = [_fitting_compression(options, recipe, seeds)]
    if command == "lottery" and recipe.method != OURS:
        raise UsageError(f"a lottery is of GSM's tickets and magnitude's, not of {recipe.method}'s: take gsm prune")
    recipes = [replace(recipe, seed=seed, compression=ratio) for ratio in ratios for seed in seeds]
    if options.get("baseline"):
        recipes = [*(dense_of(replace(recipe, seed=seed)) for seed in seeds), *recipes]
    runs: dict[Path, Recipe] = {}
    for one in recipes:
        one.check()
        scaled = one.scaled(options.epochs_scale)
        is_baseline = one.method == DENSE and recipe.method != DENSE
        name = None if is_baseline else options.name  # it is shared by runs of any name
        runs[folder_of(options.out, scaled, command, device, name)] = scaled
    dense = {one.seed: path for path, one in runs.items() if one.method == DENSE and options.get("baseline")}
    if recipe.weights is not None and command == "lottery":
        raise UsageError(
            "a lottery trains its base net from the ticket's initialisation: leave out --weights, or set it to null if "
            "the recipe has some"
        )
    if recipe.pattern == "channel" and command == "lottery":
        raise UsageError("a lottery is for single weights: leave out --pattern channel")
    _check_planned(runs)
    return runs, dense


def _check_running(options: Namespace) -> None:
    """Raise UsageError if how to run makes no sense."""
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"threads must be at least 1, not {options.threads}")
    if not (math.isfinite(options.checkpoint_seconds) and options.checkpoint_seconds >= 0):
        raise UsageError(f"checkpoint-seconds must be at least 0, not {options.checkpoint_seconds}")


def _check_planned(runs: Mapping[Path, Recipe]) -> None:
    """Raise UsageError for what a run would refuse later, or if a folder was made by another recipe."""
    for recipe in runs.values():
        recipe.check()
    for source in _base_nets_to_load(runs):
        if not is_torchvisions(source) and not Path(source).is_file():
            raise UsageError(f"weights {source} do not exist: give a file, or torchvision")
    for recipe in {repr(replace(recipe, seed=0)): recipe for recipe in runs.values()}.values():
        _check_optimizer(recipe)
    for path, recipe in runs.items():
        check_recipe(path, recipe)


def _fitting_compression(options: Namespace, recipe: Recipe, seeds: Sequence[int]) -> float:
    """Return the compression ratio at which the sparse files of runs with these seeds have the size asked for."""
    target = parse_size(options.target_size)
    # only data can tell how many classes a net has that is not of a fixed number
    classes = None if recipe.model in models.MODELS else load_data(recipe, options.data_dir).classes
    recipes = [replace(recipe, seed=seed).scaled(options.epochs_scale) for seed in seeds]
    return compression_for(target, models.build(recipe.model, recipe.seed, classes), recipes)


def _export_small(folder: Path, target: int, console: _Console) -> None:
    """Export a run that was to fit a size."""
    console.say(export(folder, "sparse"))
    size = (folder / export_name("pruned", "sparse")).stat().st_size
    if size > target:
        raise RuntimeError(f"the file of {folder} has {size:,} bytes, more than the {target:,} that were to be enough")


def _check_optimizer(recipe: Recipe) -> None:
    """Raise UsageError for what GSM, or another method, would refuse later, before anything is written."""
    model = models.build(recipe.model, recipe.seed)
    try:
        with warnings.catch_warnings(action="ignore"):  # given again when the stage begins
            groups = None
            if recipe.pattern == "channel":
                groups = find_channels(model, torch.zeros(1, *image_shape(recipe)))
            if recipe.method == OURS:
                gsm(model, recipe, steps_per_epoch=1_000, groups=groups)
            else:
                rival(recipe, model, 1_000, groups)
    except ValueError as error:
        raise UsageError(in_options(str(error))) from error


def _check_net(planned: Mapping[Path, Recipe], classes: int) -> None:
    """Raise UsageError for a net or weights that a run would refuse, before its folder is made and belongs to them."""
    recipe = next(iter(planned.values()))
    model = models.build(recipe.model, recipe.seed, classes)
    models.check_fits(model, recipe.model, recipe.dataset, image_shape(recipe), classes)
    for source in _base_nets_to_load(planned):
        load_pretrained(model, recipe.model, source)


def _base_nets_to_load(planned: Mapping[Path, Recipe]) -> list[str]:
    """Return where runs have their base nets from, each place once, without what they have copied already."""
    missing = (recipe.pretrained for path, recipe in planned.items() if not (path / "base.safetensors").exists())
    return list(dict.fromkeys(source for source in missing if source is not None))


def _recipe(options: Namespace) -> Recipe:
    """Return the recipe that the options add up to."""
    for path in options.config or []:
        theirs = read_yaml(Path(path)).get("recipe", options.recipe)
        if theirs != options.recipe:
            raise UsageError(f"{path} is for the recipe {theirs}, not {options.recipe}")
    given = options.as_dict()
    for stage in ("base", "gsm"):
        if not isinstance(given[stage], dict):
            raise UsageError(f"{stage} must be settings of its own, like {stage}.epochs, not {given[stage]}")
    given["compression"] = parse_ratios(given["compression"])[0]
    if given["pattern"] == "channel" and given["macs"] > 0:
        given["compression"] = 1 / given["macs"]
    names = {*(field.name for field in fields(Recipe)), given["method"]} - {"settings"}
    return Recipe.from_dict({name: given[name] for name in names if name in given})


def _device(name: str) -> torch.device:
    """Return a device that works; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: choose auto or cpu") from error
    return device


def _save_figures(finished: Run, folder: RunFolder) -> None:
    """Put figures of the layers' density and of the training curves into a run's folder."""
    title = f"{finished.title}, seed {finished.recipe['seed']}"
    group = Group(title, [finished])
    kept = structure.kept_by(group, structure.read_masks(group, []))
    if "widths" in group.results[0]:
        figures.save(structure.widths(group), "widths", title, folder.save_figure)
    figures.save(structure.density(group, kept), "density", title, folder.save_figure)
    figures.save(figures.curves(accuracy.training_panels(group)), "curves", title, folder.save_figure)


# --- show ---


def _show(paths: Sequence[Path], json_path: Path | None, console: _Console, log: _Console) -> None:
    """Show what can be read of runs and files, and say what cannot."""
    paths = list({os.path.realpath(path): path for path in paths}.values())  # each once, however it is written
    files = [path for path in paths if os.path.isfile(path)]  # noqa: PTH113  # False of what may not be looked at
    missing: list[str] = []
    layers = {path: rows for path in files if (rows := tried(missing, layers_in, path)) is not None}
    runs = [one for path in paths if path not in files and (one := tried(missing, read_run, path))]
    if missing and (json_path is not None or not (runs or layers)):
        raise UsageError("; ".join(missing))
    groups = [comparable(group, missing) for group in by_recipe(runs)]
    for reason in missing:
        log.say(f"missing: {reason}")
    if json_path is not None:
        if files:
            raise UsageError("--json takes run folders, not files")
        write_output(json_path, (json.dumps(summary(runs), indent=1) + "\n").encode(), "--json")
    for path, rows in layers.items():
        _print_layers(rows, path, console)
    for one in (one for one in runs if one.result is None):
        console.print(tables.progress_table(one))
    _print_groups(groups, console)


def _print_layers(layers: Sequence[LayerSparsity], path: Path, console: _Console) -> None:
    """Print what each layer of a file keeps."""
    console.print(tables.layers_table(layers, str(path)))
    if text := tables.empty_layers((row.name, row.params, row.nonzeros) for row in layers):
        console.say(text)


def _print_groups(groups: Sequence[list[Run]], console: _Console) -> None:
    """Print runs of each recipe, if there are few, and what they have in common: net, data and a range of ratios."""
    for group in groups if len(groups) <= _MANY else ():
        _print_results(group, console)
    for title, family in sweep.families([Group("", group) for group in groups]).items():
        series = series_of([group.runs for group in family])
        if ratios_of(series):
            console.print(frontier_table(series, title, "top-1 % of the pruned net, mean ± deviation over the seeds"))
            for text in verdicts(series):
                console.say(text)
    if len(groups) > _MANY:
        console.say(f"{len(groups)} groups of runs: gsm show of up to {_MANY} has layers and stages of each")


def _print_results(runs: Sequence[Run], console: _Console) -> None:
    """Print accuracies of runs of one recipe, and what each layer of the first keeps."""
    result: Record | None = runs[0].result
    assert result is not None
    layers = [LayerSparsity(**layer) for layer in result["layers"]]
    console.print(tables.results_table(runs))
    replayed = result["command"] == "replay"
    what = "ticket" if replayed else "pruned net"
    console.print(tables.layers_table(layers, f"{what} of seed {result['seed']}"))
    if not replayed and (text := tables.cut_line(runs)):
        console.say(text)
    for text in tables.empty_layers_of(runs):
        console.say(text)
    if text := tables.costs_line(result):
        console.say(text)
    seconds = sum(sum(one.result["seconds"].values()) for one in runs if one.result)
    where = runs[0].path if len(runs) == 1 else f"{runs[0].path} and {len(runs) - 1} more"
    files = "weights" if replayed else "weights, curves.png, density.png"
    console.say(f"{seconds:.0f} s of training; {files} in {where}")


# --- export ---


def _verify(options: Namespace, console: _Console) -> None:
    """Check a sparse file and say what is true of it."""
    file = read_sparse(options.file)
    certificate = file.certificate
    counts = f"{certificate.nonzeros:,} of {certificate.prunable:,} weights, each layer's, and sha256"
    text = f"verified: {counts} {certificate.sha256}"
    if options.accuracy:
        text += f"; accuracy measured again: {verify_accuracy(options.file, file, options.data_dir, options.model)}"
    elif certificate.top1 is not None:
        text += f"; accuracy stated: {certificate.top1:.2f} %, --accuracy measures it"
    others = [name for name in file.tensors if name not in file.prunable and is_prunable(file.tensors[name])]
    if others:
        text += f"; not counted, as it is stored as unpruned: {', '.join(others)}"
    _print_layers(sparsity_rows(file.pruned), options.file, console)
    console.say(text)


def _replay(options: Namespace, console: _Console, log: _Console) -> None:
    """Train a stored ticket again and say whether it came to the same."""
    ticket = read_ticket(options.file)
    recipe = recipe_of(ticket.recipe, options.file, options.model)
    device = _device(options.device)
    threads = ticket.threads if options.threads is None else options.threads
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    torch.set_num_threads(threads)
    dataset = load_data(recipe, options.data_dir).to(device)
    check_fits(ticket, recipe, dataset.classes, options.file)
    which = tensors_hash(ticket.masks)[:12]  # another ticket of the same recipe and seed is another run
    net, of_run = net_name(recipe.recipe, recipe.model), f"x{recipe.compression:g}-s{recipe.seed}"
    name = f"{net}-replay-{ticket.method}-{recipe.preset}-{of_run}-{which}"
    with RunFolder(options.out / name, recipe) as folder:
        log.say(f"{folder.path}{_already(folder)}")
        if not folder.finished:
            folder.note_environment(device)
        with ProgressBars(log) as bars:
            again = replay(Job(recipe, dataset, folder, bars, device), ticket, options.file)
    if again.same_weights and again.top1 == ticket.top1:
        console.say(f"identical: {again.top1:.2f} %, and the same weights to the bit")
        return
    same = "the same accuracy" if again.top1 == ticket.top1 else "not identical"
    console.say(
        f"{same}: {again.top1:.2f} % here, {ticket.top1:.2f} % there, with other weights; the bits are those of one "
        f"machine and number of threads, there {ticket.threads} ({ticket.machine}), here {threads}"
    )


# --- bench ---


def _bench(options: Namespace, console: _Console, log: _Console) -> None:
    """Measure what a step costs on the shapes of each model named, or how long the nets of runs take."""
    match options.subject:
        case "step":
            _bench_steps(options, console, log)
        case "inference":
            if not options.names:
                raise UsageError("name the folders of the runs to measure: gsm bench inference RUN...")
            for folder in map(Path, options.names):
                with _progress(log, str(folder), MEASUREMENTS) as progress:
                    latencies = measure_inference(folder, options.model, progress)
                console.print(latency_table(str(folder), latencies))
                console.say(verdict(latencies))
                _warn_if_busy(latencies, log)
        case subject:
            raise UsageError(f"unknown benchmark {subject!r}: {suggestion(subject, ('step', 'inference'))}")


def _bench_steps(options: Namespace, console: _Console, log: _Console) -> None:
    if options.repeats < 1:
        raise UsageError(f"repeats must be at least 1, not {options.repeats}")
    device = _device(options.device)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # that there is no CUDA is no news
    works = {name: bench.workload(name) for name in options.names or ("lenet300", "resnet56")}
    for name, work in works.items():
        with _progress(log, name, bench.steps_in_all(options.repeats)) as progress:
            costs = bench.measure(work, options.repeats, device, progress)
        console.print(tables.costs_table(name, work, costs))
        _warn_if_busy(costs, log)


@contextmanager
def _progress(log: _Console, title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Show how far a measurement is, as a bar that no thread draws, or without a terminal in a line at its start."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bars = Progress(*columns, console=log, transient=True, auto_refresh=False, disable=not log.is_terminal)
    task = bars.add_task(title, total=total)

    def show(what: str) -> None:
        if not (log.is_terminal or bars.tasks[task].completed):
            log.say(f"{title}: {total} measurements")
        bars.update(task, advance=1, description=f"{title}: {what}", refresh=True)

    with bars:
        yield show


def _warn_if_busy(measured: Sequence[bench.Cost] | Sequence[Latency], log: _Console) -> None:
    spreads = [spread for one in measured for spread in (one.milliseconds_spread, one.ratio_spread)]
    if warning := bench.busy(spreads):
        log.say(f"warning: {warning}")
