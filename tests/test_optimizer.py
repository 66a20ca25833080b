import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, NonFiniteGradientError, prunable_parameters, sparsity_table
from reference_gsm import NaiveGSM, naive_top


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def conv_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    return net.to(memory_format=torch.channels_last)


def batches(count, shape=(12,), seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(32, *shape, generator=generator), torch.randint(4, (32,), generator=generator)


def backward(model, batch):
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def assert_same(model, other):
    for (name, p), q in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


# --- the rule ---


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("passive_decay", [None, 1e-9, 0.05])
@pytest.mark.parametrize("compression", [1, 1.5, 7, 300])
def test_naive_twin_in_lockstep(compression, passive_decay, nesterov):
    fast, slow = small_net().double(), small_net().double()
    settings = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": nesterov, "passive_decay": passive_decay}
    ours = GSM(fast.parameters(), 0.1, compression=compression, **settings)
    twin = NaiveGSM(slow.parameters(), 0.1, compression, **settings)
    for images, labels in batches(40):
        for model, optimizer in ((fast, ours), (slow, twin)):
            backward(model, (images.double(), labels))
            optimizer.step()
        for p, q in zip(fast.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [small_net, conv_net])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_compression_1_is_sgd_bit_for_bit(make, weight_decay, momentum, nesterov):
    settings = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    ours, theirs = make(), make()
    gsm = GSM(ours.parameters(), 0.1, compression=1, **settings)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, **settings)
    for batch in batches(30, (12,) if make is small_net else (3, 4, 4)):
        for model, optimizer in ((ours, gsm), (theirs, sgd)):
            backward(model, batch)
            optimizer.step()
        assert_same(ours, theirs)


def test_compression_1_skips_missing_gradients_as_sgd_does():
    ours, theirs = small_net(), small_net()
    optimizers = (
        GSM(ours.parameters(), 0.1, compression=1),
        torch.optim.SGD(theirs.parameters(), 0.1, 0.9, weight_decay=1e-4),
    )
    for batch in batches(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            backward(model, batch)
            model[2].weight.grad = None
            optimizer.step()
    assert_same(ours, theirs)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4), st.data())
def test_exactly_q_weights_feel_their_gradient(shapes, data):
    """With no decay to move them, exactly the Q weights of largest |w g| in the whole model move."""
    params = [nn.Parameter(torch.rand(shape) + 0.5) for shape in shapes]
    total = sum(p.numel() for p in params)
    compression = total / data.draw(st.integers(1, total))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no decay: the optimizer warns
        optimizer = GSM(params, 0.1, compression=compression, weight_decay=0, momentum=0)
    for p in params:
        p.grad = torch.rand_like(p) + 0.5
    expected = naive_top([(p * p.grad).abs().detach() for p in params], optimizer.nonzeros)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old, active in zip(params, before, expected, strict=True):
        assert torch.equal(p.detach() != old, active)


def test_small_tensor_loses_everything():
    """An eye can check it: of two equal tensors, one scaled by 10 and one by 0.1, the first keeps all of Q."""
    torch.manual_seed(0)
    large, small = nn.Parameter(10 * torch.randn(10, 10)), nn.Parameter(0.1 * torch.randn(10, 10))
    optimizer = GSM([large, small], 0.1, compression=2.5, weight_decay=1e-3)
    large.grad, small.grad = torch.ones(10, 10), torch.ones(10, 10)
    optimizer.step()
    masks = optimizer.finalize()
    assert [int(mask.sum()) for mask in masks.values()] == [80, 0]
    assert not small.any()


def test_passive_weights_follow_the_closed_form():
    """w_k ~ w_0 exp(-alpha eta k / (1 - beta)), the published overdamped limit."""
    weight = nn.Parameter(torch.ones(1, 101, dtype=torch.float64))
    optimizer = GSM([weight], 1e-3, compression=101, momentum=0.9, weight_decay=0.01)
    for _ in range(5_000):
        weight.grad = torch.zeros_like(weight)
        weight.grad[0, 50] = 0.01  # the one active weight
        optimizer.step()
    passive = weight.detach()[0, torch.arange(101) != 50]
    torch.testing.assert_close(
        passive, torch.full_like(passive, math.exp(-1e-3 * 0.01 * 5_000 / 0.1)), rtol=1e-2, atol=0
    )


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


