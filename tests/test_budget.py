"""Budgets keep exactly what was meant, however they are given."""

import contextlib
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsm_sgd.budget import Budget, kept_weights

SIZES = st.integers(1, 10**12)
EXACT = {  # of N weights, given the value as a fraction
    "compression": lambda total, value: total / value,
    "density": lambda total, value: total * value,
    "sparsity": lambda total, value: total * (1 - value),
}
KINDS = pytest.mark.parametrize("kind", EXACT)


def values(kind):
    return {
        "compression": st.floats(1, 1e6),
        "density": st.floats(0, 1, exclude_min=True),
        "sparsity": st.floats(0, 1, exclude_max=True),
    }[kind]


def kept(total, kind, value):
    """Return Q, or 0 where it is refused."""
    with contextlib.suppress(ValueError):
        return Budget.of(**{kind: value}).num_kept(total)
    return 0


@pytest.mark.parametrize(
    ("num_weights", "budget", "num_kept"),
    [
        (1_000, {"compression": 10}, 100),
        (1_000, {"compression": 1 / (1 - 0.9)}, 100),
        (1_000, {"compression": np.float32(10)}, 100),
        (1_000, {"sparsity": 0.9}, 100),
        (1_000, {"density": 0.1}, 100),
        (1_000, {"num_kept": np.int64(100)}, 100),
        (999, {"compression": 10}, 99),
        (999, {"sparsity": 0.9}, 99),
        (1_000, {"sparsity": 0.0}, 1_000),
        (266_200, {"compression": 60}, 4_436),  # the paper's nets
        (430_500, {"compression": 125}, 3_444),
        (430_500, {"compression": 300}, 1_435),
        (851_504, {"compression": 10}, 85_150),
    ],
)
def test_budgets_keep_what_was_meant(num_weights, budget, num_kept):
    assert Budget.of(**budget).num_kept(num_weights) == num_kept


@KINDS
@given(num_weights=SIZES, data=st.data())
def test_the_number_kept_is_the_floor(kind, num_weights, data):
    """Up to a rounding error of the arithmetic with N."""
    value = data.draw(values(kind))
    exact = EXACT[kind](Fraction(num_weights), Fraction(value))
    found = kept(num_weights, kind, value)
    assert found in (math.floor(exact), math.floor(exact + num_weights * Fraction(1, 10**15)))
    assert type(found) is int


@given(SIZES, st.data())
def test_a_number_that_was_divided_out_keeps_what_was_meant(num_weights, data):
    num_kept = data.draw(st.integers(1, num_weights))
    assert kept(num_weights, "compression", num_weights / num_kept) == num_kept
    assert kept(num_weights, "density", num_kept / num_weights) == num_kept
    assert kept(num_weights, "sparsity", 1 - num_kept / num_weights) == num_kept
    assert kept_weights(num_weights, num_weights / num_kept) == num_kept


def test_every_number_of_a_thousand_weights_can_be_kept():
    for num_kept in range(1, 1_001):
        assert kept(1_000, "compression", 1_000 / num_kept) == num_kept
        assert kept(1_000, "density", num_kept / 1_000) == num_kept
        assert kept(1_000, "sparsity", 1 - num_kept / 1_000) == num_kept
        assert kept(1_000, "sparsity", (1_000 - num_kept) / 1_000) == num_kept
        assert kept(1_000, "num_kept", num_kept) == num_kept


@KINDS
@given(num_weights=SIZES, data=st.data())
def test_a_larger_budget_keeps_no_less(kind, num_weights, data):
    lower, higher = sorted([data.draw(values(kind)), data.draw(values(kind))])
    one, other = kept(num_weights, kind, lower), kept(num_weights, kind, higher)
    assert one <= other if kind == "density" else one >= other


def test_the_share_is_the_density_before_it_is_rounded_down():
    budgets = [Budget.of(4), Budget.of(density=0.25), Budget.of(sparsity=0.75), Budget.of(num_kept=25)]
    assert [budget.share(100) for budget in budgets] == [0.25] * 4
    assert Budget.of(3).share(10) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one of compression, density, sparsity and num_kept, not none"),
        ({"density": 0.1, "num_kept": 3}, "not density and num_kept"),
        *(
            ({"compression": value}, "compression must be a finite number of at least 1, not ")
            for value in (0.99, 0, -3, math.inf, -math.inf, math.nan)
        ),
        *(({"density": value}, "density must be above 0 and at most 1, not ") for value in (0, 1.01, -1, math.nan)),
        *(({"sparsity": value}, "sparsity must be at least 0 and below 1, not ") for value in (1, -0.1, 90, math.nan)),
        ({"num_kept": 0}, "num_kept must be at least 1, not 0"),
        ({"num_kept": 2.5}, r"num_kept must be a whole number, not 2\.5"),
        ({"num_kept": True}, "num_kept must be a whole number, not True"),
        ({"compression": "4"}, "compression must be a number, not '4'"),
    ],
)
def test_bad_budgets(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(**budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"compression": 11}, "compression 11 leaves none of 10 weights; use at most 10"),
        ({"density": 0.05}, "density 0.05 leaves none of 10 weights; use at least 1 / N"),
        ({"sparsity": 0.95}, "sparsity 0.95 leaves none of 10 weights$"),
        ({"num_kept": 1_234_567}, "num_kept 1234567 is more than the 10 weights; use at most 10"),
    ],
)
def test_budgets_that_do_not_fit(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(**budget).num_kept(10)
