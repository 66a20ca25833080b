"""Every implementation of the rule chooses exactly the weights that a stable sort does, and moves them alike."""

import copy
import math
from itertools import cycle

import pytest
import torch
from gsm_sgd.passes import flattened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, NonFiniteGradientError, fused
from gsm_sgd.selection import find_cut, importance
from reference_gsm import NaiveGSM, naive_top

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "equal", "zero", "denormal", "ties", "huge_and_tiny", "mostly_zero", "spikes", "layers_apart"]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    yield
    torch.compiler.reset()


@pytest.fixture(params=["stored", "computed"])
def either_pass(request, monkeypatch):
    """Small models store their importances, large ones compute them again: here both do either."""
    monkeypatch.setattr(fused, "_SMALL", 0 if request.param == "computed" else 2**22)


def net(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))
    return layers.to(memory_format=torch.channels_last).to(dtype)


def batch(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 4, 4, generator=generator, dtype=dtype)
    return images, torch.randint(4, (16,), generator=generator)


def backward(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def values(kind, size, seed):
    """Return importances of a kind; weights are their roots."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(size, generator=generator, dtype=torch.float64)
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
    elif kind == "spikes":  # large where the strided sample looks
        flat[:: round(size ** (1 / 3)) | 1] += 10
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
    return weights, grads, draw(st.one_of(st.just(1), st.just(max(1, total - 1)), st.integers(1, total)))


def check_choice(weights, grads, k):
    scores = [importance(w, g) for w, g in zip(weights, grads, strict=True)]
    cut = find_cut(fused.FusedRule()._scores(weights, grads), k)
    for number, (score, expected) in enumerate(zip(scores, naive_top(scores, k), strict=True)):
        score = score.to(cut.value.dtype)
        active = score >= cut.value if number <= cut.tensor else score > cut.value
        if number == cut.tensor:
            flattened(active, weights[number])[cut.surplus] = False
        assert torch.equal(active, expected)


@pytest.mark.parametrize("small", [0, 2**22])
@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_choice_equals_a_stable_sort(small, problem):
    """The passes run uncompiled here, which lets shapes vary; the tests below compile them."""
    with torch.compiler.set_stance("force_eager"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_SMALL", small)
        if sum(w.numel() for w in problem[0]) > problem[2]:
            check_choice(*problem)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("small", [0, 2**22])
def test_importances_keep_the_precision_of_their_weights_among_wider_ones(small, narrow, monkeypatch):
    """Float64 has numbers between an importance in float32 and the product that was rounded to it."""
    monkeypatch.setattr(fused, "_SMALL", small)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(size, generator=generator).to(dtype) for size, dtype in ((40, narrow), (9, torch.float64))]
    grads = [torch.rand(weight.shape, generator=generator).to(weight.dtype) for weight in weights]
    with torch.compiler.set_stance("force_eager"):
        for k in range(1, 49):
            check_choice(weights, grads, k)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1e-4, 0.02, 0.3, 0.97])
def test_choice_among_many_where_one_sample_misleads(kind, share, monkeypatch):
    monkeypatch.setattr(fused, "_SMALL", 0)
    flat = values(kind, 300_000, 1).float()
    weights, grads = (
        [w.view(-1, 100) for w in flat.sqrt().split(100_000)],
        [g.view(-1, 100) for g in flat.split(100_000)],
    )
    with torch.compiler.set_stance("force_eager"):
        rule = fused.FusedRule()
        k = round(share * 300_000)
        scores = torch.cat([importance(w, g).view(-1) for w, g in zip(weights, grads, strict=True)])
        expected = torch.zeros_like(scores, dtype=torch.bool)
        expected[scores.sort(descending=True, stable=True).indices[:k]] = True
        for hint in (None, 1.0, 1e-30):  # no last threshold, one near, one far off
            rule._hints.threshold = None if hint is None else scores[expected].min() * hint
            cut = find_cut(rule._scores(weights, grads), k)
            active = scores > cut.value
            active[: 100_000 * (cut.tensor + 1)] |= scores[: 100_000 * (cut.tensor + 1)] == cut.value
            active[100_000 * cut.tensor + cut.surplus] = False
            assert torch.equal(active, expected)


@pytest.mark.parametrize("k", [1_000, 29_990, 30_000, 30_010, 150_000, 299_000])
def test_importances_that_are_zero_are_counted_and_not_gathered(k, monkeypatch):
    monkeypatch.setattr(fused, "_SMALL", 0)
    weights = [torch.rand(1500, 100, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    grads = [torch.rand(1500, 100, generator=torch.Generator().manual_seed(i)) ** 9 for i in (2, 3)]
    for grad in grads:
        grad[:, 10:] = 0
    gathered = []
    between = fused._ComputedScores.between
    monkeypatch.setattr(fused._ComputedScores, "between", lambda *args: gathered.append(between(*args)) or gathered[-1])
    with torch.compiler.set_stance("force_eager"):
        check_choice(weights, grads, k)
    assert max(len(values) for _, values in gathered) < 10_000


@pytest.mark.usefixtures("either_pass")
def test_zero_gradients_where_denormal_numbers_are_flushed_to_zero():
    """Nothing lies between zero and the smallest normal number then, and a score of zero is passive all the same."""
    params = [nn.Parameter(torch.ones(40, 30)) for _ in range(3)]
    optimizer = GSM(params, 0.5, compression=2, momentum=0.0, weight_decay=0.25, passive_decay=0.5, fused=True)
    for p in params:
        p.grad = torch.zeros_like(p)
    params[1].grad[3, 4] = torch.finfo(torch.float32).tiny
    torch.set_flush_denormal(True)
    try:
        optimizer.step()
    finally:
        torch.set_flush_denormal(False)
    moved = torch.cat([p.detach().reshape(-1) for p in params])
    assert torch.equal(moved, torch.where(torch.arange(3600) == 1294, 1 - 0.5 * 0.25, 1 - 0.5 * 0.5))


@pytest.mark.usefixtures("either_pass")
@pytest.mark.parametrize("nesterov", [False, True])
def test_compiled_steps_in_lockstep_with_the_naive_twin(nesterov):
    """Compiled once: the learning rate, the threshold and the step change, and nothing is compiled again."""
    fast, slow = net(), net()
    hyper = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": 0.03}
    ours = GSM(fast.parameters(), 0.1, compression=7, fused=True, **hyper)
    twin = NaiveGSM(slow.parameters(), 0.1, 7, **hyper)
    stance = "default"
    for step in range(12):
        ours.param_groups[0]["lr"] = twin.lr = 0.1 / (1 + step)
        for model, optimizer in ((fast, ours), (slow, twin)):
            backward(model, *batch(step))
            with torch.compiler.set_stance(stance if optimizer is ours else "default"):
                optimizer.step()
        for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        stance = "fail_on_recompile" if step else "default"


@pytest.mark.usefixtures("either_pass")
def test_ties_across_the_threshold_when_compiled():
    """Of equal importances the first are active: those of the second tensor in part, in index order."""
    params = [
        nn.Parameter(torch.ones(4, 5)),
        nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    optimizer = GSM(params, 0.5, compression=116 / 50, momentum=0.0, weight_decay=0.25, passive_decay=0.5, fused=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in params])
    assert torch.equal(moved, torch.where(torch.arange(116) < 50, 1 - 0.5 * 1.25, 1 - 0.5 * 0.5))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {}])
def test_compression_1_is_sgd_of_the_same_implementation_bit_for_bit(options):
    ours, theirs = net(torch.float32), net(torch.float32)
    gsm = GSM(ours.parameters(), 0.1, compression=1, weight_decay=1e-2, **options)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, weight_decay=1e-2, **options)
    for step in range(10):
        for model, optimizer in ((ours, gsm), (theirs, sgd)):
            backward(model, *batch(step, torch.float32))
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_implementations_agree_before_and_after_finalize(options):
    nets = net(), net()
    optimizers = [
        GSM([{"params": [*model[:4].parameters()], "lr": 0.05}, {"params": [*model[4:].parameters()]}], 0.1, **settings)
        for model, settings in zip(nets, ({"compression": 5}, {"compression": 5, **options}), strict=True)
    ]
    for step in range(10):
        for model, optimizer in zip(nets, optimizers, strict=True):
            backward(model, *batch(step))
            if step == 3:
                model[3].weight.grad = None
            optimizer.step()
            if step == 6:
                optimizer.finalize()
        for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    assert sum(int(p.count_nonzero()) for p in nets[1].parameters() if p.ndim > 1) == optimizers[1].nonzeros


@pytest.mark.usefixtures("either_pass")
def test_compiled_step_refuses_a_gradient_that_is_not_finite():
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=5, fused=True)
    backward(model, *batch(0))
    optimizer.step()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    for bad in (math.inf, math.nan):
        backward(model, *batch(1))
        model[3].weight.grad[2, 3] = bad
        with pytest.raises(NonFiniteGradientError, match=r"'3\.weight' is not finite"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan  # a weight is left to the loss
    backward(before, *batch(1))
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        p.grad = q.grad
    optimizer.step()
    assert model[3].weight.isnan().sum() == 1


def test_copies_and_loaded_states_go_on_in_the_same_way():
    model = net()
    optimizer = GSM(model.parameters(), 0.1, compression=5, fused=True)
    backward(model, *batch(0))
    optimizer.step()
    assert copy.deepcopy(optimizer).defaults["fused"]
    twin = copy.deepcopy(model)
    eager = GSM(twin.parameters(), 0.1, compression=5)
    eager.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two would share their momenta
    for one, opt in ((model, optimizer), (twin, eager)):
        backward(one, *batch(1))
        opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_layout_of_gradients_and_loaded_momenta_does_not_matter(options):
    """Torch's fused SGD takes for granted that all tensors lie in memory as the parameter does."""
    params = [nn.Parameter(torch.rand(6, 5, 4, 3)), nn.Parameter(torch.rand(3))]
    params += [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    optimizers = [
        GSM(params[:2], 0.1, compression=3, weight_decay=0.1, **options),
        GSM(params[2:], 0.1, compression=3, weight_decay=0.1, foreach=False),
    ]
    for step in range(3):
        if step == 1:
            params[0].data = params[0].data.to(memory_format=torch.channels_last)  # the momenta stay as they are
        for p, q in zip(params[:2], params[2:], strict=True):
            p.grad, q.grad = (torch.full_like(q, 0.1).copy_(q.detach() ** 2 - 0.3) for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(params[:2], params[2:], strict=True):
            torch.testing.assert_close(p, q)


def test_without_a_compiler_the_error_says_what_to_do():
    model = net(torch.float32)
    optimizer = GSM(model.parameters(), 0.1, compression=5, fused=True)
    before = copy.deepcopy(model)
    backward(model, *batch(0, torch.float32))
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(settings), pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


def test_gaps_in_memory_are_refused_by_the_compiled_step():
    weight = nn.Parameter(torch.ones(4, 8)[:, ::2])
    optimizer = GSM([weight], 0.1, compression=2, fused=True)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="without gaps in memory"):
        optimizer.step()


def test_foreach_and_fused_exclude_each_other():
    with pytest.raises(ValueError, match="cannot both be True"):
        GSM(net().parameters(), 0.1, compression=2, foreach=True, fused=True)
