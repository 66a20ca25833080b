"""The net of a file again: its recipe read back, its model built, its accuracy measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from ..experiments import UsageError, data, models
from ..experiments.loop import evaluate
from ..experiments.models import check_named
from ..experiments.recipes import RECIPES, Recipe, check_stages
from ..experiments.rundir import read_weights
from ..experiments.splits import Dataset
from ..experiments.states import load_state
from ..reports.nets import prunable_weights
from ..reports.runs import Run


def recipe_of(fields: Mapping[str, Any], source: Path, allowed: str | None = None) -> Recipe:
    """Return the recipe that a file states.

    Args:
        fields: as the file has them.
        source: the file, for messages.
        allowed: the function of the user's own, if any, that is to build the net.

    Raises:
        UsageError: they are no recipe, or the net is built by code that the user has not named, or by other code.
    """
    types = ArgumentParser(exit_on_error=False)
    types.add_class_arguments(Recipe)
    try:
        check_stages(fields)
        recipe = Recipe.from_dict(types.parse_object(dict(fields)).as_dict())
        recipe.check()
        if not recipe.compression >= 1:
            raise ValueError("no compression ratio")
        if recipe.recipe not in RECIPES or recipe.dataset not in data.DATASETS:
            raise ValueError("no recipe's name, or no data set's")
    except (ArgumentError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} states no recipe of this version") from error
    check_named(recipe.model, source, allowed)
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


def image_shape(recipe: Recipe) -> tuple[int, int, int]:
    """Return the shape of the images that a recipe trains on: (channels, height, width)."""
    return data.IMAGE_SHAPES.get(recipe.dataset) or models.fitting_images(recipe.model)[0]


def build(recipe: Recipe, tensors: Mapping[str, Tensor], classes: int | None = None) -> nn.Module:
    """Return the net of a recipe with these weights.

    Raises:
        UsageError: they do not fit it.
    """
    model = models.build(recipe.model, recipe.seed, classes)
    try:
        load_state(model, tensors)
    except RuntimeError as error:
        raise UsageError(f"the weights do not fit {recipe.model}") from error
    return model


def pruned_net(run: Run, allowed: str | None = None) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the pruned net of a run, and the shape of an image that it takes; `allowed` is as of `recipe_of`.

    Raises:
        UsageError: the run is not over, or its weights are missing or damaged.
    """
    recipe = recipe_of(run.recipe, run.path, allowed)
    classes = len(list(prunable_weights(run, run.net).values())[-1])
    model = build(recipe, read_weights(run.path / f"{run.net}.safetensors"), classes)
    return model, image_shape(recipe)


def measure(recipe: Recipe, tensors: Mapping[str, Tensor], data_dir: Path | None) -> float:
    """Return the accuracy, in percent, of weights on the images of a recipe, by the CPU."""
    dataset = load_data(recipe, data_dir)
    return evaluate(build(recipe, tensors, dataset.classes), dataset.test)
