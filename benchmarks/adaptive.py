"""Methods for AdamW on a small language model: which one loses least?

    python benchmarks/adaptive.py [--rows gsm,gradual] [--compression 2,4,10,20] [--patterns] [--seeds 0-2]
        [--steps 3000] [--jobs 2] [--out runs/adaptive] [--json FILE]

The net is that of examples/language_model.py, which learns the bytes of Python's manual. Each row has four trials at
each ratio, with seed 0; the one with the fewest bits on held-out text is trained with all seeds and tested on the last
tenth. All rows prune the matrices of the blocks to exactly floor(N / C) weights, and have the same steps, batches,
warm-up, cosine and clipping. Masks begin to fall at 30 % of the steps and are final at 75 %, so the rest retrains.

Each run is a file in --out, and what is finished is not trained again, so an interrupted command goes on.
"""

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from gsm_sgd import GSMAdamW, Phase, Schedule
from gsm_sgd.experiments.environment import environment
from gsm_sgd.experiments.whole_files import atomic_write
from gsm_sgd.masks import choose
from gsm_sgd.methods import Gradual
from gsm_sgd.names import prunable_in
from gsm_sgd.patterns import NM, Block, Unstructured
from gsm_sgd.reports.runs import over_seeds
from gsm_sgd.rule import Part
from gsm_sgd.schedules import CURVES

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from language_model import BATCH, LENGTH, Transformer, bits_per_byte  # type: ignore[import-not-found]

BEGIN = 0.3  # share of the steps before anything is pruned: the net has to learn to attend first
CUT = 0.75  # share of the steps after which the masks of every row are final
END = 0.6  # share after which the final density is reached, in rows that have another setting of their own
WEIGHT_DECAY = 0.01


class Run(NamedTuple):
    """What a training depends on."""

    row: str
    compression: float
    settings: dict[str, float]  # lr, and the row's own
    seed: int
    steps: int

    @property
    def file(self) -> str:
        """The name of its record."""
        return hashlib.sha256(json.dumps(self._asdict(), sort_keys=True).encode()).hexdigest()[:16] + ".json"


Groups = list[dict[str, Any]]
Build = Callable[[Groups, Run], Optimizer]


def adamw(groups: Groups, run: Run) -> Optimizer:
    """Return torch's AdamW, which the rows but GSM's are built on; alone it is the dense row."""
    return AdamW(groups, lr=run.settings["lr"], weight_decay=WEIGHT_DECAY, fused=True)


# --- GSM and its ablations ---


def gsm(kind: type[GSMAdamW] = GSMAdamW, begin: float = BEGIN, **options: Any) -> Build:
    """Return what builds GSMAdamW with a cubic ramp that lasts from `begin` as long as from BEGIN to `end`."""

    def build(groups: Groups, run: Run) -> Optimizer:
        end = run.settings["end"] + begin - BEGIN

        def curve(share: float) -> float:
            return CURVES["cubic"](max(0.0, (share * end - begin) / (end - begin)))

        schedule = Schedule(run.steps, ramp=end, fade=0.1, cut=CUT, curve=curve)
        budget: dict[str, Any] = {} if isinstance(options.get("pattern"), NM) else {"compression": run.compression}
        return kind(groups, run.settings["lr"], weight_decay=WEIGHT_DECAY, schedule=schedule, **budget, **options)

    return build


class BothMasked(GSMAdamW):
    """The second moment is of the masked gradient too."""

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        grads = [grad * mask.to(grad.dtype) for grad, mask in zip(part.grads, active, strict=True)]
        super()._masked_(part._replace(grads=grads), active)


class MaskedAfter(GSMAdamW):
    """Both moments are of the full gradient; a passive weight only decays, at once, as its update is masked."""

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        factor = 1 - float(part.group["lr"]) * part.passive_decay
        kept, decayed = [mask.bool() for mask in active], [param * factor for param in part.params]
        self._torchs_(part, exactly=False)
        for param, mask, passive in zip(part.params, kept, decayed, strict=True):
            param.copy_(torch.where(mask, param, passive))


