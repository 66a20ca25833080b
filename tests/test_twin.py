"""GSM beside torch.optim.SGD, wherever nothing is passive, and in the loops and states that optimizers meet."""

import copy
import io
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
from torch.nn import functional as F
from torch.optim import SGD, lr_scheduler

from gsm_sgd import GSM, Schedule

HYPER = {"momentum": 0.9, "weight_decay": 1e-2}
IMPLEMENTATIONS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]
SCHEDULERS = {
    "none": lambda _: None,
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "warm-up and cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    return model.to(dtype)


def in_groups(model):
    return [{"params": [*model[0].named_parameters("0")], "lr": 0.03}, {"params": [*model[1:].named_parameters("1")]}]


def backward(model, seed, missing=None):
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 4, 4, generator=generator).to(next(model.parameters()).dtype)
    F.cross_entropy(model(images).float(), torch.randint(4, (8,), generator=generator)).backward()
    if missing is not None:
        missing(model).grad = None


def take_steps(pairs, seeds, missing=None):
    """Train each model by its optimizer, on the same batches."""
    for seed in seeds:
        for model, optimizer in pairs:
            backward(model, seed, missing)
            optimizer.step()


def same_bits(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def num_nonzero(model):
    return sum(int(param.count_nonzero()) for param in model.parameters() if param.ndim > 1)


def twins(dtype=torch.float32, groups=False, layout=lambda model: model, **options):
    ours, theirs = layout(net(dtype)), layout(net(dtype))
    params = [in_groups(model) if groups else list(model.named_parameters()) for model in (ours, theirs)]
    return (ours, GSM(params[0], 0.1, compression=1, **HYPER, **options)), (
        theirs,
        SGD(params[1], 0.1, **HYPER, **options),
    )


def train(pairs, steps=12, make_scheduler=SCHEDULERS["none"], missing=None):
    schedulers = [make_scheduler(optimizer) for _, optimizer in pairs]
    for step in range(steps):
        for (model, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            take_steps([(model, optimizer)], [step], missing if step % 3 else None)
            if scheduler is not None:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    (ours, _), (theirs, _) = pairs
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_implementation_and_precision(dtype, options, groups):
    train(twins(dtype, groups, **options), missing=lambda model: model[4].weight)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler):
    train(twins(groups=True), make_scheduler=SCHEDULERS[scheduler])


@pytest.mark.parametrize(
    "layout",
    [lambda model: model.to(memory_format=torch.channels_last), lambda model: _with_gaps(model)],
    ids=["channels last", "gaps"],
)
def test_every_layout(layout):
    train(twins(layout=layout))


def _with_gaps(model):
    wide = torch.zeros(4, 32)
    wide[:, ::2] = model[4].weight.detach()
    model[4].weight = nn.Parameter(wide[:, ::2])
    return model


def test_a_rate_that_is_a_tensor():
    pairs = twins()
    for _, optimizer in pairs:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    train(pairs)


@pytest.mark.parametrize("pickled", [False, True], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("settings", [{"density": 1}, {"density": 0.2}, {"density": 0.2, "compiled": True}], ids=str)
def test_copies_go_on_in_the_same_way(quick_compile, pickled, settings):
    model = net()
    schedule = Schedule(9, ramp=0.2, fade=0, cut=0.7)
    optimizer = GSM(model.named_parameters(), 0.1, schedule=schedule, **settings, **HYPER)
    pair = (model, optimizer)
    take_steps([pair], range(4))
    twin, other = pickle.loads(pickle.dumps(pair)) if pickled else copy.deepcopy(pair)
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    take_steps([pair, (twin, other)], range(4, 9))
    assert same_bits(model, twin)
    assert num_nonzero(twin) == 172 * settings["density"] // 1
    assert repr(other) == repr(optimizer)
    assert other.param_groups[0].keys() == GSM(net().parameters(), 0.1, compression=2).param_groups[0].keys() | {
        "param_names"
    }


@pytest.mark.parametrize("to_gsm", [False, True], ids=["GSM to SGD", "SGD to GSM"])
def test_states_load_across_both_ways(to_gsm):
    (ours, gsm), (theirs, sgd) = twins()
    train([(ours, gsm), (theirs, sgd)], 4)
    fresh = net()
    fresh.load_state_dict((theirs if to_gsm else ours).state_dict())
    other = GSM(fresh.named_parameters(), 1.0, compression=1) if to_gsm else SGD(fresh.named_parameters(), 1.0)
    other.load_state_dict(copy.deepcopy((sgd if to_gsm else gsm).state_dict()))
    take_steps([(ours, gsm), (fresh, other)], range(4, 9))
    assert same_bits(ours, fresh)


def test_a_state_of_sgd_leaves_the_settings_that_only_gsm_has():
    model = net()
    sgd = SGD(in_groups(model), 0.1, momentum=0.9)
    groups = in_groups(model)
    groups[1]["prunable"] = False
    optimizer = GSM(groups, 0.1, compression=4, schedule=Schedule(50), passive_decay=0.1)
    optimizer.load_state_dict(sgd.state_dict())
    assert [(group["prunable"], group["passive_decay"]) for group in optimizer.param_groups] == [
        (None, 0.1),
        (False, 0.1),
    ]
    assert optimizer.schedule == Schedule(50)
    assert optimizer.num_kept == 27


@pytest.mark.parametrize("setting", [{"maximize": True}, {"dampening": 0.5}])
def test_what_only_sgd_does_is_refused(setting):
    model = net()
    message = f"{next(iter(setting))}={next(iter(setting.values()))} is not supported"
    with pytest.raises(ValueError, match=message):
        GSM([{"params": model.parameters(), **setting}], 0.1, compression=2)
    optimizer = GSM(model.parameters(), 0.1, compression=2)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(SGD(model.parameters(), 0.1, momentum=0.9, **setting).state_dict())


def test_a_step_compiled_by_the_user_is_not_recompiled():
    (ours, gsm), twin = twins()
    take_step = torch.compile(gsm.step, backend="eager")
    for step in range(6):
        take_steps([twin], [step])
        backward(ours, step)
        with torch.compiler.set_stance("fail_on_recompile" if step > 2 else "default"):
            take_step()
    assert same_bits(ours, twin[0])


def test_momentum_0_leaves_no_state():
    model = net()
    optimizer = GSM(model.parameters(), 0.1, compression=4, momentum=0.0)
    take_steps([(model, optimizer)], [0])
    assert not optimizer.state


# --- a model that changes after the optimizer was built ---


@pytest.mark.parametrize("options", IMPLEMENTATIONS[:3], ids=str)
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_converted_model_goes_on(dtype, finalized, options):
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = GSM(model.parameters(), 0.05, compression=4, **options)

    def step(count):
        for seed in range(count):
            model.zero_grad()
            images = torch.randn(32, 20, generator=torch.Generator().manual_seed(seed)).to(model[0].weight.dtype)
            F.cross_entropy(model(images).float(), torch.arange(32) % 4).backward()
            optimizer.step()

    step(3)
    if finalized:
        optimizer.finalize()
    model.to(dtype)
    step(3)
    assert all(state["momentum_buffer"].dtype == dtype for state in optimizer.state.values())
    optimizer.finalize()
    assert num_nonzero(model) == optimizer.num_kept == 96


@pytest.mark.parametrize("shape", [(30, 16), (10, 16)], ids=["grown", "shrunk"])
@pytest.mark.parametrize("compression", [1, 4])
def test_a_parameter_that_changed_its_shape_is_named(compression, shape):
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=compression)
    take_steps([(model, optimizer)], [0])
    model[4].weight.data = torch.ones(shape)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=rf"'4.weight' has shape \({shape[0]}, 16\), its momentum_buffer \(4, 16\)"):
        optimizer.step()
    assert same_bits(model, before)


