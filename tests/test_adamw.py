"""GSMAdamW against its naive twin, its scores, how its passive weights vanish, and what it refuses."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

from gsm_sgd import GSM, CutWarning, GSMAdamW, NonFiniteGradientError, Phase, Schedule
from gsm_sgd.decay import Motion
from gsm_sgd.optim.sparse import SparseOptimizer
from nets import (
    assert_same_bits,
    backward,
    channels_last_net,
    conv_net,
    dense_net,
    kept_of,
    saved_and_loaded,
    train,
)
from reference_gsm import NaiveAdamW, naive_active


def assert_close(model, other, **tolerance):
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.detach().double(), theirs.detach().double(), **tolerance)


# --- the rule ---

OPTIONS = [{}, {"foreach": False}, {"fused": True}]


def check_lockstep(fast, kept=59, passive_decay=0.05, **options):
    """Train beside the twin; in some steps a weight has no gradient, and so other ones are active."""
    slow = copy.deepcopy(fast)
    settings = {"weight_decay": 1e-2, "betas": (0.8, 0.99), "eps": 1e-4, "passive_decay": passive_decay}
    ours = GSMAdamW(fast.parameters(), 0.02, num_kept=kept, **settings, **options)
    twin = NaiveAdamW(slow.parameters(), 0.02, kept, **settings)
    for seed in range(15):
        for model, optimizer in ((fast, ours), (slow, twin)):
            backward(model, seed)
            if seed % 4 == 1:
                model[4].weight.grad = None
            optimizer.step()
        assert_close(fast, slow, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("passive_decay", [1e-2, 1e-9, 0.5])
@pytest.mark.parametrize("make", [dense_net, channels_last_net])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_naive_twin_in_lockstep(make, options, passive_decay):
    check_lockstep(make().double(), passive_decay=passive_decay, **options)


@pytest.mark.parametrize("make", [dense_net, channels_last_net])
@pytest.mark.parametrize("kept", [1, 150])
def test_few_or_many_active_in_lockstep(make, kept):
    check_lockstep(make().double(), kept=kept)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_kept", [9, 50])
def test_the_surplus_of_equal_scores_is_passive(num_kept):
    weights = [nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
    ours = GSMAdamW(weights, 0.1, num_kept=num_kept, passive_decay=0.5)
    twin = NaiveAdamW(twins, 0.1, num_kept, 0.5)
    for _ in range(2):
        for param in (*weights, *twins):
            param.grad = torch.ones_like(param)
        ours.step()
        twin.step()
        torch.testing.assert_close(weights, twins, rtol=1e-6, atol=0)


class BothMasked(GSMAdamW):
    """The second moment is of the masked gradient too."""

    def _masked_(self, part, active):
        grads = [grad * b.to(grad.dtype) for grad, b in zip(part.grads, active, strict=True)]
        super()._masked_(part._replace(grads=grads), active)


def test_a_subclass_may_mask_elsewhere():
    weight = nn.Parameter(torch.ones(1, 2))
    weight.grad = torch.tensor([[1.0, 0.5]])
    optimizer = BothMasked([weight], num_kept=1)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], torch.tensor([[1e-3, 0.0]]))


def sum_of_both(weight, grad, state):
    return weight.abs() + grad.abs()


@pytest.mark.parametrize("score", ["taylor", sum_of_both])
@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_implementations_agree_through_a_whole_schedule(options, score):
    nets = dense_net().double(), dense_net().double()
    for model, its in zip(nets, ({}, options), strict=True):
        settings = {"betas": (0.5, 0.99), "eps": 1e-4, "schedule": Schedule(20, ramp=0.2, fade=0.3, cut=0.8)}
        optimizer = GSMAdamW(model.parameters(), 0.01, compression=6, score=score, **settings, **its)
        train(model, optimizer, range(20))
        assert optimizer.phase is Phase.DONE
    assert_close(*nets, rtol=1e-9, atol=1e-12)


def test_a_step_by_eye():
    """Both moments start at zero, so in the first step an active weight moves by lr, whatever its gradient."""
    weight = nn.Parameter(torch.tensor([[2.0, 1.0, 1.0, 4.0]]))
    weight.grad = torch.tensor([[3.0, 0.1, -5.0, 0.0]])
    optimizer = GSMAdamW([weight], 0.125, num_kept=2, weight_decay=0.0, passive_decay=4.0)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.875, 0.5, 1.125, 2.0]]))
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], torch.tensor([[0.3, 0.0, -0.5, 0.0]]))
    torch.testing.assert_close(state["exp_avg_sq"], 1e-3 * weight.grad**2)
    assert state["step"] == 1


def test_a_parameter_without_a_gradient_decays_and_its_moments_wait():
    model = dense_net()
    optimizer = GSMAdamW(model.parameters(), 0.125, compression=4, passive_decay=0.5)
    train(model, optimizer, range(3))
    weight, before = model[2].weight, model[2].weight.detach().clone()
    state = copy.deepcopy(optimizer.state[weight])
    backward(model, 3)
    weight.grad = model[2].bias.grad = None
    bias = model[2].bias.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.125 * 0.5))
    assert torch.equal(model[2].bias, bias)
    after = optimizer.state[weight]
    assert all(torch.equal(after[key], state[key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    assert (after["step"], optimizer.state[model[0].weight]["step"]) == (3, 4)


def test_steps_may_be_counted_in_float64():
    model = dense_net().double()
    torch.set_default_dtype(torch.float64)
    try:
        check_lockstep(model)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kept", [352, 60])
@pytest.mark.parametrize("fused", [None, True])
def test_a_rate_may_be_a_tensor(kept, fused):
    nets = dense_net(), dense_net()
    for model, lr in zip(nets, (torch.tensor(0.01, dtype=torch.float64), 0.01), strict=True):
        optimizer = GSMAdamW(model.parameters(), lr, num_kept=kept, fused=fused)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for seed in range(3):
            train(model, optimizer, [seed])
            scheduler.step()
    assert_close(*nets, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("passive_decay", [0.05, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_naive_twins_up_to_its_units(dtype, passive_decay):
    unit = {torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    model = dense_net(dtype)
    optimizer = GSMAdamW(model.parameters(), 0.01, num_kept=60, passive_decay=passive_decay, eps=1e-3)
    for seed in range(6):
        backward(model, seed)
        twin = copy.deepcopy(model).double()
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            theirs.grad = ours.grad.double()
        naive = NaiveAdamW(twin.parameters(), 0.01, 60, 0.01 if passive_decay is None else passive_decay, eps=1e-3)
        naive.taken = [seed] * 6  # it takes each step from where ours stands
        for ours, moments in zip(model.parameters(), naive.moments, strict=True):
            for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                moment.copy_(optimizer.state[ours].get(name, torch.tensor(0.0)))
        optimizer.step()
        naive.step()
        assert_close(model, twin, rtol=2 * unit, atol=unit * 0.01)
        for ours, (first, second) in zip(model.parameters(), naive.moments, strict=True):
            state = optimizer.state[ours]
            torch.testing.assert_close(state["exp_avg"].double(), first, rtol=2 * unit, atol=1e-7)
            torch.testing.assert_close(state["exp_avg_sq"].double(), second, rtol=2 * unit, atol=1e-7)


def test_float16_moments_that_are_rounded_to_zero_do_not_divide():
    """The square of this gradient is less than float16 can hold, and after it come gradients of zero."""
    weight = nn.Parameter(torch.ones(2, 8, dtype=torch.float16))
    optimizer = GSMAdamW([weight], 1e-2, num_kept=8)
    weight.grad = torch.full_like(weight, 1e-3)
    for _ in range(5):
        optimizer.step()
        weight.grad = torch.zeros_like(weight)
    assert (weight - 1).abs().max() < 0.1


def test_second_moments_of_bfloat16_follow_the_gradients():
    """Rounded to nearest they would never fall: a step takes a thousandth, half a unit is two or four."""
    weight = nn.Parameter(torch.ones(50, 50, dtype=torch.bfloat16))
    optimizer = GSMAdamW([weight], 1e-6, num_kept=2_400, passive_decay=0.0)
    for step in range(1_000):
        weight.grad = torch.full_like(weight, 1.0 if step == 0 else 1e-3)
        optimizer.step()
    mean = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert mean == pytest.approx(1e-3 * 0.999**999, rel=0.05)


# --- scores ---


def test_fisher_is_the_weight_times_the_root_of_the_second_moment():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 8)) for _ in range(2)]
    optimizer = GSMAdamW(params, 0.01, num_kept=50, score="fisher", weight_decay=0.0)
    expected = [torch.zeros(6, 8).bool()] * 2  # in the first step there is no second moment yet
    for _ in range(4):
        before = [param.detach().clone() for param in params]
        moments = [optimizer.state[param]["exp_avg"].clone() if param in optimizer.state else 0 for param in params]
        for param in params:
            param.grad = torch.randn(6, 8)
        optimizer.step()
        for param, moment, mask in zip(params, moments, expected, strict=True):
            assert torch.equal((optimizer.state[param]["exp_avg"] - 0.9 * moment).abs() > 1e-6, mask)
        assert expected[0].any() or all(map(torch.equal, before, params))
        expected = naive_active([p.detach().abs() * optimizer.state[p]["exp_avg_sq"].sqrt() for p in params], 50)


def test_fisher_needs_a_second_moment():
    with pytest.raises(ValueError, match="the score 'fisher' needs a second moment: use GSMAdamW, or another score"):
        GSM(dense_net().parameters(), 0.1, compression=2, score="fisher")


def test_a_score_sees_both_moments_and_the_steps():
    seen = []

    def score(weight, grad, state):
        seen.append({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()})
        corrected = state["exp_avg"] / (1 - 0.9 ** max(1, int(state["step"])))
        return (weight * corrected).abs() + 1e-9

    model = dense_net()
    optimizer = GSMAdamW(model.named_parameters(), compression=4, score=score)
    train(model, optimizer, [0])
    after = {key: value.clone() for key, value in optimizer.state[model[0].weight].items()}
    train(model, optimizer, [1])
    assert set(seen[0]) == {"exp_avg", "exp_avg_sq", "step", "seed"}
    assert [int(state["step"]) for state in seen] == [0, 0, 0, 1, 1, 1]
    assert all(torch.equal(seen[3][key], after[key]) for key in ("exp_avg", "exp_avg_sq"))


# --- passive weights vanish ---


def passive_by_construction(**options):
    """Return an optimizer of two weights, one active, one passive for good since it has no gradient."""
    param = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
    optimizer = GSMAdamW([param], num_kept=1, weight_decay=0.0, **options)
    param.grad = torch.tensor([[1e-9, 0.0]], dtype=torch.float64)
    return optimizer, param


@pytest.mark.parametrize("lr_of", [lambda f: 1.0, lambda f: 0.55 + 0.45 * math.cos(math.pi * f), lambda f: f + 1e-3])
def test_auto_is_closed_form(lr_of):
    """(1 - r) / alpha: whatever the learning rate, a weight shrinks by r in each step."""
    schedule = Schedule(500, ramp=0, fade=0.4, cut=1, shrink_to=1e-3)
    optimizer, param = passive_by_construction(lr=0.1, schedule=schedule)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_of(step / 500))
    left = []
    for _ in range(500):
        optimizer.step()
        scheduler.step()
        left.append(param[0, 1].item())
    assert left[99] == pytest.approx(1e-3 ** (100 / 300), rel=1e-6)
    assert left[299] == pytest.approx(1e-3, rel=1e-6)
    assert left[499] == pytest.approx(1e-6, rel=1e-6)
    assert optimizer.passive_shrinkage == pytest.approx(1e-3, rel=1e-6)  # in the fade


def test_a_weight_that_coasts_does_not_count_as_vanished():
    """However few steps are left, none is taken to shrink faster than the first moment that moves it."""
    schedule = Schedule(40, ramp=0, fade=0.25, cut=1)
    with pytest.warns(CutWarning, match="the fade is too short for passive weights to shrink.* or lower beta1"):
        optimizer, param = passive_by_construction(lr=1e-3, schedule=schedule, eps=1e-30)
    param.grad[0, 1] = -1e-10
    for _ in range(30):
        optimizer.step()
    optimizer.state[param]["exp_avg"][0, 1] = -1e-10  # as if it had been active until the fade
    before = param[0, 1].item()
    for _ in range(10):
        optimizer.step()
    promised, real = optimizer.passive_shrinkage, param[0, 1].item() / before
    assert promised == pytest.approx(0.9**10)
    assert promised < real < 1.5 * promised
    with pytest.warns(CutWarning, match="the fade is too short"):
        optimizer.finalize()


def vanishing(dtype, betas):
    """Return how much of the norm the cut takes after a whole schedule, and the model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)).to(dtype)
    optimizer = GSMAdamW(model.named_parameters(), 3e-3, compression=10, betas=betas, schedule=Schedule(1_000))
    train(model, optimizer, range(700))
    assert optimizer.phase is Phase.FADE
    left = optimizer.passive_residual
    train(model, optimizer, range(700, 702))
    assert optimizer.phase is Phase.DONE
    return left, model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)], ids=str)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)], ids=str)
