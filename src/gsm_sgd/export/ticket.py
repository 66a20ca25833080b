"""A winning ticket in a few kilobytes: seed, hash of the initialisation, masks and recipe; and its training again."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..budget import kept_weights
from ..experiments import UsageError, models
from ..experiments.lottery import TICKETS, retrain_ticket
from ..experiments.prune import Job, finish, initial_net
from ..experiments.recipes import Recipe
from ..experiments.rundir import read_weights
from ..experiments.states import tensors_hash
from ..masks import Masks
from ..names import prunable_parameters
from ..reports import nets
from ..reports.runs import read_run
from .sparse import read_sparse, save_sparse

_FACTS = {"recipe": dict, "method": str, "init": str, "trained": str, "threads": int, "machine": str}
_MOST_THREADS = 1_024


class Ticket(NamedTuple):
    """What a ticket holds: a sparse file of its masks, with the rest in place of the recipe."""

    masks: Masks  # by name of the weights
    recipe: dict[str, Any]  # of the lottery, as `recipe.yaml` has it; the seed is in it
    method: str  # what found the ticket, gsm or magnitude
    init: str  # the hash of the initialisation, and
    trained: str  # of the weights that came out when it was retrained,
    top1: float  # their accuracy in percent,
    threads: int  # how many computed them,
    machine: str  # and with what, in words


class Replay(NamedTuple):
    """What a ticket came to when it was trained again: accuracy in percent, and whether the weights are the same."""

    top1: float
    same_weights: bool


def save_ticket(folder: Path, method: str = "gsm", out: Path | None = None) -> str:
    """Write a ticket of a finished lottery to a file, by default in its folder, and return a line on it.

    Raises:
        UsageError: it is no finished lottery, or the file cannot be written.
    """
    if method not in TICKETS:
        raise UsageError(f"unknown method {method!r}: choose one of {', '.join(TICKETS)}")
    run = read_run(folder)
    result = run.finished()
    if result["command"] != "lottery":
        raise UsageError(f"{folder} is no lottery and has no tickets: gsm lottery makes them")
    process = run.processes[-1] if run.processes else {}
    machine = [f"torch {result.get('torch')}", process.get("processor", result["device"]), process.get("instructions")]
    ticket = Ticket(
        masks=nets.mask(run, method),
        recipe=run.recipe,
        method=method,
        init=tensors_hash(read_weights(folder / "init.safetensors")),
        trained=tensors_hash(read_weights(folder / f"ticket-{method}.safetensors")),
        top1=result["top1"][f"ticket_{method}"],
        threads=process.get("threads", torch.get_num_threads()),
        machine=", ".join(str(part) for part in machine if part),
    )
    out = out or folder / f"ticket-{method}.ticket.safetensors.xz"
    size = write_ticket(out, ticket)
    return f"{out}: {size:,} bytes, {ticket.masks.num_kept:,} weights, {ticket.top1:.2f} %"


def write_ticket(path: Path, ticket: Ticket) -> int:
    """Write a ticket to a file, whole or not at all, and return its size in bytes."""
    facts = {name: getattr(ticket, name) for name in _FACTS}
    return save_sparse(path, ticket.masks, prunable=ticket.masks, recipe=facts, top1=ticket.top1)


def read_ticket(path: Path) -> Ticket:
    """Return the ticket of a file; UsageError if it is missing, damaged, or no ticket."""
    file = read_sparse(path)
    facts, top1 = file.recipe, file.certificate.top1
    types = {name: type(fact) for name, fact in facts.items()} if isinstance(facts, dict) else {}
    if types != _FACTS or top1 is None or facts["method"] not in TICKETS or not 1 <= facts["threads"] <= _MOST_THREADS:
        raise UsageError(f"{path} is not a ticket: gsm ticket save makes one of a lottery")
    return Ticket(masks=Masks(file.pruned), top1=top1, **facts)


def check_fits(ticket: Ticket, recipe: Recipe, classes: int, source: Path) -> None:
    """Raise UsageError if the layers of a ticket, or the number of its weights, are not those of its recipe's net."""
    prunable = prunable_parameters(models.build(recipe.model, recipe.seed, classes))
    kept = ticket.masks.num_kept
    masks = {name: (mask.shape, mask.dtype) for name, mask in ticket.masks.items()}
    if masks != {name: (weight.shape, torch.bool) for name, weight in prunable.items()}:
        raise UsageError(f"{source} does not fit {recipe.model}: its masks are of other layers")
    if kept != kept_weights(sum(weight.numel() for weight in prunable.values()), recipe.compression):
        raise UsageError(f"{source} keeps {kept:,} weights, which is not {recipe.compression:g}x of its net")


def replay(job: Job, ticket: Ticket, source: Path) -> Replay:
    """Train a ticket that fits again, and compare; UsageError if its seed initialises the net differently here."""
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
