"""A rule as it is applied where torch has no kernel for it: in half precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..memory import dense_stride
from ..rule import Part, Rule, dithered

# A step changes it by a share of 1 - beta2, which is mostly less than half a unit in the last place.
_AT_RANDOM = ("exp_avg_sq",)


@torch.no_grad()
def update_half_(rule: Rule, part: Part, active: Sequence[Tensor], rows: Sequence[list[float]], kind: bool) -> None:
    """Update parameters in half precision, with float32 between reading and writing them.

    Passive weights are rounded at random; see `dithered`. The noise depends on the step alone: it is the same on all
    replicas, and in a run that was resumed.
    """
    if not part.params:
        return
    generator = torch.Generator(part.params[0].device).manual_seed(part.step)
    for i, (w, g, b) in enumerate(zip(part.params, part.grads, active, strict=True)):
        keep = b.bool()
        buffers = [buffer[i].float() for buffer in part.buffers.values()]
        weight, moved = rule(w.float(), g.float(), buffers, keep, rows[i], kind)
        for (name, buffer), new in zip(part.buffers.items(), moved, strict=True):
            rounded = dithered(new, buffer[i].dtype, generator)
            buffer[i].copy_(rounded if name in _AT_RANDOM else torch.where(keep, new, rounded))
        w.copy_(torch.where(keep, weight, dithered(weight, w.dtype, generator)))


def takes_fused(params: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel, the quickest, takes these parameters; torch 2.9's ruins half precision."""
    dense = all(param.is_contiguous() or param.stride() == dense_stride(param) for param in params)
    real = all(param.dtype in (torch.float32, torch.float64) for param in params)
    return dense and real and {param.device.type for param in params} <= {"cpu", "cuda"}
