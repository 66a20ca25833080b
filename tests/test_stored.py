"""The buffer that a step keeps its scores in: the weights that are active are those that a stable sort chooses."""

import math
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gsm_sgd.scores import evaluate, magnitude, taylor
from gsm_sgd.selection.stored import ScoreBuffer
from gsm_sgd.selection.threshold import Local, find_threshold
from reference_gsm import naive_active

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "equal", "zero", "denormal", "ties", "huge_and_tiny", "mostly_zero", "layers_apart"]


def check_choice(score, weights, grads, k):
    buffer = ScoreBuffer()
    assert buffer.fill(score, weights, grads, [{}] * len(weights))
    threshold = find_threshold(Local(buffer.scores_of(range(len(weights)))), k, positive=True)
    scores = [evaluate(score, w, g, {}) for w, g in zip(weights, grads, strict=True)]
    for mine, expected in zip(buffer.active(threshold), naive_active(scores, k), strict=True):
        assert torch.equal(mine.bool(), expected)


def values(kind, size, seed):
    """Return importances of a kind; weights are their roots."""
    flat = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "equal":
        flat = torch.full_like(flat, 0.25)
    elif kind == "zero":
        flat = torch.zeros_like(flat)
    elif kind == "denormal":
        flat = flat * 1e-40
    elif kind == "ties":
        flat = (flat * 4).round() / 4
    elif kind == "mostly_zero":
        flat = flat * (flat > 0.9)
    elif kind == "layers_apart":
        flat[: size // 2] *= 1e-6
    return flat


@st.composite
def problems(draw):
    kind = draw(st.sampled_from(KINDS))
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    shapes = draw(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=5))
    if kind == "huge_and_tiny":
        shapes = [[2], [181, 97], [3, 1]]
    sizes = [math.prod(shape) for shape in shapes]
    total = sum(sizes)
    flat = values(kind, total, draw(st.integers(0, 2**31)))
    layouts = [draw(st.permutations(range(len(shape)))) for shape in shapes]
    weights, grads = [], []
    for part, shape, layout, dtype in zip(flat.split(sizes), shapes, layouts, cycle(dtypes), strict=False):
        laid_out = [shape[axis] for axis in layout]
        back = [layout.index(axis) for axis in range(len(shape))]
        weights.append(part.sqrt().to(dtype).view(laid_out).permute(back))
        grads.append((-part.sqrt()).to(dtype).view(laid_out).permute(back))
    k = draw(st.one_of(st.just(1), st.just(max(1, total - 1)), st.integers(1, total)))
    return draw(st.sampled_from([taylor, magnitude])), weights, grads, k


@settings(max_examples=100)
@given(problem=problems())
def test_choice_equals_a_stable_sort(problem):
    check_choice(*problem)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_scores_keep_the_precision_of_their_weights_among_wider_ones(narrow):
    """Float64 has numbers between an importance in float32 and the product that was rounded to it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(size, generator=generator).to(dtype) for size, dtype in ((40, narrow), (9, torch.float64))]
    grads = [torch.rand(weight.shape, generator=generator).to(weight.dtype) for weight in weights]
    for k in range(1, 49):
        check_choice(taylor, weights, grads, k)


def in_three(flat):
    return [part.view(-1, 100) for part in flat.float().split(100_000)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1e-4, 0.02, 0.3, 0.97])
def test_choice_among_many(kind, share):
    flat = values(kind, 300_000, 1)
    check_choice(taylor, in_three(flat.sqrt()), in_three(flat), round(share * 300_000))


@pytest.mark.parametrize("large_ones_seen", [True, False])
@pytest.mark.parametrize("share", [0.003, 0.3, 0.97])
def test_choice_where_the_sample_misleads(samples, share, large_ones_seen):
    """Large scores are exactly what the sample has, or exactly what it has not: the bracket widens until it fits."""
    places = in_three(torch.arange(300_000))
    check_choice(magnitude, places, places, 1)
    seen = torch.zeros(300_000, dtype=torch.bool)
    seen[samples[0][samples[0] >= 0].long()] = True  # not what fills up the buffer's last row
    assert 1_000 < seen.sum() < 30_000
    samples.clear()
    flat = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    flat[seen == large_ones_seen] += 10
    check_choice(taylor, in_three(flat.sqrt()), in_three(flat.sqrt()), round(share * 300_000))
    assert len(samples) > 1
