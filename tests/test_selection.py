import math
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gsm_sgd.selection import StoredScores, find_cut, importance, kept_weights, select_top
from reference_gsm import naive_top

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def scores_and_k(draw):
    """Tensors of any shapes and dtypes, from continuous values to nothing but ties, and a k that fits."""
    shapes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([1, 2, 5, None]))
    scale = draw(st.sampled_from([1.0, 1e-40, 1e30]))
    scores = []
    for shape in shapes:
        dtype = draw(st.sampled_from(DTYPES))
        values = torch.rand(shape, generator=generator, dtype=torch.float64) - draw(st.sampled_from([0.0, 0.5]))
        if levels is not None:
            values = (values * levels).round()
        scores.append((values * scale).to(dtype))
    total = sum(score.numel() for score in scores)
    return scores, draw(st.integers(0, total))


@settings(max_examples=300, deadline=None)
@given(scores_and_k())
def test_equals_a_stable_sort(case):
    scores, k = case
    masks = select_top(scores, k)
    assert sum(int(mask.sum()) for mask in masks) == k
    for mask, naive, score in zip(masks, naive_top(scores, k), scores, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        assert torch.equal(mask, naive)


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.5, 0.99, 1 - 1e-5])
@pytest.mark.parametrize("kind", ["normal", "heavy_tail", "ties", "two_values", "huge_and_tiny"])
def test_large_inputs_that_need_the_sample(kind, share):
    """Beyond the size of the sample the threshold is found from a bracket; the k largest are still exact."""
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(200_003, generator=generator).abs()
    if kind == "heavy_tail":
        flat = flat**20
    elif kind == "ties":
        flat = (flat * 10).round()
    elif kind == "two_values":
        flat = (flat > 2).float()
    scores = [*flat[:7].split(1), flat[7:]] if kind == "huge_and_tiny" else [*flat.split(77_777)]
    k = max(1, math.floor(share * flat.numel()))
    masks = torch.cat(select_top(scores, k))
    expected = torch.zeros_like(flat, dtype=torch.bool)
    expected[flat.sort(descending=True, stable=True).indices[:k]] = True
    assert torch.equal(masks, expected)


