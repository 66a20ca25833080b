"""The budget: one number, given in one of four ways, of which Q is exactly what was meant."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM
from gsm_sgd.budget import Budget, kept_weights

KINDS = ("compression", "density", "sparsity", "num_kept")
sizes = st.integers(1, 10**12)


@pytest.mark.parametrize(
    ("kind", "values", "exact"),
    [
        ("compression", st.floats(1, 1e6), lambda n, value: n / value),
        ("density", st.floats(0, 1, exclude_min=True), lambda n, value: n * value),
        ("sparsity", st.floats(0, 1, exclude_max=True), lambda n, value: n * (1 - value)),
    ],
)
@given(num_weights=sizes, data=st.data())
def test_the_number_kept_is_the_floor(kind, values, exact, num_weights, data):
    """Or the number above it, where that is only a rounding error of the arithmetic with N away."""
    value = data.draw(values)
    share = exact(Fraction(num_weights), Fraction(value))
    assume(share >= 1)
    kept = Budget.of(**{kind: value}).num_kept(num_weights)
    assert kept in (math.floor(share), math.floor(share + num_weights * Fraction(1, 10**15)))
    assert type(kept) is int


@pytest.mark.parametrize(
    ("num_weights", "budget", "kept"),
    [
        (1_000, {"compression": 1 / (1 - 0.9)}, 100),
        (1_000, {"compression": np.float32(10)}, 100),
        (1_000, {"sparsity": 0.9}, 100),
        (1_000, {"density": 0.1}, 100),
        (1_000, {"num_kept": np.int64(100)}, 100),
        (266_200, {"compression": 60}, 4_436),  # the paper's nets
        (430_500, {"compression": 125}, 3_444),
        (430_500, {"compression": 300}, 1_435),
        (851_504, {"compression": 10}, 85_150),
    ],
)
def test_budgets_keep_what_was_meant(num_weights, budget, kept):
    assert Budget.of(**budget).num_kept(num_weights) == kept


def budgets_of(kept, num_weights):
    """Return the four budgets that mean to keep so many of so many weights."""
    values = (num_weights / kept, kept / num_weights, 1 - kept / num_weights, kept)
    return [Budget.of(**{kind: value}) for kind, value in zip(KINDS, values, strict=True)]


@given(sizes, sizes)
def test_a_budget_that_was_divided_out_keeps_what_was_meant(num_weights, number):
    kept = number % num_weights + 1
    assert {budget.num_kept(num_weights) for budget in budgets_of(kept, num_weights)} == {kept}
    assert kept_weights(num_weights, num_weights / kept) == kept


def test_every_q_can_be_kept():
    for kept in range(1, 4_099):
        budgets = budgets_of(kept, 4_099)
        assert {budget.num_kept(4_099) for budget in budgets} == {kept}
        assert [budget.share(4_099) for budget in budgets] == pytest.approx([kept / 4_099] * 4)


@given(st.integers(100, 10**9), st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_density_never_keeps_less(num_weights, one, other):
    low, high = sorted((one, other))
    for kind, value in (("density", lambda d: d), ("sparsity", lambda d: 1 - d), ("compression", lambda d: 1 / d)):
        kept = Budget.of(**{kind: value(low)}).num_kept(num_weights)
        assert kept <= Budget.of(**{kind: value(high)}).num_kept(num_weights) <= num_weights
        assert kept <= Budget.of(**{kind: value(low)}).num_kept(num_weights + 1)


@pytest.mark.parametrize(
    "given", [(), ("compression", "density"), ("sparsity", "num_kept"), KINDS], ids=lambda given: "+".join(given)
)
def test_exactly_one_is_given(given):
    values = {"compression": 2, "density": 0.5, "sparsity": 0.5, "num_kept": 8}
    message = f"give exactly one of compression, density, sparsity and num_kept, not {' and '.join(given) or 'none'}"
    with pytest.raises(ValueError, match=message):
        GSM([nn.Parameter(torch.ones(4, 4))], 0.1, **{kind: values[kind] for kind in given})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("compression", [0.99, 0, -3, math.inf, -math.inf, math.nan], "must be a finite number of at least 1"),
        ("density", [0, -0.1, 1.01, math.inf, math.nan], "must be above 0 and at most 1"),
        ("sparsity", [1, -0.1, 1.5, math.inf, math.nan], "must be at least 0 and below 1"),
        ("num_kept", [0, -1], "must be at least 1"),
        ("num_kept", [2.0, True, "2"], "must be a whole number"),
        ("compression", ["2", [2]], "must be a number"),
    ],
)
def test_bad_budgets(kind, values, message):
    for value in values:
        with pytest.raises(ValueError, match=f"{kind} {message}, not"):
            Budget.of(**{kind: value})


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"compression": 17}, "compression 17 leaves none of 16 weights; use at most 16"),
        ({"density": 0.06}, "density 0.06 leaves none of 16 weights; use at least 1 / N"),
        ({"sparsity": 0.95}, "sparsity 0.95 leaves none of 16 weights$"),
        ({"num_kept": 17}, "num_kept 17 is more than the 16 weights; use at most 16"),
    ],
)
def test_budgets_that_do_not_fit(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget.of(**budget).num_kept(16)
