"""Multipliers of gradients: with them one convolution trains as a block of several branches with constant scales."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, GSMAdamW, Schedule, keep_masked, multiply_gradients, sparsity_table
from gsm_sgd.reparam import CSLA, fuse, multipliers, widen
from gsm_sgd.structured import ChannelGroups, remove_channels
from nets import assert_same_bits, backward, dense_net, saved_and_loaded, train
from reference_gsm import naive_active


def net(dtype=torch.float64):
    """Return two convolutions, the first with room for the input itself, and a linear layer."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(3, 6, 3, 2, groups=3, bias=False)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 4)).to(dtype)


def searched(dtype=torch.float64):
    """Return the net with branches, of which the scales of the convolutions have been found and are constants."""
    wide, generator = widen(net(dtype), block=CSLA), torch.Generator().manual_seed(1)
    for block in (wide[0], wide[2]):
        for branch in block.branches:
            if isinstance(branch.conv, nn.Conv2d):
                scales = torch.rand(branch.norm.weight.shape, generator=generator) + 0.5
                branch.norm.weight.requires_grad_(False).copy_(scales)
    return wide


def step(model, optimizer, seed):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 8, 8, generator=generator).to(next(model.parameters()).dtype)
    F.cross_entropy(model(images), torch.randint(4, (16,), generator=generator)).backward()
    optimizer.step()


def torchs(kind, **settings):
    """Return an optimizer of torch's with multipliers."""

    def make(model, factors):
        optimizer = kind(model.named_parameters(), **settings)
        multiply_gradients(optimizer, factors)
        return optimizer

    return make


def ours(kind, **settings):
    return lambda model, factors: kind(model.named_parameters(), density=1, multipliers=factors, **settings)


SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
ADAMW = {"lr": 3e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("make", "plain", "settings"),
    [
        (torchs(torch.optim.SGD, **SGD), torch.optim.SGD, SGD),
        (ours(GSM, **SGD), torch.optim.SGD, SGD),
        (torchs(torch.optim.AdamW, **ADAMW), torch.optim.AdamW, ADAMW),
        (ours(GSMAdamW, **ADAMW), torch.optim.AdamW, ADAMW),
    ],
    ids=["SGD", "GSM", "AdamW", "GSMAdamW"],
)
def test_one_convolution_trains_as_the_branches_do(make, plain, settings):
    wide = searched()
    single, untouched = fuse(wide), fuse(wide)
    optimizer = plain([param for param in wide.parameters() if param.requires_grad], **settings)
    twin = make(single, multipliers(wide, power=2 if plain is torch.optim.SGD else 1))
    without = plain(untouched.parameters(), **settings)
    for seed in range(15):
        step(wide, optimizer, seed)
        step(single, twin, seed)
        step(untouched, without, seed)
    again = fuse(wide)
    for layer in (0, 2, 5):
        torch.testing.assert_close(single[layer].weight, again[layer].weight, rtol=1e-5, atol=1e-5)
    assert (untouched[0].weight - again[0].weight).abs().max() > 1e-2


def test_the_multipliers_are_the_sums_of_powers_of_scales():
    wide = searched()
    for power in (1, 2):
        first, second = multipliers(wide, power).values()
        large, small, _ = (branch.norm.weight.abs() ** power for branch in wide[0].branches)
        assert torch.allclose(first[:, :, 0, 0], large.view(3, 1).expand(3, 3))
        assert torch.allclose(first[:, :, 1, 1], (large + small).view(3, 1) + torch.eye(3).double())
        assert second.shape == (6, 1, 3, 3)
        large, small = (branch.norm.weight**power for branch in wide[2].branches)
        assert torch.allclose(second[:, 0, 1, 1], large + small)


def test_they_pass_through_a_file(tmp_path):
    factors = multipliers(searched(torch.float32))
    save_file(factors, tmp_path / "multipliers.safetensors")
    loaded = load_file(tmp_path / "multipliers.safetensors")
    assert loaded.keys() == factors.keys() == {"0.weight", "2.weight"}
    GSM(net(torch.float32).named_parameters(), lr=0.1, density=0.5, multipliers=loaded)


