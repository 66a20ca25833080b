import copy
import io
import math

import pytest
import torch
from torch import nn

from gsm_sgd import GSM
from gsm_sgd.scores import SCORES, evaluate, find_score, magnitude, random, taylor
from reference_gsm import naive_active

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
STILL = {"momentum": 0.0, "weight_decay": 0.5, "passive_decay": 0.0}  # passive weights do not move


def made(dtype=torch.float32, seed=0):
    """Return three parameters, one of them channels last, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in ((6, 8), (4, 3, 2, 2), (4, 8)):
        params.append(nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        params[-1].grad = torch.randn(shape, generator=generator).to(dtype)
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    return params


def moved_by_a_step(optimizer, params):
    before = [param.detach().clone() for param in params]
    optimizer.step()
    return [param.detach() != old for param, old in zip(params, before, strict=True)]


def assert_equal(tensors, others):
    assert all(torch.equal(one, two) for one, two in zip(tensors, others, strict=True))


# --- what they are ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("score", "expected"), [("taylor", [1e-8, 6.0, 0.0]), ("magnitude", [1e-3, 2.0, 5.0])], ids=["taylor", "magnitude"]
)
def test_taylor_and_magnitude_do_not_underflow_in_half_precision(score, expected, dtype):
    weight = torch.tensor([1e-3, -2.0, 5.0], dtype=dtype)
    found = evaluate(SCORES[score], weight, torch.tensor([-1e-5, 3.0, 0.0], dtype=dtype), {})
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), rtol=0.01, atol=0)
    assert weight[1] == -2


def test_random_is_uniform_above_zero_and_its_seeds():
    weight = torch.empty(50, 1000)
    scores = random(weight, weight, {"seed": 1})
    assert 0 < scores.min() < 1e-3
    assert 0.999 < scores.max() <= 1
    assert scores.mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(scores, random(weight, weight, {"seed": 1}))
    assert not torch.equal(scores, random(weight, weight, {"seed": 2}))


def test_scores_have_names():
    assert [find_score(name) for name in ("taylor", "magnitude", "random")] == [taylor, magnitude, random]
    with pytest.raises(ValueError, match=r"unknown score 'fischer': choose taylor, magnitude, random, fisher, or pass"):
        GSM(made(), 0.1, compression=2, score="fischer")


# --- what they choose ---


def small_first(weight, grad, state):
    """Return 1 / |w| where w is positive: nothing else is ever active."""
    return torch.where(weight > 0, 1 / weight.abs(), 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("score", ["taylor", "magnitude", small_first, "registered"])
@pytest.mark.parametrize("num_kept", [1, 110])
def test_the_weights_with_the_largest_scores_are_active(monkeypatch, score, num_kept):
    monkeypatch.setitem(SCORES, "registered", small_first)
    params = made()
    optimizer = GSM(params, 0.1, num_kept=num_kept, score=score, **STILL)
    scores = [find_score(score)(p.detach(), p.grad, {}) for p in params]
    assert_equal(moved_by_a_step(optimizer, params), naive_active(scores, num_kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_see_float32_at_least_and_what_the_optimizer_knows_of_a_weight(dtype):
    seen = []

    def score(weight, grad, state):
        seen.append((weight.dtype, grad.dtype, {key: copy.deepcopy(value) for key, value in state.items()}))
        return weight.abs()

    params = made(dtype)
    optimizer = GSM(params, 0.1, compression=4, score=score)
    optimizer.step()
    buffers = [optimizer.state[param]["momentum_buffer"].clone() for param in params]
    optimizer.step()
    wide = torch.promote_types(dtype, torch.float32)
    assert [entry[:2] for entry in seen] == [(wide, wide)] * 6
    first, second = [[entry[2] for entry in seen[number : number + 3]] for number in (0, 3)]
    assert [state.keys() for state in first] == [{"momentum_buffer", "seed"}] * 3
    assert not any(state["momentum_buffer"].any() for state in first)
    assert_equal([state["momentum_buffer"] for state in second], buffers)
    assert [state["seed"] for state in first] == [state["seed"] for state in second]
    assert len({state["seed"] for state in first}) == 3


def test_without_momentum_there_is_a_seed_alone():
    seen = []
    score = lambda weight, grad, state: seen.append(state) or weight.abs()  # noqa: E731
    GSM(made(), 0.1, compression=4, momentum=0.0, score=score).step()
    assert [state.keys() for state in seen] == [{"seed"}] * 3


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda weight, grad, state: weight.abs().sum(), r"of the weight's shape \(6, 8\), not torch.float32 of \(\)"),
        (lambda weight, grad, state: weight.t(), r"of the weight's shape \(6, 8\), not torch.float32 of \(8, 6\)"),
        (lambda weight, grad, state: weight > 0, "must return a floating-point tensor of the weight's shape"),
        (lambda weight, grad, state: weight.tolist(), r"of the weight's shape \(6, 8\), not list"),
        (lambda weight, grad, state: None, "not NoneType"),
    ],
)
def test_functions_that_return_something_else_are_refused(score, message):
    params = made()
    before = copy.deepcopy(params)
    optimizer = GSM(params, 0.1, compression=4, score=score)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_equal(params, before)
    assert not optimizer.state
    assert optimizer.param_groups[0]["step"] == 0


def test_infinite_scores_are_the_largest():
    def score(weight, grad, state):
        return weight.abs().index_fill(0, torch.tensor(1), -math.inf).index_fill(0, torch.tensor(3), math.inf)

    params = made()
    active = moved_by_a_step(GSM(params, 0.1, num_kept=20, score=score, **STILL), params)
    expected = [p.detach().abs() for p in params]
    for scores in expected:
        scores[1], scores[3] = -1, 100
    assert_equal(active, naive_active(expected, 20))


def test_a_score_that_is_no_number_is_refused_and_nothing_moves():
    params = made()
    before = [param.detach().clone() for param in params]
    optimizer = GSM(params, 0.1, num_kept=20, score=lambda weight, grad, state: weight * math.nan, **STILL)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match="a score of parameter number 0 is NaN, though weight and gradient are not"):
        optimizer.step()
    assert_equal(params, before)


def test_a_score_that_works_in_place_changes_nothing_else():
    one, two = made(), made()
    inplace = moved_by_a_step(GSM(one, 0.1, num_kept=20, score=lambda w, g, s: w.mul_(g).abs_(), **STILL), one)
    pure = moved_by_a_step(GSM(two, 0.1, num_kept=20, **STILL), two)
    assert_equal(inplace, pure)


# --- the control that every other score has to beat ---


def test_random_chooses_once_for_all_steps():
    params = made()
    optimizer = GSM(params, 0.1, num_kept=20, score="random", **STILL)
    first = moved_by_a_step(optimizer, params)
    assert sum(int(mask.sum()) for mask in first) == 20
    assert all(mask.any() for mask in first)
    for seed in range(1, 4):
        for param, other in zip(params, made(seed=seed), strict=True):
            param.grad = other.grad
        assert_equal(moved_by_a_step(optimizer, params), first)


@pytest.mark.parametrize("how", ["resumed", "copied", "replica"])
def test_random_chooses_the_same_in_runs_that_are_the_same(how):
    params = made()
    optimizer = GSM(params, 0.1, num_kept=20, score="random")
    twins, twin = params, optimizer
    if how == "replica":
        twins = made()
        twin = GSM(twins, 0.1, num_kept=20, score="random")
    for step in range(6):
        if step == 3 and how == "copied":
            twins, twin = copy.deepcopy((params, optimizer))
        if step == 3 and how == "resumed":
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            twins = copy.deepcopy(params)
            twin = GSM(twins, 0.1, num_kept=20, score="random")
            twin.load_state_dict(torch.load(file, weights_only=True))
        for both, opt in ((params, optimizer), (twins, twin))[: 1 if twin is optimizer else 2]:
            for param, other in zip(both, made(seed=step), strict=True):
                param.grad = other.grad
            opt.step()
    assert twin is not optimizer
    assert_equal(params, twins)
