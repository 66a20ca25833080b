"""The net of a file again: its recipe read back, its model built, its accuracy measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from ..budget import kept_weights
from ..experiments import UsageError, data, models, own_data
from ..experiments.loop import evaluate
from ..experiments.own import NOTHING, Trusted, is_own
from ..experiments.recipes import OURS, RECIPES, Recipe, add_settings, check_stages
from ..experiments.rundir import NARROW_FILE, read_weights
from ..experiments.splits import Dataset
from ..experiments.states import load_state
from ..names import prunable_parameters
from ..reports.nets import prunable_weights
from ..reports.runs import Run
from ..structured.remove import load_narrow
from .sparse import SparseFile

_SAME = 0.05  # points of accuracy that a machine's arithmetic may turn


class CertificateError(Exception):
    """A net is not what its file's certificate says."""


def recipe_of(fields: Mapping[str, Any], source: Path, trusted: Trusted = NOTHING) -> Recipe:
    """Return the recipe that a file, `source`, states.

    Raises:
        UsageError: it is no recipe, or names code that is neither part of gsm-sgd nor `trusted` by the user.
    """
    types = ArgumentParser(exit_on_error=False)
    types.add_class_arguments(Recipe, skip={"settings"})
    try:
        check_stages(fields)
        add_settings(types, str(fields.get("method", OURS)))
        recipe = Recipe.from_dict(types.parse_object(dict(fields)).as_dict())
        recipe.check()
        if (
            not recipe.compression >= 1
            or recipe.recipe not in RECIPES
            or not (recipe.dataset in data.DATASETS or is_own(recipe.dataset))
        ):
            raise ValueError("no compression ratio, no recipe's name, or no data set's")
    except (ArgumentError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} states no recipe of this version") from error
    trusted.check("model", recipe.model, source)
    trusted.check("dataset", recipe.dataset, source)
    return recipe


def load_data(recipe: Recipe, data_dir: Path | None) -> Dataset:
    """Return what a recipe trains on and measures accuracy on; made-up images fit its net."""
    if recipe.dataset == "synthetic":
        shape, classes = models.fitting_images(recipe.model)
        counts = (2_048, 512) if shape < data.IMAGE_SHAPES["imagenet"] else (256, 64)  # which are as large
        dataset = data.synthetic(*counts, shape, classes)
    else:
        dataset = data.load(recipe.dataset, data_dir, recipe.normalization)
    return dataset.hold_out(recipe.holdout) if recipe.holdout else dataset


def image_shape(recipe: Recipe) -> tuple[int, ...]:
    """Return the shape of the images that a recipe trains on: (channels, height, width)."""
    if is_own(recipe.dataset):
        return own_data.shape_of(recipe.dataset)
    return data.IMAGE_SHAPES.get(recipe.dataset) or models.fitting_images(recipe.model)[0]


def build(recipe: Recipe, tensors: Mapping[str, Tensor], classes: int | None = None) -> nn.Module:
    """Return the net of a recipe with these weights; UsageError if they do not fit it."""
    model = models.build(recipe.model, recipe.seed, classes)
    try:
        load_state(model, tensors)
    except RuntimeError as error:
        raise UsageError(f"the weights do not fit {recipe.model}") from error
    return model


def pruned_net(run: Run, trusted: Trusted = NOTHING) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the pruned net of a finished run, and the shape of an image that it takes; `trusted` as in `recipe_of`."""
    recipe = recipe_of(run.recipe, run.path, trusted)
    classes = len(list(prunable_weights(run, run.net).values())[-1])
    model = build(recipe, read_weights(run.path / f"{run.net}.safetensors"), classes)
    return model, image_shape(recipe)


def narrow_net(folder: Path, dense: nn.Module) -> nn.Module:
    """Return the narrow net of a run's folder, given its dense one; UsageError if the run has none."""
    path = folder / NARROW_FILE
    if not path.exists():
        raise UsageError(f"{folder} has no narrow net: prune with --pattern channel")
    try:
        return load_narrow(dense, path)
    except ValueError as error:
        raise UsageError(str(error)) from error


def measure(recipe: Recipe, tensors: Mapping[str, Tensor], data_dir: Path | None) -> float:
    """Return the accuracy, in percent, of weights on the images of a recipe, by the CPU."""
    dataset = load_data(recipe, data_dir)
    return evaluate(build(recipe, tensors, dataset.classes), dataset.test)


def verify_accuracy(path: Path, file: SparseFile, data_dir: Path | None, trusted: Trusted) -> str:
    """Measure the accuracy of a sparse file's net again, and return what was found; `trusted` as in `recipe_of`.

    Raises:
        UsageError: the file states no accuracy or recipe, or the data cannot be had.
        CertificateError: the accuracy is another one, or layers or compression ratio are not those of the recipe.
    """
    certificate, stated = file.certificate, file.certificate.top1
    if stated is None or file.recipe is None:
        raise UsageError(f"{path} states no accuracy: do without --accuracy")
    recipe = recipe_of(file.recipe, path, trusted)
    dataset = load_data(recipe, data_dir)
    model = build(recipe, file.tensors, dataset.classes)
    if other := sorted(set(prunable_parameters(model)) ^ set(file.prunable)):
        raise CertificateError(f"{path} certifies other layers than those prunable in {recipe.model}: {other[0]}")
    if certificate.nonzeros > kept_weights(certificate.prunable, recipe.compression):
        raise CertificateError(f"{path} states a compression ratio of {recipe.compression:g}, but keeps more weights")
    found = evaluate(model, dataset.test)
    if not abs(found - stated) <= _SAME:
        raise CertificateError(f"{path} states an accuracy of {stated:.2f} %, but has {found:.2f} %")
    images = f"{recipe.holdout:,} held-out training images" if recipe.holdout else "the test set"
    return f"{found:.2f} % on {images} of {recipe.dataset}"