# --- with the rule ---


def drawn(model, seed=0, low=0.5):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) * 2 + low for name, p in model.named_parameters()}


def chosen(weights, kept):
    """Return which of each matrix's weights are active, by |w g| of the gradients as they are."""
    matrices = [name for name, weight in weights.items() if weight.ndim > 1]
    masks = naive_active([(weights[name] * weights[name].grad).abs() for name in matrices], kept)
    return dict(zip(matrices, masks, strict=True))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_gsm_against_a_naive_twin(options):
    """T = |W G| of the gradient as it is; Z <- beta Z + eta W + B M G; W <- W - alpha Z."""
    model, twin = dense_net(torch.float64), dense_net(torch.float64)
    factors = drawn(model)
    optimizer = GSM(
        model.named_parameters(),
        0.1,
        num_kept=50,
        weight_decay=0.01,
        passive_decay=0.05,
        multipliers=factors,
        **options,
    )
    weights = dict(twin.named_parameters())
    momenta = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for seed in range(12):
        train(model, optimizer, [seed])
        backward(twin, seed)
        active = chosen(weights, 50)
        with torch.no_grad():
            for name, weight in weights.items():
                b = active.get(name, torch.ones_like(weight, dtype=torch.bool))
                eta = 0.05 - 0.04 * b.double()
                momenta[name] = 0.9 * momenta[name] + eta * weight + b * factors[name].double() * weight.grad
                weight -= 0.1 * momenta[name]
        for name, weight in weights.items():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-9, atol=1e-12)


def test_gsm_adamw_against_a_naive_twin():
    """On V = W / M with gradient M G: the decay of W is as without multipliers."""
    model, twin = dense_net(torch.float64), dense_net(torch.float64)
    factors = {name: factor.double() for name, factor in drawn(model).items()}
    settings = {"num_kept": 50, "weight_decay": 0.1, "passive_decay": 0.3}
    optimizer = GSMAdamW(model.named_parameters(), 1e-2, multipliers=factors, **settings)
    weights, state = dict(twin.named_parameters()), {}
    for t in range(1, 12):
        train(model, optimizer, [t])
        backward(twin, t)
        active = chosen(weights, 50)
        with torch.no_grad():
            for name, weight in weights.items():
                b = active.get(name, torch.ones_like(weight, dtype=torch.bool))
                m, v = state.get(name, (0.0, 0.0))
                grad = factors[name] * weight.grad
                m, v = 0.9 * m + 0.1 * b * grad, 0.999 * v + 0.001 * grad**2
                state[name] = m, v
                update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                weight -= 1e-2 * ((0.3 - 0.2 * b.double()) * weight + factors[name] * update)
        for name, weight in weights.items():
            torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [GSM, GSMAdamW])
def test_a_whole_schedule_cuts_to_exactly_q_and_gradients_stay(kind):
    model = dense_net()
    optimizer = kind(model.named_parameters(), 0.01, density=0.2, schedule=Schedule(20), multipliers=drawn(model))
    for seed in range(20):
        backward(model, seed)
        before = [param.grad.clone() for param in model.parameters()]
        optimizer.step()
        assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), before, strict=True)) or (
            optimizer.phase.value == "done"
        )
    masks = optimizer.finalize()
    assert sum(row.nonzeros for row in sparsity_table(model)) == masks.num_kept == 70


@pytest.mark.parametrize("kind", [GSM, GSMAdamW])
def test_resume_and_copies_go_on_to_the_same_bits(kind):
    def begin():
        model = dense_net()
        settings = {"density": 0.2, "schedule": Schedule(20), "multipliers": drawn(model)}
        return model, kind(model.named_parameters(), 0.01, **settings)

    model, optimizer = begin()
    train(model, optimizer, range(5))
    states = saved_and_loaded([part.state_dict() for part in (model, optimizer)])
    copied, pickled = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    again = begin()
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for pair in ((model, optimizer), again, copied, pickled):
        train(*pair, range(5, 12))
    for other in (again, copied, pickled):
        assert_same_bits(model, other[0])


