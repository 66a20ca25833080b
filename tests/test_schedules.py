"""Schedules by themselves, and what the optimizer does by them: ramp, search, fade, cut."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, Phase, Schedule
from nets import dense_net, kept_of, train
from reference_gsm import naive_top

# --- by themselves ---


def test_the_defaults():
    schedule = Schedule(100)
    assert (schedule.ramp_steps, schedule.fade_start, schedule.cut_step) == (30, 60, 70)
    phases = [schedule.phase(step) for step in range(110)]
    assert phases == [Phase.RAMP] * 30 + [Phase.SEARCH] * 30 + [Phase.FADE] * 10 + [Phase.DONE] * 40


@pytest.mark.parametrize(
    ("curve", "half"), [("cubic", 1 - 0.5**3), ("linear", 0.5), (lambda share: share**2, 0.25)], ids=str
)
def test_the_curve_of_a_ramp(curve, half):
    """Cubic: Zhu and Gupta, 2017."""
    schedule = Schedule(200, ramp=0.5, curve=curve)
    densities = [schedule.density(step, 1 / 60) for step in range(200)]
    assert densities[0] == 1
    assert densities[50] == pytest.approx(1 - half * (1 - 1 / 60))
    assert densities[100:] == [1 / 60] * 100
    assert densities == sorted(densities, reverse=True)


@st.composite
def schedules(draw):
    ramp, fade, cut, total = sorted(draw(st.lists(st.integers(0, 10_000), min_size=4, max_size=4)))
    assume(ramp < fade)
    curve = draw(st.sampled_from(["cubic", "linear"]))
    return Schedule(total, ramp / total, (cut - fade) / total, cut / total, curve)


@given(schedules(), st.floats(1e-6, 1))
def test_phases_follow_each_other_and_densities_fall(schedule, final):
    edges = (schedule.ramp_steps, schedule.fade_start, schedule.cut_step)
    steps = sorted({max(0, edge + by) for edge in (0, *edges) for by in (-1, 0, 1)})
    phases = [schedule.phase(step) for step in steps]
    assert phases == sorted(phases, key=list(Phase).index)
    assert phases[0] is (Phase.RAMP if schedule.ramp_steps else Phase.SEARCH)
    assert (Phase.SEARCH in phases, phases[-1]) == (True, Phase.DONE)
    densities = [schedule.density(step, final) for step in steps]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == final
    assert densities[0] <= 1
    assert Schedule.from_dict(schedule.as_dict()) == schedule


def test_numbers_of_numpy_become_pythons():
    schedule = Schedule(np.int64(100), np.float32(0.25), peak_lr=np.float64(0.1))
    assert [type(value) for value in schedule.as_dict().values()] == [int, float, float, float, str, float, float]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1, not 0"),
        ({"total_steps": "40"}, "total_steps must be a whole number, not '40'"),
        ({"total_steps": 40.0}, r"total_steps must be a whole number, not 40\.0"),
        ({"total_steps": True}, "total_steps must be a whole number, not True"),
        ({"ramp": -0.1}, r"ramp is a share of total_steps, from 0 to 1, not -0\.1"),
        ({"fade": 1.5}, "fade is a share of total_steps"),
        ({"cut": 700}, "cut is a share of total_steps"),
        ({"cut": math.nan}, "cut is a share of total_steps"),
        ({"cut": "0.7"}, r"cut must be a number, not '0\.7'"),
        ({"cut": None}, "cut must be a number, not None"),
        ({"ramp": 0.6}, r"ramp 0\.6, fade 0\.1 and cut 0\.7 of 100 steps leave none"),
        ({"total_steps": 2}, "of 2 steps leave none"),
        ({"curve": "square"}, "unknown curve 'square': choose cubic, linear, or pass a function"),
        ({"peak_lr": math.inf}, "peak_lr must be finite and at least 0"),
        ({"shrink_to": 0}, r"shrink_to must be above 0 and below 1, not 0\.0"),
        ({"shrink_to": math.nan}, "shrink_to must be above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"total_steps": 100, **arguments})


# --- what the optimizer does by them ---


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "schedule",
    [Schedule(20, ramp=0.5), Schedule(20, ramp=0.5, curve="linear"), lambda step: 1 / (1 + step), lambda step: 0.01],
    ids=["cubic", "linear", "function", "too low"],
)
def test_exactly_q_of_the_step_are_active(schedule, compiled):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.rand(shape, generator=generator) + 0.5) for shape in ((7, 5), (4, 3, 2), (3, 3))]
    hyper = {"momentum": 0.0, "weight_decay": 0.0, "passive_decay": 1e-30, "compiled": compiled}
    optimizer = GSM(params, 0.1, num_kept=5, schedule=schedule, **hyper)
    for step in range(12):
        density = schedule.density(step, 5 / 68) if isinstance(schedule, Schedule) else schedule(step)
        active = max(5, math.floor(68 * density + 1e-9))
        assert optimizer.num_active == active
        assert optimizer.phase is (Phase.RAMP if active > 5 else Phase.SEARCH)
        for param in params:
            param.grad = torch.rand(param.shape, generator=generator) + 0.5
        expected = naive_top([(p * p.grad).abs().detach() for p in params], active)
        before = [p.detach().clone() for p in params]
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        for param, old, moved in zip(params, before, expected, strict=True):
            assert torch.equal(param.detach() != old, moved)


def test_it_cuts_once_and_training_goes_on():
    model = dense_net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=10, schedule=Schedule(10, ramp=0, fade=0, cut=0.3))
    for step in range(6):
        assert (optimizer.phase is Phase.DONE) == (step > 3)
        before = model[0].weight.detach().clone()
        train(model, optimizer, [step])
        assert kept_of(model) == (352 if step < 3 else 35)
        assert not torch.equal(model[0].weight, before)
    assert optimizer.num_active == optimizer.num_kept == 35


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("schedule", [Schedule(60, 0, 5 / 6, 1), Schedule(80, 0, 5 / 8, 0.75)], ids=["by hand", "cut"])
def test_in_the_fade_the_same_weights_are_active_and_the_others_only_decay(schedule, compiled):
    """A gradient a hundred times as large on what is passive brings nothing back, and the cut then costs nothing."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(10, 12))
    optimizer = GSM([("w", param)], 0.1, compression=10, momentum=0.5, compiled=compiled, schedule=schedule)

    def step(grad):
        param.grad = grad
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()

    for _ in range(10):
        assert not optimizer.masks
        step(torch.randn(10, 12))
    kept = naive_top([param.detach().abs()], 12)[0]
    start = param.detach().clone()
    for number in range(50):
        step(torch.where(kept, 0.01, 1.0) * torch.randn(10, 12))
        assert torch.equal(optimizer.masks["w"], kept)
        assert optimizer.phase is Phase.FADE
        assert number or (param.detach() != start).all()
    assert 0 < param.detach()[~kept].abs().max() < 1e-5
    assert optimizer.passive_shrinkage < 2e-6
    assert param.detach()[kept].abs().min() > 1e-3
    if schedule.cut == 1:
        assert torch.equal(optimizer.finalize()["w"], kept)
    step(torch.randn(10, 12))
    assert optimizer.phase is Phase.DONE
    assert torch.equal(param.detach() != 0, kept)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_in_the_fade_kept_weights_without_a_gradient_stay(compiled):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(10, 12)) for _ in range(2)]
    optimizer = GSM(params, 0.1, compression=4, momentum=0.5, compiled=compiled, schedule=Schedule(60, 0, 5 / 6, 1))
    for step in range(60):
        for param in params:
            param.grad = torch.randn(10, 12) * 0.01
        if step >= 10:
            params[1].grad = None
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
    kept = optimizer.masks["1"]
    assert params[1].detach()[kept].abs().min() > 0.1
    assert 0 < params[1].detach()[~kept].abs().max() < 1e-4


def test_a_function_that_returns_no_density_is_refused_by_the_step():
    model = dense_net()
    optimizer = GSM(model.parameters(), 0.1, compression=10, schedule=lambda step: 1 - step / 2)
    with pytest.raises(ValueError, match=r"must return a density above 0 and at most 1, not 0\.0"):
        train(model, optimizer, range(3))


def test_another_schedule_can_be_assigned():
    """To train longer; one that does not go with the settings is refused."""
    model = dense_net()
    optimizer = GSM(model.parameters(), 0.1, compression=10, schedule=Schedule(10))
    train(model, optimizer, range(5))
    optimizer.schedule = Schedule(20)
    train(model, optimizer, range(9))
    assert optimizer.phase is not Phase.DONE
    train(model, optimizer, range(2))
    assert kept_of(model) == 35
    with pytest.raises(ValueError, match="passive_decay='auto' needs schedule"):
        optimizer.schedule = None
    assert optimizer.schedule == Schedule(20)
