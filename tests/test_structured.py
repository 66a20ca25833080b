"""ChannelGroups as a pattern: scores, the choice within a budget, and training by it."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from channel_nets import Net, images, plain, residual_net, small
from gsm_sgd import GSM, GSMAdamW, Phase, Schedule
from gsm_sgd.experiments import models
from gsm_sgd.structured import ChannelGroups, remove_channels
from nets import assert_same_bits, saved_and_loaded
from ranks import Ranks

KINDS = ("macs", "parameters", "channels")


def trained_on(model, optimizer, steps, start=0, example=None):
    """Take steps on made-up data."""
    shape = (4, 3, 8, 8) if example is None else example.shape
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        outputs = model(torch.randn(shape, generator=generator).to(next(model.parameters()).dtype))
        targets = torch.randint(outputs.shape[1], (len(outputs),), generator=generator)
        F.cross_entropy(outputs.float(), targets).backward()
        optimizer.step()


def scores_of(groups, seed):
    return torch.rand(groups.channels.count, generator=torch.Generator().manual_seed(seed)).double()


# --- score ---


def test_a_score_is_the_signed_sum_of_the_unit():
    groups = ChannelGroups.trace(plain(), images())
    gamma, beta = torch.zeros(8), torch.zeros(8)
    gamma[0], beta[0] = 1.0, -1.0  # they cancel
    gamma[1], beta[1] = -0.3, -0.4
    gamma[2], beta[2] = 0.5, 0.1
    scores = {"n.weight": gamma, "n.bias": beta, "b.weight": torch.zeros(6, 8, 3, 3), "b.bias": torch.zeros(6)}
    (pooled,) = groups.over(list(scores)).pool(list(scores.values()))
    units = groups.channels.slots["n.weight", 0]
    assert pooled[units[:3]].tolist() == pytest.approx([0.0, 0.7, 0.6])


def test_shared_units_sum_over_all_their_members():
    groups = ChannelGroups.trace(residual_net(), images())
    scores = {name: torch.ones(groups.shapes[name]) for name in groups.channels.rows}
    (pooled,) = groups.over(list(scores)).pool(list(scores.values()))
    stem = groups.channels.slots["1.weight", 0]
    assert pooled[stem].tolist() == [6.0] * 8  # gamma and beta of three norms
    assert pooled[groups.channels.slots["3.bn1.weight", 0]].tolist() == [2.0] * 8


def test_filters_and_biases_score_together():
    groups = ChannelGroups.trace(models.build("lenet5", 0), torch.randn(1, 1, 28, 28))
    scores = {name: torch.ones(groups.shapes[name]) for name in groups.channels.rows}
    (pooled,) = groups.over(list(scores)).pool(list(scores.values()))
    assert pooled[groups.channels.slots["conv1.weight", 0]].tolist() == [26.0] * 20


# --- choice ---


def net_of_families():
    """Three families of different costs."""
    return Net(
        lambda net, x: net.h(F.relu(net.c(F.relu(net.b(F.relu(net.a(x))))))),
        a=nn.Linear(5, 4),
        b=nn.Linear(4, 6),
        c=nn.Linear(6, 3),
        h=nn.Linear(3, 2),
    )


def naive_choice(groups, kind, scores, budget):
    """Return what the greedy rule keeps, a unit at a time, with every cost counted on a net that has been narrowed."""
    model = net_of_families()
    sizes = {"a": 4, "b": 6, "c": 3}
    units = {name: groups.channels.slots[f"{name}.weight", 0].tolist() for name in sizes}

    def cost(kept):
        a, b, c = (sum(unit in kept for unit in units[name]) for name in "abc")
        weights = 5 * a + a * b + b * c + c * 2
        return {"macs": weights, "parameters": weights + a + b + c + 2, "channels": a + b + c}[kind]

    everything = set(range(groups.channels.count))
    rates = {}
    for name in sizes:
        saving = cost(everything) - cost(everything - {units[name][0]})
        rates |= {unit: float(scores[unit]) / saving for unit in units[name]}
    kept = {max(units[name], key=lambda unit: (float(scores[unit]), -unit)) for name in sizes}
    closed = set()
    best_first = sorted(everything - kept, key=lambda unit: (-rates[unit], unit))
    for unit in best_first:
        family = next(name for name in sizes if unit in units[name])
        if family not in closed:
            if cost(kept | {unit}) <= budget:
                kept.add(unit)
            else:
                closed.add(family)
    assert model is not None
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.77, 1.0])
def test_the_choice_is_that_of_a_naive_twin(kind, share):
    groups = ChannelGroups.trace(net_of_families(), torch.randn(2, 5)).for_budget(kind)
    dense = groups.total([torch.empty(0)])
    for seed in range(20):
        scores = scores_of(groups, seed)
        budget = math.floor(share * dense)
        kept = groups._select(scores, budget)
        assert set(kept.nonzero().flatten().tolist()) == naive_choice(groups, kind, scores, budget)


def test_ties_go_to_the_lower_index():
    groups = ChannelGroups.trace(net_of_families(), torch.randn(2, 5)).for_budget("channels")
    kept = groups._select(torch.ones(13, dtype=torch.float64), 7)
    by_layer = [kept[groups.channels.slots[f"{name}.weight", 0]].tolist() for name in "abc"]
    assert all(row == sorted(row, reverse=True) for row in by_layer)
    assert sum(map(sum, by_layer)) == 7


NETS = [
    "residual",
    pytest.param("resnet20a", marks=pytest.mark.slow),
    "depthwise and grouped",
    "unet",
    "flat",
    "squeeze-excite",
    "encoder",
    "chunks",
]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("options", [{}, {"floor": 0.3}, {"round_to": 4}, {"floor": 0.2, "round_to": 2}])
def test_budgets_floors_and_multiples_are_kept_to(name, options):
    model, example = small(name)
    groups = ChannelGroups.trace(model, example, **options)
    for kind, seed in itertools.product(KINDS, range(4)):
        bound = groups.for_budget(kind)
        dense, smallest = bound.total([torch.empty(0)]), bound.smallest()
        scores = scores_of(groups, seed)
        for budget in (smallest, (smallest + dense) // 2, dense):
            kept = bound._select(scores, budget)
            assert bound.cost_of(kept) <= budget
            check_widths(groups, kept, **options)
        assert kept.all()
        assert bound.cost_of(bound._select(scores, 0)) == smallest
        with pytest.raises(ValueError, match=f"the budget is below the smallest possible, {smallest / dense:.4g} of"):
            bound.check_budget(smallest - 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_budget_is_met_whatever_the_scores(seed):
    """The best channel of a late stage may be one that earlier stages lack, and so cost more."""
    groups = ChannelGroups.trace(models.build("resnet20a", 0), images(size=16))
    assert groups.cost_of(groups._select(scores_of(groups, seed), groups.smallest())) <= groups.smallest()


def check_widths(groups, kept, floor=0.0, round_to=1):
    """Assert that layers keep their floors, and families multiples or all."""
    stays = torch.cat([kept, torch.ones(1, dtype=torch.bool)])
    for layer in groups.channels.layers:
        left, size = int(stays[layer.outputs].sum()), len(layer.outputs)
        if floor:
            assert left >= floor * size
        elif not groups._choice._branches:
            assert left >= 1
    for family, size in enumerate(groups.families.bincount().tolist()):
        width = int(kept[groups.families == family].sum())
        assert width in (0, size) or width % round_to == 0 or kept.all()


def test_what_is_kept_is_the_best_of_each_family():
    groups = ChannelGroups.trace(models.build("resnet20a", 0), images(size=16))
    scores = scores_of(groups, 0)
    kept = groups._select(scores, groups.total([torch.empty(0)]) // 2)
    for family in range(int(groups.families.max()) + 1):
        mine = groups.families == family
        if kept[mine].any() and not kept[mine].all():
            assert scores[mine & kept].min() > scores[mine & ~kept].max()


def test_cheap_channels_stay_and_dear_ones_go():
    """Of equal scores, those go that save most."""
    model = nn.Sequential(nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    groups = ChannelGroups.trace(model, torch.randn(2, 100))
    kept = groups._select(torch.ones(16, dtype=torch.float64), groups.total([torch.empty(0)]) // 2)
    first, second = (kept[groups.channels.slots[name, 0]].sum() for name in ("0.weight", "2.weight"))
    assert (first, second) == (3, 8)


def test_branches_vanish_as_a_whole():
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    scores = torch.ones(24, dtype=torch.float64)
    inner = groups.channels.slots["3.conv1.weight", 0]
    scores[inner] = 1e-6
    kept = groups._select(scores, groups.total([torch.empty(0)]) * 0.6)
    assert not kept[inner].any()
    assert kept[groups.channels.slots["0.weight", 0]].all()
    floored = ChannelGroups.trace(model, images(), floor=0.1)
    kept = floored._select(scores, floored.total([torch.empty(0)]) * 0.6)
    assert 1 <= kept[inner].sum() < 4


def test_of_two_ways_one_is_left():
    model = Net(
        lambda net, x: net.h(net.b(F.relu(net.a(x))) + net.d(F.relu(net.c(x)))),
        a=nn.Linear(5, 4),
        b=nn.Linear(4, 6),
        c=nn.Linear(5, 4),
        d=nn.Linear(4, 6),
        h=nn.Linear(6, 2),
    )
    groups = ChannelGroups.trace(model, torch.randn(2, 5))
    for seed in range(5):
        kept = groups._select(scores_of(groups, seed), 0)
        ways = [kept[groups.channels.slots[name, 0]].sum() for name in ("a.weight", "c.weight")]
        assert sorted(ways) == [0, 1]


def test_what_a_vanished_branch_alone_needs_goes_with_it():
    """Two layers in a branch: without the inner one the outer one leads nowhere."""
    model = plain(
        lambda net, y: y + net.e(F.relu(net.d(F.relu(net.c(y))))),
        c=nn.Conv2d(8, 5, 1),
        d=nn.Conv2d(5, 4, 1),
        e=nn.Conv2d(4, 8, 1),
    )
    groups = ChannelGroups.trace(model, images())
    scores = torch.ones(groups.channels.count, dtype=torch.float64)
    outer = groups.channels.slots["d.weight", 0]
    scores[outer] = 0
    without = torch.ones_like(scores, dtype=torch.bool)
    without[outer] = False
    kept = groups._select(scores, groups.cost_of(without))
    assert not kept[outer].any()
    assert not kept[groups.channels.slots["c.weight", 0]].any()


# --- budgets and parameters that do not fit ---


def gsm(model, groups, steps=20, **options):
    options = {"macs": 0.5, "schedule": Schedule(steps, ramp=0.2, fade=0.4, cut=0.8), **options}
    return GSM(model.named_parameters(), lr=0.05, momentum=0.5, pattern=groups, **options)


def test_budgets_of_weights_and_of_channels_do_not_mix():
    model = plain()
    groups = ChannelGroups.trace(model, images())
    for kind, value in {"density": 0.5, "compression": 2, "sparsity": 0.5, "num_kept": 5}.items():
        with pytest.raises(ValueError, match=f"a pattern of channels takes one of macs, .*, not {kind}"):
            GSM(model.named_parameters(), lr=0.1, pattern=groups, **{kind: value})
    with pytest.raises(ValueError, match="macs is a budget of channels: pass pattern=ChannelGroups"):
        GSM(model.named_parameters(), lr=0.1, macs=0.5)
    with pytest.raises(ValueError, match="give exactly one of"):
        GSM(model.named_parameters(), lr=0.1, pattern=groups, macs=0.5, parameters=0.5)
    with pytest.raises(ValueError, match="measure_latency"):
        GSM(model.named_parameters(), lr=0.1, pattern=groups, latency=0.5)


def test_a_budget_that_cannot_be_met_says_the_smallest():
    groups = ChannelGroups.trace(plain(), images())
    smallest = groups.smallest() / groups.total([torch.empty(0)])
    with pytest.raises(ValueError, match=f"the smallest possible, {smallest:.4g} of the dense net's cost"):
        gsm(plain(), groups, macs=smallest * 0.9)
    gsm(plain(), groups, macs=smallest * 1.001)


def test_parameters_need_names_and_must_be_trained():
    model = plain()
    groups = ChannelGroups.trace(model, images())
    with pytest.raises(ValueError, match=r"needs names: pass model.named_parameters\(\)"):
        GSM(model.parameters(), lr=0.1, pattern=groups, macs=0.5)
    with pytest.raises(ValueError, match=r"'n.bias' silences channels, but is not trained here"):
        GSM([item for item in model.named_parameters() if item[0] != "n.bias"], lr=0.1, pattern=groups, macs=0.5)
    dense = [{"params": list(model.named_parameters()), "prunable": False}]
    with pytest.raises(ValueError, match=r"'n.weight' silences channels, but is not trained here"):
        GSM(dense, lr=0.1, pattern=groups, macs=0.5)
    model.n.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'n.weight' silences channels, but is not trained here"):
        GSM(model.named_parameters(), lr=0.1, pattern=groups, macs=0.5)


def test_another_models_parameters_are_refused():
    groups = ChannelGroups.trace(plain(), images())
    with pytest.raises(ValueError, match=r"'n.weight' is not what it was when the channels were traced"):
        gsm(plain(channels=4), groups)


def test_parameter_groups_keep_their_settings():
    model = plain()
    decayed = [(name, param) for name, param in model.named_parameters() if param.ndim > 1]
    others = [(name, param) for name, param in model.named_parameters() if param.ndim < 2]
    groups = ChannelGroups.trace(model, images())
    optimizer = GSM([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.1, pattern=groups, macs=0.5)
    found = [(group["param_names"], group["prunable"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        (["a.weight", "h.weight"], False, 0.1),
        (["b.weight"], True, 0.1),
        (["a.bias", "h.bias"], False, 1e-4),
        (["n.weight", "n.bias", "b.bias"], True, 1e-4),
    ]


def test_a_module_that_is_called_module_and_a_wrapped_model_are_found():
    wrapped = Net(lambda net, x: net.module(x), module=plain())
    gsm(wrapped, ChannelGroups.trace(wrapped, images()))
    gsm(wrapped, ChannelGroups.trace(wrapped.module, images()))


# --- training ---


def test_a_unit_whose_score_is_zero_is_passive():
    """Though the budget has room for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.LeakyReLU(), nn.Linear(8, 4))
    groups = ChannelGroups.trace(model.eval(), torch.randn(2, 12))
    with torch.no_grad():
        model[1].weight[2] = model[1].bias[2] = 0.0
    optimizer = GSM(model.named_parameters(), lr=0.1, pattern=groups, macs=0.9, passive_decay=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(torch.randn(8, 12)).square().mean().backward()
        assert model[1].bias.grad[2] != 0
        optimizer.step()
    assert model[1].weight[2] == model[1].bias[2] == 0
    assert (model[1].bias != 0).sum() >= 6


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:]]


