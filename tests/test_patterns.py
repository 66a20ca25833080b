"""Patterns in both optimizers, against naive twins that look at one group or block at a time."""

import copy
import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, NM, Block, GSMAdamW, NonFiniteGradientError, Phase, Schedule
from gsm_sgd.patterns import Pattern, Unstructured
from reference_gsm import NaiveAdamW, NaiveGSM, naive_active


class Run(Pattern):
    """A pattern of one's own takes nothing but a class: h weights that follow each other along the last axis."""

    def __init__(self, h):
        self.size = h

    def pool(self, scores):
        return [tensor.unflatten(-1, (-1, self.size)).sum(-1) for tensor in scores]

    def expand(self, kept, scores):
        return [mask.repeat_interleave(self.size, -1) for mask in kept]


# --- naive twins: one group or block at a time ---


def groups_of(tensor, m):
    """Return the groups of m consecutive inputs as views: (out, in, ...) -> [(m,), ...]."""
    places = itertools.product(*(range(size) for size in tensor.shape[2:]))
    return [
        tensor[(out, slice(first, first + m), *place)]
        for place in places
        for out in range(tensor.shape[0])
        for first in range(0, tensor.shape[1], m)
    ]


def naive_nm(scores, n, m):
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in scores]
    for tensor, mask in zip(scores, masks, strict=True):
        for group, its_mask in zip(groups_of(tensor, m), groups_of(mask, m), strict=True):
            its_mask.copy_(naive_active([group], n)[0])
    return masks


def blocks_of(tensor, h, w):
    """Return the blocks of a matrix as views."""
    rows, columns = tensor.shape
    return [tensor[r : r + h, c : c + w] for r in range(0, rows, h) for c in range(0, columns, w)]


def naive_blocks(scores, h, w, kept):
    matrices = [tensor.reshape(len(tensor), -1) for tensor in scores]
    pooled = [torch.stack([block.sum() for block in blocks_of(matrix, h, w)]) for matrix in matrices]
    masks = [torch.zeros(matrix.shape, dtype=torch.bool) for matrix in matrices]
    for mask, marks in zip(masks, naive_active(pooled, kept // (h * w)), strict=True):
        for block, mark in zip(blocks_of(mask, h, w), marks, strict=True):
            block.fill_(mark)
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def naive_runs(scores, h, kept):
    masks = naive_blocks([tensor.reshape(-1, tensor.shape[-1]) for tensor in scores], 1, h, kept)
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


PATTERNS = {
    "2 of 4": (NM(2, 4), {}, lambda scores: naive_nm(scores, 2, 4)),
    "1 of 8": (NM(1, 8), {}, lambda scores: naive_nm(scores, 1, 8)),
    "blocks of 4 x 4": (Block(4, 4), {"num_kept": 230}, lambda scores: naive_blocks(scores, 4, 4, 230)),
    "blocks of 1 x 8": (Block(1, 8), {"num_kept": 230}, lambda scores: naive_blocks(scores, 1, 8, 230)),
    "runs of 4": (Run(4), {"num_kept": 230}, lambda scores: naive_runs(scores, 4, 230)),
    "single weights": (Unstructured(), {"num_kept": 230}, lambda scores: naive_active(scores, 230)),
}
every_pattern = pytest.mark.parametrize("name", PATTERNS)
both = pytest.mark.parametrize("make", [GSM, GSMAdamW])
new_pattern = pytest.mark.parametrize("name", [name for name in PATTERNS if name != "single weights"])


# --- what the tests train ---


def net(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(8, 4, (3, 8), bias=False), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)]
    return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 8, 6, 8, generator=generator, dtype=torch.float64)
    model.zero_grad()
    F.cross_entropy(model(images.to(model[0].weight.dtype)), torch.randint(4, (16,), generator=generator)).backward()


def train(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def prunable(model):
    return [p.detach() for p in model.parameters() if p.ndim >= 2]


def per_group(tensors, m):
    """Return how many weights are not zero in each group of m inputs."""
    return torch.stack([group.count_nonzero() for tensor in tensors for group in groups_of(tensor, m)])


def assert_alike(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def assert_same_bits(model, other):
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def step_that_moves_active_weights_alone(pattern, scores, gradless=(), **budget):
    """Return which weights are active, given their scores."""
    params = [nn.Parameter(torch.ones_like(tensor)) for tensor in scores]
    optimizer = GSM(params, 0.1, momentum=0.0, weight_decay=0.5, passive_decay=0.0, pattern=pattern, **budget)
    for number, (param, tensor) in enumerate(zip(params, scores, strict=True)):
        param.grad = None if number in gradless else tensor
    optimizer.step()
    return [param.detach() != 1 for param in params]


# --- patterns ---


def test_equal_scores_of_a_group_go_to_the_lower_index_and_zeros_are_passive():
    scores = torch.tensor([[1.0, 1, 1, 1, 0, 0, 3, 0], [2, 3, 2, 2, 0, 0, 0, 0]])
    (active,) = step_that_moves_active_weights_alone(NM(2, 4), [scores])
    assert active.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]]