def test_groups_and_prunable_key():
    net = small_net()
    embedding_like, rest = [net[0].weight], [net[2].weight, net[4].weight, net[0].bias]
    optimizer = GSM(
        [{"params": embedding_like, "prunable": False}, {"params": rest, "lr": 0.01}],
        0.1,
        compression=4,
    )
    assert optimizer.num_prunable == 16 * 8 + 8 * 4
    assert optimizer.nonzeros == 40
    backward(net, next(batches(1)))
    optimizer.step()
    optimizer.finalize()
    kept = {row.name: row.nonzeros for row in sparsity_table(net)}
    assert kept["0.weight"] == 192  # not governed by the rule
    assert kept["2.weight"] + kept["4.weight"] == 40


def test_bias_can_be_made_prunable():
    net = small_net()
    optimizer = GSM([{"params": list(net.parameters()), "prunable": True}], 0.1, compression=2)
    assert optimizer.num_prunable == sum(p.numel() for p in net.parameters())


def test_parameter_without_gradient_only_decays():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=4, momentum=0.0, weight_decay=0.5)
    before = copy.deepcopy(net)
    backward(net, next(batches(1)))
    net[2].weight.grad = net[2].bias.grad = None
    optimizer.step()
    torch.testing.assert_close(net[2].weight, before[2].weight * 0.95)
    assert torch.equal(net[2].bias, before[2].bias)


def test_no_gradient_at_all_is_no_step():
    net = small_net()
    before = copy.deepcopy(net)
    optimizer = GSM(net.parameters(), 0.1, compression=4, weight_decay=0.5)
    optimizer.step()
    assert_same(net, before)
    assert not optimizer.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    weight = nn.Parameter(torch.randn(30, 30).to(dtype))
    optimizer = GSM([weight], 0.1, compression=9)
    weight.grad = torch.randn(30, 30).to(dtype)
    optimizer.step()
    optimizer.finalize()
    assert int(weight.count_nonzero()) == 100


# --- what it leaves alone ---


def test_gradients_are_never_written():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=5, nesterov=True)
    for batch in batches(3):
        backward(net, batch)
        before = [p.grad.clone() for p in net.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("finalized", [False, True])
def test_non_finite_gradient_changes_nothing(bad, finalized):
    net = small_net()
    optimizer = GSM(net.named_parameters(), 0.1, compression=5)
    backward(net, next(batches(1)))
    optimizer.step()
    if finalized:
        optimizer.finalize()
    weights, state = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    backward(net, next(batches(1)))
    net[2].weight.grad[3, 1] = bad
    with pytest.raises(NonFiniteGradientError, match=r"'2\.weight' is not finite"):
        optimizer.step()
    assert_same(net, weights)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_non_finite_gradient_of_an_unnamed_parameter_is_numbered():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=5)
    backward(net, next(batches(1)))
    net[4].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError, match="number 2 is not finite"):
        optimizer.step()


@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("compression", [1, 5])
def test_a_refused_first_step_leaves_no_state(compression, finalized):
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=compression)
    if finalized:
        optimizer.finalize()
    before = copy.deepcopy(optimizer.state_dict())
    backward(net, next(batches(1)))
    net[2].weight.grad[0, 0] = math.nan
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert after["param_groups"] == before["param_groups"]


def test_sparse_gradient_is_refused():
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = GSM(embedding.parameters(), 0.1, compression=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="parameter number 0 has a sparse gradient: put it into a group"):
        optimizer.step()


# --- finalize and state ---


def test_finalize_keeps_the_largest_and_zeros_stay_zero():
    net = small_net()
    optimizer = GSM(net.named_parameters(), 0.1, compression=10)
    for batch in batches(5):
        backward(net, batch)
        optimizer.step()
    expected = naive_top([p.detach().abs() for p in prunable_parameters(net).values()], optimizer.nonzeros)
    masks = optimizer.finalize()
    assert list(masks) == list(prunable_parameters(net))
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))
    assert optimizer.finalized
    after = copy.deepcopy(net)
    for batch in batches(5, seed=2):
        backward(net, batch)
        optimizer.step()
        for name, p in prunable_parameters(net).items():
            assert not p[~masks[name]].any()
    assert not torch.equal(net[0].weight, after[0].weight)
    assert sum(row.nonzeros for row in sparsity_table(net)) == optimizer.nonzeros == (12 * 16 + 16 * 8 + 8 * 4) // 10


