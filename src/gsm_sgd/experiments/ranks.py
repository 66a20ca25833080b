"""The processes that torchrun has started for a run, ranked from 0; without it there is one, and nothing to agree on.

Each trains on its shard of every batch, DistributedDataParallel averages the gradients, and rank 0 writes.
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

_LOSSES = ("closed by peer", "reset by peer", "Broken pipe", "imed out")  # gloo has no type of its own for a lost rank


class LostRankError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return how many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_distributed() -> bool:
    """Return whether there are several processes."""
    return world_size() > 1


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the processes for as long as the context lasts, which gets the device of this one.

    Raises:
        UsageError: there are more processes than GPUs on this machine.
        LostRankError: another process has ended.
    """
    if not is_distributed():
        yield device
        return
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UsageError(f"process {local_rank} of this machine has no GPU: start {gpus} at most")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UsageError(f"several processes cannot share work on {device.type}: add --device cpu")
    store, _, _ = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # When torchrun starts the processes of one machine again they share a store with those that ended, and may
        # read where one of these was to be reached.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]  # torch's stubs do not list it
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), device_id=device_id)
    try:
        yield device
    except RuntimeError as error:
        gloo_lost = "gloo" in str(error) and any(words in str(error) for words in _LOSSES)
        if not (gloo_lost or isinstance(error, dist.DistBackendError | dist.DistNetworkError)):
            raise
        raise LostRankError(
            "another process of this run has ended, its own message says why: give the same command again to go on"
        ) from error
    finally:
        dist.destroy_process_group()


def replicate(model: nn.Module) -> nn.Module:
    """Return a model to train with: its gradients are averages over all processes."""
    return DistributedDataParallel(model) if is_distributed() else model


def loss_weight(count: int) -> float:
    """Return what to multiply the mean loss of this process's shard of a batch of `count` images by.

    The average over the processes is then the mean over the batch, even where it does not divide evenly.
    """
    return len(range(rank(), count, world_size())) * world_size() / count


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process rank 0's buffers: the means and variances of batch norms."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum over all processes, in place."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def from_rank_0(value: bool) -> bool:
    """Return rank 0's value: it writes files, so the others may see them earlier or later."""
    answer = [value]
    if is_distributed():
        dist.broadcast_object_list(answer, 0)
    return answer[0]


def barrier() -> None:
    """Wait until all processes have come here."""
    if is_distributed():
        dist.barrier()
