import copy
import logging
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gsm_sgd import GSM, GSMAdamW, NonFiniteGradientError, Schedule
from gsm_sgd.native import kernel, library
from gsm_sgd.selection.stored import select_top

pytestmark = pytest.mark.skipif(library.load_step() is None, reason="needs a C compiler and OpenMP")

MOVES_ONLY_WHAT_IS_ACTIVE = {"momentum": 0.0, "weight_decay": 0.0, "passive_decay": 0.0}


class GSMByTorch(GSM):
    _in_c = None


class GSMAdamWByTorch(GSMAdamW):
    _in_c = None


TWINS = {GSM: GSMByTorch, GSMAdamW: GSMAdamWByTorch}
SETTINGS = [
    (GSM, {"momentum": 0.9}),
    (GSM, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (GSM, {"momentum": 0.0, "passive_decay": 0.05}),
    (GSM, {"momentum": 0.9, "weight_decay": 0.0, "score": "magnitude"}),
    (GSMAdamW, {}),
    (GSMAdamW, {"betas": (0.3, 0.95), "weight_decay": 0.0}),
    (GSMAdamW, {"passive_decay": 0.5, "eps": 1e-4}),
]


def net():
    """Return a net with tails of all lengths, more than a chunk of weights, and a convolution with channels last."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 7, 3),
        nn.Flatten(),
        nn.Linear(7 * 6 * 6, 67),
        nn.Tanh(),
        nn.Linear(67, 11),
        nn.BatchNorm1d(11),
    ]
    model = nn.Sequential(*layers)
    model[0].to(memory_format=torch.channels_last)
    return model


def give_gradients(model, step):
    torch.manual_seed(step + 1)
    images = torch.randn(8, 3, 8, 8)
    model.zero_grad()
    model(images).square().mean().backward()


def tensors_of(optimizer):
    return [
        tensor
        for group in optimizer.param_groups
        for param in group["params"]
        for tensor in (param, *(v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)))
    ]


def assert_same(a, b):
    ours, theirs = tensors_of(a), tensors_of(b)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.fixture
def steps(monkeypatch):
    """Count the steps in C, and of these the ones that repeat the last one."""
    taken = {"in C": 0, "repeated": 0}
    step, repeat = kernel.Kernel.step, GSM._repeat

    def counted(self, *args):
        done = step(self, *args)
        taken["in C"] += done
        return done

    def repeated(self):
        done = repeat(self)
        taken["repeated"] += done
        return done

    monkeypatch.setattr(kernel.Kernel, "step", counted)
    for kind in TWINS:
        monkeypatch.setattr(kind, "_repeat", repeated)
    return taken


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- the same bits ---


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
def test_all_phases_have_the_bits_of_torchs_operations(kind, settings, steps, two_threads):
    total = 20
    twins = []
    for cls in (kind, TWINS[kind]):
        model = net()
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters(), "lr": 0.02}]
        twins.append(
            (model, cls(groups, lr=0.01, density=0.2, schedule=Schedule(total, ramp=0.3, cut=0.8), **settings))
        )
    for step in range(total):
        for model, optimizer in twins:
            give_gradients(model, step)
            optimizer.step()
        assert_same(twins[0][1], twins[1][1])
    assert steps["in C"] == total - 1  # the first, at density 1, is torch's
    assert steps["repeated"] == steps["in C"] - 3  # the first of them, of the fade, and after the cut are laid out anew
    assert twins[0][1].buffer_bytes == 0


def test_a_step_is_the_same_whatever_the_number_of_threads():
    ends = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(size)) for size in ((300, 301), (1000, 7), (5,))]
        optimizer = GSM(weights, 0.1, compression=9)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for step in range(3):
            torch.manual_seed(step)
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        torch.set_num_threads(before)
        ends.append(weights)
    for one, other in pairwise(ends):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- the choice ---


def active_of(weights, grads, num_kept, **settings):
    """Return which weights a step moves along their gradients."""
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = GSM(params, 1.0, num_kept=num_kept, **MOVES_ONLY_WHAT_IS_ACTIVE, **settings)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    assert optimizer._kernel is not None, "the step was not in C"
    return [param.detach() != weight for param, weight in zip(params, weights, strict=True)]


@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4), levels=st.integers(1, 5))
def test_exactly_the_largest_scores_are_active_however_many_are_equal(data, sizes, levels):
    total = 10 * sum(sizes)
    if total < 2:
        return
    torch.manual_seed(data.draw(st.integers(0, 99)))
    weights = [torch.randint(1, 1 + levels, (10, size)).float() for size in sizes]
    grads = [torch.randint(-1, 2, weight.shape).float() for weight in weights]
    num_kept = data.draw(st.integers(1, total - 1))
    expected = select_top([(w * g).abs() for w, g in zip(weights, grads, strict=True)], num_kept, positive=True)
    for mine, other in zip(active_of(weights, grads, num_kept), expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["normal", "few values", "all equal", "mostly zero", "tiny", "one layer has all"])
def test_the_choice_among_more_weights_than_there_is_room_for(kind, share):
    torch.manual_seed(1)
    weights = [torch.randn(400, 300), torch.randn(30, 1001)]
    scale = {"tiny": 1e-37, "one layer has all": 1e-3}.get(kind, 1.0)
    grads = [torch.randn_like(weights[0]) * scale, torch.randn_like(weights[1])]
    if kind in ("few values", "all equal"):
        weights = [torch.ones_like(weight) for weight in weights]
        grads = [grad.sign() * (1 if kind == "all equal" else grad.abs().round() + 1) for grad in grads]
    if kind == "mostly zero":
        grads = [grad * (torch.rand_like(grad) < 0.2) for grad in grads]
    if kind == "tiny":
        weights = [weight.abs() + 1 for weight in weights]
        grads[1] = grads[1] * scale
    num_kept = round(share * sum(weight.numel() for weight in weights))
    expected = select_top([(w * g).abs() for w, g in zip(weights, grads, strict=True)], num_kept, positive=True)
    params = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = GSM(params, 0.5, num_kept=num_kept, momentum=0.5, weight_decay=0.0, passive_decay=0.0)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    assert optimizer._kernel is not None
    for param, grad, mask in zip(params, grads, expected, strict=True):
        assert torch.equal(optimizer.state[param]["momentum_buffer"], grad * mask)  # even what is lost in the weights


@pytest.mark.parametrize("num_kept", [1, 2, 3, 4, 5, 6, 7, 20_005, 20_006, 49_999])
def test_ties_far_apart_go_to_the_lower_index(num_kept):
    """Six equal scores, in several chunks of three tensors, among other ones that are larger or smaller."""
    torch.manual_seed(0)
    weights = [torch.ones(100, 200), torch.ones(200, 200), torch.ones(1, 40)]
    grads = [torch.rand(100, 200) * 0.1 + 0.6, torch.rand(200, 200) * 0.1 + 0.1, torch.rand(1, 40) * 0.1]
    for number, place in ((0, 7), (0, 19_990), (1, 5), (1, 39_000), (1, 39_001), (2, 3)):
        grads[number].view(-1)[place] = 0.5
    if num_kept < 10:
        num_kept += 20_000 - 2
    expected = select_top(grads, num_kept)
    for mine, other in zip(active_of(weights, grads, num_kept), expected, strict=True):
        assert torch.equal(mine, other)


def test_ties_of_a_weight_whose_memory_is_not_in_the_order_of_its_index_go_to_the_lower_index():
    weight = torch.ones(4, 6, 3, 3).to(memory_format=torch.channels_last)
    param = nn.Parameter(weight.clone())
    optimizer = GSM([param], 1.0, num_kept=50, **MOVES_ONLY_WHAT_IS_ACTIVE)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert torch.equal((param != 1).flatten(), torch.arange(weight.numel()) < 50)


def test_denormal_scores_count_as_the_caller_has_them_count():
    weights, grads = [torch.full((10, 10), 1e-20)], [torch.full((10, 10), 1e-20)]
    momenta = []
    for flush in (False, True):
        if not torch.set_flush_denormal(flush):
            pytest.skip("this processor cannot flush denormal numbers")
        try:
            param = nn.Parameter(weights[0].clone())
            optimizer = GSM([param], 0.1, num_kept=7, momentum=0.5, weight_decay=0.0, passive_decay=0.0)
            param.grad = grads[0]
            optimizer.step()
            momenta.append(int((optimizer.state[param]["momentum_buffer"] != 0).sum()))
        finally:
            torch.set_flush_denormal(False)
    assert momenta == [7, 0]


# --- what is not finite ---


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", ["taylor", "magnitude"])
@pytest.mark.parametrize("phase", [1, 8, 12, 18])
def test_a_gradient_that_is_not_finite_changes_nothing_in_any_phase(value, score, phase):
    model = net()
    schedule = Schedule(20, ramp=0.3, fade=0.2, cut=0.8)
    optimizer = GSM(model.named_parameters(), 0.01, density=0.2, schedule=schedule, score=score)
    for step in range(phase):
        give_gradients(model, step)
        optimizer.step()
    give_gradients(model, phase)
    weight = model[4].weight
    kept = int(optimizer.masks["4.weight"].flatten().nonzero()[-1]) if optimizer.masks else 700
    weight.grad.view(-1)[kept] = value
    before = copy.deepcopy(tensors_of(optimizer))
    with pytest.raises(NonFiniteGradientError, match=r"'4\.weight' is not finite"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(optimizer), strict=True))
    assert optimizer.param_groups[0]["step"] == phase


def test_an_infinite_weight_is_active_as_with_torchs_operations():
    ends = []
    for kind in (GSM, GSMByTorch):
        model = net()
        with torch.no_grad():
            model[4].weight[3, 5] = math.inf
        optimizer = kind(model.parameters(), 0.01, density=0.1, momentum=0.0)
        for param in model.parameters():
            torch.manual_seed(param.numel())
            param.grad = torch.randn_like(param)
        optimizer.step()
        ends.append([param.detach().nan_to_num(nan=7.0) for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- what may change between steps ---


def freeze(model, optimizer):
    model[2].weight.requires_grad_(False)


def freeze_and_unfreeze(model, optimizer):
    freeze(model, optimizer)
    give_gradients(model, 99)
    optimizer.step()
    model[2].weight.requires_grad_(True)


def replace_weights(model, optimizer):
    model[2].weight.data = model[2].weight.data * 0.5


def shrink_weights_in_place(model, optimizer):
    model[2].weight.data.mul_(0.5)


def replace_a_buffer(model, optimizer):
    state = optimizer.state[model[4].weight]
    state.update({name: tensor * 0.5 for name, tensor in state.items() if name != "step"})


def move_a_buffer(model, optimizer):
    state = optimizer.state[model[4].weight]
    for name, tensor in state.items():
        if name != "step":
            tensor.data = tensor.data * 0.5


def forget_a_state(model, optimizer):
    del optimizer.state[model[4].weight]


def forget_all_states(model, optimizer):
    optimizer.state.clear()


def load_a_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def change_rates(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.003, 0.1


def give_a_tensor_as_rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.004)


def ask_for_a_loop(model, optimizer):
    optimizer.param_groups[0]["foreach"] = False


def prune_no_more(model, optimizer):
    optimizer.param_groups[0]["prunable"] = False


def leave_out_a_gradient(model, optimizer):
    give_gradients(model, 98)
    model[2].weight.grad = None
    optimizer.step()


def add_a_group(model, optimizer):
    torch.manual_seed(5)
    model.append(nn.Linear(11, 5))
    optimizer.add_param_group({"params": model[-1].parameters()})


def transpose_a_gradient(model, optimizer):
    give_gradients(model, 97)
    weight = model[4].weight
    weight.grad = weight.grad.t().contiguous().t()
    optimizer.step()


CHANGES = [
    *(freeze, freeze_and_unfreeze, replace_weights, shrink_weights_in_place, replace_a_buffer, move_a_buffer),
    *(forget_a_state, forget_all_states, load_a_state, change_rates, give_a_tensor_as_rate, ask_for_a_loop),
    *(prune_no_more, leave_out_a_gradient, add_a_group, transpose_a_gradient),
]


@pytest.mark.parametrize("kind", TWINS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_steps_is_seen(change, kind):
    twins = []
    for cls in (kind, TWINS[kind]):
        model = net()
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        twins.append((model, cls(groups, lr=0.01, density=0.2, passive_decay=0.01)))
    for model, optimizer in twins:
        for step in range(3):
            give_gradients(model, step)
            optimizer.step()
        change(model, optimizer)
        for step in range(3, 6):
            give_gradients(model, step)
            optimizer.step()
    assert_same(twins[0][1], twins[1][1])


def test_masks_that_are_changed_in_place_count():
    ends = []
    for kind in (GSM, GSMByTorch):
        model = net()
        optimizer = kind(model.named_parameters(), 0.01, density=0.2, schedule=Schedule(10, ramp=0.2, cut=0.5))
        for step in range(9):
            if step == 7:
                for param in (model[0].weight, model[4].weight):  # the one with channels last, the other without
                    optimizer.state[param]["mask"].fill_(True)
            give_gradients(model, step)
            optimizer.step()
        ends.append(optimizer)
    assert_same(*ends)
    assert ends[0].masks["0.weight"].is_contiguous()


def test_momentum_that_is_switched_on_gets_its_buffer():
    ends = []
    for kind in (GSM, GSMByTorch):
        model = net()
        optimizer = kind(model.parameters(), 0.01, density=0.2, momentum=0.0)
        for step in range(4):
            optimizer.param_groups[0]["momentum"] = 0.9 * (step > 1)
            give_gradients(model, step)
            optimizer.step()
        ends.append(optimizer)
    assert_same(*ends)
    assert all("momentum_buffer" in state for state in ends[0].state.values())


def trained():
    """Return a net and its optimizer after two steps."""
    model = net()
    optimizer = GSM(model.parameters(), 0.01, density=0.2)
    for step in range(2):
        give_gradients(model, step)
        optimizer.step()
    return model, optimizer


def test_a_copy_has_its_own_weights():
    model, optimizer = trained()
    twin_model, twin = copy.deepcopy((model, optimizer))
    give_gradients(twin_model, 2)
    before = copy.deepcopy(tensors_of(optimizer))
    twin.step()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(optimizer), strict=True))
    give_gradients(model, 2)
    optimizer.step()
    assert_same(optimizer, twin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_take_torchs_operations(dtype, steps):
    model = nn.Linear(10, 10).to(dtype)
    optimizer = GSM(model.parameters(), 0.1, density=0.5)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert steps == {"in C": 0, "repeated": 0}


def test_a_subclass_with_a_rule_of_its_own_runs_it(steps):
    class Still(GSM):
        def _masked_(self, part, active):
            pass

    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Still([weight], 0.1, density=0.5)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(weight, torch.ones(4, 4))
    assert steps["in C"] == 0


# --- the compiler ---


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Build anew, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load_step.cache_clear()
    yield tmp_path / "cache" / "gsm-sgd"
    monkeypatch.undo()
    library.load_step.cache_clear()


def test_it_is_built_once_and_found_again(fresh, monkeypatch):
    assert library.load_step() is not None
    (built,) = fresh.iterdir()
    assert built.suffix == ".so"
    library.load_step.cache_clear()
    monkeypatch.setattr(library, "_build", partial(pytest.fail, "built again"))
    assert library.load_step() is not None


def compiler(folder, text):
    path = folder / "broken-cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("way", ["missing", "fails", "writes rubbish"])
def test_without_a_compiler_that_works_a_step_takes_torchs_operations(way, fresh, tmp_path, monkeypatch, caplog):
    _, expected = trained()
    broken = {
        "missing": str(tmp_path / "none"),
        "fails": compiler(tmp_path, "exit 1"),
        "writes rubbish": compiler(tmp_path, 'for last; do :; done; echo rubbish > "$last"'),
    }
    monkeypatch.setenv("CC", broken[way])
    library.load_step.cache_clear()
    with caplog.at_level(logging.INFO, "gsm_sgd"):
        _, optimizer = trained()
    assert optimizer._kernel is None
    assert "steps use torch's operations" in caplog.text
    assert_same(optimizer, expected)


@pytest.mark.parametrize("damage", ["no folder", "rubbish"])
def test_a_cache_that_is_no_use_is_done_without(damage, fresh):
    if damage == "no folder":
        fresh.parent.mkdir()
        fresh.write_text("a file where the folder should be")
    else:
        library.load_step()
        (built,) = fresh.iterdir()
        built.unlink()
        built.write_bytes(b"rubbish")
        library.load_step.cache_clear()
    assert library.load_step() is not None
    assert trained()[1]._kernel is not None