def test_wrapped_names_match():
    model = dense_net()
    wrapped = [(f"_orig_mod.{name}", param) for name, param in model.named_parameters()]
    GSM(wrapped, 0.1, density=0.5, multipliers=drawn(model))


# --- torch's optimizers ---


def test_gradients_are_as_they_were_after_a_step_and_the_handle_ends_it():
    model, twin = dense_net(), dense_net()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    handle = multiply_gradients(optimizer, drawn(model))
    backward(model)
    before = [param.grad.clone() for param in model.parameters()]
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in zip(model.parameters(), before, strict=True))
    twin.load_state_dict(model.state_dict())
    handle.remove()
    reference = torch.optim.SGD(twin.parameters(), lr=0.1)
    train(model, optimizer, [1])
    train(twin, reference, [1])
    assert_same_bits(model, twin)


def test_zeros_stay_zero():
    model = dense_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    multiply_gradients(optimizer, drawn(model), model)
    with torch.no_grad():
        model[0].weight[:, :6] = 0
    keep_masked(optimizer, {"0.weight": model[0].weight != 0}, model)
    train(model, optimizer, range(3))
    assert not model[0].weight[:, :6].any()


# --- bad input ---


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ({"5.weight": torch.ones(3)}, "multipliers of '5.weight', which is no parameter that is trained here"),
        ({"0.weight": torch.ones(3)}, r"'0\.weight' have shape \(3,\), and it has \(16, 12\)"),
        ({"0.weight": torch.zeros(16, 12)}, "of '0.weight' must be finite and above 0"),
        ({"0.weight": torch.full((16, 12), torch.inf)}, "must be finite and above 0"),
    ],
)
def test_multipliers_that_do_not_fit_are_refused(factors, said):
    model = dense_net()
    with pytest.raises(ValueError, match=said):
        GSM(model.named_parameters(), 0.1, density=0.5, multipliers=factors)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    with pytest.raises(ValueError, match=said):
        multiply_gradients(optimizer, factors)
    assert not optimizer._optimizer_step_pre_hooks


def test_what_else_is_refused():
    model = dense_net()
    factors = drawn(model)
    with pytest.raises(ValueError, match=r"multipliers go by names: pass model\.named_parameters\(\)"):
        GSM(model.parameters(), 0.1, density=0.5, multipliers=factors)
    with pytest.raises(ValueError, match="GSM multiplies gradients itself: pass multipliers= to it"):
        multiply_gradients(GSM(model.named_parameters(), 0.1, density=0.5), factors)
    half = dense_net(torch.bfloat16)
    GSM(half.named_parameters(), 0.1, density=0.5, multipliers=factors)
    with pytest.raises(ValueError, match=r"AdamW's multipliers need float32, and '0\.weight' is in half precision"):
        GSMAdamW(half.named_parameters(), 0.1, density=0.5, multipliers=factors)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    multiply_gradients(optimizer, factors)
    with pytest.raises(ValueError, match="take steps without a closure"):
        optimizer.step(lambda: 0.0)


def test_a_model_that_has_lost_channels_needs_multipliers_of_its_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    groups = ChannelGroups.trace(model, torch.rand(2, 3, 8, 8))
    factors = drawn(model)
    optimizer = GSM(model.named_parameters(), 0.1, pattern=groups, macs=0.5, multipliers=factors)
    slim = remove_channels(model, groups, optimizer.finalize(), optimizer)
    slim(torch.rand(2, 3, 8, 8)).sum().backward()
    before = copy.deepcopy(slim.state_dict())
    with pytest.raises(ValueError, match="build a new optimizer with those of this model"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in slim.state_dict().items())
