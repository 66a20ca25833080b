"""The theory of passive weights against simulation, and the optimizer's automatic decay and schedule."""

import contextlib
import copy
import io
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, NonFiniteGradientError
from gsm_sgd.budget import (
    PassiveWeight,
    cubic_compression,
    decay_for_rate,
    decay_for_shrinkage,
    fastest_rate,
    shrinkage,
)
from reference_gsm import naive_top

momenta = st.one_of(st.just(0.0), st.floats(0.01, 0.995))
nesterovs = st.booleans()


def passive_by_construction(**options):
    """Return an optimizer of two weights, one active, one passive for good since it has no gradient."""
    param = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    optimizer = GSM([param], compression=2, weight_decay=0.0, **options)
    param.grad = torch.tensor([[1e-9, 0.0]], dtype=torch.float64)
    return optimizer, param


# --- the recurrence ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=60), st.floats(1e-6, 0.1), st.floats(0.01, 0.99), nesterovs)
def test_recurrence_is_what_the_optimizer_does(lrs, decay, momentum, nesterov):
    optimizer, param = passive_by_construction(lr=0.1, momentum=momentum, nesterov=nesterov, passive_decay=decay)
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert abs(param[0, 1].item()) == pytest.approx(shrinkage(decay, lrs, momentum, nesterov), rel=1e-9, abs=1e-12)


@given(momenta, nesterovs, st.floats(0.001, 0.999), st.floats(1e-4, 1.0))
def test_decay_for_a_rate_has_that_eigenvalue(momentum, nesterov, place, lr):
    assume(momentum > 0 or not nesterov)
    rate = fastest_rate(momentum, nesterov) + place * (1 - fastest_rate(momentum, nesterov))
    decay = decay_for_rate(rate, lr, momentum, nesterov)
    # an eigenvector: weight 1 and momentum (1 - rate) / lr, or for Nesterov what the first row says of it
    pull = decay
    if momentum == 0:
        start = PassiveWeight(1.0, 0.0)
    elif nesterov:
        start = PassiveWeight(1.0, ((1 - rate) / lr - pull * (1 + momentum)) / momentum**2)
    else:
        start = PassiveWeight(1.0, ((1 - rate) / lr - pull) / momentum)
    after = start.step(lr, decay, momentum, nesterov)
    assert after.weight == pytest.approx(rate, rel=1e-9)
    if momentum > 0:
        assert after.momentum == pytest.approx(rate * start.momentum, rel=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_above_the_critical_decay_a_weight_oscillates_and_shrinks_no_faster(momentum, nesterov):
    lr, steps = 0.1, round(40 / (1 - momentum))
    critical = decay_for_rate(0.0, lr, momentum, nesterov)

    def path(decay):
        passive, weights = PassiveWeight(), []
        for _ in range(steps):
            passive = passive.step(lr, decay, momentum, nesterov)
            weights.append(passive.weight)
        return weights

    assert all(weight > 0 for weight in path(critical))
    over = path(3 * critical)
    assert min(over) < 0 < max(over)
    if not nesterov:  # |lambda| is sqrt(beta) for any decay above; Nesterov's even comes down further
        slowest = max(abs(weight) for weight in over[-round(4 / (1 - momentum)) :])
        assert slowest > 1e-3 * fastest_rate(momentum) ** steps


def test_overdamped_limit_is_the_papers_formula():
    assert shrinkage(1e-5, [0.01] * 20_000, 0.9) == pytest.approx(math.exp(-1e-5 * 0.01 * 20_000 / 0.1), rel=1e-3)


def test_published_schedule_of_resnet56_shrinks_to_what_the_paper_says():
    """3.4e-4 with momentum .98, 0.20 with .90: 600 epochs of 782 steps, the rate cut tenfold after 400 and 500."""
    lrs = [lr for lr, epochs in ((5e-3, 400), (5e-4, 100), (5e-5, 100)) for _ in range(782 * epochs)]
    assert shrinkage(1e-4, lrs, 0.98) == pytest.approx(3.4e-4, rel=0.06)
    assert shrinkage(1e-4, lrs, 0.90) == pytest.approx(0.20, rel=0.02)


# --- the decay for a budget ---


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1e-4, 0.5), min_size=20, max_size=300),
    st.floats(0, 0.9),
    nesterovs,
    st.floats(1e-4, 0.9),
)
def test_decay_for_shrinkage_reaches_it(lrs, momentum, nesterov, factor):
    lrs = [*lrs, *([max(lrs)] * 400)]  # enough of the highest rate to get there
    decay = decay_for_shrinkage(factor, lrs, momentum, nesterov)
    assert shrinkage(decay, lrs, momentum, nesterov) == pytest.approx(factor, rel=1e-3)


