"""Nothing that a user does by mistake costs accuracy silently: exactly Q, frozen parameters, cuts, low precision."""

import copy
import functools
import itertools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gsm_sgd import GSM, CutWarning, Phase, Schedule, magnitude_masks, prunable_parameters
from nets import assert_same_bits, backward, dense_net, kept_of, saved_and_loaded, train
from ranks import full
from reference_gsm import NaiveGSM, naive_active

SHAPES = [(3, 2), (1, 3), (5, 7), (2, 2), (33, 1)]  # 81 weights


# --- exactly min(Q, weights with a gradient and a score above zero) are active ---


def gradients(seed, present, zeros):
    """Return gradients of some of the tensors, a share of them zero."""
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= zeros) for shape in SHAPES
    ]
    return [grad if is_present else None for grad, is_present in zip(grads, present, strict=True)]


def check_active(steps, kept, resumed=False, spread=lambda tensor: tensor):
    """Take steps in which nothing but gradients moves anything, and hold what moved against a stable sort."""
    torch.manual_seed(0)
    params = [nn.Parameter(spread(torch.rand(shape) + 0.5)) for shape in SHAPES]
    hyper = {"momentum": 0.0, "weight_decay": 0.0, "passive_decay": 1e-30}
    optimizer = GSM(params, 0.5, num_kept=kept, **hyper)
    for seed, present, zeros in steps:
        grads = gradients(seed, present, zeros)
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else spread(grad)
        before = [full(param) for param in params]
        scores = [torch.zeros(w.shape) if g is None else (w * g).abs() for w, g in zip(before, grads, strict=True)]
        if resumed:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = GSM(params, 0.5, num_kept=kept, **hyper)
            optimizer.load_state_dict(state)
        optimizer.step()
        for param, old, expected in zip(params, before, naive_active(scores, kept), strict=True):
            assert torch.equal(full(param) != old, expected)


some_steps = st.lists(
    st.tuples(
        st.integers(0, 10**6), st.lists(st.booleans(), min_size=5, max_size=5), st.sampled_from([0.0, 0.5, 0.95, 1.0])
    ),
    min_size=2,
    max_size=5,
)


@pytest.mark.usefixtures("way")
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=some_steps, kept=st.integers(1, 80), resumed=st.booleans())
def test_exactly_q_whatever_gradients_are_missing(steps, kept, resumed):
    check_active(steps, kept, resumed)


def check_active_sharded(steps):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kept in (4, 17, 40, 80):
        check_active(steps, kept, spread=lambda tensor: distribute_tensor(tensor, mesh, [Shard(0)]))


@pytest.mark.slow
def test_exactly_q_whatever_gradients_are_missing_on_several_processes(ranks):
    present = [[True] * 5, [True, False, True, True, True], [False, True, False, False, True], [True] * 5]
    steps = [(seed, there, zeros) for seed, (there, zeros) in enumerate(itertools.product(present, [0.0, 0.5, 0.95]))]
    ranks(2).run(check_active_sharded, steps)


@pytest.mark.usefixtures("way")
def test_a_score_of_zero_is_passive():
    """Dead weights decay like others, whatever their index, and do not survive the cut."""
    weight = nn.Parameter(torch.ones(1, 100))
    hyper = {"momentum": 0.0, "weight_decay": 0.0, "passive_decay": 0.1}
    optimizer = GSM([weight], 0.1, compression=2, **hyper)
    for _ in range(100):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, -10:] = 1e-6
        optimizer.step()
    torch.testing.assert_close(weight[0, :90].detach(), torch.full((90,), 0.99**100))
    assert (weight[0, 90:] > 0.999).all()


def test_tensors_of_zeros_are_named_unless_a_ramp_lets_them_begin():
    params = [("a", nn.Parameter(torch.randn(4, 20))), ("b", nn.Parameter(torch.zeros(8, 4)))]
    for _, param in params:
        param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match="every weight of 'b' is zero, so none has a score above zero"):
        GSM(params, 0.1, compression=2).step()
    params[1][1].data.zero_()
    GSM(params, 0.1, compression=2, schedule=Schedule(5)).step()
    assert params[1][1].all()


# --- frozen parameters ---