@pytest.mark.parametrize("kind", ["macs", *SLOW])
def test_training_ends_within_the_budget_and_lossless(kind):
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    optimizer = gsm(model, groups, steps=200, **{"macs": None, kind: 0.5})
    trained_on(model, optimizer, 159)
    assert optimizer.phase is Phase.FADE
    before = copy.deepcopy(model).eval()(images())
    trained_on(model, optimizer, 1, start=159)
    masks = optimizer.finalize()
    bound = groups.for_budget(kind)
    dense = bound.total([torch.empty(0)])
    assert optimizer.num_prunable == dense
    kept = bound.kept_by(masks)
    assert 0.35 * dense < bound.cost_of(kept) <= 0.5 * dense
    assert kept.sum() < groups.channels.count
    assert torch.isfinite(before).all()
    assert optimizer.passive_residual < 1e-5
    for name, mask in masks.items():
        assert (dict(model.named_parameters())[name][~mask] == 0).all()
    others = [param for name, param in model.named_parameters() if name not in masks]
    assert all((param != 0).all() for param in others)


def test_active_channels_follow_the_ramp():
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    optimizer = gsm(model, groups, steps=50, schedule=Schedule(50, ramp=0.6, fade=0.1, cut=0.9))
    active = []
    for step in range(40):
        active.append(optimizer.num_active)
        trained_on(model, optimizer, 1, start=step)
    assert active == sorted(active, reverse=True)
    assert active[0] > active[20] > active[-1] == optimizer.num_kept == optimizer.num_prunable // 2