def test_too_few_steps_say_what_can_be_reached():
    with pytest.raises(
        ValueError, match=r"10 steps shrink a passive weight by 1 at best without oscillating, not by 0\.001"
    ):
        decay_for_shrinkage(1e-3, [0.1] * 10, 0.99)
    with pytest.raises(ValueError, match="0 steps shrink a passive weight by 1 at best"):
        decay_for_shrinkage(1e-3, [], 0.9)
    for factor in (0, 1, -1, math.nan):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            decay_for_shrinkage(factor, [0.1], 0.9)


# --- passive_decay="auto" ---

SCHEDULES = {
    "constant": lambda f: 1.0,
    "step": lambda f: 1.0 if f < 0.7 else 0.3,
    "warm-up": lambda f: min(1.0, f / 0.1),
    "cosine": lambda f: 0.55 + 0.45 * math.cos(math.pi * f),
    "cycles": lambda f: 0.6 + 0.4 * math.cos(8 * math.pi * f),
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.98])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_auto_shrinks_as_far_as_it_is_to_whatever_the_scheduler(schedule, momentum, nesterov):
    total = 2_000
    optimizer, param = passive_by_construction(
        lr=0.1, momentum=momentum, nesterov=nesterov, passive_decay="auto", total_steps=total, shrink_to=1e-2
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: SCHEDULES[schedule](step / total))
    for _ in range(total):
        optimizer.step()
        scheduler.step()
    assert param[0, 1].item() == pytest.approx(1e-2, rel=0.15)
    assert optimizer.passive_shrinkage == pytest.approx(param[0, 1].item(), rel=1e-6)


def test_auto_survives_a_learning_rate_that_jumps():
    """Down by a thousand, where the decay would have to be huge, and up again with the momentum that it left."""
    optimizer, param = passive_by_construction(lr=0.1, momentum=0.95, passive_decay="auto", total_steps=1_000)
    for step in range(1_000):
        optimizer.param_groups[0]["lr"] = 0.1 if step % 200 < 100 else 1e-4
        before = abs(param[0, 1].item())
        optimizer.step()
        assert abs(param[0, 1].item()) <= before + 0.01
    assert abs(param[0, 1].item()) < 0.05


def test_auto_survives_a_warm_up_from_next_to_nothing():
    """A tiny learning rate asks for a huge decay, whose momentum would throw the weight far away a little later."""
    optimizer, param = passive_by_construction(lr=0.1, momentum=0.95, passive_decay="auto", total_steps=2_000)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6, total_iters=100)
    for _ in range(2_000):
        optimizer.step()
        scheduler.step()
        assert abs(param[0, 1].item()) <= 1
    assert abs(param[0, 1].item()) < 2e-6


def test_a_function_needs_no_ramp():
    param = nn.Parameter(torch.ones(10, 10))
    GSM([param], 0.1, compression=10, compression_schedule=lambda step: 1 + step, total_steps=1_000, cut_step=300)


def test_auto_is_never_below_weight_decay():
    param = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    optimizer = GSM(
        [param], 0.1, compression=2, weight_decay=0.3, passive_decay="auto", total_steps=10_000, shrink_to=0.9
    )
    plain = nn.Parameter(param.detach().clone())
    twin = GSM([plain], 0.1, compression=2, weight_decay=0.3)
    for _ in range(20):
        for one, opt in ((param, optimizer), (plain, twin)):
            one.grad = torch.tensor([[1e-9, 0.0]], dtype=torch.float64)
            opt.step()
    assert torch.equal(param, plain)


# --- the schedule ---


