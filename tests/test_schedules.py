"""The schedule: what it plans, and that an optimizer goes by it."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, CutWarning, Phase, Schedule
from reference_gsm import naive_top

shares = st.floats(0, 1)


def only_cut(total, cut):
    return Schedule(total, ramp=0, fade=0, cut=cut / total)


# --- what is planned ---


@pytest.mark.parametrize(
    ("curve", "middle"), [("cubic", 1 - 0.9 * (1 - 0.5**3)), ("linear", 0.55), (lambda share: share**2, 0.775)]
)
def test_the_density_falls_from_1_to_the_budgets(curve, middle):
    schedule = Schedule(200, ramp=0.5, curve=curve)
    densities = [schedule.density(step, 0.1) for step in range(120)]
    assert densities[0] == 1
    assert densities[50] == pytest.approx(middle)
    assert densities[99] > 0.1
    assert densities[100:] == [0.1] * 20
    assert densities == sorted(densities, reverse=True)


def test_without_a_ramp_the_density_is_the_budgets_at_once():
    assert Schedule(10, ramp=0).density(0, 0.1) == 0.1


@given(st.integers(1, 10_000), shares, shares, shares)
def test_phases_are_the_shares_to_the_step(total, ramp, fade, cut):
    fade *= cut
    ramp *= cut - fade  # of what is left before the fade
    steps = round(ramp * total), round(cut * total) - round(fade * total), round(cut * total)
    assume(steps[0] < steps[1])
    schedule = Schedule(total, ramp, fade, cut)
    assert (schedule.ramp_steps, schedule.fade_start, schedule.cut_step) == steps
    edges = {step: schedule.phase(step) for edge in (0, *steps, total) for step in (edge - 1, edge) if step >= 0}
    order = list(Phase)
    assert [*edges.values()] == [order[sum(step >= edge for edge in steps)] for step in edges]


@pytest.mark.parametrize(
    ("shares", "steps"),
    [
        ({}, [30, 30, 10, 30]),
        ({"ramp": 0, "fade": 0}, [0, 70, 0, 30]),
        ({"ramp": 0.299, "fade": 0.104, "cut": 0.695}, [30, 30, 10, 30]),
        ({"cut": 1}, [30, 60, 10, 0]),
    ],
)
def test_each_phase_lasts_its_share(shares, steps):
    phases = [Schedule(100, **shares).phase(step) for step in range(100)]
    assert [phases.count(phase) for phase in Phase] == steps
    assert phases == [phase for phase, count in zip(Phase, steps, strict=True) for _ in range(count)]


def test_a_schedule_is_plain_values_and_back():
    schedule = Schedule(np.int64(50), ramp=np.float32(0.25), curve="linear", peak_lr=torch.tensor(0.5))
    values = json.loads(json.dumps(schedule.as_dict()))
    assert values["ramp"] == 0.25
    assert Schedule.from_dict({**values, "later": 1}) == schedule
    custom = Schedule.from_dict(Schedule(50, curve=lambda share: share).as_dict())
    assert custom.density(15, 0.1) == 0.1
    with pytest.raises(ValueError, match="a curve that is a function: assign"):
        custom.density(14, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": "40"}, "total_steps must be a whole number, not '40'"),
        ({"total_steps": 40.0}, r"total_steps must be a whole number, not 40\.0"),
        ({"total_steps": True}, "total_steps must be a whole number, not True"),
        ({"total_steps": 0}, "total_steps must be at least 1, not 0"),
        ({"total_steps": -1}, "total_steps must be at least 1, not -1"),
        ({"ramp": "0.3"}, "ramp must be a number, not '0.3'"),
        ({"fade": None}, "fade must be a number, not None"),
        ({"ramp": 30}, r"ramp is a share of total_steps, from 0 to 1, not 30\.0"),
        ({"fade": -0.1}, r"fade is a share of total_steps, from 0 to 1, not -0\.1"),
        ({"cut": 1.1}, r"cut is a share of total_steps, from 0 to 1, not 1\.1"),
        ({"cut": math.nan}, "cut is a share of total_steps, from 0 to 1, not nan"),
        ({"ramp": 0.7}, r"ramp \+ fade must be less than cut.*ramp 0\.7, fade 0\.1 and cut 0\.7 of 100 steps"),
        ({"ramp": 0.6}, r"ramp \+ fade must be less than cut"),
        ({"total_steps": 2}, r"ramp \+ fade must be less than cut.*of 2 steps leave none"),
        ({"curve": "square"}, "unknown curve 'square': choose cubic, linear, or pass a function"),
        ({"peak_lr": "high"}, "peak_lr must be a number, not 'high'"),
        ({"peak_lr": math.inf}, "peak_lr must be finite and at least 0, not inf"),
        ({"peak_lr": -1}, "peak_lr must be finite and at least 0, not -1"),
        ({"shrink_to": 0}, r"shrink_to must be above 0 and below 1, not 0\.0"),
        ({"shrink_to": 1}, r"shrink_to must be above 0 and below 1, not 1\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"total_steps": 100, **arguments})


# --- what an optimizer does ---


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("by_function", [False, True])
def test_exactly_q_of_the_step_are_active(by_function):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.rand(shape, generator=generator) + 0.5) for shape in ((7, 5), (4, 3, 2), (3, 3))]
    settings = {"momentum": 0.0, "weight_decay": 0.0, "passive_decay": 1e-30}
    schedule = (lambda step: 1 / (1 + step)) if by_function else Schedule(20, ramp=0.5, cut=1)
    optimizer = GSM(params, 0.1, compression=12, schedule=schedule, **settings)
    for step in range(14):
        for param in params:
            param.grad = torch.rand(param.shape, generator=generator) + 0.5
        density = 1 / (1 + step) if by_function else 1 / 12 + 11 / 12 * (1 - min(1, step / 10)) ** 3
        count = max(5, math.floor(68 * density + 1e-9))
        assert optimizer.num_active == count
        assert optimizer.phase is (Phase.RAMP if count > 5 else Phase.SEARCH)
        expected = naive_top([(p * p.grad).abs().detach() for p in params], count)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for param, old, active in zip(params, before, expected, strict=True):
            assert torch.equal(param.detach() != old, active)


def test_the_cut_comes_once_and_training_goes_on():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 10))
    optimizer = GSM([("w", param)], 0.1, compression=10, schedule=only_cut(6, 3), passive_decay=0.1)
    for step in range(6):
        assert (optimizer.phase is Phase.DONE) == (step > 3)
        param.grad = torch.randn(10, 10)
        before = param.detach().clone()
        optimizer.step()
        assert int(param.count_nonzero()) == (100 if step < 3 else 10)
        assert not torch.equal(param, before)
    assert optimizer.num_active == 10


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cut", [False, True], ids=["cut by finalize", "cut by the schedule"])
def test_in_the_fade_the_same_weights_are_active_and_the_others_only_decay(cut):
    """A gradient a hundred times as large on what is passive brings nothing back, and the cut then costs nothing."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 12))
    total = 80 if cut else 60
    schedule = Schedule(total, ramp=0, fade=50 / total, cut=60 / total)
    optimizer = GSM([("w", param)], 0.1, compression=10, momentum=0.5, schedule=schedule)
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
        assert optimizer.phase is Phase.FADE
        if step == 0:
            assert torch.equal(param.detach() != start, torch.ones_like(kept))
    passive = param.detach()[~kept].abs()
    assert 0 < passive.max() < 1e-5
    assert optimizer.passive_shrinkage < 2e-6
    assert param.detach()[kept].abs().min() > 1e-3
    masks = None if cut else optimizer.finalize()
    param.grad = torch.randn(10, 12)
    optimizer.step()
    assert optimizer.phase is Phase.DONE
    assert masks is None or torch.equal(masks["w"], kept)
    assert torch.equal(param.detach() != 0, kept)