def test_groups_are_of_inputs_and_blocks_of_the_matrix_that_im2col_multiplies_by():
    """A convolution of one output, two inputs and a kernel of 1 x 2."""
    scores = torch.tensor([[[[1.0, 2]], [[3, 1]]]])
    (active,) = step_that_moves_active_weights_alone(NM(1, 2), [scores])
    assert active.int().tolist() == [[[[0, 1]], [[1, 0]]]]
    (active,) = step_that_moves_active_weights_alone(Block(1, 2), [scores], num_kept=2)
    assert active.int().tolist() == [[[[0, 0]], [[1, 1]]]]


def test_equal_blocks_go_to_the_lower_index_and_budgets_are_rounded_down_to_whole_ones():
    scores = [torch.tensor([[1.0, 1, 0, 2, 3, 0], [0, 0, 1, 0, 0, 2]]), torch.tensor([[2.0, 0, 9, 0]])]
    active = step_that_moves_active_weights_alone(Block(1, 2), scores, num_kept=9)
    assert [mask.int().tolist() for mask in active] == [[[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], [[0, 0, 1, 1]]]
    active = step_that_moves_active_weights_alone(Block(1, 2), scores, num_kept=14)  # one block has no score above zero
    assert [mask.int().tolist() for mask in active] == [[[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], [[1, 1, 1, 1]]]


def test_scores_below_zero_count_in_a_pool():
    params = [nn.Parameter(torch.ones(2, 4))]
    params[0].grad = torch.tensor([[9.0, -8, 0, 3], [9, -3, 1, 1]])
    optimizer = GSM(params, 0.1, num_kept=4, pattern=Block(1, 2), score=lambda w, g, _: w * g, weight_decay=0.0)
    optimizer.step()
    assert (params[0] != 1).int().tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]


def test_a_parameter_without_a_gradient_leaves_the_groups_of_others_alone():
    scores = [torch.rand(4, 8) + 0.1 for _ in range(3)]
    active = step_that_moves_active_weights_alone(NM(2, 4), scores, gradless=[1])
    assert not active[1].any()
    assert per_group([active[0], active[2]], 4).tolist() == [2] * 16


@every_pattern
@both
def test_in_lockstep_with_a_naive_version(make, name):
    pattern, budget, choose = PATTERNS[name]
    fast, slow = net(), net()
    settings = {"weight_decay": 1e-2, "passive_decay": 0.05}
    settings |= {"momentum": 0.9, "nesterov": True} if make is GSM else {"eps": 1e-4}
    ours = make(fast.parameters(), 0.1, pattern=pattern, **budget, **settings)
    twin = (NaiveGSM if make is GSM else NaiveAdamW)(slow.parameters(), 0.1, 2, **settings)
    twin.choose = choose
    for step in range(12):
        train(fast, ours, [step])
        train(slow, twin, [step])
        assert_alike(fast, slow)
    expected = choose([weight.abs() for weight in prunable(fast)])
    masks = ours.finalize()
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))
    assert masks.num_kept == ours.num_kept
    train(fast, ours, range(3))
    assert sum(int(weight.count_nonzero()) for weight in prunable(fast)) == ours.num_kept


@new_pattern
@both
def test_once_the_masks_are_fixed_steps_in_c_keep_the_pattern_too(request, make, name):
    pattern, budget, _ = PATTERNS[name]
    nets = net().float(), net().float()
    for model in nets:
        schedule = Schedule(16, ramp=0, fade=0.5, cut=0.75)
        train(model, make(model.parameters(), 0.01, pattern=pattern, schedule=schedule, **budget), range(16))
        request.getfixturevalue("by_torch")  # for the second one
    assert_same_bits(*nets)