def test_a_frozen_parameter_stays_and_does_not_count():
    """A trunk that is frozen, even with a gradient left from before, through ramp, fade, cut and after."""
    model = dense_net()
    backward(model)
    model[0].requires_grad_(False)
    before, grad = copy.deepcopy(model[0]), model[0].weight.grad
    optimizer = GSM(model.named_parameters(), 0.05, compression=4, schedule=Schedule(30, fade=4 / 30, cut=2 / 3))
    assert optimizer.num_prunable == 16 * 8 + 8 * 4
    for seed in range(30):
        backward(model, seed)
        model[0].weight.grad = grad
        optimizer.step()
        assert_same_bits(model[0], before)
    assert optimizer.phase is Phase.DONE
    assert list(optimizer.masks) == ["2.weight", "4.weight"]
    assert kept_of(model[2:]) == optimizer.num_kept == 40


def test_frozen_parameters_of_density_1_stay():
    model = dense_net()
    backward(model)
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    GSM(model.parameters(), 0.1, compression=1, weight_decay=0.1).step()
    assert torch.equal(model[0].weight, before)


def test_n_and_q_follow_what_is_unfrozen():
    model = dense_net()
    model[0].requires_grad_(False)
    optimizer = GSM(model.named_parameters(), 0.1, compression=4)
    assert (optimizer.num_prunable, optimizer.num_kept) == (160, 40)
    train(model, optimizer, [0])
    model[0].requires_grad_(True)
    assert (optimizer.num_prunable, optimizer.num_kept) == (352, 88)
    train(model, optimizer, [0])
    masks = optimizer.finalize()
    assert masks.num_kept == 88
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]


def test_what_is_left_to_train_after_the_cut_may_be_fewer_weights_than_the_ratio():
    model = dense_net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=60)
    train(model, optimizer, [0])
    optimizer.finalize()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)  # 32 weights are left
    before = model[4].bias.detach().clone()
    train(model, optimizer, [0])
    assert (optimizer.num_prunable, optimizer.num_kept) == (352, 5)
    assert not torch.equal(model[4].bias, before)


def test_everything_prunable_may_be_frozen_for_a_while():
    model = dense_net()
    optimizer = GSM(model.named_parameters(), 0.1, compression=4)
    for name, param in model.named_parameters():
        param.requires_grad_("bias" in name)
    before = copy.deepcopy(model)
    train(model, optimizer, [0])
    assert torch.equal(model[0].weight, before[0].weight)
    assert not torch.equal(model[0].bias, before[0].bias)


@pytest.mark.parametrize("finalized", [False, True], ids=["in the fade", "after the cut"])
def test_freezing_and_unfreezing_once_the_masks_are_fixed(finalized):
    model = dense_net()
    model[0].requires_grad_(False)
    optimizer = GSM(model.named_parameters(), 0.1, compression=4, schedule=Schedule(20, ramp=0, fade=0.75, cut=1))
    train(model, optimizer, range(8))
    if finalized:
        optimizer.finalize()
    before = copy.deepcopy(model)
    model[0].requires_grad_(True)
    backward(model)
    with pytest.raises(ValueError, match=r"'0\.weight' was frozen when the masks were fixed, and no longer is"):
        optimizer.step()
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    backward(model)
    if finalized:
        optimizer.step()
        assert torch.equal(model[2].weight, before[2].weight)
        assert not torch.equal(model[4].weight, before[4].weight)
    else:
        with pytest.raises(ValueError, match=r"'2\.weight' was frozen during the fade"):
            optimizer.step()
        assert_same_bits(model, before)


# --- parameters that the rule cannot govern ---


def test_integer_parameters_are_left_alone():
    model = dense_net()
    packed = nn.Parameter(torch.randint(0, 255, (6, 5), dtype=torch.uint8), requires_grad=False)
    before = packed.clone()
    optimizer = GSM([("packed", packed), *model.named_parameters()], 0.1, compression=4)
    assert optimizer.num_prunable == 352
    train(model, optimizer, [0])
    optimizer.finalize()
    assert torch.equal(packed, before)


