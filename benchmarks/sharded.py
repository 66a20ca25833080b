"""What the exact choice costs where the weights are spread over processes: bytes, calls and time of a step.

Each row is one model of N weights, sharded over gloo processes of this machine with one thread each. Times are medians
over steps, GSM's and SGD's (fused, on the same shards) by turns; all processes share the machine's cores, so that what
counts is the ratio. Bytes are what a process hands to collective calls in a step. At the largest N nothing is stored:
importances are drawn in chunks, and only bytes and calls are counted.

    python benchmarks/sharded.py [--numels 1e6 1e7] [--drawn 1e9] [--ranks 1 2 4 8] [--repeats 9] [--json FILE]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

from gsm_sgd import GSM
from gsm_sgd.experiments.environment import environment
from gsm_sgd.selection.sharded import Sharded, Shards
from gsm_sgd.selection.stored import guess_bracket
from gsm_sgd.selection.threshold import find_threshold

TENSORS = 50
COMPRESSION = 10
_CHUNK = 2**22
_COLLECTIVES = ("all_reduce", "all_gather_into_tensor")


class Counted:
    """The bytes of each collective call made in a context."""

    def __enter__(self) -> "Counted":
        """Begin to count."""
        self.bytes: list[int] = []
        self._originals = {name: getattr(dist, name) for name in _COLLECTIVES}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(original))
        return self

    def __exit__(self, *_: object) -> None:
        """Count no longer."""
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: Tensor, *args: Any) -> Any:
            self.bytes.append(tensor.nbytes)
            return original(tensor, *args)

        return call


class Drawn:
    """Importances |w g| of normal w and g that are drawn each time they are looked at, as one tensor."""

    def __init__(self, numel: int, seed: int) -> None:
        self._numel, self._seed = numel, seed

    def __len__(self) -> int:
        """Return the number of tensors."""
        return 1

    def _chunks(self, numel: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        for start in range(0, numel, _CHUNK):
            pair = torch.randn(2, min(_CHUNK, numel - start), generator=generator)
            yield pair[0].mul_(pair[1]).abs_()

    def bracket(self, k: float, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess from those drawn first."""
        sample = torch.cat(list(self._chunks(2 * round(self._numel ** (2 / 3)))))  # as many as of stored ones
        return guess_bracket(sample, k / self._numel, sigmas)

    def between(self, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
        """Draw all of them."""
        reached, values = 0, []
        for chunk in self._chunks(self._numel):
            reached += int((chunk >= high).sum())
            values.append(chunk[(chunk > low) & (chunk < high)])
        return reached, torch.cat(values)

    def count(self, value: Tensor) -> list[int]:
        """Draw all of them again."""
        return [sum(int((chunk == value).sum()) for chunk in self._chunks(self._numel))]

    def ties(self, number: int, value: Tensor) -> Tensor:
        """Draw all of them again."""
        places = [
            (chunk == value).nonzero().squeeze(1) + i * _CHUNK for i, chunk in enumerate(self._chunks(self._numel))
        ]
        return torch.cat(places)


def measure_steps(numel: int, repeats: int) -> dict[str, float]:
    """Return what steps on a model cost, GSM's and SGD's by turns."""
    ranks, mesh = dist.get_world_size(), init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(dist.get_rank())
    rows = max(1, numel // TENSORS // ranks // 1000)

    def spread() -> DTensor:
        return DTensor.from_local(torch.randn(rows, 1000), mesh, [Shard(0)], run_check=False)

    params: list[Any] = [nn.Parameter(spread()) for _ in range(TENSORS)]
    parts: list[Any] = [nn.Parameter(param.to_local().detach().clone()) for param in params]
    settings: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
    gsm = GSM(params, compression=COMPRESSION, **settings)
    sgd = torch.optim.SGD(parts, fused=True, **settings)
    seconds: dict[str, list[float]] = {"gsm": [], "sgd": []}
    sizes: list[list[int]] = []
    for turn in range(-2, repeats):
        for param, part in zip(params, parts, strict=True):
            param.grad = spread()
            part.grad = param.grad.to_local()
        for name, optimizer in (("gsm", gsm), ("sgd", sgd)):
            dist.barrier()
            began = time.perf_counter()
            with Counted() as counted:
                optimizer.step()
            dist.barrier()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
                if name == "gsm":
                    sizes.append(counted.bytes)
    milliseconds = {f"{name}_ms": 1000 * median(values) for name, values in seconds.items()}
    return {**_sent(sizes), **milliseconds, "ratio": milliseconds["gsm_ms"] / milliseconds["sgd_ms"]}


def measure_drawn(numel: int, repeats: int) -> dict[str, float]:
    """Return what finding a threshold among importances that nobody stores sends."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    mine = numel // dist.get_world_size()
    with torch.device("meta"):
        local = torch.empty(mine, 1)
    part = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    shards = Shards([part])
    shards.place = torch.device("cpu")
    sizes = []
    for turn in range(max(1, repeats // 3)):
        seed = 1000 * turn + dist.get_rank()
        with Counted() as counted:
            scores = Sharded(shards, partial(_drawn, mine, seed))
            find_threshold(scores, mine * dist.get_world_size() // COMPRESSION)
        sizes.append(counted.bytes)
    return _sent(sizes)


def _drawn(numel: int, seed: int, _: Sequence[int]) -> Drawn:
    return Drawn(numel, seed)


def _sent(sizes: Sequence[Sequence[int]]) -> dict[str, float]:
    totals = [sum(step) for step in sizes]
    calls = [len(step) for step in sizes]
    return {"bytes": median(totals), "most_bytes": max(totals), "calls": median(calls), "most_calls": max(calls)}


def _serve(rank: int, ranks: int, folder: str, kind: str, numel: int, repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    row = (measure_steps if kind == "steps" else measure_drawn)(numel, repeats)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(row))
    dist.destroy_process_group()


def main() -> None:
    """Measure and print each row."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numels", type=float, nargs="*", default=[1e6, 1e7, 1e8])
    parser.add_argument("--drawn", type=float, nargs="*", default=[1e9])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = []
    for kind, numels in (("steps", options.numels), ("drawn", options.drawn)):
        for numel in map(int, numels):
            for ranks in options.ranks:
                with tempfile.TemporaryDirectory() as folder:
                    spawn(_serve, (ranks, folder, kind, numel, options.repeats), nprocs=ranks)
                    row = json.loads((Path(folder) / "row.json").read_text())
                row = {key: round(value, 3) for key, value in row.items()}
                rows.append({"kind": kind, "weights": numel, "ranks": ranks, **row})
                print(rows[-1], flush=True)
    if options.json:
        record = {"benchmark": "sharded", "compression": COMPRESSION, "repeats": options.repeats}
        record |= {"environment": environment(torch.device("cpu")), "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
