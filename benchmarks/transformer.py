"""Ways to prune with AdamW, on the small language model of examples/: which one loses least at equal steps?

    python benchmarks/transformer.py [--rows gsm,gradual] [--compression 2,4,10,20] [--seeds 3] [--steps 3000]
        [--jobs 2] [--out runs/transformer] [--json FILE]

Of every row the settings are chosen from as many trials, on held-out text, with seed 0; the chosen ones are then
trained with every seed and measured on the last tenth of the text. All rows prune the same matrices, see the same
batches, have the same schedule of the learning rate, and keep exactly floor(N / C) weights. A run is a file in --out;
those that are there are not trained again.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from gsm_sgd import GSMAdamW, Schedule
from gsm_sgd.experiments.environment import environment
from gsm_sgd.masks import choose
from gsm_sgd.methods import Gradual
from gsm_sgd.patterns import NM, Block, Unstructured
from gsm_sgd.rule import Part
from gsm_sgd.schedules import CURVES

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from language_model import BATCH, LENGTH, Transformer, bits_per_byte  # type: ignore[import-not-found]

BEGIN = 0.25  # share of the steps before anything is pruned: the net learns to attend first
CUT = 0.8  # share of the steps after which masks are fixed in every row
WEIGHT_DECAY = 0.01
Settings = dict[str, float]


# --- rows: GSM and its ablations ---


class Both(GSMAdamW):
    """Both moments are of the masked gradient."""

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        grads = [grad * mask.to(grad.dtype) for grad, mask in zip(part.grads, active, strict=True)]
        super()._masked_(part._replace(grads=grads), active)


class After(GSMAdamW):
    """Both moments are of the full gradient, and the mask is on the update."""

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        kept = [mask.bool() for mask in active]
        before = [param.clone() for param in part.params]
        self._torchs_(part, exactly=False)
        factor = 1 - float(part.group["lr"]) * part.passive_decay
        for param, old, mask in zip(part.params, before, kept, strict=True):
            param.copy_(torch.where(mask, param, old * factor))


class Coupled(GSMAdamW):
    """The passive decay is in the gradient, as L2 regularisation is, and so in both moments."""

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        grads = [
            torch.where(mask.bool(), grad, part.extra_decay * param)
            for param, grad, mask in zip(part.params, part.grads, active, strict=True)
        ]
        self._torchs_(part._replace(grads=grads), exactly=False)


def by_momentum(weight: Tensor, grad: Tensor, state: Any) -> Tensor:
    """Return |w m|."""
    first: Tensor = state["exp_avg"]
    return (weight * first).abs()


def by_update(weight: Tensor, grad: Tensor, state: Any) -> Tensor:
    """Return |w m / sqrt(v)|."""
    first, second = state["exp_avg"], state["exp_avg_sq"]
    scores: Tensor = (weight * first / (second.sqrt() + 1e-8)).abs()
    return scores


GSM_ROWS: dict[str, dict[str, Any]] = {
    "gsm": {},
    "gsm, score |w| sqrt(v)": {"score": "fisher"},
    "gsm, score |w m|": {"score": by_momentum},
    "gsm, score |w m / sqrt(v)|": {"score": by_update},
    "gsm, score |w|": {"score": "magnitude"},
    "gsm, both moments masked": {"kind": Both},
    "gsm, mask after the moments": {"kind": After},
    "gsm, coupled decay": {"kind": Coupled},
    "gsm, ramp from the start": {"begin": 0.0},
    "gsm, 2:4": {"pattern": NM(2, 4)},
    "gsm, blocks 4x4": {"pattern": Block(4, 4)},
    "gsm, blocks 1x16": {"pattern": Block(1, 16)},
}


def gsm(groups: Any, steps: int, compression: float, settings: Settings, **options: Any) -> GSMAdamW:
    """Return GSMAdamW with a ramp from BEGIN, or another start, to the setting `end`."""
    end, begin = settings["end"], options.pop("begin", BEGIN)

    def late(share: float) -> float:
        return CURVES["cubic"](max(0.0, (end * share - begin) / (end - begin)))

    schedule = Schedule(steps, ramp=end, fade=0.1, cut=CUT, curve=late)
    budget = {} if isinstance(options.get("pattern"), NM) else {"compression": compression}
    kind = options.pop("kind", GSMAdamW)
    rates = {"lr": settings["lr"], "weight_decay": WEIGHT_DECAY}
    optimizer: GSMAdamW = kind(groups, **rates, **budget, schedule=schedule, **options)
    return optimizer


# --- rows: what it is compared with ---


class Latent:
    """Weights are a masked copy of latent ones, which AdamW trains; masks follow the cubic ramp until the cut.

    A subclass says by what score weights are kept.
    """

    every = 1  # steps between two choices
    hard = False  # whether what is masked is lost, and moves on from zero until the next choice

    def __init__(self, weights: list[Tensor], steps: int, compression: float, end: float) -> None:
        self.weights, self.steps, self.end = weights, steps, end
        self.total = sum(weight.numel() for weight in weights)
        self.kept = int(self.total / compression)
        self.latent = [weight.detach().clone() for weight in weights]
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
        self.prepare()

    def prepare(self) -> None:
        """Make what the score needs."""

    def look(self, weight: Tensor, grad: Tensor, number: int) -> None:
        """Note a latent weight and its gradient."""

    def scores(self) -> list[Tensor]:
        """Return the scores; weights with the largest are kept."""
        return [weight.abs() for weight in self.latent]

    def before_step(self, step: int) -> None:
        """Put the latent weights in place, for the optimizer to update them."""
        for number, (weight, latent, mask) in enumerate(zip(self.weights, self.latent, self.masks, strict=True)):
            assert weight.grad is not None
            self.look(latent, weight.grad, number)
            if step >= round(CUT * self.steps):
                weight.grad.mul_(mask)
            weight.copy_(latent)

    def after_step(self, step: int) -> None:
        """Take the updated weights as latent ones, and mask them; `step` counts the one just taken."""
        share = min(1.0, max(0.0, (step / self.steps - BEGIN) / (self.end - BEGIN)))
        count = self.total - round((self.total - self.kept) * CURVES["cubic"](share))
        fixed = step >= round(CUT * self.steps)
        chosen = step <= round(CUT * self.steps) and step % self.every == 0
        if chosen:
            self.masks = choose(self.scores(), count, Unstructured())
        for weight, latent, mask in zip(self.weights, self.latent, self.masks, strict=True):
            latent.copy_(weight)
            if chosen or fixed or not self.hard:
                weight.mul_(mask)
            if self.hard or fixed:
                latent.copy_(weight)


class Proximal(Latent):
    """The proximal step of l0: of latent weights the largest pass, and the gradient goes to all, as PAT has it."""


class Movement(Latent):
    """Movement pruning (Sanh et al., 2020): scores are trained, and add up -w g; the gradient of w is masked."""

    def prepare(self) -> None:
        """Begin with equal scores."""
        self.moved = [torch.zeros_like(weight) for weight in self.weights]

    def look(self, weight: Tensor, grad: Tensor, number: int) -> None:
        """Train the scores, then mask the gradient of the weight."""
        self.moved[number].sub_(weight * grad)
        grad.mul_(self.masks[number])

    def scores(self) -> list[Tensor]:
        """Return what has been added up."""
        return self.moved


class Platon(Latent):
    """PLATON (Zhang et al., 2022): means over steps of |w g| times those of its deviation; what is cut is zero."""

    every, hard = 10, True
    _BETA1, _BETA2 = 0.85, 0.95

    def prepare(self) -> None:
        """Begin with nothing."""
        self.mean = [torch.zeros_like(weight) for weight in self.weights]
        self.deviation = [torch.zeros_like(weight) for weight in self.weights]

    def look(self, weight: Tensor, grad: Tensor, number: int) -> None:
        """Update the means."""
        score = (weight * grad).abs()
        self.mean[number].lerp_(score, 1 - self._BETA1)
        self.deviation[number].lerp_((score - self.mean[number]).abs(), 1 - self._BETA2)

    def scores(self) -> list[Tensor]:
        """Return the products."""
        return [mean * deviation for mean, deviation in zip(self.mean, self.deviation, strict=True)]


LATENT: dict[str, type[Latent]] = {"proximal": Proximal, "movement": Movement, "platon": Platon}
ROWS = ["dense", "gsm", "gradual", *LATENT, *(row for row in GSM_ROWS if row != "gsm")]
MAIN = ["gsm", "gradual", *LATENT]  # at every ratio
AT = {"dense": 1.0, "gsm, 2:4": 2.0, "gsm, blocks 4x4": 4.0, "gsm, blocks 1x16": 4.0}  # the only ratio; else ABLATED
ABLATED = 10.0


def grid(row: str) -> list[Settings]:
    """Return the trials of a row: as many for each."""
    own = {"weight_decay": [0.01, 0.1]} if row == "dense" else {"end": [0.5, 0.65]}
    axes = {"lr": [1e-3, 3e-3], **own}
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


# --- a run ---


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Return what is trained on, what settings are chosen on, and what is measured on."""
    whole = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    first, second = len(whole) * 8 // 10, len(whole) * 9 // 10
    return whole[:first], whole[first:second], whole[second:]


