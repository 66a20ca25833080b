"""How passive weights decay: the theory against simulation, and the decay that the optimizer chooses."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, CutWarning, Schedule
from gsm_sgd.decay import PassiveWeight, decay_for_rate, fastest_rate, shrinkage

momenta = st.one_of(st.just(0.0), st.floats(0.01, 0.995))
nesterovs = st.booleans()


def passive_by_construction(rows=1, **options):
    """Return an optimizer of rows of two weights, one active, one passive for good since it has no gradient."""
    param = nn.Parameter(torch.ones(rows, 2, dtype=torch.float64))
    optimizer = GSM([param], compression=2, weight_decay=0.0, **options)
    param.grad = torch.tensor([[1e-9, 0.0]] * rows, dtype=torch.float64)
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


# --- passive_decay="auto" ---

LR_SCHEDULES = {
    "constant": lambda f: 1.0,
    "step": lambda f: 1.0 if f < 0.7 else 0.3,
    "warm-up": lambda f: min(1.0, f / 0.1),
    "cosine": lambda f: 0.55 + 0.45 * math.cos(math.pi * f),
    "cycles": lambda f: 0.6 + 0.4 * math.cos(8 * math.pi * f),
}


def whole_search(total, **settings):
    """A schedule without ramp, fade and cut."""
    return Schedule(total, ramp=0, fade=0, cut=1, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.95, False)])
@pytest.mark.parametrize("lr_schedule", LR_SCHEDULES)
def test_auto_shrinks_as_far_as_it_is_to_whatever_the_scheduler(lr_schedule, momentum, nesterov):
    total = round(50 / (1 - momentum))
    schedule = whole_search(total, shrink_to=1e-2)
    optimizer, param = passive_by_construction(lr=0.1, momentum=momentum, nesterov=nesterov, schedule=schedule)
    assert optimizer.param_groups[0]["passive_decay"] == "auto"
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: LR_SCHEDULES[lr_schedule](step / total))
    for _ in range(total):
        optimizer.step()
        scheduler.step()
    assert param[0, 1].item() == pytest.approx(1e-2, rel=0.15)
    assert optimizer.passive_shrinkage == pytest.approx(param[0, 1].item(), rel=1e-6)


def test_auto_shrinks_from_the_ramps_end_and_in_the_fade_once_more():
    schedule = Schedule(1_000, ramp=0.2, fade=0.3, cut=1, curve="linear", shrink_to=1e-2)
    optimizer, param = passive_by_construction(rows=100, lr=0.1, momentum=0.9, schedule=schedule)
    left = []
    for _ in range(1_000):
        optimizer.step()
        left.append(param[0, 1].item())
    assert left[699] / left[199] == pytest.approx(1e-2, rel=0.15)
    assert left[999] / left[699] == pytest.approx(1e-2, rel=0.15)


def test_auto_survives_a_learning_rate_that_jumps():
    """Down by a thousand, where the decay would have to be huge, and up again with the momentum that it left."""
    optimizer, param = passive_by_construction(lr=0.1, momentum=0.95, schedule=whole_search(500))
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.1 if step % 100 < 50 else 1e-4
        before = abs(param[0, 1].item())
        optimizer.step()
        assert abs(param[0, 1].item()) <= before + 0.01
    assert abs(param[0, 1].item()) < 0.05


@pytest.mark.parametrize(("peak_lr", "rise"), [(None, 50), (0.1, 500)])
def test_auto_survives_a_warm_up_from_next_to_nothing(peak_lr, rise):
    """A tiny learning rate asks for a huge decay, whose momentum would throw the weight far away a little later."""
    optimizer, param = passive_by_construction(lr=0.1, momentum=0.95, schedule=whole_search(1_000, peak_lr=peak_lr))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-6, total_iters=rise)
    for _ in range(1_000):
        optimizer.step()
        scheduler.step()
        assert abs(param[0, 1].item()) <= 1
    assert abs(param[0, 1].item()) < 2e-6


@pytest.mark.parametrize(("first_lr", "factor"), [(0.01, 1.0), (1.0, 0.01)])
def test_auto_does_not_depend_on_the_unit_that_a_scheduler_multiplies(first_lr, factor):
    optimizer, param = passive_by_construction(lr=first_lr, momentum=0.9, schedule=whole_search(500))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: factor)
    for _ in range(500):
        optimizer.step()
        scheduler.step()
    assert param[0, 1].item() == pytest.approx(1e-6, rel=0.05)


def test_auto_is_never_below_weight_decay():
    param = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    settings = {"lr": 0.1, "compression": 2, "weight_decay": 0.3}
    optimizer = GSM([param], schedule=whole_search(10_000, shrink_to=0.9), **settings)
    plain = nn.Parameter(param.detach().clone())
    twin = GSM([plain], **settings)
    for _ in range(20):
        for one, opt in ((param, optimizer), (plain, twin)):
            one.grad = torch.tensor([[1e-9, 0.0]], dtype=torch.float64)
            opt.step()
    assert torch.equal(param, plain)


@pytest.mark.parametrize(
    ("momentum", "schedule", "message"),
    [
        (0.99, whole_search(100), "too few steps for passive weights to shrink"),
        (0.9, Schedule(1_000, fade=0.05), "the fade is too short for passive weights to shrink"),
        (0.9, Schedule(1_000), None),
        (0.9, whole_search(1_000), None),
    ],
)
def test_too_few_steps_for_the_momentum_warn(momentum, schedule, message):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        passive_by_construction(lr=0.1, momentum=momentum, schedule=schedule)
    assert [warning.category for warning in caught] == ([CutWarning] if message else [])
    assert all(message in str(warning.message) for warning in caught)
