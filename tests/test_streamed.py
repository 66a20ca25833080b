"""Every way to find the threshold chooses the weights that a stable sort does, and every update moves them alike."""

import copy
import math
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, NonFiniteGradientError
from gsm_sgd.memory import flattened
from gsm_sgd.scores import evaluate, magnitude, taylor
from gsm_sgd.selection import streamed
from gsm_sgd.selection.stored import ScoreBuffer
from gsm_sgd.selection.threshold import Local, find_threshold
from nets import backward, conv_net
from reference_gsm import NaiveGSM, naive_active

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = ["normal", "equal", "zero", "denormal", "ties", "huge_and_tiny", "mostly_zero", "layers_apart"]
SMALL = {"stored": 2**22, "streamed": 0}


# --- the choice: the passes run uncompiled here, which lets shapes vary; the tests below compile them ---


def scores_by(way, score, weights, grads):
    """Return scores as a step has them: in the eager buffer, stored by a compiled pass, or computed again each time."""
    if way == "buffer":
        buffer = ScoreBuffer()
        buffer.fill(score, weights, grads, [{}] * len(weights))
        return buffer.scores_of(range(len(weights)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed, "_SMALL", SMALL[way])
        return streamed.streamed(score, weights, grads, streamed.Passes.compiled())


def check_choice(way, score, weights, grads, k):
    with torch.compiler.set_stance("force_eager"):
        threshold = find_threshold(Local(scores_by(way, score, weights, grads)), k, positive=True)
    scores = [evaluate(score, w, g, {}) for w, g in zip(weights, grads, strict=True)]
    for number, (mine, expected) in enumerate(zip(scores, naive_active(scores, k), strict=True)):
        compare = torch.ge if number <= threshold.tensor else torch.gt
        active = compare(mine.to(threshold.value.dtype), threshold.value)
        if number == threshold.tensor:
            flattened(active, weights[number])[threshold.surplus] = False
        assert torch.equal(active, expected)


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


@pytest.mark.parametrize("way", ["buffer", *SMALL])
@settings(max_examples=100)
@given(problem=problems())
def test_choice_equals_a_stable_sort(way, problem):
    check_choice(way, *problem)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["buffer", *SMALL])
