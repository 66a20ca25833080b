"""The steps of GSM against the naive twin and by eye, the cut, and what is refused."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gsm_sgd import GSM, NonFiniteGradientError, Phase, Schedule, prunable_parameters
from nets import assert_same_bits, backward, channels_last_net, dense_net, kept_of, train
from reference_gsm import NaiveGSM, naive_top


def assert_close(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


# --- the rule ---


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("passive_decay", [None, 1e-9, 0.05])
@pytest.mark.parametrize("compression", [1, 1.5, 7, 300])
def test_naive_twin_in_lockstep(compression, passive_decay, nesterov):
    fast, slow = dense_net(torch.float64), dense_net(torch.float64)
    hyper = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": passive_decay}
    ours = GSM(fast.parameters(), 0.1, compression=compression, **hyper)
    twin = NaiveGSM(slow.parameters(), 0.1, compression, **hyper)
    for seed in range(25):
        train(fast, ours, [seed])
        train(slow, twin, [seed])
        assert_close(fast, slow)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_channels_last_in_lockstep_with_the_naive_twin(nesterov, options):
    """The learning rate changes from step to step."""
    fast, slow = channels_last_net().double(), channels_last_net().double()
    hyper = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": 0.03}
    ours = GSM(fast.parameters(), 0.1, compression=7, **hyper, **options)
    twin = NaiveGSM(slow.parameters(), 0.1, 7, **hyper)
    for step in range(8):
        ours.param_groups[0]["lr"] = twin.lr = 0.1 / (1 + step)
        train(fast, ours, [step])
        train(slow, twin, [step])
        assert_close(fast, slow)


def test_small_tensor_loses_everything():
    """An eye can check it: of two equal tensors, one scaled by 10 and one by 0.1, the first keeps all of Q."""
    torch.manual_seed(0)
    large, small = nn.Parameter(10 * torch.randn(10, 10)), nn.Parameter(0.1 * torch.randn(10, 10))
    optimizer = GSM([large, small], 0.1, compression=2.5, weight_decay=1e-3)
    large.grad, small.grad = torch.ones(10, 10), torch.ones(10, 10)
    optimizer.step()
    assert [row.nonzeros for row in optimizer.finalize().table()] == [80, 0]
    assert not small.any()


def test_passive_weight_comes_back():
    weight = nn.Parameter(torch.ones(1, 2))
    optimizer = GSM([weight], 0.1, compression=2, momentum=0.0, weight_decay=1e-3)
    for active in (0, 1):
        before = weight.detach().clone()
        weight.grad = torch.full((1, 2), 1e-3)
        weight.grad[0, active] = 1.0
        optimizer.step()
        moved = (before - weight.detach()) > 0.05
        assert moved[0].tolist() == [active == 0, active == 1]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_kept", [9, 50])
def test_ties_across_the_threshold(num_kept):
    """Of equal importances the first are active: those of one tensor in part, in index order, and none after it."""
    params = [
        nn.Parameter(torch.ones(4, 5)),
        nn.Parameter(torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)),
    ]
    optimizer = GSM(params, 0.5, num_kept=num_kept, momentum=0.0, weight_decay=0.25, passive_decay=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = torch.cat([p.detach().reshape(-1) for p in params])
    assert torch.equal(moved, torch.where(torch.arange(116) < num_kept, 1 - 0.5 * 1.25, 1 - 0.5 * 0.5))


@pytest.mark.usefixtures("way")
def test_zero_gradients_where_denormal_numbers_are_flushed_to_zero():
    """Nothing lies between zero and the smallest normal number then, and a score of zero is passive all the same."""
    params = [nn.Parameter(torch.ones(40, 30)) for _ in range(3)]
    optimizer = GSM(params, 0.5, compression=2, momentum=0.0, weight_decay=0.25, passive_decay=0.5)
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


def test_groups_say_what_is_prunable():
    net = dense_net()
    optimizer = GSM(
        [
            {"params": [net[0].weight], "prunable": False},
            {"params": [net[4].bias], "prunable": True},
            {"params": [net[2].weight, net[4].weight, net[0].bias], "lr": 0.01},
        ],
        0.1,
        compression=4,
    )
    assert (optimizer.num_prunable, optimizer.num_kept) == (4 + 128 + 32, 41)
    train(net, optimizer, [0])
    optimizer.finalize()
    assert net[0].weight.count_nonzero() == 192
    assert sum(int(p.count_nonzero()) for p in (net[2].weight, net[4].weight, net[4].bias)) == 41


def test_two_models_with_the_same_names():
    first, second = dense_net(seed=0), dense_net(seed=1)
    optimizer = GSM([*first.named_parameters(), *second.named_parameters()], 0.1, compression=4)
    assert list(optimizer.finalize()) == [str(number) for number in range(6)]
    assert kept_of(first) + kept_of(second) == optimizer.num_kept == 176
    assert min(kept_of(first), kept_of(second)) > 0


def test_parameter_without_gradient_only_decays():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=4, momentum=0.0, weight_decay=0.5)
    before = copy.deepcopy(net)
    backward(net)
    net[2].weight.grad = net[2].bias.grad = None
    optimizer.step()
    torch.testing.assert_close(net[2].weight, before[2].weight * 0.95)
    assert torch.equal(net[2].bias, before[2].bias)


def test_no_gradient_at_all_is_no_step():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=4, weight_decay=0.5)
    optimizer.step()
    assert_same_bits(net, dense_net())
    assert not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.usefixtures("way")
def test_gradients_are_never_written():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=5, nesterov=True)
    for seed in range(3):
        backward(net, seed)
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


def test_closure():
    ours, twin = dense_net(), dense_net()
    with_closure = GSM(ours.parameters(), 0.1, compression=6)
    plain = GSM(twin.parameters(), 0.1, compression=6)
    for seed in range(3):
        loss = with_closure.step(lambda seed=seed: backward(ours, seed))
        assert loss.item() == backward(twin, seed).item()
        plain.step()
    assert_same_bits(ours, twin)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("make", [dense_net, channels_last_net])
def test_deterministic_mode(make):
    """Where torch is told to refuse nondeterministic operations, the bits are the same as where it is not."""
    nets = make(), make()
    for net, deterministic in zip(nets, (False, True), strict=True):
        optimizer = GSM(net.parameters(), 0.1, compression=6)
        torch.use_deterministic_algorithms(deterministic)
        try:
            train(net, optimizer, range(5))
            optimizer.finalize()
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same_bits(*nets)


# --- torch's implementations, and layouts in memory ---


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_implementations_agree_before_and_after_finalize(options):
    nets = channels_last_net().double(), channels_last_net().double()
    optimizers = []
    for model, mine in zip(nets, ({}, options), strict=True):
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
        assert_close(*nets)
    assert kept_of(nets[1]) == optimizers[1].num_kept


def test_foreach_and_fused_exclude_each_other():
    with pytest.raises(ValueError, match="cannot both be True"):
        GSM(dense_net().parameters(), 0.1, compression=2, foreach=True, fused=True)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"compression": 1, "fused": True}], ids=str)
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


@pytest.mark.usefixtures("way")
def test_gaps_in_memory_do_not_matter():
    params = [nn.Parameter(torch.rand(4, 16)[:, ::2]) for _ in range(2)]
    twins = [nn.Parameter(p.detach().contiguous()) for p in params]
    optimizers = [GSM(side, 0.1, compression=2, passive_decay=0.05) for side in (params, twins)]
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = q.grad = torch.randn(4, 8)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(params, twins)


# --- gradients and weights that are not finite ---


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("compression", [1, 5])
def test_non_finite_gradient_changes_nothing(compression, finalized, steps, bad):
    net = dense_net()
    optimizer = GSM(net.named_parameters(), 0.1, compression=compression)
    train(net, optimizer, range(steps))
    if finalized:
        optimizer.finalize()
    weights, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    backward(net)
    net[2].weight.grad[3, 1] = bad
    with pytest.raises(NonFiniteGradientError, match=r"gradient of parameter '2\.weight' is not finite"):
        optimizer.step()
    assert_same_bits(net, weights)
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], state["state"], rtol=0, atol=0)
    assert after["param_groups"] == state["param_groups"]


def test_non_finite_gradient_of_an_unnamed_parameter_is_numbered():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=5)
    backward(net)
    net[4].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError, match="gradient of parameter number 4 is not finite"):
        optimizer.step()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "schedule", [Schedule(10, ramp=0, fade=0.9, cut=1), Schedule(10, ramp=0, fade=0, cut=0.1)], ids=["fade", "cut"]
)
def test_a_step_that_is_refused_neither_begins_the_fade_nor_cuts(schedule):
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=10, schedule=schedule)
    train(net, optimizer, [0])
    before = copy.deepcopy(net)
    net[0].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert_same_bits(net, before)
    assert (optimizer.phase, optimizer.masks) == (Phase.SEARCH, {})


@pytest.mark.usefixtures("way")
def test_weights_that_are_not_numbers_are_left_to_the_loss():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=6)
    backward(net)
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan  # its gradient is still finite
    optimizer.step()
    assert net[2].weight.isnan().sum() == 1


# --- the cut ---


@pytest.mark.usefixtures("way")
def test_finalize_keeps_the_largest_and_zeros_stay_zero():
    net = dense_net()
    optimizer = GSM(net.named_parameters(), 0.1, compression=10)
    train(net, optimizer, range(5))
    expected = naive_top([p.detach().abs() for p in prunable_parameters(net).values()], 35)
    masks = optimizer.finalize()
    assert optimizer.phase is Phase.DONE
    assert list(masks) == list(prunable_parameters(net))
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))
    assert masks.num_kept == optimizer.num_kept == 35
    weights = copy.deepcopy(net)
    for mask in masks.values():
        mask.logical_not_()  # a copy: it changes nothing here
    again = optimizer.finalize()
    assert all(torch.equal(mask, naive) for mask, naive in zip(again.values(), expected, strict=True))
    assert_same_bits(net, weights)
    for seed in range(5, 10):
        train(net, optimizer, [seed])
        assert all(not p[~again[name]].any() for name, p in prunable_parameters(net).items())
    assert not torch.equal(net[0].weight, weights[0].weight)
    assert kept_of(net) == 35


def test_finalize_before_any_step_is_magnitude_pruning():
    net = dense_net()
    expected = naive_top([p.detach().abs() for p in prunable_parameters(net).values()], 35)
    masks = GSM(net.parameters(), 0.1, compression=10).finalize()
    assert list(masks) == ["0", "1", "2"]  # no names given: position among the prunable
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))


def test_kept_weights_of_a_parameter_without_gradient_stay_after_finalize():
    net = dense_net()
    optimizer = GSM(net.parameters(), 0.1, compression=3, momentum=0.0, weight_decay=0.5)
    optimizer.finalize()
    before = net[2].weight.detach().clone()
    backward(net)
    net[2].weight.grad = None
    optimizer.step()
    assert torch.equal(net[2].weight, before)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be finite and at least 0, not -0.1"),
        ({"lr": math.nan}, "lr must be finite"),
        ({"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
        ({"lr": None}, "lr must be a number, not None"),
        ({"lr": torch.ones(2)}, r"lr must be a number or a tensor with one element, not \(2,\)"),
        ({"lr": torch.tensor(math.nan)}, "lr must be finite"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and below 1, not 1\.0"),
        ({"momentum": -0.1}, "momentum must be at least 0"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum above 0"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"weight_decay": None}, "weight_decay must be a number, not None"),
        ({"passive_decay": math.inf}, "passive_decay must be finite"),
        ({"passive_decay": "automatic"}, "passive_decay must be a number, 'auto' or None, not 'automatic'"),
        ({"passive_decay": "auto"}, r"passive_decay='auto' needs schedule=Schedule\(total_steps\)"),
        ({"passive_decay": "auto", "schedule": lambda step: 1}, "passive_decay='auto' needs schedule=Schedule"),
        ({"schedule": 100}, "schedule must be a Schedule, a function of the step, or None, not 100"),
        ({"schedule": lambda step: 1.5}, "must return a density above 0 and at most 1, not 1.5"),
        ({"schedule": lambda step: 0.0}, "must return a density above 0"),
        ({"compression": None}, "give exactly one of compression, density, sparsity and num_kept, not none"),
        ({"sparsity": 0.9}, "exactly one of .* not compression and sparsity"),
        ({"compression": 353}, "compression 353 leaves none of 352 weights"),
        ({"compression": None, "num_kept": 353}, "num_kept 353 is more than the 352 weights"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GSM(dense_net().parameters(), **{"lr": 0.1, "compression": 2, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 2}, "momentum must be"),
        ({"sparsity": 0.9}, "sparsity is one for the whole model: pass it to GSM"),
        ({"schedule": None}, "schedule is one for the whole model"),
    ],
)
def test_bad_settings_of_a_group(settings, message):
    net = dense_net()
    optimizer = GSM(net[0].parameters(), 0.1, compression=2)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": net[2].parameters(), **settings})
    assert len(optimizer.param_groups) == 1


def test_prunable_group_after_finalize():
    net = dense_net()
    optimizer = GSM(net[0].parameters(), 0.1, compression=2)
    optimizer.finalize()
    with pytest.raises(ValueError, match="once the masks are fixed"):
        optimizer.add_param_group({"params": net[2].parameters()})
    assert len(optimizer.param_groups) == 1


def test_parameters_on_several_devices():
    params = [nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))]
    optimizer = GSM(params, 0.1, compression=2)
    params[1] = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(3, 3, device="meta"))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="on one device"):
        optimizer.step()


def test_nothing_prunable():
    with pytest.raises(ValueError, match="nothing to prune"):
        GSM([nn.Parameter(torch.ones(3))], 0.1, compression=2)


def test_parameter_given_twice():
    weight = nn.Parameter(torch.ones(3, 3))
    for params in ([weight, weight], [{"params": [weight]}, {"params": [weight]}], [("a", weight), ("b", weight)]):
        with pytest.raises(ValueError, match=r"twice|more than one parameter group"):
            GSM(params, 0.1, compression=2)


def test_settings_with_which_passive_weights_vanish_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GSM(dense_net().parameters(), 0.1, compression=2, weight_decay=0, passive_decay=1e-3)
        GSM(dense_net().parameters(), 0.1, compression=1, weight_decay=0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prunable": "no"}, "prunable must be True, False or None, not 'no'"),
        ({"budget": 3}, "budget is one for the whole model"),
        ({"peak_lr": 0.1}, "peak_lr is one for the whole model"),
    ],
    ids=str,
)
def test_a_group_says_only_what_concerns_a_group(more, message):
    with pytest.raises(ValueError, match=message):
        GSM([{"params": [torch.nn.Parameter(torch.ones(4, 4))], **more}], 0.1, num_kept=2)