def test_finalize_twice_is_harmless():
    net = small_net()
    optimizer = GSM(net.named_parameters(), 0.1, compression=10)
    backward(net, next(batches(1)))
    optimizer.step()
    first = optimizer.finalize()
    weights = copy.deepcopy(net)
    second = optimizer.finalize()
    assert_same(net, weights)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_finalize_before_any_step_is_magnitude_pruning():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=10)
    masks = optimizer.finalize()
    assert list(masks) == [0, 1, 2]  # no names given: position among the prunable
    assert sum(int(mask.sum()) for mask in masks.values()) == optimizer.nonzeros


def test_returned_masks_are_copies():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=10)
    optimizer.finalize()[0].fill_(True)
    assert sum(int(mask.sum()) for mask in optimizer.finalize().values()) == optimizer.nonzeros


def test_kept_weights_of_a_parameter_without_gradient_stay_after_finalize():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=3, momentum=0.0, weight_decay=0.5)
    optimizer.finalize()
    before = net[2].weight.detach().clone()
    backward(net, next(batches(1)))
    net[2].weight.grad = None
    optimizer.step()
    assert torch.equal(net[2].weight, before)


@pytest.mark.parametrize("finalize_at", [None, 3, 7])
def test_state_survives_a_round_trip(finalize_at, tmp_path):
    """A run that is saved and loaded into a new optimizer after five steps goes on with the same bits."""
    straight, resumed = small_net(), small_net()
    gsm = GSM(straight.named_parameters(), 0.1, compression=6, momentum=0.95)
    ours = GSM(resumed.named_parameters(), 0.1, compression=6, momentum=0.95)
    for step, batch in enumerate(batches(10)):
        if step == 5:
            torch.save({"model": resumed.state_dict(), "optimizer": ours.state_dict()}, tmp_path / "state")
            state = torch.load(tmp_path / "state", weights_only=True)
            resumed = small_net(seed=99)
            resumed.load_state_dict(state["model"])
            ours = GSM(resumed.named_parameters(), 1.0, compression=2)  # the state carries the settings
            with pytest.warns(UserWarning, match=r"brings compression=6\.0 \(not 2\.0\)"):
                ours.load_state_dict(state["optimizer"])
            assert ours.finalized is (finalize_at == 3)
        for model, optimizer in ((straight, gsm), (resumed, ours)):
            if step == finalize_at:
                optimizer.finalize()
            backward(model, batch)
            optimizer.step()
    assert ours.nonzeros == gsm.nonzeros
    assert_same(straight, resumed)
    for mask, other in zip(gsm.finalize().values(), ours.finalize().values(), strict=True):
        assert other.dtype == torch.bool
        assert torch.equal(mask, other)


def test_optimizer_can_be_copied():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=6)
    optimizer.finalize()
    assert copy.deepcopy(optimizer).finalized


# --- in other people's loops ---


def test_closure():
    ours, twin = small_net(), small_net()
    with_closure = GSM(ours.parameters(), 0.1, compression=6)
    plain = GSM(twin.parameters(), 0.1, compression=6)
    for batch in batches(5):
        loss = with_closure.step(lambda batch=batch: backward(ours, batch))
        assert loss.item() == backward(twin, batch).item()
        plain.step()
    assert_same(ours, twin)


def test_lr_scheduler():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for batch in batches(10):
        backward(net, batch)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_grad_scaler_skips_an_overflowed_step():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=6)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(net)
    images, labels = next(batches(1))
    scaler.scale(F.cross_entropy(net(images), labels)).backward()
    net[0].weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert_same(net, before)
    net.zero_grad()
    scaler.scale(F.cross_entropy(net(images), labels)).backward()
    scaler.step(optimizer)
    assert not torch.equal(net[0].weight, before[0].weight)


