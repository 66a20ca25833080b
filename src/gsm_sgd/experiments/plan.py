"""Which runs a command asks for, and the folders that they go into."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import torch

from . import UsageError
from .loop import fitting_precision
from .recipes import DENSE, OURS, Recipe, by_method, find_recipe, net_name
from .rundir import check_recipe, dotted

_IN_THE_NAME = ("seed", "compression", "pattern", "macs", "latency")  # anyway
_DIGITS = 6  # of the hash
_MOST = 10_000  # seeds, or ratios, of a command


def parse_seeds(text: str) -> list[int]:
    """Return the seeds that a text like 0-4 or 0,1,2 lists.

    Raises:
        UsageError: it is no such list, or a seed stands in it twice.
    """
    seeds: list[int] = []
    for word in text.split(","):
        bounds = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", word)
        if bounds is None:
            raise UsageError(f"seeds must be whole numbers with commas between, like 0,1,2, or 0-4, not {text!r}")
        first, last = int(bounds[1]), int(bounds[2] or bounds[1])
        if last < first or last - first >= _MOST:
            raise UsageError(f"seeds must rise from the first to the last, and be {_MOST:,} at most, not {word!r}")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"a seed stands twice in {text!r}")
    return seeds


def parse_ratios(value: float | str) -> list[float]:
    """Return the compression ratios that a number, or a text like 20,60,200, lists.

    Raises:
        UsageError: it is no such list, or a ratio stands in it twice.
    """
    try:
        ratios = [float(word) for word in str(value).split(",")]
    except ValueError as error:
        raise UsageError(
            f"compression must be a number, or several with commas between, like 20,60,200, not {value!r}"
        ) from error
    if len({f"{ratio:g}" for ratio in ratios}) < len(ratios):
        raise UsageError(f"a compression ratio stands twice in {value!r}")
    return ratios


def dense_of(recipe: Recipe) -> Recipe:
    """Return the dense control of a recipe: the same net, data, seed and epochs, by the same SGD, and nothing cut."""
    recipe = replace(recipe, method=OURS, settings={}, pattern="weight", macs=Recipe.macs, latency=None)
    return by_method(recipe, DENSE)


def folder_of(out: Path, recipe: Recipe, command: str, device: torch.device, name: str | None = None) -> Path:
    """Return the folder of a run: no two runs have the same.

    It is called `<net>-<command>-<preset>-x<C>-s<seed>`, or of channels macs<share> or latency<share> in place of x<C>;
    with the method in it if that is not GSM, and where settings differ from the preset's with a hash of those. A name
    given takes the place of all that but ratio and seed. A run that an earlier version has begun, without a hash, goes
    on where it is.
    """
    ((kind, amount),) = recipe.budget.items()
    ratio_and_seed = f"{'x' if kind == 'compression' else kind}{amount:g}-s{recipe.seed}"
    if name is not None:
        if not re.fullmatch(r"[\w.+-]+", name) or name.startswith("."):
            raise UsageError(f"a name is made of letters, digits, dots and dashes, not {name!r}")
        return out / f"{name}-{ratio_and_seed}"
    net = net_name(recipe.recipe, recipe.model)
    parts = [net, command, *([] if recipe.method == OURS else [recipe.method]), recipe.preset]
    plain = out / "-".join([*parts, ratio_and_seed])
    differing = settings_hash(recipe, device)
    if not differing or _is_folder_of(plain, recipe):
        return plain
    return out / "-".join([*parts, differing, ratio_and_seed])


def settings_hash(recipe: Recipe, device: torch.device) -> str:
    """Return a short hash of the settings that differ from the preset's, but seed and ratio; no text if none does."""
    preset = by_method(find_recipe(recipe.recipe, recipe.preset), recipe.method)
    preset = replace(preset, precision=fitting_precision(preset.precision, device))
    usual, ours = dotted(preset.as_dict()), dotted(recipe.as_dict())
    differing = {key: value for key, value in ours.items() if key not in _IN_THE_NAME and usual.get(key) != value}
    if not differing:
        return ""
    return hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _is_folder_of(path: Path, recipe: Recipe) -> bool:
    """Return whether a folder was made by this recipe."""
    try:
        check_recipe(path, recipe)
    except UsageError:
        return False
    return (path / "recipe.yaml").exists()
