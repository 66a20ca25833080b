"""What an optimizer step costs: GSM against SGD and the published approach, interleaved on the same shapes."""

import ctypes
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from ..budget import Budget
from ..optim.gsm import GSM
from ..optim.gsm_adamw import GSMAdamW
from ..optim.sparse import SparseOptimizer
from . import UsageError, models, suggestion

Shapes = list[tuple[int, ...]]
BASELINE = "SGD, fused"
ADAMW = "AdamW, fused"
BY_TORCH = "GSM, torch operations"
CAPTION = "±: half of the interquartile range over the turns"
WORKLOADS = {"lenet300": 60, "lenet5": 125, "resnet56": 10, "resnet50": 5, "gpt2": 10}
"""The models whose shapes are known, and the compression ratios to measure them at."""

_SETTINGS: dict[str, Any] = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4}
_WARM_UP = 2  # turns
_OPTIMIZERS = 7
_SPREAD = 0.25  # beyond it a figure says little
_GRADIENT_SETS = 3  # a threshold that never moves would flatter


class Workload(NamedTuple):
    """Shapes of a model's parameters, and the compression ratio to measure at."""

    shapes: Shapes
    compression: float


class Cost(NamedTuple):
    """What one optimizer's step costs."""

    name: str
    milliseconds: float  # median
    ratio: float  # of torch's SGD(fused=True) or AdamW(fused=True), in the same run
    milliseconds_spread: float  # as `spread` has it
    ratio_spread: float
    extra_mib: float | None  # memory beyond parameters, gradients and momenta at its peak; None where unknown
    first_seconds: float  # the first step, compilation included


def workload(name: str) -> Workload:
    """Return a workload by name; UsageError if there is none."""
    if name not in WORKLOADS:
        raise UsageError(f"no parameter shapes are known for {name!r}: {suggestion(name, WORKLOADS)}")
    shapes = _gpt2() if name == "gpt2" else [tuple(param.shape) for param in models.build(name, 0).parameters()]
    return Workload(shapes, WORKLOADS[name])


def spread(values: Sequence[float]) -> float:
    """Return half the interquartile range of some measurements as a share of their median, 0 if there is only one."""
    if len(values) == 1:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2 / median(values)


def busy(spreads: Iterable[float]) -> str | None:
    """Return a warning if measurements vary so much that they say little, else None."""
    if (largest := max(spreads)) <= _SPREAD:
        return None
    return f"the times vary by ± {largest:.0%}: measure again when the machine is not busy with something else"


def measure(
    work: Workload, repeats: int, device: torch.device, progress: Callable[[str], object] = lambda _: None
) -> list[Cost]:
    """Return what a step of each optimizer costs, interleaved, `repeats` times each.

    `progress` is told of each of the `steps_in_all(repeats)` steps before it is taken.
    """
    torch.manual_seed(0)
    start = [torch.randn(shape, device=device) * 0.05 for shape in work.shapes]
    # Gradients of different batches, and of different size.
    grads = [[torch.randn_like(w) * 0.01 * 1.1**number for w in start] for number in range(_GRADIENT_SETS)]
    optimizers: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
        BASELINE: lambda params: SGD(params, fused=True, **_SETTINGS),
        "SGD, foreach": lambda params: SGD(params, foreach=True, **_SETTINGS),
        "GSM": lambda params: GSM(params, compression=work.compression, **_SETTINGS),
        BY_TORCH: lambda params: _ByTorch(params, compression=work.compression, **_SETTINGS),
        "published approach": lambda params: _Published(params, work.compression),
        ADAMW: lambda params: AdamW(params, fused=True, lr=1e-6),
        "GSMAdamW": lambda params: GSMAdamW(params, lr=1e-6, compression=work.compression),
    }
    contestants = {
        name: (make(params := [nn.Parameter(w.clone()) for w in start]), params) for name, make in optimizers.items()
    }

    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-_WARM_UP, repeats):
        for name, (optimizer, params) in contestants.items():
            for param, grad in zip(params, grads[turn % _GRADIENT_SETS], strict=True):
                param.grad = grad
            progress(name if seconds[name] else f"{name}, its first step")
            seconds[name].append(_timed(optimizer.step, device))
    measured = {name: times[_WARM_UP:] for name, times in seconds.items()}
    baselines = {name: measured[ADAMW if "AdamW" in name else BASELINE] for name in measured}
    return [
        Cost(
            name,
            milliseconds=1e3 * median(times),
            ratio=median(times) / median(baselines[name]),
            milliseconds_spread=spread(times),
            ratio_spread=spread([time / base for time, base in zip(times, baselines[name], strict=True)]),
            extra_mib=_extra_mib(contestants[name][0], device),
            first_seconds=seconds[name][0],
        )
        for name, times in measured.items()
    ]


def steps_in_all(repeats: int) -> int:
    """Return how many steps `measure` takes."""
    return _OPTIMIZERS * (_WARM_UP + repeats)


class _ByTorch(GSM):
    """GSM as it runs where step.c does not."""

    _in_c = None  # type: ignore[assignment]


class _Published(SGD):
    """The published approach: all importances concatenated, their top-k, a mask by the smallest of them."""

    def __init__(self, params: Sequence[nn.Parameter], compression: float) -> None:
        super().__init__(params, **_SETTINGS)
        self._prunable = [param for param in params if param.ndim >= 2]
        total = sum(param.numel() for param in self._prunable)
        self._kept = Budget.of(compression=compression).num_kept(total)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a benchmark has no closure
        grads = [param.grad for param in self._prunable if param.grad is not None]
        scores = [(param * grad).abs() for param, grad in zip(self._prunable, grads, strict=True)]
        threshold = torch.cat([score.view(-1) for score in scores]).topk(self._kept).values[-1]
        for param, score, grad in zip(self._prunable, scores, grads, strict=True):
            param.grad = grad * (score >= threshold)
        super().step()
        for param, grad in zip(self._prunable, grads, strict=True):
            param.grad = grad


def _timed(step: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cpu.synchronize if device.type == "cpu" else torch.accelerator.synchronize
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started


def _extra_mib(optimizer: Optimizer, device: torch.device) -> float | None:
    """Return the peak of memory that a step needs beyond what is there before it, and what it keeps for the next."""
    kept = optimizer.buffer_bytes if isinstance(optimizer, SparseOptimizer) else 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        optimizer.step()
        return (torch.cuda.max_memory_allocated(device) - before + kept) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the step would use memory that others left
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        optimizer.step()
        return (max(_status("VmHWM") - before, 0) + kept) / 2**20
    except (OSError, AttributeError, ValueError):  # not Linux
        return None


def _status(key: str) -> int:
    (kibibytes,) = re.findall(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(kibibytes)


def _gpt2() -> Shapes:
    """Return those of the smallest GPT-2, its head tied to the embedding."""
    width = 768
    norm, biased = [(width,), (width,)], [(3 * width, width), (3 * width,), (width, width), (width,)]
    block: Shapes = [*norm, *biased, *norm, (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *(12 * block), *norm]
