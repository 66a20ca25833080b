"""The same exact threshold where each process holds a part of the weights, as FSDP2 and device meshes arrange it.

1. From a sample of its own scores each process guesses two values, the share Q / N of them above the one and below the
   other. The lowest and the highest guess of all processes very likely enclose the threshold.
2. Each process looks at its scores once, for those between, and counts them in 2,048 bins. The counts are summed over
   all processes, so they show in which bin rank Q is, or that it is not between.
3. If few scores are in that bin, all processes exchange them; if many are, it is divided into bins in turn.
4. If several equal the Q-th largest and not all can be active, they are counted weight by weight. In the weight where
   the room for them ends steps 2 and 3 follow with their positions in it.

What is sent is counts and a few numbers, whatever the size of the model, and the result does not depend on how the
weights are sharded.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import is_first_copy, offsets, to_local
from ..memory import index_order
from ..scores import score_dtype
from .threshold import Found, NotFiniteError, ScoresOf, at_end

BINS = 2**11  # counts that are summed at a time: 16 KiB
EXCHANGED = 2**11  # numbers, 16 KiB, that a process receives at most when they are exchanged instead of counted
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SIGMAS = 3.0  # half-width of the guess: a wide one costs little, another one two more calls


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
        self.parts = [to_local(param) for param in params] if parts is None else list(parts)
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
        self.counted = [number for number, param in enumerate(params) if is_first_copy(param)]
        self.size = sum(self.parts[number].numel() for number in self.counted)
        self.dtype, self.place = score_dtype(params), self.parts[0].device
        self.total = sum(param.numel() for param in params)

    def are_of(self, params: Sequence[Tensor]) -> bool:
        """Return whether these are the weights."""
        return len(params) == len(self.params) and all(a is b for a, b in zip(params, self.params, strict=True))

    def everywhere(self, holds: Sequence[bool]) -> list[bool]:
        """Return for each of several things whether it holds on all processes."""
        flags = torch.tensor(holds, dtype=torch.int32, device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MIN)
        return [bool(flag) for flag in flags.tolist()]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return a number for each weight, of the part here, summed over all processes; copies count once."""
        mine = [0.0] * len(self.params)
        for number in self.counted:
            mine[number] = values[number]
        summed = torch.tensor(mine, dtype=torch.float64, device=self.device)  # exact for counts up to 2^53
        dist.all_reduce(summed)
        return summed.tolist()

    def kth_largest(
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

    def places(self, number: int, positions: Tensor) -> Tensor:
        """Return where in the index order of a weight positions in the memory of its part here are."""
        param = self.params[number]
        part = torch.empty_like(self.parts[number], device="meta")  # dense, as scores are
        rest = index_order(positions, part)
        place = torch.zeros_like(rest)
        for axis, start in enumerate(offsets(param)):
            below = math.prod(part.shape[axis + 1 :])
            place += (rest.div(below, rounding_mode="floor") + start) * math.prod(param.shape[axis + 1 :])
            rest = rest % below
        return place


class Sharded:
    """The scores of all processes; see `find_threshold`.

    Args:
        shards: where the weights lie.
        scores_of: given numbers of weights, what there is of their scores on this process.
        suspect: whether a score here is not finite. Then `kth_largest` raises NotFiniteError on every process.
    """

    sigmas = _SIGMAS

    def __init__(self, shards: Shards, scores_of: ScoresOf, suspect: bool = False) -> None:
        self._shards, self._scores_of, self._suspect = shards, scores_of, suspect
        self._scores = scores_of(shards.counted) if shards.size else None
        self.num_tensors = len(shards.params)

    def bracket(self, k: int, sigmas: float) -> tuple[Tensor, Tensor]:
        """Take the lowest and the highest guess of all processes.

        The value that has a share of all scores above it lies between the lowest and the highest of those that have
        this share of one process's scores above them.
        """
        shards = self._shards
        ends = torch.full((2,), -math.inf, dtype=shards.dtype, device=shards.device)
        if self._scores is not None:
            low, high = self._scores.bracket(k * shards.size / shards.total, sigmas)
            ends = torch.stack([-low, high]).to(shards.device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        return -ends[0].to(shards.place).clamp(max=1.0), ends[1].to(shards.place)  # no score is below -1

    def kth_largest(self, k: int, low: Tensor, high: Tensor) -> Found | None:
        """Look among those between, counted and summed over all processes."""
        reached, values = 0, low.new_empty(0)
        if self._scores is not None:
            reached, values = self._scores.between(low, high)
        span = int(_keys(low)) + 1, int(_keys(high)) - 1
        key = self._shards.kth_largest(_keys(values), k, span, reached, self._suspect)
        if isinstance(key, _Key):
            return Found(_value(key.key, values), key.larger, key.equal)
        return at_end(k, key, low, high, self.count)

    def count(self, value: Tensor) -> list[int]:
        """Count on all processes together."""
        counted = self._shards.counted
        mine = dict(zip(counted, () if self._scores is None else self._scores.count(value), strict=False))
        return [int(total) for total in self._shards.totals([mine.get(i, 0) for i in range(self.num_tensors)])]

    def surplus(self, tensor: int, value: Tensor, room: int, equal: int) -> Tensor:
        """Find the last position that there is room for among those of all processes."""
        shards = self._shards
        positions = torch.empty(0, dtype=torch.int64, device=shards.place)
        if shards.parts[tensor].numel():
            positions = self._scores_of([tensor]).ties(0, value)
        places = shards.places(tensor, positions)
        counted = -places if tensor in shards.counted else places[:0]
        last = shards.kth_largest(counted, room, (1 - shards.params[tensor].numel(), 0), inside=equal)
        assert isinstance(last, _Key), "fewer ties than were counted"
        return positions[places > -last.key]


class _Key(NamedTuple):
    """A key, how many of all are larger, and how many are equal."""

    key: int
    larger: int
    equal: int


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
