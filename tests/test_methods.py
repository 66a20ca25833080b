"""The methods that GSM is compared with, each against a naive definition on small nets."""

import copy
import math
from functools import partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adam, AdamW

from gsm_sgd import GSM, Masks, NonFiniteGradientError
from gsm_sgd.methods import METHODS, SNIP, Dense, Gradual, Method, OneShot, RigL, find_method
from gsm_sgd.methods.layers import divide
from nets import assert_same_bits, backward, conv_net, dense_net, kept_of, saved_and_loaded

STEPS = 40
Q = 44  # of the 352 weights of the dense net
SETTINGS = {"gradual": {"every": 3}, "rigl": {"every": 3}, "set": {"every": 3}, "ac_dc": {"phase": 0.1}}
SPARSE = [name for name in METHODS if name != "dense"]


def sgd(model):
    return SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True)


def adamw(model):
    return AdamW(model.named_parameters(), lr=3e-3, amsgrad=True)


OPTIMIZERS = [sgd, adamw]


def built(name, optimizer, num_kept=Q, **settings):
    return METHODS[name](optimizer, STEPS, num_kept=num_kept, **SETTINGS.get(name, {}), **settings)


def steps(model, optimizer, numbers):
    for number in numbers:
        backward(model, number)
        optimizer.step()


def matrices(model):
    return {name: p for name, p in model.named_parameters() if p.ndim > 1}


def top(scores, count):
    """Return a mask of the largest, by sorting; ties to the lower index."""
    order = sorted(range(scores.numel()), key=lambda i: (-float(scores.view(-1)[i]), i))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(scores.shape)


def global_top(tensors, count):
    """Return masks of the largest of all tensors together."""
    whole = top(torch.cat([tensor.reshape(-1) for tensor in tensors.values()]), count)
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view(tensors[key].shape) for key, part in zip(tensors, parts, strict=True)}


def impose(masks, weights, optimizer):
    """Zero weights, and all that the optimizer has for them."""
    for key, weight in weights.items():
        weight.data[~masks[key]] = 0
        for value in optimizer.state[weight].values():
            if value.shape == weight.shape:
                value[~masks[key]] = 0


def mask_gradients(masks, weights):
    for key, weight in weights.items():
        weight.grad[~masks[key]] = 0


def everything(weights):
    return {key: torch.ones_like(weight, dtype=torch.bool) for key, weight in weights.items()}


# --- all of them ---


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("name", SPARSE)
def test_exactly_q_weights_are_kept_in_the_end_and_stay(name, make):
    model = dense_net()
    optimizer = make(model)
    method = built(name, optimizer)
    steps(model, optimizer, range(STEPS))
    masks = method.finalize()
    assert isinstance(masks, Masks)
    assert list(masks) == ["0.weight", "2.weight", "4.weight"]
    assert masks.num_kept == method.kept == Q
    assert kept_of(model) == Q or (name == "set" and kept_of(model) < Q)  # some are grown where no gradient comes
    steps(model, optimizer, range(5))
    assert all(torch.equal(method.masks[key], mask) for key, mask in masks.items())
    assert not any(weight[~masks[key]].any() for key, weight in matrices(model).items())


@pytest.mark.parametrize("name", SPARSE)
def test_weights_that_are_cut_are_zero_after_every_step_and_so_is_their_momentum(name):
    model = dense_net()
    optimizer = sgd(model)
    method = built(name, optimizer)
    seen = set()
    for number in range(STEPS):
        steps(model, optimizer, [number])
        seen.add(method.masks.num_kept)
        for key, weight in matrices(model).items():
            away = ~method.masks[key]
            assert not weight[away].any()
            momentum = optimizer.state[weight].get("momentum_buffer")
            assert momentum is None or not momentum[away].any()
    assert min(seen) == Q
    assert (len(seen) > 1) == (name in ("one_shot", "gradual", "ac_dc"))


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 7, 20, 33])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_goes_on_from_a_state_ends_in_the_same_bits(name, stop, make):
    kept = {"num_kept": 352 if name == "dense" else Q}
    models, methods = [], []
    for interrupted in (False, True):
        model = dense_net()
        optimizer = make(model)
        method = built(name, optimizer, **kept)
        steps(model, optimizer, range(stop))
        if interrupted:
            state = saved_and_loaded([model.state_dict(), optimizer.state_dict(), method.state_dict()])
            model = dense_net(seed=1)
            optimizer = make(model)
            method = built(name, optimizer, **kept)
            for part, its in zip((model, optimizer, method), state, strict=True):
                part.load_state_dict(its)
        steps(model, optimizer, range(stop, STEPS))
        models.append(model)
        methods.append(method.finalize())
    assert_same_bits(*models)
    assert all(torch.equal(mask, methods[1][key]) for key, mask in methods[0].items())


