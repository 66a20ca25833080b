"""The accuracy of a run, or of a file in any of our formats, measured again on the data of its recipe."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..experiments import UsageError, models
from ..experiments.loop import evaluate
from ..experiments.own import NOTHING, Trusted
from ..experiments.reading import cause, read_yaml
from ..experiments.recipes import Recipe
from ..experiments.rundir import NARROW_FILE, read_weights
from ..reports.runs import read_run
from .container import is_sparse
from .extras import needed
from .hdf5_file import is_hdf5, published_name, read_hdf5
from .rebuild import build, load_data, narrow_net, recipe_of
from .sparse import read_sparse


class Evaluation(NamedTuple):
    """An accuracy, in percent, of so many images of a data set, and what was said of it."""

    top1: float
    images: int
    dataset: str
    stated: float | None

    def __str__(self) -> str:
        """Return it as a line."""
        stated = "" if self.stated is None else f"; {self.stated:.2f} % was stated"
        return f"{self.top1:.2f} % of {self.images:,} images of {self.dataset}{stated}"


def evaluate_source(
    source: Path, recipe_file: Path | None = None, data_dir: Path | None = None, trusted: Trusted = NOTHING
) -> Evaluation:
    """Measure the accuracy of the net that a run ended with, or that a file holds, on the CPU.

    Args:
        source: a run's folder, or a safetensors, sparse, HDF5 or ONNX file of a run.
        recipe_file: recipe.yaml of that run; by default the one in the folder or beside the file. A sparse file has it.
        data_dir: folder of the data; default $GSM_DATA.
        trusted: as of `recipe_of`.

    Raises:
        UsageError: the run is not over, the file is none of these, or its recipe is nowhere.
    """
    stated, sparse = None, None
    if source.is_dir():
        run = read_run(source)
        stated = run.finished()["top1"][run.net.replace("-", "_")]
        recipe_file, source = recipe_file or source / "recipe.yaml", source / f"{run.net}.safetensors"
    if not source.is_file():
        raise UsageError(f"{source} does not exist: give a run's folder, or a file of one")
    if is_sparse(source):
        sparse = read_sparse(source)
        stated = sparse.certificate.top1
    if sparse is not None and sparse.recipe is not None and recipe_file is None:
        recipe = recipe_of(sparse.recipe, source, trusted)
    else:
        recipe_file = recipe_file or source.parent / "recipe.yaml"
        recipe = recipe_of(_fields(recipe_file), recipe_file, trusted)
    dataset = load_data(recipe, data_dir)
    net = _net(source, recipe, dataset.classes) if sparse is None else build(recipe, sparse.tensors, dataset.classes)
    return Evaluation(evaluate(net, dataset.test), len(dataset.test), recipe.dataset, stated)


def _fields(recipe_file: Path) -> Any:
    """Return what a recipe's file holds."""
    try:
        return read_yaml(recipe_file)
    except FileNotFoundError as error:
        raise UsageError(f"{recipe_file} does not exist: add --recipe RUN/recipe.yaml, of the file's run") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{recipe_file} is damaged: {cause(error)}") from error


def _net(source: Path, recipe: Recipe, classes: int) -> nn.Module:
    """Return the net of a file: ONNX, HDF5, narrow, or safetensors."""
    if source.suffix == ".onnx":
        return _OnnxNet(source)
    if is_hdf5(source):
        ours = models.build(recipe.model, recipe.seed, classes).state_dict()
        names = {published_name(name, recipe.model): name for name in ours}
        return build(recipe, {names.get(name, name): tensor for name, tensor in read_hdf5(source).items()}, classes)
    if source.name == NARROW_FILE:
        return narrow_net(source.parent, models.build(recipe.model, recipe.seed, classes))
    return build(recipe, read_weights(source), classes)


class _OnnxNet(nn.Module):
    """A net in onnxruntime, which `evaluate` takes for one of torch's."""

    def __init__(self, source: Path) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0))  # says on which device it computes
        onnxruntime = needed("onnxruntime", "ONNX")
        try:
            self._session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        except Exception as error:  # a damaged file can fail in any way
            raise UsageError(f"{source} is no ONNX file that onnxruntime can read") from error
        self._input = self._session.get_inputs()[0].name

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        return torch.from_numpy(self._session.run(None, {self._input: images.contiguous().numpy()})[0])
