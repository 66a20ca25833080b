import math
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gsm_sgd import select_top
from gsm_sgd.selection.stored import StoredScores
from gsm_sgd.selection.threshold import Local, find_threshold
from reference_gsm import naive_active, naive_top

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


@settings(max_examples=200)
@given(scores_and_k(), st.booleans())
def test_equals_a_stable_sort(case, positive):
    scores, k = case
    masks = select_top(scores, k, positive)
    expected = (naive_active if positive else naive_top)(scores, k)
    assert positive or sum(int(mask.sum()) for mask in masks) == k
    for mask, naive, score in zip(masks, expected, scores, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        assert torch.equal(mask, naive)


@pytest.mark.parametrize("share", [1e-5, 0.01, 0.3, 0.5, 0.99, 1 - 1e-5])
@pytest.mark.parametrize("kind", ["normal", "heavy_tail", "ties", "two_values", "huge_and_tiny"])
def test_large_inputs_that_need_the_sample(kind, share):
    """Beyond the size of the sample the threshold is found from a bracket; the k largest are still exact."""
    flat = torch.randn(200_003, generator=torch.Generator().manual_seed(3)).abs()
    if kind == "heavy_tail":
        flat = flat**20
    elif kind == "ties":
        flat = (flat * 10).round()
    elif kind == "two_values":
        flat = (flat > 2).float()
    scores = [*flat[:7].split(1), flat[7:]] if kind == "huge_and_tiny" else [*flat.split(77_777)]
    k = max(1, math.floor(share * flat.numel()))
    assert torch.equal(torch.cat(select_top(scores, k)), naive_top([flat], k)[0])


@pytest.mark.parametrize("large_ones_seen", [True, False])
@pytest.mark.parametrize("k", [1_000, 16_000, 100_000, 390_000])
def test_sample_that_misleads(samples, large_ones_seen, k):
    """Large scores are exactly what the sample has, or exactly what it has not: the bracket widens until it fits."""
    total = 400_000
    select_top([torch.arange(total).float()], 1)
    seen = torch.zeros(total, dtype=torch.bool)
    seen[samples.pop().long()] = True
    assert 1_000 < seen.sum() < total / 10
    scores = torch.rand(total, generator=torch.Generator().manual_seed(0))
    scores[seen == large_ones_seen] += 10
    assert torch.equal(select_top([scores], k)[0], naive_top([scores], k)[0])
    assert len(samples) > 1


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
    assert 0 < max(largest.sizes.get(name, 0) for name in ("cat", "sort", "topk", "kthvalue")) < 310_000 / 10


@pytest.mark.parametrize("k", [1_000, 29_990, 30_000, 30_010, 150_000, 299_000])
def test_scores_that_are_zero_are_counted_and_not_gathered(k):
    """Most gradients are zero behind dead units and inputs; a step with such costs no more than others."""
    scores = torch.rand(300, 1000, generator=torch.Generator().manual_seed(0))
    scores[:, 100:] = 0
    halves = [*scores.view(-1).split(150_000)]
    found = StoredScores(halves)
    gathered = []
    between = found.between
    found.between = lambda low, high: gathered.append(between(low, high)) or gathered[-1]
    for mask, naive in zip(find_threshold(Local(found), k).masks(halves), naive_top(halves, k), strict=True):
        assert torch.equal(mask, naive)
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