def test_scores_keep_the_precision_of_their_weights_among_wider_ones(way, narrow):
    """Float64 has numbers between an importance in float32 and the product that was rounded to it."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(size, generator=generator).to(dtype) for size, dtype in ((40, narrow), (9, torch.float64))]
    grads = [torch.rand(weight.shape, generator=generator).to(weight.dtype) for weight in weights]
    for k in range(1, 49):
        check_choice(way, taylor, weights, grads, k)


def in_three(flat):
    return [part.view(-1, 100) for part in flat.float().split(100_000)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1e-4, 0.02, 0.3, 0.97])
def test_choice_among_many(kind, share):
    flat = values(kind, 300_000, 1)
    check_choice("streamed", taylor, in_three(flat.sqrt()), in_three(flat), round(share * 300_000))


@pytest.mark.parametrize("large_ones_seen", [True, False])
@pytest.mark.parametrize("share", [0.003, 0.3, 0.97])
@pytest.mark.parametrize("way", SMALL)
def test_choice_where_the_sample_misleads(samples, way, share, large_ones_seen):
    """Large scores are exactly what the sample has, or exactly what it has not: the bracket widens until it fits."""
    places = in_three(torch.arange(300_000))
    check_choice(way, magnitude, places, places, 1)
    seen = torch.zeros(300_000, dtype=torch.bool)
    seen[samples[0].long()] = True
    assert 1_000 < seen.sum() < 30_000
    samples.clear()
    flat = torch.rand(300_000, generator=torch.Generator().manual_seed(0))
    flat[seen == large_ones_seen] += 10
    check_choice(way, taylor, in_three(flat.sqrt()), in_three(flat.sqrt()), round(share * 300_000))
    assert len(samples) > 1


@pytest.mark.parametrize("way", SMALL)
@pytest.mark.parametrize("k", [1_000, 29_990, 30_000, 30_010, 150_000, 299_000])
def test_scores_that_are_zero_are_counted_and_not_gathered(way, k, monkeypatch):
    weights = [torch.rand(1500, 100, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    grads = [torch.rand(1500, 100, generator=torch.Generator().manual_seed(i)) ** 9 for i in (2, 3)]
    for grad in grads:
        grad[:, 10:] = 0
    gathered = []
    scores = streamed.StreamedScores
    between = scores.between
    monkeypatch.setattr(scores, "between", lambda *args: gathered.append(between(*args)) or gathered[-1])
    check_choice(way, taylor, weights, grads, k)
    assert max(len(values) for _, values in gathered) < 10_000


# --- the update ---


@pytest.fixture(params=SMALL)
def either_way(request, monkeypatch):
    """Steps of small models store their scores, those of large ones compute them again: here both do either."""
    monkeypatch.setattr(streamed, "_SMALL", SMALL[request.param])


def net(dtype=torch.float64):
    return conv_net(dtype).to(memory_format=torch.channels_last)


def assert_alike(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def check_lockstep(nesterov):
    """Compiled once: the learning rate, the threshold and the step change, and nothing is compiled again."""
    fast, slow = net(), net()
    hyper = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": 0.03}
    ours = GSM(fast.parameters(), 0.1, compression=7, compiled=True, **hyper)
    twin = NaiveGSM(slow.parameters(), 0.1, 7, **hyper)
    for step in range(8):
        ours.param_groups[0]["lr"] = twin.lr = 0.1 / (1 + step)
        backward(fast, step)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            ours.step()
        backward(slow, step)
        twin.step()
        assert_alike(fast, slow)
    assert ours.buffer_bytes == 0


@pytest.mark.usefixtures("either_way", "quick_compile")
@pytest.mark.parametrize("nesterov", [False, True])
def test_compiled_steps_in_lockstep_with_the_naive_twin(nesterov):
    check_lockstep(nesterov)


@pytest.mark.slow
@pytest.mark.usefixtures("either_way")
def test_generated_code_in_lockstep_with_the_naive_twin():
    check_lockstep(nesterov=True)
    torch.compiler.reset()


@pytest.mark.usefixtures("either_way", "quick_compile")
def test_zero_gradients_where_denormal_numbers_are_flushed_to_zero():
    """Nothing lies between zero and the smallest normal number then, and a score of zero is passive all the same."""
    params = [nn.Parameter(torch.ones(40, 30)) for _ in range(3)]
    optimizer = GSM(params, 0.5, compression=2, momentum=0.0, weight_decay=0.25, passive_decay=0.5, compiled=True)
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


@pytest.mark.usefixtures("either_way", "quick_compile")
@pytest.mark.parametrize("num_kept", [9, 50])
def test_ties_across_the_threshold(num_kept):
    """Of equal importances the first are active: those of one tensor in part, in index order, and none after it."""
    params = [
        nn.Parameter(torch.ones(4, 5)),
        nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    settings = {"momentum": 0.0, "weight_decay": 0.25, "passive_decay": 0.5}
    optimizer = GSM(params, 0.5, num_kept=num_kept, compiled=True, **settings)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in params])
    assert torch.equal(moved, torch.where(torch.arange(116) < num_kept, 1 - 0.5 * 1.25, 1 - 0.5 * 0.5))


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"foreach": False}, {"fused": True}, {"compiled": True, "score": "magnitude"}],
    ids=str,
)
def test_implementations_agree_before_and_after_finalize(options):
    nets = net(), net()
    optimizers = []
    for model, mine in zip(nets, ({"score": options.get("score", "taylor")}, options), strict=True):
        groups = [{"params": [*model[:4].parameters()], "lr": 0.05}, {"params": [*model[4:].parameters()]}]
        optimizers.append(GSM(groups, 0.1, compression=5, **mine))
    for step in range(8):
        for model, optimizer in zip(nets, optimizers, strict=True):
            backward(model, step)
            if step == 3:
                model[4].weight.grad = None
            optimizer.step()
            if step == 5:
                optimizer.finalize()
        assert_alike(*nets)
    assert sum(int(p.count_nonzero()) for p in nets[1].parameters() if p.ndim > 1) == optimizers[1].num_kept


@pytest.mark.usefixtures("either_way", "quick_compile")
def test_a_compiled_step_refuses_a_gradient_that_is_not_finite():
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=5, compiled=True)
    backward(model, 0)
    optimizer.step()
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    for bad in (math.inf, math.nan):
        backward(model, 1)
        model[4].weight.grad[2, 3] = bad
        with pytest.raises(NonFiniteGradientError, match=r"'4\.weight' is not finite"):
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
    with torch.no_grad():
        model[4].weight[0, 0] = math.nan  # a weight is left to the loss
    backward(before, 1)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        p.grad = q.grad
    optimizer.step()
    assert model[4].weight.isnan().sum() == 1


@pytest.mark.usefixtures("quick_compile")
def test_copies_stay_compiled_and_states_load_uncompiled():
    model = net()
    optimizer = GSM(model.parameters(), 0.1, compression=5, compiled=True)
    backward(model, 0)
    optimizer.step()
    copied, copied_optimizer = copy.deepcopy((model, optimizer))
    eager = copy.deepcopy(model)
    eager_optimizer = GSM(eager.parameters(), 0.1, compression=5)
    eager_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else the two would share their momenta
    for one, opt in ((model, optimizer), (copied, copied_optimizer), (eager, eager_optimizer)):
        backward(one, 1)
        opt.step()
        assert_alike(model, one)
    assert (optimizer.buffer_bytes, copied_optimizer.buffer_bytes) == (0, 0)
    assert eager_optimizer.buffer_bytes > 0


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"compression": 1, "fused": True}])
def test_layout_of_gradients_and_loaded_momenta_does_not_matter(options):
    """Torch's fused SGD takes for granted that all tensors lie in memory as the parameter does."""
    params = [nn.Parameter(torch.rand(6, 5, 4, 3)), nn.Parameter(torch.rand(3))]
    params += [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    settings = {"compression": 3, "weight_decay": 0.1} | options
    plain = {"compression": settings["compression"], "weight_decay": 0.1, "foreach": False}
    optimizers = [GSM(params[:2], 0.1, **settings), GSM(params[2:], 0.1, **plain)]
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
    optimizer = GSM(model.parameters(), 0.1, compression=5, compiled=True)
    before = copy.deepcopy(model)
    backward(model, 0)
    settings = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(settings), pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.usefixtures("quick_compile")
def test_gaps_in_memory_are_refused_by_the_compiled_step():
    weight = nn.Parameter(torch.ones(4, 8)[:, ::2])
    optimizer = GSM([weight], 0.1, compression=2, compiled=True)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match="without gaps in memory"):
        optimizer.step()


def test_foreach_and_fused_exclude_each_other():
    with pytest.raises(ValueError, match="cannot both be True"):
        GSM(net().parameters(), 0.1, compression=2, foreach=True, fused=True)
