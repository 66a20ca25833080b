"""How dense tensors lie in memory, and positions in it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy of a tensor, in its own memory order where that is dense."""
    return tensor.stride() if tensor.is_contiguous() else torch.empty_like(tensor, device="meta").stride()


def laid_out_as(params: Sequence[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors of the parameters' shapes, each in the memory order of its parameter."""
    return [
        tensor if tensor.stride() == param.stride() else torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)
        for param, tensor in zip(params, tensors, strict=True)
    ]


def by_index(positions: Tensor, like: Tensor) -> Tensor:
    """Sort positions in the memory of a dense tensor by its index order."""
    return positions if like.is_contiguous() else positions[index_order(positions, like).argsort()]


def index_order(positions: Tensor, like: Tensor) -> Tensor:
    """Return at which place in the index order of a dense tensor positions in its memory are."""
    if like.is_contiguous():
        return positions
    index, rest = torch.zeros_like(positions), positions
    for axis in _memory_order(like):
        if like.shape[axis] > 1:  # the stride of any other axis means nothing
            index += rest.div(like.stride(axis), rounding_mode="floor") * math.prod(like.shape[axis + 1 :])
            rest = rest % like.stride(axis)
    return index


def _memory_order(tensor: Tensor) -> list[int]:
    """Return the axes of a dense tensor in the order that makes it contiguous."""
    return sorted(range(tensor.ndim), key=lambda axis: (tensor.shape[axis] > 1, -tensor.stride()[axis]))