@pytest.mark.parametrize("name", SPARSE)
def test_training_that_ends_early_is_cut_to_q_by_finalize(name):
    model = dense_net()
    optimizer = sgd(model)
    method = built(name, optimizer)
    steps(model, optimizer, range(1, 2))
    assert method.finalize().num_kept == Q == kept_of(model)
    again = copy.deepcopy(model.state_dict())
    steps(model, optimizer, range(STEPS))
    assert method.finalize().num_kept == Q
    assert kept_of(model) == Q
    assert not torch.equal(model.state_dict()["0.weight"], again["0.weight"])


@pytest.mark.parametrize("name", SPARSE)
def test_convolutions_and_half_precision(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = conv_net(dtype)
        optimizer = sgd(model)
        method = built(name, optimizer, num_kept=30)
        steps(model, optimizer, range(STEPS))
        assert method.finalize().num_kept == 30


def test_frozen_parameters_and_other_groups_are_left_alone():
    model = dense_net()
    model[0].weight.requires_grad_(False)
    groups = [{"params": [model[2].weight]}, {"params": [model[0].weight, model[4].weight], "prunable": False}]
    before = model[4].weight.detach().clone()
    method = RigL(SGD(groups, lr=0.1), 10, density=0.5)
    assert (method.num_prunable, method.kept) == (128, 64)
    assert torch.equal(model[4].weight, before)
    assert list(method.masks) == ["0"]


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("name", ["gradual", "rigl", "snip"])
def test_a_closure_comes_to_the_same(name, as_keyword):
    models = [dense_net(), dense_net()]
    for with_closure, model in enumerate(models):
        optimizer = adamw(model)
        method = built(name, optimizer)
        for number in range(STEPS):
            if not with_closure:
                steps(model, optimizer, [number])
                continue
            closure = partial(backward, model, number)
            loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            assert loss > 0
        method.finalize()
    assert_same_bits(*models)


def test_dense_is_the_optimizer_itself():
    models = [dense_net(), dense_net()]
    optimizers = [adamw(model) for model in models]
    Dense(optimizers[0], STEPS, compression=1)
    for model, optimizer in zip(models, optimizers, strict=True):
        steps(model, optimizer, range(10))
    assert_same_bits(*models)


# --- magnitude ---


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_gradual_is_the_cubic_rule(make):
    """Zhu and Gupta, equation 1: s_t = s_f (1 - (1 - (t - t0) / (n dt))^3), cut every dt steps."""
    ours, naive = dense_net(), dense_net()
    optimizer, other = make(ours), make(naive)
    method = Gradual(optimizer, STEPS, num_kept=Q, begin=0.1, end=0.75, every=4)
    steps(ours, optimizer, range(STEPS))

    weights, counts = matrices(naive), set()
    masks = everything(weights)
    for number in range(STEPS):
        backward(naive, number)
        mask_gradients(masks, weights)
        other.step()
        taken = number + 1
        if 4 <= taken <= 30 and ((taken - 4) % 4 == 0 or taken == 30):
            sparsity = (1 - Q / 352) * (1 - (1 - (taken - 4) / 26) ** 3)
            kept = 352 - round(352 * sparsity)
            masks = global_top({key: weight.detach().abs() for key, weight in weights.items()}, kept)
            counts.add(kept)
        impose(masks, weights, other)
    assert len(counts) == 7
    assert_same_bits(ours, naive)
    assert all(torch.equal(mask, masks[key]) for key, mask in method.masks.items())


@pytest.mark.parametrize("layers", ["global", "uniform", "erk"])
def test_one_shot_cuts_once_by_magnitude(layers):
    ours, naive = dense_net(), dense_net()
    optimizer, other = sgd(ours), sgd(naive)
    method = OneShot(optimizer, STEPS, num_kept=Q, cut=0.25, layers=layers)
    assert method.restart == 10
    steps(ours, optimizer, range(10))
    steps(naive, other, range(10))
    sizes = {key: weight.detach().abs() for key, weight in matrices(naive).items()}
    masks = global_top(sizes, Q)
    if layers != "global":
        kept = {"uniform": [24, 16, 4], "erk": [19, 17, 8]}[layers]
        masks = {key: top(size, count) for (key, size), count in zip(sizes.items(), kept, strict=True)}
    impose(masks, matrices(naive), other)
    assert_same_bits(ours, naive)
    for number in range(10, STEPS):
        backward(naive, number)
        mask_gradients(masks, matrices(naive))
        other.step()
    steps(ours, optimizer, range(10, STEPS))
    assert_same_bits(ours, naive)


@pytest.mark.parametrize(("name", "settings"), [("one_shot", {"cut": 0}), ("magnitude", {}), ("gradual", {"end": 0.0})])
def test_the_largest_of_a_trained_net_can_be_kept_at_once(name, settings):
    model = dense_net()
    masks = global_top({key: weight.detach().abs() for key, weight in matrices(model).items()}, Q)
    method = built(name, sgd(model), **settings)
    assert all(torch.equal(mask, masks[key]) for key, mask in method.masks.items())
    assert kept_of(model) == Q


def test_ac_dc_takes_turns():
    """The defaults in 100 steps are the paper's epochs on ImageNet."""
    model = dense_net()
    optimizer = sgd(model)
    method = METHODS["ac_dc"](optimizer, 100, num_kept=Q)
    sparse = [*range(10, 15), *range(20, 25), *range(30, 35), *range(40, 45), *range(50, 55), *range(60, 65)]
    sparse += [*range(70, 75), *range(85, 100)]
    kept = []
    for number in range(100):
        kept.append(method.masks.num_kept)
        if number == 15:  # the first step of a dense phase
            assert not any(optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())
            assert kept_of(model) == Q
        if number in (10, 20, 85):
            assert kept_of(model) == Q
        steps(model, optimizer, [number])
    assert [number for number, count in enumerate(kept) if count == Q] == sparse
    assert {count for number, count in enumerate(kept) if number not in sparse} == {352}


def test_ac_dc_keeps_the_largest_and_lets_the_rest_come_back():
    model = dense_net()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = 0.5
    method = METHODS["ac_dc"](optimizer, 100, num_kept=176)
    steps(model, optimizer, range(9))
    twin = copy.deepcopy(model)  # without hooks
    other = sgd(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(twin, other, [9])
    steps(model, optimizer, [9])
    masks = global_top({key: weight.detach().abs() for key, weight in matrices(twin).items()}, 176)
    assert all(torch.equal(mask, masks[key]) for key, mask in method.masks.items())
    steps(model, optimizer, range(10, 15))
    assert kept_of(model) == 176
    steps(model, optimizer, range(15, 20))
    assert method.masks.num_kept == 176  # the next phase has begun
    assert any((method.masks[key] & ~mask).any() for key, mask in masks.items())


# --- dynamic ---


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_rigl_is_algorithm_1(make):
    """Drop the smallest |w|, grow the largest |g| of the rest, in place of a step, with a cosine."""
    ours, naive = dense_net(), dense_net()
    optimizer, other = make(ours), make(naive)
    method = RigL(optimizer, STEPS, num_kept=Q, every=5, fraction=0.5, until=0.8)
    masks = {key: mask.clone() for key, mask in method.masks.items()}
    assert [int(mask.sum()) for mask in masks.values()] == [19, 17, 8]
    impose(masks, matrices(naive), other)
    steps(ours, optimizer, range(STEPS))

    weights, changed = matrices(naive), 0
    for number in range(STEPS):
        backward(naive, number)
        if number % 5 == 0 and 0 < number < 32:
            for key, weight in weights.items():
                mask = masks[key]
                active = int(mask.sum())
                dropped = int(0.25 * (1 + math.cos(math.pi * number / 32)) * active)
                stay = top(torch.where(mask, weight.detach().abs(), -1.0), active - dropped)
                grown = top(torch.where(stay, -1.0, weight.grad.abs()), dropped)
                assert not weight[grown & ~mask].any()
                masks[key] = stay | grown
                changed += int((masks[key] != mask).sum())
            impose(masks, weights, other)
        else:
            mask_gradients(masks, weights)
            other.step()
            impose(masks, weights, other)
    assert changed
    assert_same_bits(ours, naive)
    assert all(torch.equal(mask, masks[key]) for key, mask in method.masks.items())


def test_rigl_grows_only_where_a_gradient_is_and_adam_starts_afresh():
    model = dense_net()
    optimizer = Adam(model.named_parameters(), lr=1e-2)
    method = RigL(optimizer, 100, num_kept=Q, every=4, fraction=0.3)
    steps(model, optimizer, range(4))
    before = method.masks
    backward(model, 4)
    silent = model[0].weight.grad[:, 0].zero_()
    assert not silent.any()
    optimizer.step()
    new = {key: mask & ~before[key] for key, mask in method.masks.items()}
    assert not new["0.weight"][:, 0].any()
    for key, weight in matrices(model).items():
        assert new[key].any()
        assert not weight[new[key]].any()
        assert not optimizer.state[weight]["exp_avg_sq"][new[key]].any()


def test_a_gradient_that_is_not_finite_is_named():
    for name in ("rigl", "snip"):
        model = dense_net()
        optimizer = sgd(model)
        built(name, optimizer)
        steps(model, optimizer, range(3 if name == "rigl" else 0))
        backward(model)
        model[2].weight.grad[0, 0] = math.nan
        with pytest.raises(NonFiniteGradientError, match=r"the gradient of '2\.weight' is not finite"):
            optimizer.step()


def test_set_grows_at_random_by_its_seed():
    masks = []
    for seed in (0, 0, 1):
        model = dense_net()
        optimizer = sgd(model)
        method = built("set", optimizer, seed=seed)
        first = method.masks
        seen = {key: mask.clone() for key, mask in first.items()}
        for number in range(STEPS):
            steps(model, optimizer, [number])
            assert method.masks.num_kept == Q
            seen = {key: mask | method.masks[key] for key, mask in seen.items()}
        masks.append(method.masks)
        assert [int(mask.sum()) for mask in first.values()] == [int(mask.sum()) for mask in method.masks.values()]
        assert sum(int(mask.sum()) for mask in seen.values()) > 1.5 * Q
    assert all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())
    assert any((mask != masks[2][key]).any() for key, mask in masks[0].items())


# --- at initialisation ---


def test_snip_keeps_what_matters_on_the_first_batch():
    model = dense_net()
    optimizer = sgd(model)
    method = SNIP(optimizer, STEPS, num_kept=Q)
    before = copy.deepcopy(model)
    assert method.masks.num_kept == 352
    backward(before)
    scores = {key: (weight * weight.grad).detach().abs() for key, weight in matrices(before).items()}
    masks = global_top(scores, Q)
    steps(model, optimizer, [0])
    for (key, weight), was in zip(model.named_parameters(), before.parameters(), strict=True):
        expected = was * masks[key] if key in masks else was
        assert torch.equal(weight, expected), key  # the first batch takes no step
    steps(model, optimizer, range(1, 5))
    assert all(torch.equal(mask, masks[key]) for key, mask in method.masks.items())
    assert not torch.equal(model[0].bias, before[0].bias)


def test_random_masks_depend_on_seed_and_layer_alone():
    masks = [built("random", sgd(dense_net(seed=number)), seed=seed).masks for number, seed in enumerate((0, 0, 1))]
    assert all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())
    assert any((mask != masks[2][key]).any() for key, mask in masks[0].items())
    assert [int(mask.sum()) for mask in masks[0].values()] == [19, 17, 8]
    uniform = built("random", sgd(dense_net()), layers="uniform").masks
    assert [int(mask.sum()) for mask in uniform.values()] == [24, 16, 4]


