"""Several processes: the local parts of DTensors, and whether all processes agree."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_distributed() -> bool:
    """Return whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing what defines it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, in the same memory; any other tensor as it is."""
    whole: Any = tensor
    return whole.to_local() if is_dtensor(tensor) else tensor


def local_grad(param: Tensor) -> Tensor:
    """Return the gradient of this process's part of a parameter, zeros if the parameter has none."""
    if param.grad is None:
        return torch.zeros_like(to_local(param))
    return to_local(placed_like(param, param.grad))


def placed_like(param: Tensor, tensor: Tensor) -> Tensor:
    """Return a DTensor with the placements of a parameter; any other tensor as it is."""
    dtensor: Any = tensor
    placements = getattr(param, "placements", None)
    if is_dtensor(tensor) and dtensor.placements != placements:
        dtensor = dtensor.redistribute(placements=placements)
    return dtensor  # type: ignore[no-any-return]


def like_dtensor(param: Tensor, part: Tensor, shape: torch.Size | None = None) -> Tensor:
    """Return a tensor of a parameter's placements, and of its shape or another, given this process's part of it."""
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = param
    stride = like.stride() if shape is None else torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=shape or like.shape, stride=stride
    )


def local_slice(param: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a tensor of a parameter's shape that lies where this process has its part of the parameter.

    If the tensor is a DTensor with other placements than the parameter, every process has to call.
    """
    like: Any = param
    if is_dtensor(tensor):
        spread: Any = tensor
        if is_dtensor(param) and (spread.device_mesh, spread.placements) == (like.device_mesh, like.placements):
            return to_local(tensor)
        tensor = spread.full_tensor()
    if not is_dtensor(param):
        return tensor
    bounds = zip(offsets(param), to_local(param).shape, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in bounds)].clone()


def offsets(param: Tensor) -> Sequence[int]:
    """Return where, along each axis of a parameter, this process's part begins."""
    if not is_dtensor(param):
        return [0] * param.ndim
    dtensor: Any = param
    (chunk,) = dtensor.__create_chunk_list__()  # no public API tells; torch's distributed checkpoints use this one
    return list(chunk.offsets)


def is_first_copy(param: Tensor) -> bool:
    """Return whether this process is the first of those that hold the same part of a parameter.

    Raises:
        ValueError: the parts are partial sums.
    """
    if not is_dtensor(param):
        return dist.get_rank() == 0
    dtensor: Any = param
    if any(placement.is_partial() for placement in dtensor.placements):
        raise ValueError("a parameter is a DTensor of partial sums (Partial): redistribute it first")
    return all(
        dtensor.device_mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(dtensor.placements)
        if placement.is_replicate()
    )


def check_same_settings(settings: Mapping[str, float], device: torch.device) -> None:
    """Raise ValueError on every process if they do not all have the same settings."""
    mine = torch.tensor([*settings.values()], dtype=torch.float64, device=device)
    extremes = torch.stack([mine, -mine])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    for name, largest, smallest in zip(settings, *extremes.tolist(), strict=True):
        if largest != -smallest:
            raise ValueError(
                f"processes disagree about {name}: it is {-smallest:g} on one and {largest:g} on another; "
                "build model and optimizer alike on all of them"
            )


def check_same_replicas(params: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError on every process if a parameter or its gradient has other bits on one of them.

    All have as many parameters. DTensors are not compared.
    """
    replicas = {name: param for name, param in params.items() if not is_dtensor(param)}
    if not replicas:
        return
    rows = []
    for param in replicas.values():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        present = torch.tensor([param.grad is not None], device=param.device)
        rows.append(torch.cat([_digest(param.detach()), present, _digest(grad)]))
    mine = torch.stack(rows)
    everyones = mine.new_empty(dist.get_world_size(), *mine.shape)
    dist.all_gather_into_tensor(everyones.view(-1, mine.shape[1]), mine)
    differing = (everyones != mine).any(0).tolist()
    for name, (*weight, present, low, high) in zip(replicas, differing, strict=True):
        what = f"parameter {name}" if any(weight) else f"the gradient of {name}"
        how = "exists on some processes only" if present else "is not the same on all processes"
        if any(weight) or present or low or high:
            raise RuntimeError(
                f"{what} {how}: is the model wrapped in DistributedDataParallel, and loss.backward() called on its "
                "output?"
            )


def _digest(tensor: Tensor) -> Tensor:
    """Return two numbers that change with the bits of a tensor."""
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    return torch.stack([bits.sum(), (bits * bits).sum()])