def test_cubic_compression_begins_at_1_and_ends_at_c():
    ratios = [cubic_compression(60, step, 100) for step in range(120)]
    assert ratios[0] == 1
    assert ratios[100:] == [60] * 20
    assert ratios == sorted(ratios)
    assert 1 - 1 / ratios[50] == pytest.approx((1 - 1 / 60) * (1 - 0.5**3))
    assert cubic_compression(60, 0, 0) == 60


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("schedule", ["cubic", lambda step: 1 + step])
def test_exactly_q_of_the_step_are_active(schedule, fused):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.rand(shape, generator=generator) + 0.5) for shape in ((7, 5), (4, 3, 2), (3, 3))]
    optimizer = GSM(
        params, 0.1, compression=12, momentum=0.0, weight_decay=0.0, passive_decay=1e-30,
        compression_schedule=schedule, ramp_steps=10 if schedule == "cubic" else None, fused=fused,
    )  # fmt: skip
    for step in range(14):
        for param in params:
            param.grad = torch.rand(param.shape, generator=generator) + 0.5
        ratio = cubic_compression(12, step, 10) if schedule == "cubic" else 1 + step
        assert optimizer.compression == ratio
        expected = naive_top([(p * p.grad).abs().detach() for p in params], math.floor(68 / ratio))
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for param, old, active in zip(params, before, expected, strict=True):
            assert torch.equal(param.detach() != old, active)


