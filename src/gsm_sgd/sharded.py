"""The same exact choice where each process holds a part of the weights, as FSDP2 and device meshes arrange it.

The one quantity that concerns the whole model is the Q-th largest importance. It is found by counting:

1. From a sample of its own importances each process guesses two values, the share Q / N of them above the one and below
   the other. The lowest and the highest guess of all processes very likely enclose the threshold.
2. Each process looks at its importances once, for those between, and counts them in 2,048 bins. The counts are summed
   over all processes, so they show in which bin rank Q is, or that it is not between. Then it is one of the two values,
   as counting those equal to it shows, or the samples misled.
3. If few importances are in that bin, all processes exchange them; if many are, it is divided into bins in turn.
4. If several equal the Q-th largest and not all can be active, they are counted weight by weight. In the weight where
   the room for them ends steps 2 and 3 follow with their positions in it.

What is sent is counts and a few numbers, whatever the size of the model, and the result does not depend on how the
weights are spread.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .selection import Cut, Found, NotFiniteError, Scores, ScoresOf, at_end, index_order, score_dtype, tensor_with

BINS = 2**11  # counts that are summed at a time: 16 KiB
EXCHANGED = 2**11  # numbers, 16 KiB, that a process receives at most when they are exchanged instead of counted
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SIGMAS = 3.0  # half-width of the guess: a wide one costs little, another one two more calls


def several_processes() -> bool:
    """Return whether there are processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def here(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, in the same memory: all of it, unless it is a DTensor."""
    whole: Any = tensor
    return whole.to_local() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing what defines it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def grad_here(param: Tensor) -> Tensor:
    """Return the gradient of the part of a parameter that this process holds, zeros if the parameter has none."""
    if param.grad is None:
        return torch.zeros_like(here(param))
    grad: Any = param.grad
    if is_dtensor(grad) and grad.placements != (placements := getattr(param, "placements", None)):
        grad = grad.redistribute(placements=placements)
    return here(grad)


def spread_as(param: Tensor, part: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape, of which this process holds this part as it does of the parameter."""
    if not is_dtensor(param):
        return part
    from torch.distributed.tensor import DTensor

    like: Any = param
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def cut_out(param: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a tensor of a parameter's shape that lies where this process has its part of the parameter.

    If the tensor is a DTensor, and spread in another way than the parameter, every process has to call.
    """
    like: Any = param
    if is_dtensor(tensor):
        spread: Any = tensor
        if is_dtensor(param) and (spread.device_mesh, spread.placements) == (like.device_mesh, like.placements):
            return here(tensor)
        tensor = spread.full_tensor()
    if not is_dtensor(param):
        return tensor
    bounds = zip(_offsets(param), here(param).shape, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in bounds)].clone()


def refuse_disagreement(settings: Mapping[str, float], device: torch.device) -> None:
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


def refuse_differing_copies(params: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError on every process if a parameter or its gradient has other bits on one of them.

    All have as many parameters. DTensors are not looked at.
    """
    copies = {name: param for name, param in params.items() if not is_dtensor(param)}
    if not copies:
        return
    rows = []
    for param in copies.values():
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        present = torch.tensor([param.grad is not None], device=param.device)
        rows.append(torch.cat([_digest(param.detach()), present, _digest(grad)]))
    mine = torch.stack(rows)
    everyones = mine.new_empty(dist.get_world_size(), *mine.shape)
    dist.all_gather_into_tensor(everyones.view(-1, mine.shape[1]), mine)
    differing = (everyones != mine).any(0).tolist()
    for name, (*weight, present, low, high) in zip(copies, differing, strict=True):
        what = f"parameter {name}" if any(weight) else f"the gradient of {name}"
        how = "is there on some processes only" if present else "is not the same on all processes"
        if any(weight) or present or low or high:
            raise RuntimeError(
                f"{what} {how}: is the model wrapped in DistributedDataParallel, and loss.backward() called on its "
                "output?"
            )


class Shards:
    """Where the parts lie that this process holds of some weights, given in model order.

    Args:
        params: the weights; the ones that are no DTensors are whole and the same on each process.
        parts: in which memory order the scores of the parts here come; without them in that of the parts.

    Raises:
        ValueError: the device mesh of a DTensor does not have all processes, or it waits for a sum.
    """

    def __init__(self, params: Sequence[Tensor], parts: Sequence[Tensor] | None = None) -> None:
        self.params = list(params)
        self._parts = [here(param) for param in params] if parts is None else list(parts)
        meshes = [mesh for param in params if (mesh := getattr(param, "device_mesh", None)) is not None]
        self._processes = dist.get_world_size()
        for mesh in meshes:
            if mesh.size() != self._processes:
                raise ValueError(
                    f"a device mesh has {mesh.size()} of {self._processes} processes: GSM chooses among the weights "
                    "of all of them, so each mesh has to cover them all; distribute such a parameter over the whole "
                    'mesh (Replicate() does), or put it into a group with "prunable": False'
                )
        self.device = torch.device(meshes[0].device_type)
        self._counted = [number for number, param in enumerate(params) if _is_first_copy(param)]
        self._size = sum(self._parts[number].numel() for number in self._counted)
        self._dtype, self._place = score_dtype(params), self._parts[0].device
        self._total = sum(param.numel() for param in params)

    def __len__(self) -> int:
        """Return the number of weights in the whole model."""
        return self._total

    def are_of(self, params: Sequence[Tensor]) -> bool:
        """Return whether these are the weights."""
        return len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True))

    def find_cut(self, scores_of: ScoresOf, k: int, suspect: bool, positive: bool = False) -> Cut:
        """Return where the k largest of all scores end, in the parts that this process holds.

        Args:
            scores_of: given numbers of weights, what there is of their scores on this process.
            k: how many, on all processes together.
            suspect: whether a score here is not finite.
            positive: whether only scores above zero are among them, even if these are fewer than k.

        Raises:
            NotFiniteError: a score on any process is not finite.
        """
        scores = scores_of(self._counted) if self._size else None
        count = partial(self._count, scores)
        sigmas = _SIGMAS
        while True:
            low, high = self._bracket(scores, k, sigmas)
            reached, values, suspect = _between(scores, low, high, suspect)
            span = int(_keys(low)) + 1, int(_keys(high)) - 1
            key = self._kth_largest(_keys(values), k, span, reached, suspect)
            if isinstance(key, _Key):
                found: Found | None = Found(_value(key.key, values), key.larger, key.equal)
            else:
                found = at_end(k, key, low, high, count)
            if found is not None:
                break
            sigmas *= 2  # the samples misled
        if positive and found.value <= 0:
            return Cut.above(torch.zeros_like(found.value))
        room = k - found.larger
        if room == found.equal:
            return Cut(found.value, len(self.params) - 1, values.new_empty(0, dtype=torch.int64))
        counts = found.counts or count(found.value)
        tensor, room = tensor_with(room, counts)
        return Cut(found.value, tensor, self._surplus(scores_of, tensor, found.value, room, counts[tensor]))

    def everywhere(self, holds: Sequence[bool]) -> list[bool]:
        """Return for each of several things whether it holds on all processes."""
        flags = torch.tensor(holds, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return [bool(flag) for flag in flags.tolist()]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return a number for each weight, of the part here, summed over all processes; copies count once."""
        mine = [0.0] * len(self.params)
        for number in self._counted:
            mine[number] = values[number]
        summed = torch.tensor(mine, dtype=torch.float64, device=self.device)  # exact for counts up to 2^53
        dist.all_reduce(summed)
        return summed.tolist()

    def _bracket(self, scores: Scores | None, k: int, sigmas: float) -> tuple[Tensor, Tensor]:
        """Guess two values with the k-th largest score between them.

        The value that has a share of all scores above it lies between the lowest and the highest of those that have
        this share of one process's scores above them.
        """
        ends = torch.full((2,), -math.inf, dtype=self._dtype, device=self.device)
        if scores is not None:
            low, high = scores.bracket(k * self._size / len(self), sigmas)
            ends = torch.stack([-low, high]).to(self.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return -ends[0].to(self._place).clamp(max=1.0), ends[1].to(self._place)  # no score is below -1

    def _count(self, scores: Scores | None, value: Tensor) -> list[int]:
        """Return how many scores of each weight equal a value, on all processes together."""
        mine = dict(zip(self._counted, () if scores is None else scores.count(value), strict=False))
        return [int(total) for total in self.totals([mine.get(number, 0) for number in range(len(self.params))])]

    def _kth_largest(
        self,
        keys: Tensor,
        k: int,
        span: tuple[int, int],
        above: int = 0,
        suspect: bool = False,
        inside: int | None = None,
    ) -> "_Key | int":
        """Return the k-th largest of all processes' keys.

        If it does not lie in the span, return how many lie above the span if k is among these, else how many lie above
        it and in it.

        Args:
            keys: int64, those of this process that lie in the span.
            k: which.
            span: smallest and largest.
            above: how many of this process's keys lie above the span.
            suspect: whether something is wrong with the keys here.
            inside: how many keys of all processes lie in the span, where that is known.
        """
        (low, high), larger = span, 0
        while inside is None or inside * self._processes > EXCHANGED:
            shift = max(0, (high - low).bit_length() - BINS.bit_length() + 1)
            counts = torch.bincount(keys.sub(low).bitwise_right_shift_(shift), minlength=BINS)
            counts = torch.cat([counts, counts.new_tensor([above, suspect])]).to(self.device)
            dist.all_reduce(counts)
            from_top = counts[:-1].flip(0).cumsum(0)
            place = (from_top < k - larger).sum()
            # one transfer from the device for all that is to be decided
            passed, reached, wrong, bin_number = torch.stack(
                [*from_top.gather(0, torch.stack([place - 1, place]).clamp(0, BINS)), counts[-1], place]
            ).tolist()
            if wrong:
                raise NotFiniteError
            if not 1 <= bin_number <= BINS:
                return int(reached)
            larger, inside, above = larger + passed, reached - passed, 0
            low += (BINS - bin_number) << shift
            high = low + (1 << shift) - 1
            keys = keys[(keys >= low) & (keys <= high)]
            if not shift:
                return _Key(low, larger, inside)
        found = self._exchanged(keys, inside).topk(inside).values
        key = found[k - larger - 1]
        value, more, equal = torch.stack([key, (found > key).sum(), (found == key).sum()]).tolist()
        return _Key(value, larger + more, equal)

    def _exchanged(self, keys: Tensor, count: int) -> Tensor:
        """Return all processes' keys, of which there are `count`, and fillings that are smaller."""
        mine = torch.full((count,), torch.iinfo(torch.int64).min, device=self.device)
        mine[: len(keys)] = keys
        everyones = mine.new_empty(self._processes * count)
        dist.all_gather_into_tensor(everyones, mine)
        return everyones

    def _surplus(self, scores_of: ScoresOf, tensor: int, value: Tensor, room: int, equal: int) -> Tensor:
        """Return where in the part here of a weight scores equal a value that has room for the first few of so many."""
        positions = torch.empty(0, dtype=torch.int64, device=self._place)
        if self._parts[tensor].numel():
            positions = scores_of([tensor]).ties(0, value)
        places = self._places(tensor, positions)
        counted = -places if tensor in self._counted else places[:0]
        last = self._kth_largest(counted, room, (1 - self.params[tensor].numel(), 0), inside=equal)
        assert isinstance(last, _Key), "fewer ties than were counted"
        return positions[places > -last.key]

    def _places(self, number: int, positions: Tensor) -> Tensor:
        """Return where in the index order of a weight positions in the memory of its part here are."""
        param = self.params[number]
        part = torch.empty_like(self._parts[number], device="meta")  # dense, as scores are
        rest = index_order(positions, part)
        place = torch.zeros_like(rest)
        for axis, start in enumerate(_offsets(param)):
            below = math.prod(part.shape[axis + 1 :])
            place += (rest.div(below, rounding_mode="floor") + start) * math.prod(param.shape[axis + 1 :])
            rest = rest % below
        return place


class _Key(NamedTuple):
    """A key, how many of all are larger, and how many are equal."""

    key: int
    larger: int
    equal: int


def _between(scores: Scores | None, low: Tensor, high: Tensor, suspect: bool) -> tuple[int, Tensor, bool]:
    """Return how many scores are at least `high`, those between the two, and whether any is not finite."""
    nothing = low.new_empty(0)
    if scores is None:
        return 0, nothing, suspect
    try:
        return *scores.between(low, high), suspect
    except NotFiniteError:  # the others do not know yet, and wait
        return 0, nothing, True


def _keys(values: Tensor) -> Tensor:
    """Return integers in the order of scores: the bits of those that are not negative, -1 for the others."""
    return values.view(_BITS[values.dtype]).to(torch.int64).clamp(min=-1)


def _value(key: int, like: Tensor) -> Tensor:
    """Return the score that has a key."""
    return (
        torch.tensor(key, dtype=_BITS[like.dtype], device=like.device).view(like.dtype)
        if key >= 0
        else like.new_tensor(-1.0)
    )


def _digest(tensor: Tensor) -> Tensor:
    """Return two numbers that change with the bits of a tensor."""
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    return torch.stack([bits.sum(), (bits * bits).sum()])


def _offsets(param: Tensor) -> Sequence[int]:
    """Return where in a weight, along each axis, the part begins that this process holds."""
    if not is_dtensor(param):
        return [0] * param.ndim
    dtensor: Any = param
    (chunk,) = dtensor.__create_chunk_list__()  # what torch's distributed checkpoints ask
    return list(chunk.offsets)


def _is_first_copy(param: Tensor) -> bool:
    """Return whether this process is the first of those that hold the same part of a weight.

    Raises:
        ValueError: the parts are yet to be added up.
    """
    if not is_dtensor(param):
        return dist.get_rank() == 0
    dtensor: Any = param
    if any(placement.is_partial() for placement in dtensor.placements):
        raise ValueError("a parameter is a DTensor that waits for a sum (Partial): redistribute it first")
    return all(
        dtensor.device_mesh.get_local_rank(dim) == 0
        for dim, placement in enumerate(dtensor.placements)
        if placement.is_replicate()
    )