# --- how a budget is divided ---


def naive_erk(shapes, density):
    """Return the densities, as in the appendix of Evci et al.: dense layers are found one by one."""
    dense = set()
    while True:
        total = sum(math.prod(shape) for shape in shapes)
        left = density * total - sum(math.prod(shapes[i]) for i in dense)
        raw = {i: sum(shape) / math.prod(shape) for i, shape in enumerate(shapes) if i not in dense}
        epsilon = left / sum(raw[i] * math.prod(shapes[i]) for i in raw)
        worst = max(raw, key=lambda i: raw[i])
        if epsilon * raw[worst] <= 1:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(shapes))]
        dense.add(worst)


shapes = st.lists(st.lists(st.integers(1, 9), min_size=2, max_size=4), min_size=1, max_size=6)


@given(shapes, st.floats(0.01, 0.99))
def test_erk_divides_the_budget_exactly(shapes, density):
    total = sum(math.prod(shape) for shape in shapes)
    num_kept = max(1, int(density * total))
    by_name = {str(number): shape for number, shape in enumerate(shapes)}
    try:
        kept = divide(by_name, num_kept, "erk")
    except ValueError:
        assert num_kept < 2 * total / min(sum(shape) for shape in shapes) + len(shapes)  # a share below one weight
        return
    assert sum(kept.values()) == num_kept
    for count, share, shape in zip(kept.values(), naive_erk(shapes, num_kept / total), shapes, strict=True):
        assert abs(count - share * math.prod(shape)) < 1 + 1e-6
        assert 1 <= count <= math.prod(shape)


