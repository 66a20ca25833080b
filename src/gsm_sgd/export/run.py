"""What a finished run's pruned net is given away as."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import save
from torch import Tensor

from ..experiments import UsageError, data
from ..experiments.rundir import read_weights
from ..reports.runs import Run, read_run
from .container import write_file
from .hdf5_file import to_hdf5
from .onnx_file import to_onnx
from .rebuild import build, measure, recipe_of
from .sparse import Values, rounded, save_sparse

Format = Literal["sparse", "safetensors", "onnx", "hdf5"]
ENDINGS: dict[Format, str] = {
    "sparse": "sparse.safetensors",
    "safetensors": "dense.safetensors",
    "onnx": "onnx",
    "hdf5": "hdf5",
}


def export(
    folder: Path, kind: Format, out: Path | None = None, values: Values = "float32", data_dir: Path | None = None
) -> str:
    """Write the pruned net of a run to a file, and return a line on what came out.

    Args:
        folder: the run's.
        kind: the file's format.
        out: the file; default is pruned.<ending> in the run's folder.
        values: of a sparse file; if they are rounded, accuracy is measured again.
        data_dir: folder of the data for that; default $GSM_DATA.

    Raises:
        UsageError: the run is not over, or the file cannot be made or written.
        RuntimeError: onnxruntime computes something else than torch.
    """
    if kind not in get_args(Format):
        raise UsageError(f"unknown format {kind!r}: choose one of {', '.join(get_args(Format))}")
    if values != "float32" and kind != "sparse":
        raise UsageError("--values is for --format sparse")
    run = read_run(folder)
    if run.result is None:
        raise UsageError(f"{folder} is not finished: give its command again to go on")
    weights = folder / "pruned.safetensors"
    tensors = read_weights(weights)
    out = out or folder / f"pruned.{ENDINGS[kind]}"
    remark = ""
    match kind:
        case "sparse":
            _save_sparse(run, tensors, out, values, data_dir)
        case "safetensors":
            write_file(out, save(tensors))
        case "hdf5":
            write_file(out, to_hdf5(tensors, run.recipe["model"]))
        case "onnx":
            remark = _save_onnx(run, tensors, out)
    size, dense = out.stat().st_size, weights.stat().st_size
    return f"{out}: {size:,} bytes; {weights.name}: {dense:,}, {dense / size:.1f} times as many{remark}"


def _save_sparse(run: Run, tensors: Mapping[str, Tensor], out: Path, values: Values, data_dir: Path | None) -> None:
    assert run.result is not None
    prunable = [layer["name"] for layer in run.result["layers"]]
    top1 = run.result["top1"]["pruned"]
    if values != "float32":
        recipe = recipe_of(run.recipe, run.path, run.recipe["model"])
        top1 = measure(recipe, rounded(tensors, prunable, values), data_dir)
    save_sparse(out, tensors, prunable=prunable, values=values, recipe=run.recipe, top1=top1)


def _save_onnx(run: Run, tensors: Mapping[str, Tensor], out: Path) -> str:
    """Write a net as ONNX and return how exact it is."""
    assert run.result is not None
    recipe = recipe_of(run.recipe, run.path, run.recipe["model"])
    classes = run.result["layers"][-1]["shape"][0]
    file = to_onnx(build(recipe, tensors, classes), data.IMAGE_SHAPES[recipe.dataset])
    write_file(out, file.content)
    return f"; onnxruntime's logits of {file.images} random images differ by {file.difference:.1e} at most"
