"""Budgets: how many weights of a model are kept, given in one of four ways."""

import math
import sys
from typing import NamedTuple, Self

from .schedules import real_number, whole_number

SHARES = ("macs", "parameters", "channels", "latency")
"""Budgets that are shares of what a dense net costs, by a pattern of channels."""

_ROUNDING = 4 * sys.float_info.epsilon  # of N: N / C and N (1 - s) may just miss the whole number that is meant


class Budget(NamedTuple):
    """A budget: one of `compression` C, `density`, `sparsity`, `num_kept` Q and the `SHARES`, and its value."""

    kind: str
    value: float

    @classmethod
    def of(
        cls,
        compression: float | None = None,
        density: float | None = None,
        sparsity: float | None = None,
        num_kept: int | None = None,
        macs: float | None = None,
        parameters: float | None = None,
        channels: float | None = None,
        latency: float | None = None,
    ) -> Self:
        """Return the one budget that is given, of weights or, by one of `SHARES`, of channels.

        Raises:
            ValueError: none is given, or several, or its value is out of range.
        """
        given = {"compression": compression, "density": density, "sparsity": sparsity, "num_kept": num_kept}
        given |= {"macs": macs, "parameters": parameters, "channels": channels, "latency": latency}
        found = [(kind, value) for kind, value in given.items() if value is not None]
        if len(found) != 1:
            names = " and ".join(kind for kind, _ in found) or "none"
            raise ValueError(f"give exactly one of compression, density, sparsity and num_kept, not {names}")
        kind, value = found[0]
        value = whole_number(kind, value) if kind == "num_kept" else real_number(kind, value)
        if kind == "compression" and not (math.isfinite(value) and value >= 1):
            raise ValueError(f"compression must be a finite number of at least 1, not {value}")
        if kind in ("density", *SHARES) and not 0 < value <= 1:
            raise ValueError(f"{kind} must be above 0 and at most 1, not {value}")
        if kind == "sparsity" and not 0 <= value < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, not {value}")
        if kind == "num_kept" and value < 1:
            raise ValueError(f"num_kept must be at least 1, not {value}")
        return cls(kind, value)

    @classmethod
    def given(cls, **amounts: float | None) -> Self | None:
        """Return the one budget that is given, or None if none is."""
        return cls.of(**amounts) if any(amount is not None for amount in amounts.values()) else None  # type: ignore[arg-type]

    def num_kept(self, num_prunable: int) -> int:
        """Return Q, the number of weights that are kept of N: floor(N / C), floor(N density), floor(N (1 - sparsity)).

        Raises:
            ValueError: nothing would be kept, or more than there is.
        """
        kept = rounded_down(self._exact(num_prunable), num_prunable)
        if not 1 <= kept <= num_prunable:
            most = "use at least 1 / N" if self.kind == "density" else f"use at most {num_prunable}"
            what = "leaves none of" if kept < 1 else "is more than the"
            advice = "" if self.kind == "sparsity" else f"; {most}"
            raise ValueError(f"{self.kind} {self.value:.12g} {what} {num_prunable} weights{advice}")
        return kept

    def share(self, num_prunable: int) -> float:
        """Return the density before it is rounded down to a whole number of weights."""
        return self._exact(num_prunable) / num_prunable

    def _exact(self, total: int) -> float:
        match self.kind:
            case "compression":
                return total / self.value
            case "sparsity":
                return total - total * self.value
            case "num_kept":
                return self.value
            case _:
                return total * self.value


def rounded_down(exact: float, total: int) -> int:
    """Return floor(exact), or the whole number that it misses by a rounding error of arithmetic with `total`."""
    whole = round(exact)
    return whole if abs(exact - whole) <= _ROUNDING * total else math.floor(exact)


def kept_weights(num_prunable: int, compression: float) -> int:
    """Return Q = floor(N / C)."""
    return Budget.of(compression=compression).num_kept(num_prunable)