@pytest.mark.usefixtures("way")
def test_in_the_fade_kept_weights_without_a_gradient_stay():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(10, 12)) for _ in range(2)]
    schedule = Schedule(60, ramp=0, fade=50 / 60, cut=1)
    optimizer = GSM(params, 0.1, compression=4, momentum=0.5, schedule=schedule)
    for step in range(60):
        for param in params:
            param.grad = torch.randn(10, 12) * 0.01
        if step >= 10:
            params[1].grad = None
        optimizer.step()
    kept = optimizer.masks["1"]
    assert params[1].detach()[kept].abs().min() > 0.1
    assert 0 < params[1].detach()[~kept].abs().max() < 1e-4


def test_a_function_that_returns_no_density_is_refused_by_the_step():
    param = nn.Parameter(torch.ones(10, 10))
    optimizer = GSM([param], 0.1, compression=10, schedule=lambda step: 1 - step)
    param.grad = torch.ones(10, 10)
    with pytest.raises(ValueError, match=r"must return a density above 0 and at most 1, not 0\.0"):
        optimizer.step()


@pytest.mark.parametrize("schedule", [lambda step: 1 / (2 + step), Schedule(9, curve=lambda share: 0.5 + share / 2)])
def test_schedules_with_functions_are_copied_and_loaded_where_the_function_is(schedule):
    def make(schedule):
        return GSM([nn.Parameter(torch.ones(10, 10))], 0.1, compression=10, schedule=schedule)

    optimizer = make(schedule)
    same = make(schedule)
    same.load_state_dict(optimizer.state_dict())
    assert optimizer.num_active == copy.deepcopy(optimizer).num_active == same.num_active > 10


def test_schedules_with_functions_are_refused_where_the_function_is_not():
    param = nn.Parameter(torch.ones(10, 10))
    plain = GSM([param], 0.1, compression=10)
    with pytest.raises(ValueError, match="a schedule that is a function: give it to the optimizer as well"):
        plain.load_state_dict(GSM([param], 0.1, compression=10, schedule=lambda step: 0.5).state_dict())
    curved = GSM([param], 0.1, compression=10, schedule=Schedule(10, curve=lambda share: share))
    with pytest.warns(UserWarning, match=r"brings schedule=.*curve='custom'"):
        plain.load_state_dict(curved.state_dict())
    with pytest.raises(ValueError, match=r"assign optimizer\.schedule"):
        _ = plain.num_active
    plain.schedule = Schedule(10)
    assert plain.num_active == 100


def test_a_schedule_that_is_assigned_is_checked_and_followed():
    param = nn.Parameter(torch.ones(10, 10))
    optimizer = GSM([param], 0.1, compression=10, schedule=only_cut(10, 5))
    with pytest.raises(ValueError, match="passive_decay='auto' needs schedule"):
        optimizer.schedule = None
    optimizer.schedule = only_cut(10, 2)
    for _ in range(3):
        param.grad = torch.rand(10, 10)
        optimizer.step()
    assert optimizer.phase is Phase.DONE


def test_a_schedule_assigned_without_the_decay_it_needs_warns_as_the_constructor_does():
    optimizer = GSM([nn.Parameter(torch.randn(8, 8))], 0.01, sparsity=0.5)
    with pytest.warns(CutWarning, match="the cut will remove weights that still matter: at this decay"):
        optimizer.schedule = Schedule(1000)