@pytest.mark.parametrize("options", [{}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("compression", [1, 2])
def test_complex_parameters_are_refused_by_name_or_trained_as_sgd_trains_them(compression, options):
    weight = nn.Parameter(torch.randn(4, 4))
    phases = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="parameter 'phases' is complex"):
        GSM([("weight", weight), ("phases", phases)], 0.1, compression=compression, **options)
    twin = nn.Parameter(phases.detach().clone())
    sgd = torch.optim.SGD([twin], 0.1, momentum=0.9)
    apart = {"params": [phases], "prunable": False, "weight_decay": 0.0}
    optimizer = GSM([{"params": [weight]}, apart], 0.1, compression=compression, **options)
    for _ in range(3):
        weight.grad, phases.grad = torch.randn_like(weight), torch.randn_like(phases)
        twin.grad = phases.grad.clone()
        optimizer.step()
        sgd.step()
    assert torch.equal(phases, twin)


def test_sparse_gradients_are_refused_before_anything_moves_or_trained_as_sgd_trains_them():
    embedding, linear = nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 3)
    twin = copy.deepcopy(embedding)

    def backward():
        for model in (embedding, linear):
            model.zero_grad()
        F.cross_entropy(linear(embedding(torch.arange(80).view(16, 5) % 50)), torch.arange(16) % 3).backward()

    backward()
    named = [*linear.named_parameters("linear"), *embedding.named_parameters("embedding")]
    before = linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"'embedding\.weight' has a sparse gradient: put it into a group with"):
        GSM(named, 0.1, compression=4).step()
    assert torch.equal(linear.weight, before)
    apart = {"params": embedding.parameters(), "prunable": False, "weight_decay": 0.0}
    optimizer = GSM([{"params": linear.parameters()}, apart], 0.1, compression=4)
    sgd = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        backward()
        twin.weight.grad = embedding.weight.grad.clone()
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(embedding.weight, twin.weight)


@pytest.mark.parametrize("layer", [nn.LazyLinear(4), nn.Linear(3, 4, device="meta")], ids=["lazy", "meta"])
def test_parameters_without_data_are_refused_by_name(layer):
    with pytest.raises(ValueError, match=r"parameter '0\.weight' has no data yet: run a batch through the model"):
        GSM(nn.Sequential(layer).named_parameters(), 0.1, compression=2)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm], ids=["parametrization", "old"])
def test_parts_of_a_weight_are_refused(norm):
    model = nn.Sequential(norm(nn.Linear(20, 6)), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"parameter '0\.\S+' is a part of a weight \(weight norm, say\)"):
        GSM(model.named_parameters(), 0.1, compression=2)
    groups = [{"params": model[0].named_parameters("0"), "prunable": False}, {"params": model[1].named_parameters("1")}]
    GSM(groups, 0.1, compression=2).finalize()
    assert model(torch.randn(3, 20)).isfinite().all()


def test_spectral_norm_is_pruned():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(20, 6)), nn.Linear(6, 4))
    assert GSM(model.named_parameters(), 0.1, compression=2).finalize().num_kept == 72
    assert model(torch.randn(3, 20)).isfinite().all()


@pytest.mark.parametrize("at_once", [False, True])
def test_nan_weights_are_named(at_once):
    model = dense_net()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    optimizer = GSM(model.named_parameters(), 0.1, compression=4)
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"parameter '2\.weight' contains NaN.*training has diverged"):
        magnitude_masks(prunable_parameters(model), compression=4) if at_once else optimizer.finalize()
    assert torch.equal(model[0].weight, before)
    assert optimizer.phase is Phase.SEARCH


# --- a cut that hurts warns ---


def trained(steps, schedule=None, **options):
    model = dense_net()
    optimizer = GSM(model.named_parameters(), **{"lr": 0.1, "compression": 10, "schedule": schedule, **options})
    train(model, optimizer, range(steps))
    return model, optimizer


def test_a_cut_that_takes_weights_that_matter_says_so_and_why():
    model, optimizer = trained(20)
    weights = torch.cat([p.detach().flatten() for p in prunable_parameters(model).values()])
    largest = weights.abs().sort(descending=True).values
    share = float(largest[35:].norm() / largest.norm())
    assert optimizer.passive_residual == pytest.approx(share, rel=1e-6)
    with pytest.warns(CutWarning, match=rf"takes {share:.1%} of the weights' norm.* use passive_decay='auto'"):
        optimizer.finalize()
    assert optimizer.passive_residual == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.finalize()