def test_gradient_accumulation_chooses_on_the_accumulated_gradient():
    whole, halves = small_net().double(), small_net().double()
    images, labels = next(batches(1))
    images = images.double()
    for model, chunks in ((whole, 1), (halves, 2)):
        optimizer = GSM(model.parameters(), 0.1, compression=6)
        for part, target in zip(images.chunk(chunks), labels.chunk(chunks), strict=True):
            (F.cross_entropy(model(part), target) / chunks).backward()
        optimizer.step()
    for p, q in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_tied_weights_count_once():
    net = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    net[1].weight = net[0].weight
    assert GSM(net.parameters(), 0.1, compression=2).num_prunable == 25


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be"),
        ({"lr": math.nan}, "lr must be"),
        ({"momentum": 1.0}, "momentum must be"),
        ({"momentum": -0.1}, "momentum must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        ({"passive_decay": math.inf}, "passive_decay must be"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
        ({"compression": 0.5}, "compression must be"),
        ({"compression": math.nan}, "compression must be"),
        ({"compression": math.inf}, "compression must be"),
        ({"compression": 353}, "leaves none of 352 weights"),
    ],
)
def test_bad_hyperparameters(settings, message):
    with pytest.raises(ValueError, match=message):
        GSM(small_net().parameters(), **{"lr": 0.1, "compression": 2, **settings})


def test_bad_hyperparameter_of_a_group():
    net = small_net()
    with pytest.raises(ValueError, match="momentum must be"):
        GSM([{"params": net.parameters(), "momentum": 2}], 0.1, compression=2)
    with pytest.raises(ValueError, match="groups cannot differ"):
        GSM(
            [{"params": net[0].parameters()}, {"params": net[2].parameters(), "compression": 3}],
            0.1,
            compression=2,
        )


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
    for params in (
        [weight, weight],
        [{"params": [weight]}, {"params": [weight]}],
        [("a", weight), ("b", weight)],
    ):
        with pytest.raises(ValueError, match=r"twice|more than one parameter group"):
            GSM(params, 0.1, compression=2)


def test_prunable_group_after_finalize():
    net = small_net()
    optimizer = GSM(net[0].parameters(), 0.1, compression=2)
    optimizer.finalize()
    with pytest.raises(ValueError, match="once the masks are fixed"):
        optimizer.add_param_group({"params": net[2].parameters()})
    assert len(optimizer.param_groups) == 1


def test_warns_when_passive_weights_never_shrink():
    with pytest.warns(UserWarning, match="passive weights never shrink"):
        GSM(small_net().parameters(), 0.1, compression=2, weight_decay=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GSM(small_net().parameters(), 0.1, compression=2, weight_decay=0, passive_decay=1e-3)
        GSM(small_net().parameters(), 0.1, compression=1, weight_decay=0)


def test_two_models_with_the_same_names():
    first, second = small_net(0), small_net(1)
    optimizer = GSM([*first.named_parameters(), *second.named_parameters()], 0.1, compression=4)
    assert optimizer.num_prunable == 2 * 352
    assert list(optimizer.finalize()) == list(range(6))
    kept = [sum(row.nonzeros for row in sparsity_table(net)) for net in (first, second)]
    assert sum(kept) == optimizer.nonzeros == 176
    assert min(kept) > 0


@pytest.mark.parametrize("make", [small_net, conv_net])
def test_deterministic_mode(make):
    """Where torch is told to refuse nondeterministic operations, the bits are the same as where it is not."""
    nets = make(), make()
    for net, deterministic in zip(nets, (False, True), strict=True):
        optimizer = GSM(net.parameters(), 0.1, compression=6)
        torch.use_deterministic_algorithms(deterministic)
        try:
            for batch in batches(5, (12,) if make is small_net else (3, 4, 4)):
                backward(net, batch)
                optimizer.step()
            optimizer.finalize()
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same(*nets)


def test_compiled_model():
    """A compiled model trains as the plain one does; the eager backend compiles without a compiler."""
    net, twin = small_net(), small_net()
    compiled = torch.compile(net, backend="eager")
    optimizers = [GSM(model.parameters(), 0.1, compression=6) for model in (net, twin)]
    for batch in batches(3):
        for model, optimizer in zip((compiled, twin), optimizers, strict=True):
            backward(model, batch)
            optimizer.step()
    assert_same(net, twin)


def test_weights_that_are_not_numbers_are_left_to_the_loss():
    net = small_net()
    optimizer = GSM(net.parameters(), 0.1, compression=6)
    backward(net, next(batches(1)))
    with torch.no_grad():
        net[2].weight[0, 0] = math.nan  # its gradient is still finite
    optimizer.step()
    assert net[2].weight.isnan().sum() == 1
