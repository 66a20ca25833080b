"""A winning ticket in a few kilobytes: seed, hash of the initialisation, mask and recipe; and its training again."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..experiments import UsageError, models
from ..experiments.lottery import TRAINED, retrain_ticket
from ..experiments.prune import Job, finish, initial_net
from ..experiments.recipes import Recipe
from ..experiments.rundir import read_weights
from ..experiments.states import tensors_hash
from ..experiments.whole_files import write_output
from ..masks import magnitude_masks, prunable_parameters
from ..reports.runs import read_run
from ..selection import kept_weights
from . import container, indices
from .container import Container, FormatError
from .table import Row, check_rows, codings_from_text, codings_to_text, rows_from_json, rows_to_json

FORMAT = "gsm-sgd ticket 1"
_MOST_THREADS = 1_024


@dataclass(frozen=True)
class Ticket:
    """What a ticket's file holds.

    Args:
        masks: bool, by name of the weights.
        recipe: of the lottery, as `recipe.yaml` has it; the seed is in it.
        method: what found the ticket, gsm or magnitude.
        init: hash of the initialisation.
        trained: hash of the weights that came out when it was retrained.
        top1: the accuracy of these, in percent.
        threads: how many computed them.
        machine: what they were computed with, in words.
    """

    masks: dict[str, Tensor]
    recipe: dict[str, Any]
    method: str
    init: str
    trained: str
    top1: float
    threads: int
    machine: str


class Replay(NamedTuple):
    """What a ticket came to when it was trained again: accuracy in percent, and whether the weights are the same."""

    top1: float
    same_weights: bool


def save_ticket(folder: Path, method: str = "gsm", out: Path | None = None) -> str:
    """Write a ticket of a finished lottery to a file, and return a line on it.

    Args:
        folder: the run's.
        method: what found the ticket, gsm or magnitude.
        out: the file; default is ticket-<method>.ticket.safetensors in the run's folder.

    Raises:
        UsageError: it is no finished lottery, or the file cannot be written.
    """
    if method not in TRAINED:
        raise UsageError(f"unknown method {method!r}: choose one of {', '.join(TRAINED)}")
    run = read_run(folder)
    result = run.finished()
    if result["command"] != "lottery":
        raise UsageError(f"{folder} is no lottery and has no tickets: gsm lottery makes them")
    trained = read_weights(folder / f"{TRAINED[method]}.safetensors")
    names = [layer["name"] for layer in result["layers"]]
    process = run.processes[-1] if run.processes else {}
    machine = [f"torch {result.get('torch')}", process.get("processor", result["device"]), process.get("instructions")]
    ticket = Ticket(
        masks=magnitude_masks({name: trained[name] for name in names}, result["compression"]),
        recipe=run.recipe,
        method=method,
        init=tensors_hash(read_weights(folder / "init.safetensors")),
        trained=tensors_hash(read_weights(folder / f"ticket-{method}.safetensors")),
        top1=result["top1"][f"ticket_{method}"],
        threads=process.get("threads", torch.get_num_threads()),
        machine=", ".join(str(part) for part in machine if part),
    )
    out = out or folder / f"ticket-{method}.ticket.safetensors"
    write_ticket(out, ticket)
    kept = sum(int(mask.sum()) for mask in ticket.masks.values())
    return f"{out}: {out.stat().st_size:,} bytes, {kept:,} weights, {ticket.top1:.2f} %"


def write_ticket(path: Path, ticket: Ticket) -> None:
    """Write a ticket to a file, whole or not at all."""
    rows = [Row(name, tuple(mask.shape), "BOOL") for name, mask in ticket.masks.items()]
    positions = [mask.reshape(-1).nonzero().flatten().numpy() for mask in ticket.masks.values()]
    sizes = [row.size for row in rows]
    codings = [indices.choose(where, size, 0) for where, size in zip(positions, sizes, strict=True)]
    metadata = {
        "format": FORMAT,
        "method": ticket.method,
        "codes": codings_to_text(codings),
        "init": ticket.init,
        "trained": ticket.trained,
        "top1": repr(float(ticket.top1)),
        "threads": str(ticket.threads),
        "machine": ticket.machine,
    }
    about = {"prunable": rows_to_json(rows), "recipe": ticket.recipe}
    sections = {"code": indices.encode(positions, sizes, codings)}
    write_output(path, container.to_bytes(Container(metadata, about, sections)), "--out")


def read_ticket(path: Path) -> Ticket:
    """Return the ticket of a file.

    Raises:
        UsageError: the file is missing, damaged, or no ticket.
    """
    try:
        return _ticket(container.read(path, FORMAT), path.stat().st_size)
    except FormatError as error:
        raise UsageError(f"{path} is not a ticket, or damaged: {error}") from error
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def check_fits(ticket: Ticket, recipe: Recipe, classes: int, source: Path) -> None:
    """Raise UsageError if the layers of a ticket, or the number of its weights, are not those of its recipe's net."""
    prunable = prunable_parameters(models.build(recipe.model, recipe.seed, classes))
    kept = sum(int(mask.sum()) for mask in ticket.masks.values())
    if {name: mask.shape for name, mask in ticket.masks.items()} != {name: p.shape for name, p in prunable.items()}:
        raise UsageError(f"{source} does not fit {recipe.model}: its masks are of other layers")
    if kept != kept_weights(sum(p.numel() for p in prunable.values()), recipe.compression):
        raise UsageError(f"{source} keeps {kept:,} weights, which is not {recipe.compression:g}x of its net")


