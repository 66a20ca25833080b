"""What a finished run's pruned net is given away as."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from rich.filesize import decimal
from safetensors.torch import save
from torch import Tensor

from ..experiments import UsageError
from ..experiments.own import NOTHING, Trusted
from ..experiments.rundir import NARROW_FILE, read_weights
from ..experiments.whole_files import write_output
from ..reports.runs import WEIGHTS, Run, read_run
from .hdf5_file import to_hdf5
from .onnx_file import to_onnx
from .rebuild import measure, narrow_net, pruned_net, recipe_of
from .sparse import Values, rounded, save_sparse

Format = Literal["sparse", "safetensors", "onnx", "hdf5"]
ENDINGS: dict[Format, str] = {
    "sparse": "sparse.safetensors.xz",
    "safetensors": "dense.safetensors",
    "onnx": "onnx",
    "hdf5": "hdf5",
}


def export(
    folder: Path,
    kind: Format,
    out: Path | None = None,
    values: Values = "float32",
    data_dir: Path | None = None,
    trusted: Trusted = NOTHING,
) -> str:
    """Write the pruned net of a run to a file, and return a line on what came out.

    Args:
        folder: the run's.
        kind: the file's format.
        out: the file; default is pruned.<ending> in the run's folder, with the values before the ending if they are
            rounded.
        values: of a sparse file; if they are rounded, accuracy is measured again.
        data_dir: folder of the data for that; default $GSM_DATA.
        trusted: as of `recipe_of`; for files that take more than the weights.

    Raises:
        UsageError: the run is not over, or the file cannot be made or written.
        RuntimeError: onnxruntime computes something else than torch.
    """
    if kind not in get_args(Format):
        raise UsageError(f"unknown format {kind!r}: choose one of {', '.join(get_args(Format))}")
    if values != "float32" and kind != "sparse":
        raise UsageError("--values is for --format sparse")
    run = read_run(folder)
    weights = folder / f"{run.net}.safetensors"
    tensors = read_weights(weights)
    out = out or folder / export_name(run.net, kind, values)
    if out.resolve() in [(folder / f"{name}.safetensors").resolve() for name in (*WEIGHTS, run.method)]:
        raise UsageError(f"{out} is a file of the run itself: choose another --out")
    remark = ""
    match kind:
        case "sparse":
            _save_sparse(run, tensors, out, values, data_dir, trusted)
        case "safetensors":
            write_output(out, save(tensors), "--out")
        case "hdf5":
            write_output(out, to_hdf5(tensors, run.recipe.get("model", "")), "--out")
        case "onnx":
            remark = _save_onnx(run, out, trusted)
    size, dense = out.stat().st_size, weights.stat().st_size
    smaller = f"{dense / size:.3g} times smaller than" if size < dense else "as large as"
    return f"{out}: {decimal(size)}, {smaller} the {decimal(dense)} of {weights.name}{remark}"


def export_name(net: str, kind: Format, values: Values = "float32") -> str:
    """Return the name of the file that a net is exported to by default."""
    return ".".join([net, *([] if values == "float32" else [values]), ENDINGS[kind]])


def _save_sparse(
    run: Run, tensors: Mapping[str, Tensor], out: Path, values: Values, data_dir: Path | None, trusted: Trusted
) -> None:
    result = run.finished()
    prunable = [layer["name"] for layer in result["layers"]]
    top1 = result["top1"][run.net.replace("-", "_")]
    if values != "float32":
        top1 = measure(recipe_of(run.recipe, run.path, trusted), rounded(tensors, prunable, values), data_dir)
    save_sparse(out, tensors, prunable=prunable, values=values, recipe=run.recipe, top1=top1)


def _save_onnx(run: Run, out: Path, trusted: Trusted) -> str:
    """Write a net as ONNX and return how exact it is."""
    net, shape = pruned_net(run, trusted)
    if (run.path / NARROW_FILE).exists():  # which is smaller and faster, and computes the same
        net = narrow_net(run.path, net)
    file = to_onnx(net, shape)
    write_output(out, file.content, "--out")
    return f"; onnxruntime's logits of {file.images} random images differ by {file.difference:.1e} at most"