class Coupled(GSMAdamW):
    """What passive weights decay more than active ones is in their gradient, as L2 regularisation is.

    So it goes through both moments: M is of B G + D and V of G + D, with D = (1 - B) (eta_p - eta) W.
    """

    def _masked_(self, part: Part, active: list[Tensor]) -> None:
        if self.phase is Phase.DONE:  # nothing decays any more
            return super()._masked_(part, active)
        beta1 = part.group["betas"][0]
        kept = [mask.bool() for mask in active]
        rest = [grad.masked_fill(mask, 0) for grad, mask in zip(part.grads, kept, strict=True)]
        # Torch's step takes G + D for both moments, so (1 - B) G is taken out of the first before.
        torch._foreach_add_(part.buffers["exp_avg"], rest, alpha=-(1 - beta1) / beta1)
        decay = [param.masked_fill(mask, 0) for param, mask in zip(part.params, kept, strict=True)]
        grads = torch._foreach_add(part.grads, decay, alpha=part.extra_decay)
        return self._torchs_(part._replace(grads=list(grads)), exactly=False)


def momentum(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w m|, with the first moment that an active weight has after this step.

    With that of before the step a weight that is passive for long could never be active again.
    """
    first: Tensor = state["exp_avg"]
    return (weight * first.lerp(grad, 0.1)).abs()


def update(weight: Tensor, grad: Tensor, state: Mapping[str, Any]) -> Tensor:
    """Return |w m^ / sqrt(v^)| with both moments after this step; their corrections are the same for all weights."""
    first, second = state["exp_avg"].lerp(grad, 0.1), state["exp_avg_sq"].lerp(grad * grad, 1e-3)
    scores: Tensor = (weight * first / (second.sqrt() + 1e-8)).abs()
    return scores


# --- what it is compared with ---


def gradual(groups: Groups, run: Run) -> Optimizer:
    """Return AdamW with gradual magnitude pruning (Zhu and Gupta, 2017) of the whole model."""
    optimizer = adamw(groups, run)
    Gradual(optimizer, run.steps, compression=run.compression, begin=BEGIN, end=run.settings["end"])
    return optimizer


class Rival:
    """Masks around the steps of an optimizer; their density falls by a cubic rule from BEGIN to `end`.

    A subclass says by what `scores` weights are kept, and what to `note` before a step for that. Masks are chosen every
    `every` steps, and are final at CUT; then the optimizer trains what they keep.
    """

    every = 1

    def __init__(self, optimizer: Optimizer, run: Run, end: float = END) -> None:
        self.weights = list(prunable_in(optimizer).values())
        self.steps, self.end, self.step, self.cut = run.steps, end, 0, round(CUT * run.steps)
        self.total = sum(weight.numel() for weight in self.weights)
        self.kept = int(self.total / run.compression)
        self.masks = [torch.ones_like(weight, dtype=torch.bool) for weight in self.weights]
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @classmethod
    def build(cls, groups: Groups, run: Run) -> Optimizer:
        """Return AdamW with such masks."""
        optimizer = adamw(groups, run)
        cls(optimizer, run)
        return optimizer

    def note(self, grads: list[Tensor]) -> None:
        """Note what the scores need, and what the optimizer is to update."""
        raise NotImplementedError

    def scores(self) -> list[Tensor]:
        """Return a score for each weight; the highest are kept."""
        raise NotImplementedError

    def choose(self) -> None:
        """Take as masks those of the highest scores, and set all else to zero."""
        share = min(1.0, max(0.0, (self.step / self.steps - BEGIN) / (self.end - BEGIN)))
        num_cut = round((self.total - self.kept) * CURVES["cubic"](share))
        self.masks = choose(self.scores(), self.total - num_cut, Unstructured())
        torch._foreach_mul_(self.weights, self.masks)

    @torch.no_grad()
    def _before(self, *_: Any) -> None:
        grads = [weight.grad for weight in self.weights if weight.grad is not None]
        if self.step < self.cut:
            self.note(grads)
        else:
            torch._foreach_mul_(grads, self.masks)

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self.step += 1
        if self.step > self.cut:
            torch._foreach_mul_(self.weights, self.masks)
        elif self.step % self.every == 0 or self.step == self.cut:
            self.choose()


class Platon(Rival):
    """PLATON (Zhang et al., 2022): the weights with the lowest I U become zero every ten steps.

    I <- beta I + (1 - beta) |w g| is the importance, U <- .95 U + .05 ||w g| - I| its uncertainty. AdamW knows of no
    masks: between two choices all weights move, those at zero as well.
    """

    every = 10

    def __init__(self, optimizer: Optimizer, run: Run) -> None:
        super().__init__(optimizer, run)
        self.beta = run.settings["beta"]
        self.importance = [torch.zeros_like(weight) for weight in self.weights]
        self.uncertainty = [torch.zeros_like(weight) for weight in self.weights]

    def note(self, grads: list[Tensor]) -> None:
        """Update both."""
        current = torch._foreach_abs(torch._foreach_mul(self.weights, grads))
        torch._foreach_lerp_(self.importance, current, 1 - self.beta)
        apart = torch._foreach_abs(torch._foreach_sub(current, self.importance))
        torch._foreach_lerp_(self.uncertainty, apart, 0.05)

    def scores(self) -> list[Tensor]:
        """Return the products."""
        return list(torch._foreach_mul(self.importance, self.uncertainty))


class Latent(Rival):
    """The optimizer moves latent weights; the model computes with those of them that the masks keep."""

    def __init__(self, optimizer: Optimizer, run: Run) -> None:
        super().__init__(optimizer, run, run.settings["end"])
        self.latent = [weight.detach().clone() for weight in self.weights]

    def note(self, grads: list[Tensor]) -> None:
        """Put the latent weights in place for the optimizer."""
        torch._foreach_copy_(self.weights, self.latent)

    def choose(self) -> None:
        """Take them back, and show the model what is kept."""
        torch._foreach_copy_(self.latent, self.weights)
        super().choose()


class Proximal(Latent):
    """A proximal step, as torchao's pruning-aware training takes it, with the l0 norm and one budget for all layers.

    After each step of AdamW on the latent weights, the model gets their hard threshold: the proximal map of the number
    of weights that are not zero, at the threshold that leaves as many as the ramp has. The gradient, taken at these
    weights, goes unchanged to all latent ones, so what is below the threshold may come back.
    """

    def scores(self) -> list[Tensor]:
        """Return |w|."""
        return list(torch._foreach_abs(self.latent))


class Movement(Latent):
    """Movement pruning (Sanh et al., 2020): masks are of the highest S <- S - w dL/d(w * mask), from S = 0 on.

    All weights have their scores updated, straight through the mask; a weight has its gradient where it is kept. The
    learning rate of scores changes no choice, as they start at zero and only their order counts.
    """

    def __init__(self, optimizer: Optimizer, run: Run) -> None:
        super().__init__(optimizer, run)
        self.moved = [torch.zeros_like(weight) for weight in self.weights]

    def note(self, grads: list[Tensor]) -> None:
        """Update the scores, then mask the gradients."""
        super().note(grads)
        torch._foreach_addcmul_(self.moved, self.weights, grads, -1.0)
        torch._foreach_mul_(grads, self.masks)

    def scores(self) -> list[Tensor]:
        """Return what has added up."""
        return self.moved


# --- rows ---


class Row(NamedTuple):
    """A way to train, the settings that it chooses from, and the only ratio that it is for, if any."""

    title: str
    build: Build
    grid: Mapping[str, Sequence[float]] = {"lr": (3e-3, 8e-3), "end": (0.5, 0.6)}
    only: float | None = None


ROWS = {
    "dense": Row("dense", adamw, {"lr": (2e-3, 4e-3, 8e-3, 1.6e-2)}, only=1),
    "gsm": Row("GSM, |w g|", gsm()),
    "gradual": Row("gradual magnitude", gradual),
    "platon": Row("PLATON", Platon.build, {"lr": (3e-3, 8e-3), "beta": (0.85, 0.95)}),
    "proximal": Row("proximal step", Proximal.build),
    "movement": Row("movement pruning", Movement.build),
    "gsm_fisher": Row("GSM, |w| sqrt(v)", gsm(score="fisher")),
    "gsm_momentum": Row("GSM, |w m|", gsm(score=momentum)),
    "gsm_adam": Row("GSM, |w m^ / sqrt(v^)|", gsm(score=update)),
    "gsm_magnitude": Row("GSM, |w|", gsm(score="magnitude")),
    "gsm_both": Row("GSM, both moments masked", gsm(BothMasked)),
    "gsm_after": Row("GSM, mask after the moments", gsm(MaskedAfter)),
    "gsm_coupled": Row("GSM, coupled decay", gsm(Coupled)),
    "gsm_early": Row("GSM, ramp from the start", gsm(begin=0.0)),
    "nm24": Row("GSM, 2:4", gsm(pattern=NM(2, 4)), only=2),
    "block44": Row("GSM, blocks of 4x4", gsm(pattern=Block(4, 4)), only=4),
    "block116": Row("GSM, blocks of 1x16", gsm(pattern=Block(1, 16)), only=4),
}
PATTERNS = ("nm24", "block44", "block116")


def trials(row: str, compression: float, steps: int) -> list[Run]:
    """Return the runs that a row's settings are chosen from."""
    grid = ROWS[row].grid
    settings = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [Run(row, compression, one, 0, steps) for one in settings]


def pairs(rows: Iterable[str], ratios: Sequence[float]) -> list[tuple[str, float]]:
    """Return each row with each ratio that it is for: the dense one with 1x, others with those that are asked for."""
    only = {row: ROWS[row].only for row in rows}
    both = itertools.product(rows, [1.0, *(ratio for ratio in ratios if ratio != 1)])
    return [(row, ratio) for row, ratio in both if (ratio != 1 if only[row] is None else ratio == only[row])]


# --- a run ---


def texts() -> dict[str, Tensor]:
    """Return the text to train on, to choose settings by, and to test on."""
    text = torch.tensor(list("\n".join(pydoc_data.topics.topics.values()).encode()))
    first, second = len(text) * 8 // 10, len(text) * 9 // 10
    return {"train": text[:first], "held_out": text[first:second], "test": text[second:]}


def parameter_groups(model: nn.Module) -> Groups:
    """Return what is pruned, the matrices of the blocks, and the rest."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if name.startswith("blocks.") and p.ndim == 2}
    rest = [pair for pair in named.items() if pair[0] not in matrices]
    return [{"params": list(matrices.items())}, {"params": rest, "prunable": False, "weight_decay": 0.0}]


def train(run: Run, text: Tensor) -> nn.Module:
    """Return the trained net."""
    torch.manual_seed(run.seed)
    batches = torch.Generator().manual_seed(run.seed)
    model: nn.Module = Transformer()
    optimizer = ROWS[run.row].build(parameter_groups(model), run)

    def factor(step: int) -> float:
        return min(1.0, 20 * (step + 1) / run.steps) * (0.5 + 0.5 * math.cos(math.pi * step / run.steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(run.steps):
        starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=batches)
        pieces = text[starts + torch.arange(LENGTH + 1)]
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    return model


def measured(run: Run, out: Path) -> dict[str, Any]:
    """Return a run's record, of which the file is there or is made."""
    path = out / run.file
    if not path.exists():
        began, text = time.perf_counter(), texts()
        model = train(run, text["train"])
        seconds = time.perf_counter() - began
        weights = [param for _, param in parameter_groups(model)[0]["params"]]
        kept, total = sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)
        assert kept == int(total / run.compression), f"{run}: {kept} of {total} weights are left"
        bits = {part: round(bits_per_byte(model, text[part]), 4) for part in ("held_out", "test")}
        record = {**run._asdict(), "kept": kept, **bits, "seconds": round(seconds, 1)}
        atomic_write(path, json.dumps(record).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# --- the comparison ---


def records(runs: Sequence[Run], out: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield the record of each run as it ends; `jobs` are trained at a time, each with one thread."""
    if jobs == 1:
        yield from (measured(run, out) for run in runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for future in as_completed([pool.submit(measured, run, out) for run in runs]):
            yield future.result()


def train_all(runs: Sequence[Run], out: Path, jobs: int, later: int = 0) -> list[dict[str, Any]]:
    """Train what has no record yet, say how it goes, and return all records; `later` is how many runs are to come."""
    due, began = [run for run in runs if not (out / run.file).exists()], time.perf_counter()
    print(f"{len(runs) - len(due)} of {len(runs)} runs are there already", flush=True)
    for over, record in enumerate(records(due, out, jobs), 1):
        left = (time.perf_counter() - began) / over * (len(due) - over + later) / 60
        about = f"{record['row']} at {record['compression']:g}x, {record['settings']}, seed {record['seed']}"
        print(f"{over} of {len(due)} are over: {about}: {record['held_out']} bits; {left:.0f} min left", flush=True)
    return [measured(run, out) for run in runs]


def compare(
    table: Sequence[tuple[str, float]], seeds: Sequence[int], steps: int, out: Path, jobs: int
) -> list[dict[str, Any]]:
    """Choose settings for each row and ratio by held-out text, then train with all seeds; return what was found."""
    tried = [run for cell in table for run in trials(*cell, steps)]
    found = iter(train_all(tried, out, jobs, later=len(table) * sum(seed != 0 for seed in seeds)))
    cells: list[dict[str, Any]] = []
    for row, ratio in table:
        mine = [next(found) for _ in trials(row, ratio, steps)]
        settings = min(mine, key=lambda record: record["held_out"])["settings"]
        cells.append({"row": row, "title": ROWS[row].title, "compression": ratio, "kept": mine[0]["kept"]})
        cells[-1] |= {"grid": ROWS[row].grid, "settings": settings}
        cells[-1]["trials"] = [{key: record[key] for key in ("settings", "held_out")} for record in mine]
    final = [Run(cell["row"], cell["compression"], cell["settings"], seed, steps) for cell in cells for seed in seeds]
    found = iter(train_all(final, out, jobs))
    return [{**cell, "test": over_seeds([next(found)["test"] for _ in seeds])} for cell in cells]


def leader(cells: Iterable[Mapping[str, Any]]) -> str:
    """Return which row needs the fewest bits at a ratio, and whether the next is over one deviation behind."""
    first, *others = sorted(cells, key=lambda cell: cell["test"]["mean"])
    where = f"{first['compression']:g}x: {first['row']}"
    if not others:
        return f"{where} is alone"
    ahead = others[0]["test"]["mean"] - first["test"]["mean"]
    deviations = [cell["test"]["std"] for cell in (first, others[0])]
    if None in deviations:
        return f"{where} is {ahead:.4f} bits before {others[0]['row']}, with one seed"
    verdict = "leads" if ahead > max(deviations) else "does not lead outside one deviation"
    return f"{where} {verdict}: {ahead:.4f} bits before {others[0]['row']}, deviations {deviations[0]}, {deviations[1]}"


def shown(cells: Sequence[Mapping[str, Any]], title: str) -> Table:
    """Return means and deviations: a row for each method, a column for each ratio."""
    ratios = sorted({cell["compression"] for cell in cells})
    table = Table("bits per byte", *(f"{ratio:g}x" for ratio in ratios), title=title)
    for row in dict.fromkeys(cell["row"] for cell in cells):
        tests = {cell["compression"]: cell["test"] for cell in cells if cell["row"] == row}
        texts = [f"{tests[r]['mean']:.3f} ± {tests[r]['std'] or 0:.3f}" if r in tests else "" for r in ratios]
        table.add_row(ROWS[row].title, *texts)
    return table


def main() -> None:
    """Train what is not there yet, print the table and who leads, and write all down if asked."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default=",".join(row for row in ROWS if row not in PATTERNS))
    parser.add_argument("--compression", default="2,4,10,20")
    parser.add_argument("--patterns", action="store_true", help=f"add the rows {', '.join(PATTERNS)}")
    parser.add_argument("--seeds", default="0-2", help="the first and the last")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive"))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    rows = list(dict.fromkeys([*options.rows.split(","), *(PATTERNS if options.patterns else ())]))
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"there is no row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    torch.set_num_threads(1)
    first, _, last = options.seeds.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    ratios = [float(ratio) for ratio in options.compression.split(",")]
    record: dict[str, Any] = {"benchmark": "adaptive", "steps": options.steps, "seeds": seeds}
    record |= {"bytes": {part: len(text) for part, text in texts().items()}}
    record |= {"environment": environment(torch.device("cpu"))}
    options.out.mkdir(parents=True, exist_ok=True)
    cells = compare(pairs(rows, ratios), seeds, options.steps, options.out, options.jobs)
    at = {ratio: [cell for cell in cells if cell["compression"] == ratio] for ratio in ratios}
    record |= {"rows": cells, "leaders": [leader(some) for some in at.values() if some]}
    console = Console()
    console.print(shown(cells, f"{options.steps:,} steps, seeds {options.seeds}, last tenth of the text"))
    console.print(*record["leaders"], sep="\n", highlight=False)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
