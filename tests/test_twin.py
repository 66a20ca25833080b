"""GSM as torch.optim.SGD, and GSMAdamW as torch.optim.AdamW, bit for bit, wherever nothing is passive."""

import itertools

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from gsm_sgd import GSM, GSMAdamW
from nets import assert_same_bits, backward, channels_last_net, conv_net, dense_net, saved_and_loaded, train

HYPER = {GSM: {"momentum": 0.9, "weight_decay": 1e-2}, GSMAdamW: {}}
TORCHS = {GSM: SGD, GSMAdamW: AdamW}
both = pytest.mark.parametrize("kind", TORCHS, ids=["SGD", "AdamW"])
SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, cycle_momentum="momentum" in o.param_groups[0]
    ),
    "warm-up and cosine": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.01, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


def twins(make=conv_net, dtype=None, groups=False, own=None, kind=GSM, **options):
    """Return two nets alike, one trained by GSM at density 1 with some options of its own, one by torch's optimizer."""
    pairs = []
    for optimizer, its_own in ((kind, {"density": 1, **(own or {})}), (TORCHS[kind], {})):
        model = make().to(dtype) if dtype else make()
        params = list(model.named_parameters())
        if groups:
            params = [{"params": params[:2], "lr": 0.03}, {"params": params[2:]}]
        pairs.append((model, optimizer(params, 0.1, **{**HYPER[kind], **options, **its_own})))
    return pairs


def check(pairs, make_scheduler=None, steps=12):
    """Train both; in some steps a weight has no gradient."""
    schedulers = [make_scheduler(optimizer) for _, optimizer in pairs] if make_scheduler else [None, None]
    for step in range(steps):
        for (model, optimizer), scheduler in zip(pairs, schedulers, strict=True):
            backward(model, step)
            if step % 3:
                model[4].weight.grad = None
            optimizer.step()
            if scheduler is not None:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        assert_same_bits(pairs[0][0], pairs[1][0])
    moved, start = pairs[0][0].parameters(), conv_net().parameters()
    assert not any(torch.equal(p, q) for p, q in zip(moved, start, strict=False))


@both
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_implementation_and_precision(dtype, options, groups, kind):
    check(twins(dtype=dtype, groups=groups, kind=kind, **options))


@pytest.mark.parametrize("make", [dense_net, channels_last_net])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_every_rule(make, weight_decay, momentum, nesterov):
    check(twins(make, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))


@pytest.mark.parametrize("make", [dense_net, channels_last_net])
@pytest.mark.parametrize("settings", [{"weight_decay": 0.0}, {"betas": (0.0, 0.9)}, {"betas": (0.8, 1e-3), "eps": 0.1}])
def test_every_rule_of_adamw(make, settings):
    check(twins(make, kind=GSMAdamW, **settings))


@both
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler, kind):
    check(twins(groups=True, kind=kind), SCHEDULERS[scheduler])


@both
def test_weights_with_gaps_in_memory(kind):
    def make():
        model, wide = conv_net(), torch.zeros(4, 32)
        wide[:, ::2] = model[4].weight.detach()
        model[4].weight = nn.Parameter(wide[:, ::2])
        return model

    check(twins(make, kind=kind))


@both
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_rate_that_is_a_tensor(kind, options):
    pairs = twins(kind=kind, **options)
    for _, optimizer in pairs:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.05)
    check(pairs)


def test_a_step_compiled_by_the_user_is_not_recompiled():
    (ours, gsm), (theirs, sgd) = twins()
    take_step = torch.compile(lambda: gsm.step(), backend="eager")
    for step, (model, optimizer_step) in itertools.product(range(8), ((ours, take_step), (theirs, sgd.step))):
        backward(model, step)
        with torch.compiler.set_stance("fail_on_recompile" if step > 2 else "default"):
            optimizer_step()
    assert_same_bits(ours, theirs)


@both
@pytest.mark.parametrize("to_gsm", [False, True], ids=["to torch", "from torch"])
@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_states_load_across_both_ways(to_gsm, kind, options):
    pairs = twins(kind=kind, **options)
    check(pairs, steps=4)
    (ours, gsm), (_, torchs) = pairs
    fresh = conv_net()
    fresh.load_state_dict(ours.state_dict())
    own = {"fused": True} if options else {"foreach": None}
    make, source = (lambda params, lr: kind(params, lr, density=1, **own), torchs) if to_gsm else (TORCHS[kind], gsm)
    other = make(fresh.named_parameters(), 1.0)
    other.load_state_dict(saved_and_loaded(source.state_dict()))
    train(ours, gsm, range(4, 9))
    train(fresh, other, range(4, 9))
    assert_same_bits(ours, fresh)


def test_a_state_of_sgd_leaves_the_settings_that_only_gsm_has():
    model = conv_net()
    groups = lambda: [{"params": model[:4].named_parameters("0")}, {"params": model[4].named_parameters("4")}]  # noqa: E731
    sgd = SGD(groups(), 0.1, momentum=0.9)
    apart = groups()
    apart[1]["prunable"] = False
    optimizer = GSM(apart, 0.2, compression=4, passive_decay=0.1)
    optimizer.load_state_dict(sgd.state_dict())
    assert [group["prunable"] for group in optimizer.param_groups] == [None, False]
    assert [(group["lr"], group["passive_decay"]) for group in optimizer.param_groups] == [(0.1, 0.1)] * 2
    assert optimizer.num_kept == 27


@pytest.mark.parametrize("setting", [{"maximize": True}, {"dampening": 0.5}], ids=str)
def test_what_only_sgd_does_is_refused(setting):
    model = conv_net()
    message = f"{next(iter(setting))}={next(iter(setting.values()))} is not supported"
    with pytest.raises(ValueError, match=message):
        GSM([{"params": model.parameters(), **setting}], 0.1, compression=2)
    optimizer = GSM(model.parameters(), 0.1, compression=2)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(SGD(model.parameters(), 0.1, momentum=0.9, **setting).state_dict())


@pytest.mark.parametrize("setting", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_what_only_adamw_does_is_refused(setting):
    model = conv_net()
    message = f"{setting}=True is not supported"
    with pytest.raises(ValueError, match=message):
        GSMAdamW([{"params": model.parameters(), setting: True}], compression=2)
    optimizer = GSMAdamW(model.parameters(), compression=2)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(AdamW(model.parameters(), **{setting: True}).state_dict())


def test_states_of_other_rules_are_refused():
    model = conv_net()
    sgd, adamw = GSM(model.parameters(), 0.1, compression=2), GSMAdamW(model.parameters(), compression=2)
    with pytest.raises(ValueError, match="the state is of an Adam optimizer, whose rates and moments do not fit"):
        sgd.load_state_dict(AdamW(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="the state is of an optimizer without the moments of Adam"):
        adamw.load_state_dict(SGD(model.parameters(), 0.1).state_dict())
    with pytest.raises(ValueError, match="decoupled_weight_decay=False is not supported"):
        adamw.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