def groups_of(model: nn.Module) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return parameter groups, matrices of the blocks to prune and all else, and the matrices."""
    named = dict(model.named_parameters())
    blocks = {name: p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    others = {name: p for name, p in named.items() if name not in blocks}
    rest = {"params": list(others.items()), "prunable": False, "weight_decay": 0.0}
    return [{"params": list(blocks.items())}, rest], list(blocks.values())


def train(row: str, compression: float, settings: Settings, seed: int, steps: int) -> dict[str, float]:
    """Train, and return bits per byte of the held-out text and of the last tenth, and the seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    seen, held_out, unseen = text()
    model, began = Transformer(), time.perf_counter()
    groups, weights = groups_of(model)
    latent = method = None
    optimizer: Optimizer
    if row in GSM_ROWS:
        optimizer = gsm(groups, steps, compression, settings, **GSM_ROWS[row])
    else:
        decay = settings.get("weight_decay", WEIGHT_DECAY)
        optimizer = AdamW(groups, lr=settings["lr"], weight_decay=decay, fused=True)
    if row == "gradual":
        method = Gradual(optimizer, steps, compression=compression, begin=BEGIN, end=settings["end"])
    if row in LATENT:
        latent = LATENT[row](weights, steps, compression, settings["end"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 20 * (step + 1) / steps) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for step in range(steps):
        starts = torch.randint(len(seen) - LENGTH - 1, (BATCH, 1))
        pieces = seen[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            if latent is not None:
                latent.before_step(step)
            optimizer.step()
            if latent is not None:
                latent.after_step(step + 1)
        scheduler.step()
    if method is not None:
        method.finalize()
    kept, total = (sum(int(f(weight)) for weight in weights) for f in (torch.count_nonzero, torch.numel))
    assert kept == int(total / compression), f"{row} keeps {kept} of {total} weights"
    bits = {name: bits_per_byte(model, part) for name, part in (("held out", held_out), ("test", unseen))}
    return {**bits, "seconds": round(time.perf_counter() - began, 1)}


def run(out: Path, row: str, compression: float, settings: Settings, seed: int, steps: int) -> dict[str, Any]:
    """Return a run's record, from its file if it has been trained."""
    about = {"row": row, "compression": compression, "settings": settings, "seed": seed, "steps": steps}
    path = out / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}.json"
    if not path.exists():
        record = json.dumps({**about, **train(row, compression, settings, seed, steps)})
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(record)
        partial.replace(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- the comparison ---


def cells(rows: Sequence[str], ratios: Sequence[float]) -> Iterator[tuple[str, float]]:
    """Yield rows and the ratios that each is trained at."""
    for row in rows:
        for ratio in ratios if row in MAIN else [AT.get(row, ABLATED)]:
            yield row, ratio


def all_of(tasks: Sequence[tuple[Any, ...]], jobs: int, console: Console) -> list[dict[str, Any]]:
    """Return the records of runs, several trained at a time."""
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, *task) for task in tasks]
        for number, future in enumerate(as_completed(futures), 1):
            record, rest = future.result(), (time.perf_counter() - began) / number * (len(tasks) - number)
            about = f"{record['row']}, {record['compression']:g}x, {record['settings']}, seed {record['seed']}"
            console.print(f"{number}/{len(tasks)} {about}: {record['held out']:.3f} bits; {rest / 60:.0f} min left")
        return [future.result() for future in futures]