def test_exact_counts_per_group_through_a_whole_schedule(monkeypatch):
    model, counts, seen, phases = net(), [], set(), []
    optimizer = GSM(model.parameters(), 0.05, pattern=NM(2, 4), schedule=Schedule(60))
    total, select = optimizer.num_prunable, NM.select

    def counted(*args):
        masks = select(*args)
        counts.extend(per_group(masks, 4).tolist())
        return masks

    monkeypatch.setattr(NM, "select", counted)
    for step in range(60):
        phases.append(optimizer.phase)
        planned = optimizer.num_active
        train(model, optimizer, [step])
        assert set(counts) <= {planned * 4 // total}
        seen.update(counts)
        counts.clear()
    assert seen == {2, 3}
    assert list(dict.fromkeys(phases)) == [Phase.RAMP, Phase.SEARCH, Phase.FADE, Phase.DONE]
    assert per_group(prunable(model), 4).tolist() == [2] * (total // 4)
    assert optimizer.masks.num_kept == optimizer.num_kept == total // 2


@both
@new_pattern
def test_passive_weights_vanish_before_the_cut(make, name, recwarn):
    pattern, budget, _ = PATTERNS[name]
    model = net()
    fast = {"momentum": 0.5} if make is GSM else {"betas": (0.5, 0.999)}
    optimizer = make(model.parameters(), 0.01, pattern=pattern, schedule=Schedule(300), **budget, **fast)
    train(model, optimizer, range(210))
    assert optimizer.phase is Phase.FADE
    assert 0 < optimizer.passive_residual < 1e-3
    train(model, optimizer, range(210, 215))
    assert optimizer.phase is Phase.DONE
    assert not recwarn.list


@every_pattern
@both
def test_states_and_copies_go_on_to_the_same_bits(make, name):
    pattern, budget, _ = PATTERNS[name]
    settings = {"pattern": pattern, "schedule": Schedule(20), "score": "random", **budget}
    model = net()
    optimizer = make(model.named_parameters(), 0.01, **settings)
    for stop in (4, 9, 13, 16):  # in the ramp, in the search, in the fade, after the cut
        train(model, optimizer, range(optimizer.param_groups[0]["step"], stop))
        resumed = net(seed=1)
        resumed.load_state_dict(model.state_dict())
        loaded = make(resumed.named_parameters(), 0.01, **settings)
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        copied, copy_of = copy.deepcopy((model, optimizer))
        straight, twin = copy.deepcopy((model, optimizer))
        for one, opt in ((resumed, loaded), (copied, copy_of), (straight, twin)):
            train(one, opt, range(stop, 20))
            assert opt.phase is Phase.DONE
        assert_same_bits(resumed, straight)
        assert_same_bits(copied, straight)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            NM(1, 3),
            r"'0\.weight' has 8 inputs, which 3 does not divide: choose another pattern, or put it into a group",
        ),
        (Block(1, 16), r"'4\.weight' is a matrix of 4 x 8, which blocks of 1 x 16 do not divide: choose"),
        (Block(8, 1), r"'0\.weight' is a matrix of 4 x 192, which blocks of 8 x 1 do not divide"),
    ],
    ids=repr,
)
def test_shapes_that_do_not_fit_are_refused_by_name(pattern, message):
    budget = {} if pattern.density else {"compression": 2}
    with pytest.raises(ValueError, match=message):
        GSM(net().named_parameters(), 0.1, pattern=pattern, **budget)
    optimizer = GSM([nn.Parameter(torch.rand(8, 48))], 0.1, pattern=pattern, **budget)
    with pytest.raises(ValueError, match="parameter '0' "):
        optimizer.add_param_group({"params": [nn.Parameter(torch.rand(4, 4))]})
    with pytest.raises(ValueError, match=r"parameter '0' (is no matrix|has no input dimension)"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.rand(48))], "prunable": True})
    optimizer.add_param_group({"params": [nn.Parameter(torch.rand(4, 4))], "prunable": False})
    assert optimizer.num_prunable == 8 * 48


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NM(5, 4), "NM\\(n, m\\) keeps n of each m weights, so 1 <= n <= m, not n=5 and m=4"),
        (lambda: NM(0, 4), "1 <= n <= m"),
        (lambda: NM(2, 4.0), "m must be a whole number, not 4.0"),
        (lambda: Block(0, 4), "a block must be at least 1 x 1, not 0 x 4"),
        (lambda: Block("4", 4), "height must be a whole number"),
    ],
)
def test_patterns_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_budgets_that_do_not_go_with_a_pattern_are_refused():
    with pytest.raises(ValueError, match="give exactly one of compression, density, sparsity and num_kept, not none"):
        GSM(net().parameters(), 0.1, pattern=Block(4, 4))
    with pytest.raises(ValueError, match=r"the pattern NM prescribes the density 0\.5: leave out the budget"):
        GSM(net().parameters(), 0.1, pattern=NM(2, 4), sparsity=0.9)
    with pytest.raises(ValueError, match="3 weights to keep are less than one unit of 4"):
        GSM(net().parameters(), 0.1, pattern=Block(2, 2), num_kept=3)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(NM(2, 4), None), (None, NM(2, 4)), (NM(2, 4), NM(1, 4)), (Block(4, 4), Block(1, 4)), (Block(4, 4), Run(4))],
    ids=repr,
)
def test_states_of_another_pattern_are_refused(ours, theirs, fixed):
    budgets = [{} if isinstance(pattern, NM) else {"num_kept": 230} for pattern in (ours, theirs)]
    optimizer = GSM(net().parameters(), 0.1, pattern=ours, **budgets[0])
    other = GSM(net().parameters(), 0.1, pattern=theirs, **budgets[1])
    if fixed:
        other.finalize()
    before = optimizer.state_dict()
    message = (
        f"the state is of the pattern {theirs or 'Unstructured'}, not {ours or 'Unstructured'}: build the optimizer"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state_dict() == before


def test_states_without_a_pattern_are_of_single_weights_or_of_torchs():
    single, grouped = GSM(net().parameters(), 0.1, num_kept=230), GSM(net().parameters(), 0.1, pattern=NM(2, 4))
    state = single.state_dict()
    del state["param_groups"][0]["pattern"]  # as it was before there was one
    single.load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of the pattern Unstructured, not NM"):
        grouped.load_state_dict(state)
    grouped.load_state_dict(torch.optim.SGD(net().parameters(), 0.1).state_dict())
    assert grouped.num_kept * 2 == grouped.num_prunable


@new_pattern
def test_gradients_that_are_not_finite_are_refused(name):
    pattern, budget, _ = PATTERNS[name]
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, pattern=pattern, **budget)
    train(model, optimizer, [0])
    before = copy.deepcopy(model)
    backward(model, 1)
    model[2].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"'2\.weight' is not finite"):
        optimizer.step()
    assert_same_bits(model, before)


