"""The processes that torchrun has started for a run, numbered from 0; without it there is one, and nothing to agree on.

Each trains on its share of every batch, DistributedDataParallel averages the gradients, and the first one writes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from . import UsageError


class LostRankError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the processes for as long as the context lasts, which gets the device of this one.

    Raises:
        UsageError: there are more processes than GPUs on this machine.
        LostRankError: another process has ended.
    """
    if size() == 1:
        yield device
        return
    if device.type == "cuda":
        place = int(os.environ["LOCAL_RANK"])
        if place >= torch.cuda.device_count():
            raise UsageError(f"process {place} of this machine has no GPU: start {torch.cuda.device_count()} at most")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UsageError(f"several processes cannot share work on {device.type}: add --device cpu")
    store, number, count = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # When torchrun starts the processes of one machine again they share a store with those that ended, and may
        # read where one of these was to be reached.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]  # torch's stubs do not list it
    backend = "nccl" if device.type == "cuda" else "gloo"
    place_of_barriers = device if device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=number, world_size=count, device_id=place_of_barriers)
    try:
        yield device
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise LostRankError(
            "another process of this run has ended, its own message says why: give the same command again to go on"
        ) from error
    finally:
        dist.destroy_process_group()


def replicated(model: nn.Module) -> nn.Module:
    """Return a model to train with: its gradients are averages over all processes."""
    return model if size() == 1 else DistributedDataParallel(model)


def share_of(count: int) -> float:
    """Return by what to multiply the mean loss of this process's share of a batch of `count` images.

    So that the average over the processes is the mean over the batch, also where it does not divide evenly.
    """
    return len(range(rank(), count, size())) * size() / count


def with_first_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first one: the means and variances of batch norms."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def total(value: Tensor) -> Tensor:
    """Return the sum over all processes, in place."""
    if size() > 1:
        dist.all_reduce(value)
    return value


def first_says(value: bool) -> bool:
    """Return what the first process says: it writes files, so the others may see them earlier or later."""
    if size() > 1:
        answer = [value]
        dist.broadcast_object_list(answer, 0)
        return answer[0]
    return value


def wait() -> None:
    """Wait until all processes have come here."""
    if size() > 1:
        dist.barrier()


def _is_loss(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone: gloo has no type of its own for that."""
    text = str(error)
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        "gloo" in text
        and any(words in text for words in ("closed by peer", "reset by peer", "Broken pipe", "imed out"))
    )