def test_cut_step_cuts_once_and_training_goes_on():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([("w", param)], 0.1, compression=10, cut_step=3, passive_decay=0.1)
    for step in range(6):
        assert optimizer.finalized == (step > 3)
        param.grad = torch.randn(10, 10)
        before = param.detach().clone()
        optimizer.step()
        assert int(param.count_nonzero()) == (100 if step < 3 else 10)
        assert not torch.equal(param, before)
    assert optimizer.compression == 10


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("cut_step", [None, 60])
def test_in_the_fade_the_same_weights_are_active_and_the_others_only_decay(cut_step, fused):
    """A gradient a hundred times as large on what is passive brings nothing back, and the cut then costs nothing."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 12))
    settings = {"total_steps": 60 if cut_step is None else 80, "cut_step": cut_step, "fade_steps": 50}
    optimizer = GSM([("w", param)], 0.1, compression=10, passive_decay="auto", momentum=0.5, fused=fused, **settings)
    for _ in range(10):
        assert not optimizer.masks
        param.grad = torch.randn(10, 12)
        optimizer.step()
    kept = naive_top([param.detach().abs()], 12)[0]
    start = param.detach().clone()
    for step in range(50):
        param.grad = torch.where(kept, 0.01, 1.0) * torch.randn(10, 12)
        optimizer.step()
        assert torch.equal(optimizer.masks["w"], kept)
        assert not optimizer.finalized
        if step == 0:
            assert torch.equal(param.detach() != start, torch.ones_like(kept))
    passive = param.detach()[~kept].abs()
    assert 0 < passive.max() < 1e-5
    assert optimizer.passive_shrinkage < 2e-6
    assert param.detach()[kept].abs().min() > 1e-3
    masks = optimizer.finalize() if cut_step is None else None
    param.grad = torch.randn(10, 12)
    optimizer.step()
    assert optimizer.finalized
    assert masks is None or torch.equal(masks["w"], kept)
    assert torch.equal(param.detach() != 0, kept)


@pytest.mark.parametrize("fused", [None, True])
def test_in_the_fade_kept_weights_without_a_gradient_stay(fused):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(10, 12)) for _ in range(2)]
    budget = {"passive_decay": "auto", "momentum": 0.5, "total_steps": 60, "fade_steps": 50}
    optimizer = GSM(params, 0.1, compression=4, fused=fused, **budget)
    for step in range(60):
        for param in params:
            param.grad = torch.randn(10, 12) * 0.01
        if step >= 10:
            params[1].grad = None
        optimizer.step()
    kept = optimizer.masks[1]
    assert params[1].detach()[kept].abs().min() > 0.1
    assert 0 < params[1].detach()[~kept].abs().max() < 1e-4


def test_a_short_fade_warns_for_itself():
    settings = {"compression": 10, "passive_decay": "auto", "momentum": 0.9, "total_steps": 1_000}
    with pytest.warns(UserWarning, match="fade_steps are too few"):
        GSM([nn.Parameter(torch.ones(10, 10))], 0.1, fade_steps=50, **settings)
    GSM([nn.Parameter(torch.ones(10, 10))], 0.1, fade_steps=100, **settings)


def test_a_step_that_is_refused_does_not_begin_the_fade():
    param = nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([param], 0.1, compression=10, total_steps=5, fade_steps=4)
    for grad in (torch.ones(10, 10), torch.full((10, 10), math.nan)):
        param.grad = grad
        with pytest.raises(NonFiniteGradientError) if grad.isnan().any() else contextlib.nullcontext():
            optimizer.step()
    assert not optimizer.masks


def test_a_step_that_is_refused_does_not_cut():
    param = nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([param], 0.1, compression=10, cut_step=0)
    param.grad = torch.full((10, 10), math.nan)
    before = param.detach().clone()
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.finalized


@pytest.mark.parametrize("stop", [3, 9, 13, 17])
def test_a_loaded_state_goes_on_with_the_schedule(stop):
    """In the ramp, after it, in the fade, and after the cut; through a file that only tensors and numbers can be in."""

    def make(seed):
        torch.manual_seed(seed)
        params = [nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(10))]
        settings = {
            "compression_schedule": "cubic",
            "ramp_steps": 8,
            "cut_step": 15,
            "total_steps": 20,
            "fade_steps": 4,
        }
        return params, GSM(params, 0.1, compression=10, passive_decay="auto", shrink_to=0.9, **settings)

    def step(params, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()

    straight, optimizer = make(0)
    for number in range(stop):
        step(straight, optimizer, number)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, other = make(1)
    for param, source in zip(resumed, straight, strict=True):
        param.data = source.detach().clone()
    other.load_state_dict(torch.load(file, weights_only=True))
    for number in range(stop, 20):
        step(straight, optimizer, number)
        step(resumed, other, number)
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    assert int(resumed[0].count_nonzero()) == 12


def test_copies_keep_a_schedule_that_is_a_function():
    param = nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([param], 0.1, compression=10, compression_schedule=lambda step: 2 + step)
    assert copy.deepcopy(optimizer).compression == 2
    plain = GSM([param], 0.1, compression=10)
    with pytest.warns(UserWarning, match=r"brings compression_schedule='custom' \(not 'constant'\)"):
        plain.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="is a function: give it to GSM as well"):
        _ = plain.compression


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passive_decay": "auto"}, "needs total_steps"),
        ({"passive_decay": "automatic"}, "passive_decay must be a number, 'auto' or None, not 'automatic'"),
        ({"passive_decay": "auto", "total_steps": 0}, "leaves nothing"),
        ({"passive_decay": "auto", "total_steps": 100, "shrink_to": 0}, "shrink_to must be above 0"),
        ({"compression_schedule": "square"}, "unknown compression_schedule 'square': choose constant or cubic"),
        ({"compression_schedule": "cubic"}, "needs ramp_steps or total_steps"),
        ({"compression_schedule": "cubic", "ramp_steps": 50, "cut_step": 50}, "must be below cut_step and total_steps"),
        ({"cut_step": 2.5}, "cut_step must be a whole number"),
        ({"cut_step": 50, "total_steps": 50}, "cut_step must be below total_steps, not 50 of 50"),
        ({"fade_steps": 5}, "fade_steps needs cut_step or total_steps"),
        ({"fade_steps": 50, "cut_step": 50}, "50 steps of fading aside: 0 leaves nothing of 0"),
        ({"fade_steps": -1, "cut_step": 50}, "fade_steps must be a whole number"),
        ({"ramp_steps": 50}, "ramp_steps is for compression_schedule='cubic' only"),
        ({"total_steps": -1}, "total_steps must be a whole number"),
    ],
)
def test_bad_budgets_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GSM([nn.Parameter(torch.ones(10, 10))], 0.1, compression=10, **options)


def test_a_function_that_returns_no_ratio_is_refused_by_the_step():
    param = nn.Parameter(torch.ones(10, 10))
    optimizer = GSM([param], 0.1, compression=10, compression_schedule=lambda step: 0.5)
    param.grad = torch.ones(10, 10)
    with pytest.raises(ValueError, match=r"at least 1, not 0\.5"):
        optimizer.step()


def test_too_few_steps_for_the_momentum_warn():
    with pytest.warns(UserWarning, match="too few steps for passive weights to shrink"):
        GSM(
            [nn.Parameter(torch.ones(10, 10))],
            0.1,
            compression=10,
            momentum=0.99,
            passive_decay="auto",
            total_steps=100,
        )