def test_uniform_divides_the_budget_exactly():
    assert divide({"a": (10, 10), "b": (5, 5), "c": (3, 3)}, 67, "uniform") == {"a": 50, "b": 13, "c": 4}
    assert divide({"a": (2, 3), "b": (5, 5)}, 31, "erk") == {"a": 6, "b": 25}


def test_small_layers_stay_denser_by_erk():
    kept = divide({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 4436, "erk")
    assert kept == {"fc1": 3017, "fc2": 1113, "fc3": 306}
    assert divide({"fc1": (300, 784), "fc3": (10, 10)}, 7_000, "erk")["fc3"] == 100


# --- one of one's own ---


def test_a_method_of_ones_own_is_one_class():
    class Backwards(Method):
        """Keeps the smallest."""

        name: ClassVar[str] = "backwards"
        every: int = 2

        def after_step(self):
            if self.step == self.every:
                return Masks({key: ~top(w.detach().abs(), w.numel() - 5) for key, w in self.weights.items()})
            return None

    assert Backwards.settings() == {"every": 2}
    model = dense_net()
    optimizer = sgd(model)
    method = Backwards(optimizer, 10, num_kept=15, every=4)
    steps(model, optimizer, range(6))
    assert method.finalize().num_kept == 15 == kept_of(model)


def test_settings_are_known_with_their_defaults():
    assert RigL.settings() == {"layers": "erk", "every": 100, "fraction": 0.3, "until": 0.75, "seed": 0}
    assert Dense.settings() == {}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.__doc__
        assert all(f"{key}: " in method.__doc__ for key in method.settings())


# --- refused ---


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gradual", {"begin": 0.5, "end": 0.4}, "begin must not be above end"),
        ("gradual", {"end": 1.1}, r"end is a share, from 0 to 1, not 1\.1"),
        ("gradual", {"end": "soon"}, "end must be a number, not 'soon'"),
        ("gradual", {"every": 0}, "every must be at least 1, not 0"),
        ("gradual", {"layers": "all"}, "layers must be global or erk or uniform, not 'all'"),
        ("rigl", {"layers": "global"}, "layers must be erk or uniform, not 'global'"),
        ("rigl", {"fraction": -0.1}, r"fraction is a share, from 0 to 1, not -0\.1"),
        ("rigl", {"num_kept": 2}, r"erk densities leave '4\.weight' none of 2 weights: keep more"),
        ("random", {"num_kept": 2, "layers": "uniform"}, r"uniform densities leave '4\.weight' none of 2 weights"),
        ("one_shot", {"num_kept": 2, "layers": "erk"}, r"erk densities leave '4\.weight' none"),
        ("set", {"seed": 0.5}, r"seed must be a whole number, not 0\.5"),
        ("one_shot", {"cut": 2}, "cut is a share, from 0 to 1, not 2"),
        ("ac_dc", {"warm_up": 0.9}, "must not be more than 1 together"),
        ("ac_dc", {"phase": 0.001}, r"a phase of 0\.001 is less than one of 40 steps"),
        ("dense", {}, "dense keeps all 352 weights, not 44: set compression to 1"),
        ("snip", {"num_kept": 0}, "num_kept must be at least 1, not 0"),
        ("snip", {"num_kept": 353}, "num_kept 353 is more than the 352 weights"),
        ("snip", {"num_kept": None}, "give exactly one of compression, density, sparsity and num_kept, not none"),
        ("snip", {"total_steps": 0}, "total_steps must be at least 1, not 0"),
    ],
)
def test_bad_settings_are_refused_and_nothing_changes(name, settings, message):
    model = dense_net()
    before, optimizer = copy.deepcopy(model), sgd(model)
    with pytest.raises(ValueError, match=message):
        METHODS[name](optimizer, **{"total_steps": STEPS, "num_kept": Q, **settings})
    assert_same_bits(model, before)
    assert not optimizer._optimizer_step_pre_hooks