def replay(job: Job, ticket: Ticket, source: Path) -> Replay:
    """Train a ticket that fits again from its seed, in a run's folder, and compare.

    Raises:
        UsageError: the initialisation of that seed is not the ticket's.
    """
    initial_net(job)
    if tensors_hash(read_weights(job.run.path / "init.safetensors")) != ticket.init:
        raise UsageError(
            f"the initialisation of seed {job.recipe.seed} here is not that of {source}, made with {ticket.machine}"
        )
    stage = f"ticket-{ticket.method}"
    top1 = retrain_ticket(job, ticket.method, ticket.masks)
    model = models.build(job.recipe.model, job.recipe.seed, job.data.classes)
    job.run.load_weights(stage, model)
    finish(job, "replay", model, {f"ticket_{ticket.method}": top1})
    trained = tensors_hash(read_weights(job.run.path / f"{stage}.safetensors"))
    return Replay(top1, trained == ticket.trained)


def _ticket(content: Container, file_bytes: int) -> Ticket:
    metadata, about, sections = content
    rows = rows_from_json(about.get("prunable"))
    check_rows(rows, file_bytes)
    if sections.keys() != {"code"} or any(row.dtype != "BOOL" for row in rows) or metadata["method"] not in TRAINED:
        raise FormatError("it holds something else")
    codings = codings_from_text(metadata.get("codes"), rows)
    if any(coding.kind == "whole" for coding in codings):
        raise FormatError("its codes are damaged")
    recipe, top1, threads = about.get("recipe"), float(metadata["top1"]), int(metadata["threads"])
    if not (isinstance(recipe, dict) and math.isfinite(top1) and 1 <= threads <= _MOST_THREADS):
        raise FormatError("what it says of its training makes no sense")
    masks = {}
    for row, where in zip(rows, indices.decode(sections["code"], [row.size for row in rows], codings), strict=True):
        mask = torch.zeros(row.size, dtype=torch.bool)
        mask[torch.from_numpy(where)] = True
        masks[row.name] = mask.reshape(row.shape)
    facts = {key: metadata[key] for key in ("method", "init", "trained", "machine")}
    return Ticket(masks=masks, recipe=recipe, top1=top1, threads=threads, **facts)
