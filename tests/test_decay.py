"""The theory of passive weights against simulation, and the decay that the optimizer chooses."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from gsm_sgd import GSM, Schedule
from gsm_sgd.decay import PassiveWeight, decay_for_rate, fastest_rate, shrinkage

momenta = st.one_of(st.just(0.0), st.floats(0.01, 0.995))
nesterovs = st.booleans()


def search(steps, **options):
    """Return a schedule that only searches."""
    return Schedule(steps, **{"ramp": 0, "fade": 0, "cut": 1, **options})


def passive_by_construction(**options):
    """Return an optimizer of two weights, one active, one passive for good since it has no gradient."""
    param = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    optimizer = GSM([param], **{"lr": 0.1, "compression": 2, "weight_decay": 0.0, **options})
    param.grad = torch.tensor([[1e-9, 0.0]], dtype=torch.float64)
    return optimizer, param


def path(optimizer, param, lrs):
    """Return what is left of the passive weight after each step."""
    left = []
    for lr in lrs:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        left.append(param[0, 1].item())
    return left


# --- the recurrence ---


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 0.5), min_size=1, max_size=40), st.floats(1e-6, 0.1), st.floats(0.01, 0.99), nesterovs)
def test_recurrence_is_what_the_optimizer_does(lrs, decay, momentum, nesterov):
    left = path(*passive_by_construction(momentum=momentum, nesterov=nesterov, passive_decay=decay), lrs)
    assert abs(left[-1]) == pytest.approx(shrinkage(decay, lrs, momentum, nesterov), rel=1e-9, abs=1e-12)


@given(momenta, nesterovs, st.floats(0.001, 0.999), st.floats(1e-4, 1.0))
def test_decay_for_a_rate_has_that_eigenvalue(momentum, nesterov, place, lr):
    assume(momentum > 0 or not nesterov)
    rate = fastest_rate(momentum, nesterov) + place * (1 - fastest_rate(momentum, nesterov))
    decay = decay_for_rate(rate, lr, momentum, nesterov)
    # an eigenvector: weight 1 and momentum (1 - rate) / lr, or for Nesterov what the first row says of it
    if momentum == 0:
        start = PassiveWeight(1.0, 0.0)
    elif nesterov:
        start = PassiveWeight(1.0, ((1 - rate) / lr - decay * (1 + momentum)) / momentum**2)
    else:
        start = PassiveWeight(1.0, ((1 - rate) / lr - decay) / momentum)
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

RATES = {
    "constant": lambda f: 1.0,
    "step": lambda f: 1.0 if f < 0.7 else 0.3,
    "warm-up": lambda f: min(1.0, f / 0.1),
    "cosine": lambda f: 0.55 + 0.45 * math.cos(math.pi * f),
    "cycles": lambda f: 0.6 + 0.4 * math.cos(8 * math.pi * f),
}


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.9, 0.95])
@pytest.mark.parametrize("rates", RATES)
def test_auto_shrinks_as_far_as_it_is_to_whatever_the_rates(rates, momentum, nesterov):
    """So far by the time that the fade begins, and once more by its end."""
    half = round(18 / (1 - momentum))
    schedule = search(2 * half, fade=0.5, shrink_to=0.1)
    optimizer, param = passive_by_construction(momentum=momentum, nesterov=nesterov, schedule=schedule)
    lrs = [0.1 * RATES[rates](step / (2 * half)) for step in range(2 * half)]
    left = path(optimizer, param, lrs[:half])[-1]
    assert left == pytest.approx(0.1, rel=0.15)
    assert optimizer.passive_shrinkage == pytest.approx(left, rel=1e-6)
    faded = path(optimizer, param, lrs[half:])[-1] / left
    assert optimizer.passive_shrinkage == pytest.approx(0.1, rel=0.25)
    assert 0.7 * optimizer.passive_shrinkage < faded <= optimizer.passive_shrinkage  # it had momentum already


def test_auto_survives_a_learning_rate_that_jumps():
    """Down by a thousand, where the decay would have to be huge, and up again with the momentum that it left."""
    made = passive_by_construction(momentum=0.95, schedule=search(1_000))
    left = [1.0, *path(*made, [0.1 if step % 200 < 100 else 1e-4 for step in range(1_000)])]
    assert all(abs(after) <= abs(before) + 0.01 for before, after in itertools.pairwise(left))
    assert abs(left[-1]) < 0.05


def test_auto_survives_a_warm_up_from_next_to_nothing():
    """A tiny learning rate asks for a huge decay, whose momentum would throw the weight far away a little later."""
    made = passive_by_construction(momentum=0.95, schedule=search(1_000))
    left = path(*made, [0.1 * min(1, 1e-6 + step / 50) for step in range(1_000)])
    assert all(abs(weight) <= 1 for weight in left)
    assert abs(left[-1]) < 2e-6


def test_auto_survives_a_rate_that_rises_later_if_it_is_told_how_far():
    lrs = [1e-6] * 200 + [0.1] * 200
    for peak_lr, survives in ((0.1, True), (None, False)):
        made = passive_by_construction(lr=1e-6, momentum=0.95, schedule=search(400, peak_lr=peak_lr))
        assert (max(map(abs, path(*made, lrs))) <= 1) is survives


def test_auto_does_not_depend_on_the_unit_that_a_scheduler_multiplies():
    for first, factor in ((0.01, 1.0), (1.0, 0.01)):
        optimizer, param = passive_by_construction(lr=first, momentum=0.9, schedule=search(400))
        scheduler = LambdaLR(optimizer, lambda _, factor=factor: factor)
        for _ in range(400):
            optimizer.step()
            scheduler.step()
        assert param[0, 1].item() == pytest.approx(1e-6, rel=0.05)


def test_auto_is_never_below_weight_decay():
    nearly = search(1_000, shrink_to=0.9)
    auto, plain = (passive_by_construction(weight_decay=0.3, schedule=schedule) for schedule in (nearly, None))
    assert path(*auto, [0.1] * 20) == path(*plain, [0.1] * 20)