def test_a_parameter_that_does_not_fit_its_mask_is_named():
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=4, momentum=0.0)
    optimizer.finalize()
    model[4].weight.data = torch.ones(5, 16)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"'4.weight' has shape \(5, 16\), its mask \(4, 16\)"):
        optimizer.step()


@pytest.mark.parametrize("lr", [math.nan, math.inf, -0.1])
def test_a_rate_gone_wrong_is_refused_before_anything_moves(lr):
    model = net()
    optimizer = GSM(in_groups(model), 0.1, compression=4)
    optimizer.param_groups[1]["lr"] = lr
    backward(model, 0)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="lr must be finite and at least 0"):
        optimizer.step()
    assert same_bits(model, before)


# --- states and settings ---


def test_states_are_matched_by_name():
    """The same layers, made in another order: masks and momenta go to the weights of their names."""

    def layers(names):
        torch.manual_seed(0)
        return nn.ModuleDict({name: nn.Linear(16, 16) for name in names})

    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        grads = {name: torch.randn(model.get_parameter(name).shape, generator=generator) for name in sorted(names)}
        for name, grad in grads.items():
            model.get_parameter(name).grad = grad
        optimizer.step()

    first, second = layers("ab"), layers("ba")
    names = [name for name, _ in first.named_parameters()]
    optimizer = GSM(first.named_parameters(), 0.1, compression=4)
    for seed in range(5):
        step(first, optimizer, seed)
    optimizer.finalize()
    second.load_state_dict(first.state_dict())
    wrapped = [(f"module._orig_mod.{name}", param) for name, param in second.named_parameters()]
    other = GSM(wrapped, 0.1, compression=4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == [name for name, _ in wrapped]
    for seed in range(5):
        step(first, optimizer, seed)
        step(second, other, seed)
    assert all(torch.equal(first.get_parameter(name), second.get_parameter(name)) for name in names)
    assert sum(int(layer.weight.count_nonzero()) for layer in second.values()) == optimizer.num_kept == 128


def test_a_state_of_other_parameters_is_refused():
    one, two = nn.ModuleDict({"a": nn.Linear(4, 4)}), nn.ModuleDict({"b": nn.Linear(4, 4)})
    optimizer = GSM(two.named_parameters(), 0.1, compression=2)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"only the optimizer has 'b\.bias' in group 0"):
        optimizer.load_state_dict(GSM(one.named_parameters(), 0.1, compression=2).state_dict())
    assert str(optimizer.state_dict()) == before