def test_passive_weights_are_gone_at_the_cut(dtype, most, betas):
    with warnings.catch_warnings():
        warnings.simplefilter("error", CutWarning)
        left, model, optimizer = vanishing(dtype, betas)
    assert 0 < left < most
    assert kept_of(model) == optimizer.num_kept == optimizer.masks.num_kept


def test_motion_is_that_of_the_group():
    params = list(dense_net().named_parameters())
    groups = [{"params": params[:2], "betas": (0.5, 0.9)}, {"params": params[2:]}]
    optimizer = GSMAdamW(groups, 0.1, compression=2)
    motions = [optimizer._motion(group) for group in optimizer.param_groups]
    assert motions == [Motion(0.1, 0.0, False, 0.1, 0.0, beta1) for beta1 in (0.5, 0.9)]
    assert [motion.fastest_rate for motion in motions] == [0.5, 0.9]


# --- the cut ---


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_zeros_stay_zero(options):
    model = conv_net()
    optimizer = GSMAdamW(model.named_parameters(), 0.01, compression=10, **options)
    train(model, optimizer, range(5))
    masks = optimizer.finalize()
    for name, mask in masks.items():
        state = optimizer.state[model.get_parameter(name)]
        assert not state["exp_avg"][~mask].any()
        assert not state["exp_avg_sq"][~mask].any()
    before = copy.deepcopy(model)
    train(model, optimizer, range(5, 10))
    assert kept_of(model) == optimizer.num_kept == masks.num_kept == 17
    assert all(bool((p != q).any()) for p, q in zip(model.parameters(), before.parameters(), strict=True) if p.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_ends_in_the_same_bits(dtype):
    straight, resumed = dense_net(dtype), dense_net(dtype)
    settings = {"compression": 6, "schedule": Schedule(60, ramp=0.2, fade=0.3, cut=0.8), "betas": (0.5, 0.99)}
    optimizer = GSMAdamW(straight.parameters(), 0.01, **settings)
    train(straight, optimizer, range(60))
    other = GSMAdamW(resumed.parameters(), 0.01, **settings)
    for stop in (5, 25, 40, 55, 60):
        train(resumed, other, range(other.param_groups[0]["step"], stop))
        state = saved_and_loaded(other.state_dict())
        other = GSMAdamW(resumed.parameters(), 1.0, **settings)
        other.load_state_dict(state)
    assert_same_bits(straight, resumed)
    assert other.phase is Phase.DONE


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be at least 0 and below 1, the second above 0, not \(0\.9, 1\.0\)"),
        ({"betas": (-0.1, 0.9)}, "betas must be at least 0"),
        ({"betas": (0.9, 0.0)}, "the second above 0"),
        ({"betas": (math.nan, 0.9)}, "betas must be at least 0"),
        ({"betas": 0.9}, "betas must be two numbers, not 0.9"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas": ("0.9", 0.9)}, "each of betas must be a number, not '0.9'"),
        ({"eps": 0.0}, "eps must be finite and above 0, not 0.0"),
        ({"eps": math.inf}, "eps must be finite and above 0"),
        ({"weight_decay": -1}, "weight_decay must be finite and at least 0"),
        ({"passive_decay": "auto"}, "passive_decay='auto' needs schedule=Schedule"),
        ({"foreach": True, "fused": True}, "foreach and fused cannot both be True"),
        ({"foreach": True, "lr": torch.tensor(0.1)}, "lr as a tensor does not go with foreach=True"),
        ({"compression": None}, "give exactly one of compression, density, sparsity and num_kept, not none"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GSMAdamW(dense_net().parameters(), **{"compression": 2, **settings})


def test_gradients_that_cannot_be_are_refused_and_nothing_moves():
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 4))
    optimizer = GSMAdamW(
        [{"params": model[0].named_parameters("0"), "prunable": False}, {"params": model[1].named_parameters("1")}],
        compression=2,
    )
    before = copy.deepcopy(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match=r"parameter '0\.weight' has a sparse gradient, which AdamW does not take"):
        optimizer.step()
    model[0].weight.grad = model[0].weight.grad.to_dense()
    model[1].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError, match=r"'1\.weight' is not finite"):
        optimizer.step()
    assert_same_bits(model, before)
    assert not optimizer.state


def test_repr_and_base():
    optimizer = GSMAdamW(dense_net().parameters(), compression=2)
    assert isinstance(optimizer, SparseOptimizer)
    assert "betas: (0.9, 0.999)" in repr(optimizer)