def main() -> None:
    """Choose settings, train with all seeds, print, and write down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=";".join(ROWS), help="with semicolons between")
    parser.add_argument("--compression", default="2,4,10,20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    console, steps = Console(width=110), options.steps
    options.out.mkdir(parents=True, exist_ok=True)
    table = [*cells(options.rows.split(";"), [float(ratio) for ratio in options.compression.split(",")])]

    tasks = [(options.out, *cell, settings, 0, steps) for cell in table for settings in grid(cell[0])]
    trials = all_of(tasks, options.jobs, console)
    chosen = {}
    for cell in table:
        mine = [trial for trial in trials if (trial["row"], trial["compression"]) == cell]
        chosen[cell] = min(mine, key=lambda trial: trial["held out"])["settings"]
    tasks = [(options.out, *cell, chosen[cell], seed, steps) for cell in table for seed in range(options.seeds)]
    finals = all_of(tasks, options.jobs, console)

    shown = Table("row", "times fewer", "bits per byte", "settings", title=f"{steps:,} steps, {options.seeds} seeds")
    rows = []
    for row, ratio in table:
        bits = [run["test"] for run in finals if (run["row"], run["compression"]) == (row, ratio)]
        spread = stdev(bits) if len(bits) > 1 else None
        mean = {"mean": round(fmean(bits), 4), "std": None if spread is None else round(spread, 4)}
        rows.append({"row": row, "compression": ratio, "settings": chosen[row, ratio], "bits": mean, "values": bits})
        shown.add_row(row, f"{ratio:g}", f"{mean['mean']:.3f} ± {spread or 0:.3f}", str(chosen[row, ratio]))
    console.print(shown)
    if options.json:
        record = {"benchmark": "transformer", "steps": steps, "seeds": options.seeds}
        record |= {"environment": environment(torch.device("cpu")), "rows": rows, "trials": trials}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
