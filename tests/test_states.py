"""States and copies go on to the same bits, match by name, bring their settings and say so; others are refused."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gsm_sgd import GSM, GSMAdamW, Phase, Schedule
from nets import assert_same_bits, backward, conv_net, dense_net, kept_of, saved_and_loaded, train

SCHEDULE = Schedule(20, ramp=0.4, fade=0.2, cut=0.75, shrink_to=0.9)
STATES = pytest.mark.parametrize(
    ("schedule", "steps", "phase"),
    [
        (None, 5, Phase.SEARCH),
        (None, 5, Phase.DONE),
        (SCHEDULE, 3, Phase.RAMP),
        (SCHEDULE, 9, Phase.SEARCH),
        (SCHEDULE, 13, Phase.FADE),
        (SCHEDULE, 17, Phase.DONE),
    ],
)
MOMENTUM = {GSM: {"momentum": 0.95}, GSMAdamW: {}}
both = pytest.mark.parametrize("kind", MOMENTUM)


def trained(make, schedule, steps, phase, kind=GSM, **settings):
    """Return a net and its optimizer after so many steps, which end in a phase."""
    model = make()
    optimizer = kind(model.named_parameters(), 0.1, compression=6, schedule=schedule, **MOMENTUM[kind], **settings)
    train(model, optimizer, range(steps))
    if schedule is None and phase is Phase.DONE:
        optimizer.finalize()
    assert optimizer.phase is phase
    return model, optimizer


def assert_go_on_alike(model, optimizer, other, its):
    for one, opt in ((model, optimizer), (other, its)):
        train(one, opt, range(17, 25))
        opt.finalize()
    assert_same_bits(model, other)
    assert kept_of(other) == its.num_kept == optimizer.num_kept


# --- the same bits ---


@pytest.mark.usefixtures("way")
@both
@STATES
def test_a_loaded_state_goes_on(schedule, steps, phase, kind):
    model, optimizer = trained(conv_net, schedule, steps, phase, kind)
    fresh = conv_net(seed=9)
    fresh.load_state_dict(model.state_dict())
    other = kind(fresh.named_parameters(), 1.0, compression=2)  # the state carries the settings
    with pytest.warns(UserWarning, match=r"brings compression=6 \(not compression=2\)"):
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.phase is phase
    assert {mask.dtype for mask in other.masks.values()} <= {torch.bool}
    assert_go_on_alike(model, optimizer, fresh, other)


@pytest.mark.usefixtures("way")
@both
@STATES
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on(copied, schedule, steps, phase, kind):
    pair = trained(conv_net, schedule, steps, phase, kind)
    twin, other = copied(pair)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    assert repr(other) == repr(pair[1])
    assert_go_on_alike(*pair, twin, other)


def test_momentum_0_leaves_no_state():
    model = conv_net()
    optimizer = GSM(model.parameters(), 0.1, compression=4, momentum=0.0)
    train(model, optimizer, [0])
    assert not optimizer.state


# --- names ---


def test_states_are_matched_by_name():
    """The same layers, made in another order: masks and momenta go to the weights of their names."""

    def layers(names):
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

    def step(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for name in names:
                param = model.get_parameter(name)
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.step()

    first, second = layers("ab"), layers("ba")
    names = [name for name, _ in first.named_parameters()]
    optimizer = GSM(first.named_parameters(), 0.1, compression=4)
    step(first, optimizer, range(5))
    optimizer.finalize()
    second.load_state_dict(first.state_dict())
    wrapped = [(f"module._orig_mod.{name}", param) for name, param in second.named_parameters()]
    other = GSM(wrapped, 0.1, compression=4)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == [name for name, _ in wrapped]
    step(first, optimizer, range(5))
    step(second, other, range(5))
    assert all(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in names)
    assert kept_of(second) == optimizer.num_kept == 128


def test_a_state_of_other_parameters_is_refused():
    one, two = nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.ModuleDict({"b": nn.Linear(4, 4)})
    optimizer = GSM(two.named_parameters(), 0.1, compression=2)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"only the optimizer has 'b\.bias' in group 0"):
        optimizer.load_state_dict(GSM(one.named_parameters(), 0.1, compression=2).state_dict())
    assert str(optimizer.state_dict()) == before


def test_a_state_of_other_shapes_is_refused():
    _, optimizer = trained(dense_net, None, 1, Phase.SEARCH)
    model = nn.Sequential(*(nn.Linear(6, 6) if isinstance(layer, nn.Linear) else layer for layer in dense_net()))
    other = GSM(model.named_parameters(), 0.1, compression=6)
    with pytest.raises(ValueError, match="the state that was loaded is of another model"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


# --- settings ---


def test_a_loaded_state_brings_its_schedule_and_says_so():
    model = conv_net()
    optimizer = GSM(model.parameters(), 0.1, compression=5, schedule=Schedule(1_000, cut=0.8))
    own = {"check_ranks": False, "foreach": True}
    other = GSM(model.parameters(), 0.2, compression=5, schedule=Schedule(2_000), **own)
    message = r"brings schedule=Schedule\(total_steps=1000, .*cut=0\.8.*\) \(not schedule=.*\): to train by another"
    with pytest.warns(UserWarning, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert other.schedule == Schedule(1_000, cut=0.8)
    group = other.param_groups[0]
    assert (group["lr"], group["foreach"]) == (0.1, True)
    other.schedule = Schedule(3_000)
    assert other.state_dict()["param_groups"][0]["schedule"]["total_steps"] == 3_000


def test_states_of_earlier_versions_are_refused():
    optimizer = GSM(conv_net().parameters(), 0.1, compression=5)
    state = optimizer.state_dict()
    state["param_groups"][0]["compression_schedule"] = "cubic"
    with pytest.raises(ValueError, match="saved by gsm-sgd before schedules had a class: train with that version"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": Schedule(np.int64(40), ramp=np.float32(0.25))},
        {"schedule": Schedule(torch.tensor(40))},
        {"lr": np.float64(0.1)},
        {"lr": np.float32(0.1)},
        {"compression": np.float32(4)},
        {"compression": torch.tensor(4.0)},
        {"momentum": torch.tensor(0.9)},
        {"weight_decay": np.float64(1e-3), "passive_decay": np.float32(1e-3)},
        {"momentum": np.float64(0.9), "nesterov": np.bool_(True)},
    ],
    ids=str,
)
def test_numpy_numbers_and_a_state_that_loads(settings):
    model = conv_net()
    optimizer = GSM(model.named_parameters(), **{"lr": 0.1, "compression": 4, "momentum": 0.5, **settings})
    for step in range(4):
        optimizer.param_groups[0]["lr"] = np.float64(0.1) / (1 + step)  # as a scheduler of one's own would
        train(model, optimizer, [step])
    group = saved_and_loaded(optimizer.state_dict())["param_groups"][0]
    assert (tuple(group["budget"]), group["lr"]) == (("compression", 4), 0.025)


# --- torch's distributed checkpoints, on one process ---

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@both
@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@STATES
def test_distributed_checkpoints_carry_masks(schedule, steps, phase, options, kind):
    model, optimizer = trained(conv_net, schedule, steps, phase, kind)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh, other = trained(conv_net, schedule, 0, Phase.RAMP if schedule else Phase.SEARCH, kind)
    fresh.load_state_dict(model.state_dict())
    for _ in range(2):  # into a fresh one, and once more into the same one
        set_optimizer_state_dict(fresh, other, copy.deepcopy(saved), options=options)
        assert other.phase is phase
        assert other.param_groups[0]["step"] == steps
    assert_go_on_alike(model, optimizer, fresh, other)


@both
def test_asking_a_fresh_optimizer_for_its_state_counts_no_step(kind):
    model, optimizer = trained(conv_net, SCHEDULE, 0, Phase.RAMP, kind)
    twin, other = copy.deepcopy((model, optimizer))
    get_optimizer_state_dict(model, optimizer)
    assert (optimizer.param_groups[0]["step"], optimizer.param_groups[0]["lr"]) == (0, 0.1)
    assert_go_on_alike(model, optimizer, twin, other)


def test_places_for_masks_to_load_are_no_masks():
    model = conv_net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=4)
    get_optimizer_state_dict(model, optimizer)
    model[0].weight.requires_grad_(False)
    train(model, optimizer, [0])
    assert list(optimizer.finalize()) == ["4.weight"]
    assert optimizer.num_kept == 16


def test_a_flat_state_without_its_masks_is_refused():
    model, optimizer = trained(conv_net, None, 1, Phase.DONE)
    saved = get_optimizer_state_dict(model, optimizer, options=FLAT)
    broken = {key: value for key, value in copy.deepcopy(saved).items() if not key.endswith(".mask")}
    fresh, other = trained(conv_net, None, 0, Phase.SEARCH)
    with pytest.raises((ValueError, KeyError), match=r"lacks the mask of a prunable parameter|0\.weight\.mask"):
        set_optimizer_state_dict(fresh, other, broken, options=FLAT)  # older torch notices it itself


# --- a model that changes after the optimizer was built ---


@both
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("phase", [Phase.SEARCH, Phase.DONE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_converted_model_goes_on(dtype, phase, options, kind):
    model, optimizer = trained(dense_net, None, 3, phase, kind, **options)
    model.to(dtype)
    train(model, optimizer, range(3, 6))
    buffers = ("exp_avg", "exp_avg_sq") if kind is GSMAdamW else ("momentum_buffer",)
    assert all(state[name].dtype == dtype for state in optimizer.state.values() for name in buffers)
    optimizer.finalize()
    assert kept_of(model) == optimizer.num_kept == 58


@pytest.mark.parametrize("shape", [(30, 16), (2, 16)], ids=["grown", "shrunk"])
@pytest.mark.parametrize("compression", [1, 4])
@pytest.mark.parametrize("finalized", [False, True])
def test_a_parameter_that_changed_its_shape_is_named(finalized, compression, shape):
    model = conv_net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=compression, momentum=0.0 if finalized else 0.9)
    train(model, optimizer, [0])
    if finalized:
        optimizer.finalize()
    model[4].weight.data = torch.ones(shape)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(model)
    what = "mask" if finalized else "momentum_buffer"
    with pytest.raises(ValueError, match=rf"'4.weight' has shape \({shape[0]}, 16\), its {what} \(4, 16\)"):
        optimizer.step()
    assert_same_bits(model, before)


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1])
def test_a_rate_gone_wrong_is_refused_before_anything_moves(lr):
    model = conv_net()
    params = list(model.named_parameters())
    optimizer = GSM([{"params": params[:2]}, {"params": params[2:]}], 0.1, compression=4)
    optimizer.param_groups[1]["lr"] = lr
    backward(model)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        optimizer.step()
    assert_same_bits(model, before)


def test_what_concerns_the_whole_model_is_in_the_first_group_alone():
    """So an interrupt between two groups cannot leave them apart."""
    params = list(conv_net().named_parameters())
    optimizer = GSM([{"params": params[:2]}, {"params": params[2:]}], 0.1, compression=4)
    model_wide = {"budget", "schedule", "step", "phase"}
    assert [model_wide & set(group) for group in optimizer.param_groups] == [model_wide, set()]


# --- states that cannot be ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "weird"}, "has a phase 'weird', which there is not"),
        ({"budget": ("x", 7)}, "has a budget of 'x', which there is not"),
        ({"budget": ("density", 7)}, "density must be above 0 and at most 1"),
        ({"step": -5}, "has a step of -5"),
        ({"step": "a"}, "step must be a whole number"),
        ({"betas": (0.9, 0.999)}, "the state is of an Adam optimizer"),
    ],
    ids=str,
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(changes, message):
    _, optimizer = trained(conv_net, None, 3, Phase.SEARCH)
    before = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(before)
    broken["param_groups"][0] |= changes
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
