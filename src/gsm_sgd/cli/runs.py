"""The commands `gsm prune` and `gsm lottery`: planned and checked as a whole, then one run after another."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from jsonargparse import Namespace

from ..experiments import UsageError, models, ranks
from ..experiments.channels import find_channels
from ..experiments.loop import fitting_precision
from ..experiments.lottery import lottery
from ..experiments.observers import ProgressBars
from ..experiments.plan import dense_of, folder_of, parse_ratios, parse_seeds
from ..experiments.pretrained import is_torchvisions, load_pretrained
from ..experiments.prune import Job, gsm, prune, rival
from ..experiments.reading import read_yaml
from ..experiments.recipes import DENSE, OURS, Recipe
from ..experiments.rundir import RunFolder, check_recipe
from ..experiments.splits import Dataset
from ..export.rebuild import image_shape, load_data
from ..export.run import export, export_name
from ..export.target import compression_for, parse_size
from ..optim.checks import CutWarning
from ..reports import accuracy, figures, structure
from ..reports.blocks import Group
from ..reports.runs import WEIGHTS, Run, by_recipe, read_run
from .arguments import in_options
from .console import Console, find_device, set_threads
from .show import print_groups

_COMMANDS = {"prune": prune, "lottery": lottery}
_FEW, _FEW_IMAGES = 4, 256  # epochs, and batches of each; images that accuracy is measured on


def run(command: str, options: Namespace, console: Console, log: Console) -> None:
    """Run a recipe for each ratio and seed, and show what came out."""
    device = find_device(options.device)
    set_threads(options.threads)
    with log.warnings(), _out(options) as out:
        planned, dense = _plan(command, options, out, device)
        dataset = load_data(next(iter(planned.values())), options.data_dir)
        if options.fast_dev_run:
            planned, dataset = _shortened(planned, dataset)
            warnings.simplefilter("ignore", CutWarning)  # of a few steps it says nothing
        check_net(planned, dataset.classes)
        dataset = dataset.shard(ranks.rank(), ranks.world_size())
        with ranks.process_group(device) as device:
            for path, recipe in planned.items():
                with RunFolder(path, recipe, options.checkpoint_seconds) as folder:
                    _run_one(command, folder, dataset.to(device), device, options.tensorboard, log)
                    if recipe.seed in dense and recipe.method != DENSE:
                        folder.add_top1({"dense": read_run(dense[recipe.seed]).finished()["top1"]["pruned"]})
                    if folder.writes:
                        _save_figures(read_run(path), folder)
        if folder.writes:
            _show(planned, options, console)


def _run_one(
    command: str, folder: RunFolder, dataset: Dataset, device: torch.device, tensorboard: bool, log: Console
) -> None:
    """Carry out one run, or the rest of it."""
    log.say(f"{folder.path}{already(folder)}")
    folder.check_data(dataset.identity)
    if folder.finished:
        return
    folder.note_environment(device)
    events = folder.path / "tensorboard" if tensorboard and folder.writes else None
    with ProgressBars(log, events) as bars:
        _COMMANDS[command](Job(folder.recipe, dataset, folder, bars, device))


@contextmanager
def _out(options: Namespace) -> Iterator[Path]:
    """Return the folder that gets the runs' folders; of a trial run it is deleted."""
    if not options.fast_dev_run:
        yield options.out
        return
    with TemporaryDirectory(prefix="gsm-") as folder:
        yield Path(folder)


def _shortened(planned: Mapping[Path, Recipe], dataset: Dataset) -> tuple[dict[Path, Recipe], Dataset]:
    """Return the first run of each method with a few epochs of a few batches: to try all, not to learn anything."""
    runs: dict[str, tuple[Path, Recipe]] = {}
    for path, recipe in planned.items():
        base, gsm = (replace(one, epochs=_FEW, milestones=()) for one in (recipe.base, recipe.gsm))
        runs.setdefault(recipe.method, (path, replace(recipe, base=base, gsm=gsm)))
    train = torch.arange(min(len(dataset.train), _FEW * recipe.batch_size))
    test = torch.arange(min(len(dataset.test), _FEW_IMAGES))
    return dict(runs.values()), replace(
        dataset, train=dataset.train.subset(train, True), test=dataset.test.subset(test, False)
    )