def test_a_scheduled_cut_warns_too():
    with pytest.warns(CutWarning, match="active shortly before had no time to shrink: add a fade"):
        trained(41, Schedule(60, ramp=0, fade=0, cut=2 / 3, shrink_to=0.3), momentum=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, optimizer = trained(59, Schedule(60, ramp=0, fade=50 / 60, cut=58 / 60), momentum=0.5)
    assert optimizer.phase is Phase.DONE


def test_a_rate_that_fell_too_early_is_named_as_the_cause():
    model, optimizer = trained(10, Schedule(60, ramp=0, fade=50 / 60, cut=1), momentum=0.5)
    optimizer.param_groups[0]["lr"] = 1e-7
    train(model, optimizer, range(10, 60))
    with pytest.warns(CutWarning, match="the learning rate was too low for passive weights to shrink"):
        optimizer.finalize()


def test_fewer_steps_than_planned_are_named_as_the_cause():
    _, optimizer = trained(25, Schedule(400, ramp=0, cut=0.75), momentum=0.5)
    with pytest.warns(CutWarning, match=r"only 25 of the 300 steps before it were taken \(steps, not batches, are"):
        optimizer.finalize()


def test_a_state_of_a_net_that_was_not_cut_in_time_warns():
    model, optimizer = trained(20, Schedule(20, ramp=0, fade=0, cut=1), momentum=0.0)
    with pytest.warns(CutWarning, match="total_steps are over, and the net of this state has not been cut"):
        optimizer.state_dict()
    train(model, optimizer, [20])
    assert kept_of(model) == optimizer.num_kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.0}, "passive weights never shrink where weight_decay and passive_decay are both 0"),
        ({"schedule": Schedule(100), "passive_decay": 1e-4}, r"at this decay 1 of a passive weight is left by then"),
    ],
)
def test_settings_that_cannot_work_warn_when_built(options, message):
    with pytest.warns(CutWarning, match=f"the cut will remove weights that still matter: .*{message}"):
        trained(0, **options)


def test_a_layer_that_keeps_nothing_is_named():
    params = [("large", nn.Parameter(torch.ones(4, 5))), ("small", nn.Parameter(torch.full((3, 3), 1e-9)))]
    optimizer = GSM(params, 0.1, compression=2)
    with pytest.warns(CutWarning, match="no weight of 'small' is kept, so nothing passes through it"):
        optimizer.finalize()


def test_dense_weights_loaded_after_the_cut_are_cut_again():
    model, optimizer = trained(5)
    dense = copy.deepcopy(model.state_dict())
    masks = optimizer.finalize()
    model.load_state_dict(dense)
    assert optimizer.finalize().keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), dense[name] * mask)


def test_gradients_of_cut_weights_are_zero_before_anybody_sees_them():
    """So clipping takes the norm of what is trained; also in a copy, and in an optimizer that loaded the state."""
    schedule = Schedule(40, ramp=0, fade=0, cut=0.25)
    model, optimizer = trained(20, schedule, compression=3)
    fresh = dense_net()
    fresh.load_state_dict(model.state_dict())
    loaded = GSM(fresh.named_parameters(), 0.1, compression=3, schedule=schedule)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, other = copy.deepcopy((model, optimizer))
    for net in (model, fresh, copied):
        for _ in range(2):  # accumulated
            images = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
            F.cross_entropy(net(images), torch.arange(32) % 4).backward()
        for name, mask in optimizer.masks.items():
            grad = net.get_parameter(name).grad
            assert grad[mask].any()
            assert not grad[~mask].any()
    del optimizer, other, loaded
    backward(model)
    assert all(param.grad.bool().float().mean() > 0.3 for param in prunable_parameters(model).values())


# --- low precision ---

UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_one_step_is_the_naive_twins_up_to_the_units_of_the_precision(dtype, nesterov):
    """Active weights are rounded to the nearest, passive ones to either neighbour: one unit of weight and momentum."""
    hyper = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": 0.2}
    model = dense_net(dtype)
    twin = copy.deepcopy(model).double()
    optimizer = GSM(model.parameters(), 0.1, compression=4, **hyper)
    naive = NaiveGSM(twin.parameters(), 0.1, 4, **hyper)
    for seed in range(6):
        backward(model, seed)
        for ours, theirs, z in zip(model.parameters(), twin.parameters(), naive.z, strict=True):
            theirs.data = ours.detach().double()  # the twin takes each step from where ours stands
            theirs.grad = ours.grad.double()
            if ours in optimizer.state:
                z.copy_(optimizer.state[ours]["momentum_buffer"])
        optimizer.step()
        naive.step()
        for ours, theirs, z in zip(model.parameters(), twin.parameters(), naive.z, strict=True):
            momentum = optimizer.state[ours]["momentum_buffer"].double()
            allowed = 2 * UNIT[dtype] * (1 + naive.beta)
            torch.testing.assert_close(momentum, z, rtol=allowed, atol=1e-7)
            torch.testing.assert_close(ours.detach().double(), theirs.detach(), rtol=allowed, atol=0.1 * allowed)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("dtype", "grad"),
    [(torch.bfloat16, 1e-4), (torch.float16, 1e-5), (torch.float32, 1e-9), (torch.float64, 1e-17)],
    ids=str,
)
def test_the_gradient_of_an_active_weight_is_not_rounded_away(dtype, grad):
    weight = nn.Parameter(torch.tensor([[0.5, 0.5]], dtype=dtype))
    options = {"momentum": 0.9, "weight_decay": 0.0, "passive_decay": 0.1}
    optimizer = GSM([weight], 1.0, compression=2, **options)
    weight.grad = torch.tensor([[grad, 0.0]], dtype=dtype)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["momentum_buffer"][0, 0], weight.grad[0, 0])


@functools.cache
def left_of_passive_weights(dtype, fading):
    """Return the share of each passive weight that is left after 1,500 steps, in the fade or not, and the promise."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.rand(20, 100) + 0.5).to(dtype))
    schedule = Schedule(1_500, ramp=0, fade=0.995 * fading, cut=1, shrink_to=0.1)
    optimizer = GSM([weight], 0.01, num_kept=1, schedule=schedule)
    active = int(weight.argmax()) if fading else 0
    for step in range(1_500):
        if step == schedule.fade_start % 1_500:
            start = weight.detach().double().clone()
        weight.grad = torch.zeros_like(weight)
        weight.grad.view(-1)[active] = 1e-3
        optimizer.step()
    left = (weight.detach().double() / start).view(-1)
    return left[torch.arange(2_000) != active], optimizer.passive_shrinkage


@pytest.mark.slow
@pytest.mark.parametrize("fading", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_passive_weights_vanish_in_half_precision(dtype, fading):
    """As fast on average as in float64: also where a step of decay is less than half a unit in the last place."""
    left, promised = left_of_passive_weights(dtype, fading)
    exact, _ = left_of_passive_weights(torch.float64, fading)
    assert promised == pytest.approx(0.1, rel=0.05)
    assert exact.mean().item() == pytest.approx(promised, rel=0.2)
    assert left.mean().item() == pytest.approx(exact.mean().item(), rel=0.05)
    assert left.max() < 0.3


def test_noise_is_the_same_in_a_run_that_was_resumed():
    straight, resumed = dense_net(torch.bfloat16), dense_net(torch.bfloat16)
    optimizer, other = (
        GSM(model.parameters(), 0.1, compression=6, passive_decay=0.05) for model in (straight, resumed)
    )
    train(straight, optimizer, range(8))
    train(resumed, other, range(4))
    again = GSM(resumed.parameters(), 0.1, compression=6)
    again.load_state_dict(saved_and_loaded(other.state_dict()))
    train(resumed, again, range(4, 8))
    assert_same_bits(straight, resumed)


# --- processes that differ ---


def replicas_that_differ(check_ranks):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = GSM([weight], 0.1 * (1 + dist.get_rank()), compression=4, check_ranks=check_ranks)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    return weight.detach().clone()


@pytest.mark.slow
def test_replicas_with_other_settings_are_refused_at_the_first_step(ranks):
    for message in ranks(2).errors(replicas_that_differ, None):
        assert "processes disagree about lr: it is 0.1 on one and 0.2 on another" in message
    assert len(ranks(2).run(replicas_that_differ, False)) == 2
