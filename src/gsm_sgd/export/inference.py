"""How long a pruned net takes, by torch and onnxruntime, by turns: dense, with sparse layers, or narrow."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor, nn

from ..experiments import bench
from ..experiments.environment import environment
from ..experiments.own import NOTHING, Trusted
from ..experiments.rundir import NARROW_FILE
from ..experiments.whole_files import atomic_write
from ..reports.runs import read_run
from .csr import as_sparse, linear_layers, turns_of
from .extras import needed
from .onnx_file import to_onnx
from .rebuild import narrow_net, pruned_net

Engines = dict[str, Callable[[Tensor], Any]]  # each from images to logits

BATCHES = (1, 16, 256)
THREADS = (1, 2)
MEASUREMENTS = len(BATCHES) * len(THREADS)
DENSE, SPARSE, ONNX = "torch, dense", "torch, linear layers in CSR", "onnxruntime, dense"
NARROW, ONNX_NARROW = "torch, narrow", "onnxruntime, narrow"
_TOLERANCE = 1e-5  # of the largest logit, or of 1 if that is more


class Latency(NamedTuple):
    """What a batch takes."""

    engine: str
    batch: int
    threads: int
    milliseconds: float
    ratio: float  # of torch's dense time to it: how many times as fast it is
    milliseconds_spread: float  # over the turns, as `bench.spread` has it
    ratio_spread: float


def measure_inference(
    folder: Path, trusted: Trusted = NOTHING, progress: Callable[[str], object] = lambda _: None
) -> list[Latency]:
    """Measure the pruned net of a run on random images, and leave the figures in its folder as inference.json.

    Args:
        folder: the run's.
        trusted: as of `recipe_of`.
        progress: told of each of the `MEASUREMENTS` before it is taken.

    Raises:
        UsageError: the run is not over, or onnxruntime is not installed.
        RuntimeError: an engine computes something else.
    """
    run = read_run(folder)
    model, shape = pruned_net(run, trusted)
    nets = {DENSE: model, NARROW: narrow_net(folder, model)} if (folder / NARROW_FILE).exists() else {DENSE: model}
    contents = {ONNX: to_onnx(copy.deepcopy(model), shape).content}
    if NARROW in nets:
        contents[ONNX_NARROW] = to_onnx(copy.deepcopy(nets[NARROW]), shape).content
    else:
        nets[SPARSE] = in_csr(copy.deepcopy(model))
    threads_before = torch.get_num_threads()
    latencies = []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            engines: Engines = {name: net.eval() for name, net in nets.items()}
            engines |= {name: _session(content, threads) for name, content in contents.items()}
            for batch in BATCHES:
                progress(f"batch {batch}, {threads} threads".replace(" 1 threads", " 1 thread"))
                latencies += _by_turns(engines, torch.randn(batch, *shape), threads)
    finally:
        torch.set_num_threads(threads_before)
    rows = [latency._asdict() for latency in latencies]
    record = {"benchmark": "inference", "rows": rows, "environment": environment(torch.device("cpu"))}
    atomic_write(folder / "inference.json", (json.dumps(record, indent=1) + "\n").encode())
    return latencies


def in_csr(model: nn.Module) -> nn.Module:
    """Swap all linear layers of a net that can be swapped for sparse ones, in place, and return it."""
    for parent, name, layer in linear_layers(model):
        setattr(parent, name, as_sparse(layer))
    return model


def verdict(latencies: Sequence[Latency]) -> str:
    """Return where a narrow net, or sparse layers, win against torch's dense ones and where they lose."""
    narrow = [latency for latency in latencies if latency.engine == NARROW]
    sparse = narrow or [latency for latency in latencies if latency.engine == SPARSE]
    sides = {
        "faster than dense": [latency for latency in sparse if latency.ratio >= 1],
        "slower": [latency for latency in sparse if latency.ratio < 1],
    }
    parts = []
    for side, found in sides.items():
        cases = [f"{one.ratio:.2f} times at batch {one.batch} on {one.threads} threads" for one in found]
        if cases:
            parts.append(f"{side}: {', '.join(cases)}".replace(" 1 threads", " 1 thread"))
    return f"{'The narrow net is' if narrow else 'Linear layers in CSR are'} {'; '.join(parts)}."


def latency_table(title: str, latencies: Sequence[Latency]) -> Table:
    """Return the figures as a table for the terminal."""
    table = Table(title=title, caption=bench.CAPTION)
    for column in ("engine", "batch", "threads", "ms", "times as fast"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for one in latencies:
        milliseconds = f"{one.milliseconds:.3g} ± {one.milliseconds_spread:.0%}"
        times = f"{one.ratio:.2f} ± {one.ratio_spread:.0%}"
        table.add_row(one.engine, str(one.batch), str(one.threads), milliseconds, times)
    return table


def _by_turns(engines: Engines, images: Tensor, threads: int) -> list[Latency]:
    """Return what each engine takes for a batch, after a look at whether they agree."""
    with torch.inference_mode():
        logits = {name: torch.as_tensor(engine(images)) for name, engine in engines.items()}
    bound = _TOLERANCE * max(1.0, float(logits[DENSE].abs().max()))
    for name in engines.keys() & {SPARSE, NARROW}:
        difference = float((logits[name] - logits[DENSE]).abs().max())
        if not difference <= bound:
            raise RuntimeError(
                f"the logits of {name} differ from dense ones by {difference:.2g}, more than {bound:.2g}"
            )
    seconds = dict(zip(engines, turns_of(list(engines.values()), images), strict=True))
    dense = seconds[DENSE]
    return [
        Latency(
            name,
            len(images),
            threads,
            milliseconds=round(1000 * min(taken), 5),
            ratio=round(min(dense) / min(taken), 3),
            milliseconds_spread=round(bench.spread(taken), 3),
            ratio_spread=round(bench.spread([ours / its for ours, its in zip(dense, taken, strict=True)]), 3),
        )
        for name, taken in seconds.items()
    ]


def _session(content: bytes, threads: int) -> Callable[[Tensor], Any]:
    """Return a function that computes logits by onnxruntime with so many threads."""
    onnxruntime = needed("onnxruntime", "inference by onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})[0]
