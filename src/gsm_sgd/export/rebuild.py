"""The net of a file again: its recipe read back, its model built, its accuracy measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from ..experiments import UsageError, data, models
from ..experiments.loop import evaluate
from ..experiments.models import MODELS, torchvision_name
from ..experiments.recipes import RECIPES, Recipe
from ..experiments.rundir import read_weights
from ..experiments.splits import Dataset
from ..reports.runs import Run


def recipe_of(fields: Mapping[str, Any], source: Path, allowed: str | None = None) -> Recipe:
    """Return the recipe that a file states.

    Args:
        fields: as the file has them.
        source: the file, for messages.
        allowed: the one function of the user's own that may be called to build the net.

    Raises:
        UsageError: they are no recipe, or the net is built by code that the user has not named.
    """
    types = ArgumentParser(exit_on_error=False)
    types.add_class_arguments(Recipe)
    try:
        recipe = Recipe.from_dict(types.parse_object(dict(fields)).as_dict())
        recipe.check()
        if recipe.recipe not in RECIPES:
            raise ValueError("no recipe's name")
    except (ArgumentError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"{source} states no recipe of this version") from error
    ours = recipe.model in MODELS or torchvision_name(recipe.model) is not None
    if not ours and recipe.model != allowed:
        raise UsageError(
            f"{source} says that {recipe.model!r} builds its net, which is not part of gsm-sgd: "
            f"if you trust that code, add --model {recipe.model}"
        )
    return recipe


def load_data(recipe: Recipe, data_dir: Path | None) -> Dataset:
    """Return what a recipe trains on and measures accuracy on; made-up images fit its net."""
    if recipe.dataset == "synthetic":
        shape, classes = models.fitting_images(recipe.model)
        counts = (2_048, 512) if shape < data.IMAGE_SHAPES["imagenet"] else (256, 64)  # which are as large
        dataset = data.synthetic(*counts, shape, classes)
    else:
        dataset = data.load(recipe.dataset, data_dir)
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
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"the weights do not fit {recipe.model}") from error
    return model


def pruned_net(run: Run) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the pruned net of a run, and the shape of an image that it takes.

    Raises:
        UsageError: the run is not over, or its weights are missing or damaged.
    """
    classes = run.finished()["layers"][-1]["shape"][0]
    recipe = recipe_of(run.recipe, run.path, run.recipe["model"])
    model = build(recipe, read_weights(run.path / f"{run.net}.safetensors"), classes)
    return model, image_shape(recipe)


def measure(recipe: Recipe, tensors: Mapping[str, Tensor], data_dir: Path | None) -> float:
    """Return the accuracy, in percent, of weights on the images of a recipe, by the CPU."""
    dataset = load_data(recipe, data_dir)
    return evaluate(build(recipe, tensors, dataset.classes), dataset.test)