# --- patterns that do not keep their word ---


class Inverted(Run):
    def expand(self, kept, scores):
        return [~mask for mask in super().expand(kept, scores)]


class Shapeless(Run):
    def expand(self, kept, scores):
        return list(kept)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (Inverted(4), "the pattern Inverted keeps"),
        (Shapeless(4), "Shapeless must expand to a bool mask of each"),
    ],
    ids=["too many", "another shape"],
)
def test_what_a_pattern_keeps_is_checked(pattern, message):
    model = nn.Linear(8, 6)
    optimizer = GSM(model.parameters(), 0.1, num_kept=8, pattern=pattern)
    model(torch.ones(2, 8)).sum().backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize("pattern", ["nm", Block, Run(0)], ids=["a name", "a class", "no size"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern must be a Pattern with a size of at least 1"):
        GSM([nn.Parameter(torch.ones(8, 8))], 0.1, num_kept=8, pattern=pattern)


# --- what the kernels that are for them make of the result ---


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_bsr_stores_the_blocks_and_nothing_else():
    model = net()
    optimizer = GSMAdamW(model.named_parameters(), 0.01, pattern=Block(4, 4), num_kept=230)
    train(model, optimizer, range(3))
    optimizer.finalize()
    blocks = 0
    for weight in prunable(model):
        stored = weight.flatten(1).to_sparse_bsr((4, 4))
        blocks += len(stored.values())
        assert torch.equal(stored.to_dense(), weight.flatten(1))
    assert blocks * 16 == optimizer.num_kept == 224


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with semi-structured kernels")
@pytest.mark.parametrize("make", [GSM, GSMAdamW])
def test_semi_structured_kernels_take_the_result(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)).cuda().half()
    optimizer = make(model.named_parameters(), 0.01, pattern=NM(2, 4))
    images = torch.randn(128, 256, device="cuda", dtype=torch.half)
    for _ in range(3):
        model.zero_grad()
        model(images).float().square().mean().backward()
        optimizer.step()
    optimizer.finalize()
    with torch.inference_mode():
        expected = model(images)
        for layer in (model[0], model[2]):
            layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight))
        torch.testing.assert_close(model(images), expected, rtol=1e-2, atol=1e-3)