@pytest.mark.parametrize("at", [2, 6, 13, 17])
def test_a_resumed_run_has_the_same_bits(at):
    """In ramp, search, fade, and after the cut."""
    runs = []
    for resumes in (False, True):
        model = residual_net()
        groups = ChannelGroups.trace(model, images())
        optimizer = gsm(model, groups)
        trained_on(model, optimizer, at)
        if resumes:
            state = saved_and_loaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
            model = residual_net(seed=3)
            optimizer = gsm(model, ChannelGroups.trace(model, images()))
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        trained_on(model, optimizer, 20 - at, start=at)
        runs.append(model)
    assert_same_bits(*runs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_go_on_to_the_same_bits(copied):
    model = residual_net()
    optimizer = gsm(model, ChannelGroups.trace(model, images()))
    trained_on(model, optimizer, 8)
    again, its = copied((model, optimizer))
    trained_on(model, optimizer, 12, start=8)
    trained_on(again, its, 12, start=8)
    assert_same_bits(model, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gamma_and_beta_vanish_in_any_precision(dtype):
    model = residual_net().to(dtype)
    groups = ChannelGroups.trace(model, images().to(dtype))
    optimizer = gsm(model, groups, steps=100)
    trained_on(model, optimizer, 79)
    masks = optimizer.masks
    away = [dict(model.named_parameters())[name][~mask].abs() for name, mask in masks.items()]
    assert sum(map(len, away)) > 10
    assert torch.cat(away).max() < 1e-4
    slim = remove_channels(model, groups, optimizer.finalize())
    assert next(slim.parameters()).dtype == dtype


# --- several processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def trained_by_ddp():
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    ddp = DistributedDataParallel(model)
    optimizer = GSM(ddp.named_parameters(), lr=0.05, pattern=groups, macs=0.5, schedule=Schedule(12, cut=0.9))
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(8, 3, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
        rank = dist.get_rank()
        optimizer.zero_grad()
        F.cross_entropy(ddp(inputs[rank::2]), targets[rank::2]).backward()
        optimizer.step()
    slim = remove_channels(model, groups, optimizer.finalize())
    return {name: param.detach().clone() for name, param in slim.named_parameters()}


@pytest.mark.slow
def test_replicas_choose_the_same_channels(ranks):
    one, other = ranks.run(trained_by_ddp)
    assert all(torch.equal(param, other[name]) for name, param in one.items())
    assert sum(map(torch.numel, one.values())) < sum(map(torch.numel, residual_net().parameters()))


@pytest.mark.slow
def test_adamw_trains_channels_away_as_well():
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    schedule = Schedule(300, ramp=0.2, fade=0.3, cut=0.8)
    optimizer = GSMAdamW(model.named_parameters(), lr=0.01, pattern=groups, macs=0.5, schedule=schedule)

    def step(net, number):
        optimizer.zero_grad()
        inputs = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        F.cross_entropy(net(inputs), torch.arange(8) % 3).backward()
        optimizer.step()

    for number in range(240):
        step(model, number)
    assert optimizer.passive_residual < 1e-3
    masks = optimizer.finalize()
    slim = remove_channels(model, groups, masks, optimizer)
    before = [weight.clone() for weight in slim.parameters()]
    step(slim, 240)
    assert all((old != new).any() for old, new in zip(before, slim.parameters(), strict=True) if new.numel())
    assert groups.for_budget("macs").total([torch.ones(1)]) // 2 >= ChannelGroups.trace(slim, images()).for_budget(
        "macs"
    ).total([torch.ones(1)])