def _show(planned: Mapping[Path, Recipe], options: Namespace, console: Console) -> None:
    """Print the results of runs and the next command."""
    if options.fast_dev_run:
        console.say(f"{_FEW} epochs of {_FEW} batches went through all stages, of {len(planned)} run(s); none was kept")
        return
    print_groups(by_recipe([read_run(path) for path in planned]), console)
    for path in planned if options.get("target_size") is not None else ():
        _export_small(path, parse_size(options.target_size), console)
    last = list(planned)[-1]
    console.say(f"next: gsm report {last} (or gsm export, gsm bench inference)")


def already(folder: RunFolder) -> str:
    """Return what is to be said of a run that an earlier command has begun, or ended; a stage says how far it was."""
    if folder.finished:
        return ": finished already, nothing to do"
    done = [
        name for name in dict.fromkeys((*WEIGHTS, folder.recipe.method)) if name != "init" and folder.has_weights(name)
    ]
    if done:
        return f": resumes, {', '.join(done)} done already"
    return ": resumes" if any(folder.path.glob("*.checkpoint")) else ""


def _plan(
    command: str, options: Namespace, out: Path, device: torch.device
) -> tuple[dict[Path, Recipe], dict[int, Path]]:
    """Return the folders and recipes of all runs, checked before anything is written, and dense runs' by seed."""
    check_running(options)
    recipe = recipe_of_options(options)
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
        runs[folder_of(out, scaled, command, device, name)] = scaled
    dense = {one.seed: path for path, one in runs.items() if one.method == DENSE and options.get("baseline")}
    if recipe.weights is not None and command == "lottery":
        raise UsageError(
            "a lottery trains its base net from the ticket's initialisation: leave out --weights, or set it to null if "
            "the recipe has some"
        )
    if recipe.pattern == "channel" and command == "lottery":
        raise UsageError("a lottery is for single weights: leave out --pattern channel")
    check_planned(runs)
    return runs, dense


def check_running(options: Namespace) -> None:
    """Raise UsageError if how to run makes no sense."""
    if not (math.isfinite(options.checkpoint_seconds) and options.checkpoint_seconds >= 0):
        raise UsageError(f"checkpoint-seconds must be at least 0, not {options.checkpoint_seconds}")


def check_planned(runs: Mapping[Path, Recipe]) -> None:
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


def _export_small(folder: Path, target: int, console: Console) -> None:
    """Export a run that was to fit a size."""
    console.say(export(folder, "sparse"))
    size = (folder / export_name("pruned", "sparse")).stat().st_size
    if size > target:
        raise RuntimeError(f"the file of {folder} has {size:,} bytes, more than the {target:,} that were to be enough")


def _check_optimizer(recipe: Recipe) -> None:
    """Raise UsageError for what GSM, or another method, would refuse later, before anything is written."""
    model = models.build(recipe.model, recipe.seed)
    recipe = replace(recipe, latency=None)  # of which only measuring can tell
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


def check_net(planned: Mapping[Path, Recipe], classes: int) -> None:
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


def recipe_of_options(options: Namespace) -> Recipe:
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
    given["macs"] = parse_ratios(given["macs"])[0]
    share = given["macs"] if given.get("latency") is None else given["latency"]
    if given["pattern"] == "channel" and share > 0:
        given["compression"] = 1 / share
    names = {*(field.name for field in fields(Recipe)), given["method"]} - {"settings"}
    return Recipe.from_dict({name: given[name] for name in names if name in given})


def _save_figures(finished: Run, folder: RunFolder) -> None:
    """Put figures of the layers' density and of the training curves into a run's folder."""
    title = f"{finished.title}, seed {finished.recipe['seed']}"
    group = Group(title, [finished])
    kept = structure.kept_by(group, structure.read_masks(group, []))
    if "widths" in group.results[0]:
        figures.save(structure.widths(group), "widths", title, folder.save_figure)
    figures.save(structure.density(group, kept), "density", title, folder.save_figure)
    figures.save(figures.curves(accuracy.training_panels(group)), "curves", title, folder.save_figure)