@pytest.mark.parametrize("outliers_seen", [True, False])
def test_sample_that_misleads(outliers_seen):
    """Large scores sit exactly where the strided sample looks, or exactly where it does not."""
    total = 400_000
    stride = round(total ** (1 / 3)) | 1
    scores = torch.rand(total, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(total, dtype=torch.bool)
    seen[::stride] = True
    scores[seen if outliers_seen else ~seen] += 10
    for k in (1_000, 16_000, 100_000, 390_000):
        expected = torch.zeros(total, dtype=torch.bool)
        expected[scores.sort(descending=True, stable=True).indices[:k]] = True
        assert torch.equal(select_top([scores], k)[0], expected)


def test_scores_are_neither_concatenated_nor_sorted():
    class Largest(TorchDispatchMode):
        sizes: ClassVar[dict[str, int]] = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            result = func(*args, **(kwargs or {}))
            handled = result if name == "cat" else args[0]
            if isinstance(handled, torch.Tensor):
                self.sizes[name] = max(self.sizes.get(name, 0), handled.numel())
            return result

    scores = [torch.rand(700, 300), torch.rand(100_000)]
    with Largest() as largest:
        select_top(scores, 310_000 // 60)
    assert max(largest.sizes.get(name, 0) for name in ("cat", "sort", "topk", "kthvalue")) < 310_000 / 10


@pytest.mark.parametrize("k", [1_000, 29_990, 30_000, 30_010, 150_000, 299_000])
def test_scores_that_are_zero_are_counted_and_not_gathered(k):
    """Most gradients are zero behind dead units and inputs; a step with such costs no more than others."""
    scores = [torch.rand(300, 500, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    for score in scores:
        score[:, 50:] = 0
    found = StoredScores([score.view(-1) for score in scores])
    gathered = []
    between = found.between
    found.between = lambda low, high: gathered.append(between(low, high)) or gathered[-1]
    masks = find_cut(found, k).masks([score.view(-1) for score in scores])
    assert torch.equal(torch.cat(masks), torch.cat([naive.view(-1) for naive in naive_top(scores, k)]))
    assert max(len(values) for _, values in gathered) < 30_000


def test_ties_go_to_the_lower_index_across_tensors():
    masks = select_top([torch.zeros(3), torch.tensor([0.0, 1.0]), torch.zeros(2, 2)], 5)
    assert [mask.flatten().tolist() for mask in masks] == [[1, 1, 1], [1, 1], [0, 0, 0, 0]]


def test_memory_layout_does_not_matter():
    scores = torch.randn(6, 5, 4, 3).round()
    for layout in (
        scores.to(memory_format=torch.channels_last),
        scores.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    ):
        assert torch.equal(select_top([layout], 100)[0], select_top([scores], 100)[0])


def test_infinite_scores_are_the_largest():
    scores = torch.tensor([1.0, math.inf, -math.inf, 2.0, math.inf])
    assert select_top([scores], 1)[0].tolist() == [False, True, False, False, False]
    assert select_top([scores], 3)[0].tolist() == [False, True, False, True, True]


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        ([torch.ones(3)], 4, "cannot select 4 of 3 scores"),
        ([torch.ones(3)], -1, "cannot select -1 of 3 scores"),
        ([], 1, "cannot select 1 of 0 scores"),
        ([torch.ones(3, dtype=torch.int64)], 1, "floating point"),
        ([torch.ones(3), torch.tensor([1.0, math.nan])], 2, "NaN"),
        ([torch.ones(3), torch.ones(3, device="meta")], 2, "one device"),
    ],
)
def test_bad_scores(scores, k, message):
    with pytest.raises(ValueError, match=message):
        select_top(scores, k)


def test_nothing_to_select():
    assert select_top([], 0) == []
    assert not select_top([torch.ones(3)], 0)[0].any()


@given(st.integers(1, 10**12), st.floats(1, 1e6))
def test_kept_weights_is_the_floor(num_weights, compression):
    exact = Fraction(num_weights) / Fraction(compression)
    if exact < 1 - Fraction(1, 10**12):
        with pytest.raises(ValueError, match="leaves none"):
            kept_weights(num_weights, compression)
    else:
        kept = kept_weights(num_weights, compression)
        assert kept in (math.floor(exact), math.floor(exact * (1 + Fraction(1, 10**15))))
        assert type(kept) is int


@given(st.integers(1, 10**12), st.data())
def test_a_ratio_that_was_divided_out_keeps_what_was_meant(num_weights, data):
    kept = data.draw(st.integers(1, num_weights))
    assert kept_weights(num_weights, num_weights / kept) == kept


def test_a_ratio_that_was_computed_from_a_sparsity_keeps_what_was_meant():
    assert kept_weights(1_000, 1 / (1 - 0.9)) == 100
    assert kept_weights(1_000, np.float32(10)) == 100


def test_kept_weights_of_the_paper():
    assert kept_weights(266_200, 60) == 4_436
    assert kept_weights(430_500, 125) == 3_444
    assert kept_weights(430_500, 300) == 1_435
    assert kept_weights(851_504, 10) == 85_150


@pytest.mark.parametrize("compression", [0.99, 0, -3, math.inf, -math.inf, math.nan])
def test_bad_compression(compression):
    with pytest.raises(ValueError, match="compression must be a finite number of at least 1"):
        kept_weights(100, compression)


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_does_not_underflow_in_half_precision(dtype):
    weight, grad = torch.tensor([1e-3, -2.0], dtype=dtype), torch.tensor([-1e-5, 3.0], dtype=dtype)
    score = importance(weight, grad)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert score[0] > 0
    assert score[1] == 6