def test_a_loaded_state_brings_its_schedule_and_says_so():
    model = net()
    optimizer = GSM(model.parameters(), 0.1, compression=5, schedule=Schedule(1_000))
    other = GSM(model.parameters(), 0.2, compression=5, schedule=Schedule(2_000, cut=0.6), fused=True)
    message = r"brings schedule=\{'total_steps': 1000,.* \(not \{'total_steps': 2000,.*assign optimizer.schedule"
    with pytest.warns(UserWarning, match=message):
        other.load_state_dict(optimizer.state_dict())
    assert other.schedule == Schedule(1_000)
    group = other.param_groups[0]
    assert (group["lr"], group["fused"], group["foreach"]) == (0.1, True, None)
    other.schedule = Schedule(3_000)
    assert other.state_dict()["param_groups"][0]["schedule"]["total_steps"] == 3_000


def test_a_group_added_after_loading_gets_the_loaded_budget():
    model = net()
    optimizer = GSM(model[0].parameters(), 0.1, compression=10)
    other = GSM(model[0].parameters(), 0.1, compression=5)
    with pytest.warns(UserWarning, match=r"brings budget=\('compression', 10\.0\) \(not \('compression', 5\.0\)\)"):
        other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": model[4].parameters()})
    assert other.num_kept == 17


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": Schedule(np.int64(40), cut=np.float32(0.75))},
        {"schedule": Schedule(torch.tensor(40))},
        {"passive_decay": np.float32(0.5)},
        {"lr": np.float64(0.1)},
        {"lr": np.float32(0.1)},
        {"compression": np.float32(4)},
        {"compression": torch.tensor(4.0)},
        {"momentum": torch.tensor(0.9)},
        {"weight_decay": np.float64(1e-3)},
        {"momentum": np.float64(0.9), "nesterov": np.bool_(True)},
    ],
    ids=str,
)
def test_numpy_numbers_and_a_state_that_loads(settings):
    model = net()
    optimizer = GSM(model.named_parameters(), **{"lr": 0.1, "compression": 4, "momentum": 0.5, **settings})
    for step in range(4):
        optimizer.param_groups[0]["lr"] = np.float64(0.1) / (1 + step)  # as a scheduler of one's own would
        take_steps([(model, optimizer)], [step])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["param_groups"][0]["budget"] == ("compression", 4)
    assert state["param_groups"][0]["lr"] == 0.025


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compression": "4"}, "compression must be a number, not '4'"),
        ({"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
        ({"lr": None}, "lr must be a number, not None"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element, not \(2,\)"),
        ({"weight_decay": None}, "weight_decay must be a number, not None"),
    ],
)
def test_settings_that_are_no_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        GSM(net().parameters(), **{"lr": 0.1, "compression": 4, **settings})


# --- torch's distributed checkpoints, on one process ---


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("steps", [3, 8, 11], ids=["before the fade", "in the fade", "after the cut"])
def test_distributed_checkpoints_carry_masks(steps, flat):
    def make():
        model = net()
        schedule = Schedule(20, ramp=0.1, fade=0.2, cut=0.5)
        return model, GSM(model.named_parameters(), 0.1, compression=4, schedule=schedule, **HYPER)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = make()
    take_steps([(model, optimizer)], range(steps))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    fresh, other = make()
    fresh.load_state_dict(model.state_dict())
    for _ in range(2):  # into a fresh one, and once more into the same one
        set_optimizer_state_dict(fresh, other, copy.deepcopy(saved), options=options)
        assert (other.phase, other.schedule) == (optimizer.phase, optimizer.schedule)
        assert other.param_groups[0]["step"] == steps
    take_steps([(model, optimizer), (fresh, other)], range(steps, 15))
    assert same_bits(model, fresh)
    assert num_nonzero(fresh) == optimizer.num_kept


def test_asking_a_fresh_optimizer_for_its_state_counts_no_step():
    pairs = []
    for _ in range(2):
        model = net()
        schedule = Schedule(10, ramp=0.1, fade=0.1, cut=0.5)
        pairs.append((model, GSM(model.named_parameters(), 0.1, compression=4, schedule=schedule, **HYPER)))
    get_optimizer_state_dict(*pairs[0])
    assert [pairs[0][1].param_groups[0][key] for key in ("step", "lr")] == [0, 0.1]
    take_steps(pairs, range(8))
    assert same_bits(pairs[0][0], pairs[1][0])


def test_places_for_masks_to_load_are_no_masks():
    model = net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=4, **HYPER)
    get_optimizer_state_dict(model, optimizer)
    model[0].weight.requires_grad_(False)
    take_steps([(model, optimizer)], [0])
    assert list(optimizer.finalize()) == ["4.weight"]
    assert optimizer.num_kept == 16


def test_a_flat_state_without_its_masks_is_refused():
    model = net()
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    optimizer = GSM(model.named_parameters(), 0.1, compression=4, **HYPER)
    take_steps([(model, optimizer)], [0])
    optimizer.finalize()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    broken = {key: value for key, value in copy.deepcopy(saved).items() if not key.endswith(".mask")}
    fresh = net()
    with pytest.raises(ValueError, match="lacks the mask of a prunable parameter"):
        set_optimizer_state_dict(fresh, GSM(fresh.named_parameters(), 0.1, compression=4), broken, options=options)
