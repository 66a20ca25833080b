"""Where the kept weights of a tensor are, in few bits: as a bitmask, or as Rice codes of the gaps between them.

A gap is the number of weights left out between a kept one and the one before it. Its Rice code with parameter p is its
p low bits as they are, and the rest in unary. The low bits of all tensors come first, so that both parts can be read
without going from code to code. docs/format.md has the layout bit by bit.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
"""The flat indices of a tensor's kept weights, in rising order."""

LARGEST_PARAMETER = 31
LARGEST_TENSOR = 2**31  # weights; with such parameters no sum of gaps leaves int64


class Coding(NamedTuple):
    """How a tensor is stored: whole, or as so many values with a bitmask or with Rice codes of that parameter."""

    kind: Literal["whole", "bitmask", "rice"]
    stored: int
    parameter: int = 0


def choose(positions: Positions, size: int, value_bits: int) -> Coding:
    """Return what takes the fewest bits, values included, for weights kept of `size`; the simplest of equals.

    Values of no bits cannot be stored whole, since it is by them that it would be known what is kept.
    """
    kept = len(positions)
    gaps = _gaps(positions)
    parameters = range(min(size.bit_length(), LARGEST_PARAMETER) + 1)
    rice, parameter = min((_rice_bits(gaps, parameter), parameter) for parameter in parameters)
    codings = [
        (size + kept * value_bits, Coding("bitmask", kept)),
        (rice + kept * value_bits, Coding("rice", kept, parameter)),
    ]
    if value_bits:
        codings.insert(0, (size * value_bits, Coding("whole", size)))
    return min(codings, key=lambda coding: coding[0])[1]


def most_bits(size: int, kept: int, value_bits: int) -> int:
    """Return the most bits that tensors of `size` weights together can take with `kept` of them not zero.

    With n weights of which k are kept, `choose` needs at most n v bits for whole tensors, n + k v with bitmasks, and
    k (v + 1 + p) + (n - k) / 2^p with any p. All are linear in n and k, so the least of them is concave and grows in
    proportion: divided among tensors in whatever way, it is largest where all are equally dense. That is computed here.
    """
    rice = (kept * (value_bits + 1 + p) + (size - kept >> p) for p in range(LARGEST_PARAMETER + 1))
    return min(size * value_bits, size + kept * value_bits, *rice)


def encode(positions: Sequence[Positions], sizes: Sequence[int], codings: Sequence[Coding]) -> bytes:
    """Return the bitmasks and Rice codes of tensors with these numbers of weights, padded with zero bits to a byte."""
    low: list[NDArray[np.uint8]] = [np.empty(0, np.uint8)]
    unary: list[NDArray[np.uint8]] = []
    for where, size, coding in zip(positions, sizes, codings, strict=True):
        if coding.kind == "bitmask":
            low.append(_ones(where, size))
        elif coding.kind == "rice":
            gaps = _gaps(where)
            places = np.arange(coding.parameter - 1, -1, -1)
            low.append((gaps[:, None] >> places & 1).astype(np.uint8).reshape(-1))
            ends = np.cumsum((gaps >> coding.parameter) + 1)
            unary.append(_ones(ends - 1, int(ends[-1]) if len(ends) else 0))
    return np.packbits(np.concatenate([*low, *unary])).tobytes()


def decode(code: bytes, sizes: Sequence[int], codings: Sequence[Coding]) -> list[Positions]:
    """Return what `encode` was given, in memory in proportion to the code and the number of kept weights.

    Raises:
        ValueError: the code is not one of such tensors.
    """
    for size, coding in zip(sizes, codings, strict=True):
        if not (0 <= coding.stored <= size <= LARGEST_TENSOR and 0 <= coding.parameter <= LARGEST_PARAMETER):
            raise ValueError("a tensor with more values than weights")
    rice = sum(coding.stored for coding in codings if coding.kind == "rice")
    split = sum(_low_bits(size, coding) for size, coding in zip(sizes, codings, strict=True))
    if split > 8 * len(code):
        raise ValueError("the code is too short")
    bits = np.unpackbits(np.frombuffer(code, np.uint8))
    if np.count_nonzero(bits[split:]) != rice:
        raise ValueError("the code has another number of values")
    ends = np.flatnonzero(bits[split:])
    used = split + (int(ends[-1]) + 1 if rice else 0)
    if len(bits) - used >= 8:
        raise ValueError("the code is too long")
    quotients = np.diff(ends, prepend=-1) - 1

    positions, at, first = [], 0, 0
    for size, coding in zip(sizes, codings, strict=True):
        low = bits[at : at + _low_bits(size, coding)]
        at += len(low)
        where: Positions = np.empty(0, np.int64)
        if coding.kind == "bitmask":
            if np.count_nonzero(low) != coding.stored:
                raise ValueError("a bitmask with another number of ones")
            where = np.flatnonzero(low)
        elif coding.kind == "rice":
            high = quotients[first : first + coding.stored]
            first += coding.stored
            where = _positions(high, low, size, coding.parameter)
        positions.append(where)
    return positions


def _positions(high: NDArray[np.int64], low: NDArray[np.uint8], size: int, parameter: int) -> Positions:
    """Return positions by the quotients and the low bits of their gaps."""
    if int(high.sum()) > size >> parameter:
        raise ValueError("a position beyond the end of its tensor")
    gaps = high << parameter
    for place in range(parameter):
        gaps |= low[place::parameter].astype(np.int64) << (parameter - 1 - place)
    where = np.cumsum(gaps + 1) - 1
    if len(where) and where[-1] >= size:
        raise ValueError("a position beyond the end of its tensor")
    return where


def _gaps(positions: Positions) -> NDArray[np.int64]:
    return np.diff(positions, prepend=-1) - 1


def _rice_bits(gaps: NDArray[np.int64], parameter: int) -> int:
    return len(gaps) * (1 + parameter) + int((gaps >> parameter).sum())


def _low_bits(size: int, coding: Coding) -> int:
    """Return the bits that a tensor takes before the unary part."""
    return {"whole": 0, "bitmask": size, "rice": coding.stored * coding.parameter}[coding.kind]


def _ones(positions: Positions, length: int) -> NDArray[np.uint8]:
    bits = np.zeros(length, np.uint8)
    bits[positions] = 1
    return bits