def test_an_unknown_method_is_named_with_the_nearest():
    assert find_method("rigl") is RigL
    with pytest.raises(ValueError, match="unknown method 'gradul': did you mean 'gradual'"):
        find_method("gradul")
    with pytest.raises(ValueError, match="unknown method 'xyzzy': choose one of one_shot, gradual, rigl, set, random"):
        find_method("xyzzy")


def test_what_cannot_be_pruned_is_refused():
    model = dense_net()
    with pytest.raises(ValueError, match="GSM prunes by itself: give rigl a torch optimizer"):
        RigL(GSM(model.named_parameters(), 0.1, compression=2), STEPS, num_kept=Q)
    with pytest.raises(ValueError, match="nothing to prune"):
        RigL(SGD([model[0].bias], lr=0.1), STEPS, num_kept=Q)
    with pytest.raises(ValueError, match="'0' is complex"):
        RigL(SGD([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], lr=0.1), STEPS, num_kept=1)


def test_a_state_of_something_else_is_refused():
    def at(name, net=dense_net, **settings):
        return METHODS[name](sgd(net()), STEPS, **{"num_kept": Q, **settings})

    state = saved_and_loaded(at("rigl").state_dict())
    for other, message in (
        (at("set"), "saved with method rigl, which is set here"),
        (at("rigl", every=7), "saved with every 100, which is 7 here"),
        (at("rigl", num_kept=40), "saved with num_kept 44, which is 40 here"),
        (at("rigl", net=conv_net), "masks are of other parameters"),
    ):
        before = other.masks
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert all(torch.equal(mask, before[key]) for key, mask in other.masks.items())


def test_snip_needs_a_gradient_of_every_weight():
    model = dense_net()
    optimizer = sgd(model)
    built("snip", optimizer)
    backward(model)
    model[2].weight.grad = None
    with pytest.raises(ValueError, match=r"'2\.weight' has no dense gradient in the first step"):
        optimizer.step()
