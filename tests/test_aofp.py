"""AOFP: the damage against its definition, decisions by halves, and what is silenced."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import CutWarning
from gsm_sgd.experiments.models.resnet_cifar import resnet_a
from gsm_sgd.structured import AOFP, ChannelGroups, remove_channels
from nets import assert_same_bits
from test_channel_methods import IMAGES, Residual, assert_same_end, sgd, step, straight_and_resumed


@pytest.fixture(scope="module")
def groups():
    return ChannelGroups.trace(Residual(), IMAGES)


def begin(groups, steps=100, **options):
    model = Residual()
    optimizer = sgd(model)
    return model, optimizer, AOFP(optimizer, steps, model, groups, **{"macs": 0.7, "every": 4, **options})


def inner(groups):
    """Return the units of the inner layer, in order of its filters."""
    return groups.channels.rows["bn1.weight"][1]


def test_the_damage_is_the_relative_change_behind_norm_and_relu(groups):
    model, optimizer, method = begin(groups, every=100)
    expected, draws = torch.zeros(12).double(), torch.zeros(12)
    for seed in range(5):
        off = method._off[inner(groups)]
        twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        images = torch.randn(16, 3, 12, 12, generator=generator)
        with torch.no_grad():
            x = F.relu(twin.bn0(twin.stem(images)))
            hidden = F.relu(twin.bn1(twin.conv1(x)))
            twin.bn2.eval()
            whole = F.relu(twin.bn2(twin.conv2(hidden)))
            part = F.relu(twin.bn2(twin.conv2(hidden * ~off.view(-1, 1, 1))))
        expected[off] += ((whole - part).norm() ** 2 / whole.norm() ** 2).double()
        draws += off
        step(model, optimizer, seed)
        torch.testing.assert_close(method._total[inner(groups)], expected)
        assert torch.equal(method._draws[inner(groups)].float(), draws)
    assert not method._total[groups.channels.rows["bn0.weight"][1]].any()


def test_a_random_half_of_the_search_space_is_off(groups):
    model, optimizer, method = begin(groups, every=100)
    seen = []
    for seed in range(8):
        assert method._off.sum() == method._off[inner(groups)].sum() == 6
        seen.append(tuple(method._off.tolist()))
        step(model, optimizer, seed)
    assert len(set(seen)) > 4
    method._search = [inner(groups)[:3]]
    method._draw()
    assert method._off.sum() == method._off[inner(groups)[:3]].sum() == 1


def test_gradients_stay_as_they_are(groups):
    model, optimizer, _ = begin(groups, threshold=0.0)
    twin = Residual()
    reference = sgd(twin)
    for seed in range(10):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    assert_same_bits(model, twin)


def decide(method, groups, damage):
    """Let a method decide after these mean damages of the inner filters."""
    method._draws[:] = 2
    method._total[inner(groups)] = 2 * torch.tensor(damage).double()
    method._decide()
    kept = method.kept[inner(groups)]
    search = [(inner(groups) == unit).nonzero().item() for unit in method._search[0]] if method._search else None
    return (~kept).nonzero().flatten().tolist(), search and sorted(search)


def test_decisions_go_by_halves(groups):
    _, _, method = begin(groups, macs=0.3, threshold=0.01)
    damage = [0.02, 0.001, 0.003, 0.05, 0.002, 0.06, 0.005, 0.07, 0.02, 0.004, 0.08, 0.03]
    half = [1, 2, 4, 6, 9]  # and 0 or 8, which is above the threshold
    gone, search = decide(method, groups, damage)
    assert gone == []
    assert set(half) < set(search)
    assert len(search) == 6
    gone, search = decide(method, groups, damage)  # three of the six are below it
    assert gone == [1, 2, 4]
    assert search == [0, 3, 5, 6, 7, 8, 9, 10, 11]  # all that are left
    gone, search = decide(method, groups, [1.0] * 12)
    assert gone == [1, 2, 4]
    assert len(search) == 4
    assert len(decide(method, groups, [1.0] * 12)[1]) == 2
    gone, search = decide(method, groups, [1.0] * 12)  # of two filters the better one is above it: all over again
    assert gone == [1, 2, 4]
    assert search == [0, 3, 5, 6, 7, 8, 9, 10, 11]


def test_the_search_ends_when_the_budget_is_met(groups):
    _, _, method = begin(groups, macs=0.7, threshold=0.5)
    gone, search = decide(method, groups, [0.01 * place for place in range(12)])
    assert search is None
    bound = groups.for_budget("macs")
    most = 0.7 * bound.total([IMAGES])
    assert bound.cost_of(method.kept) <= most
    one_more = method.kept.clone()
    one_more[inner(groups)[gone[-1]]] = True
    assert bound.cost_of(one_more) > most
    assert gone == list(range(len(gone)))  # those of the least damage


def test_a_layer_keeps_one_channel(groups):
    _, _, method = begin(groups, macs=0.4, threshold=1.0)
    while method._search:
        decide(method, groups, [0.0] * 12)
    for _ in range(2):
        method.kept = method._without(inner(groups), 0)
        assert method.kept[inner(groups)].sum() == 1


def test_filters_are_silenced_in_steps_and_removal_is_exact(groups):
    model, optimizer, method = begin(groups, 60, macs=0.5, every=5, threshold=10.0, cut=0.8)
    counts = []
    for seed in range(48):
        step(model, optimizer, seed)
        kept = method.kept[inner(groups)]
        counts.append(int(kept.sum()))
        assert torch.equal(model.bn1.weight != 0, kept)
        assert torch.equal(model.bn1.bias != 0, kept)
    assert counts[0] == 12
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 12
    assert not method._search
    masks = method.finalize()  # without a warning: nothing is left to choose
    slim = remove_channels(model, groups, masks, optimizer)
    torch.testing.assert_close(slim.eval()(IMAGES), model.eval()(IMAGES), rtol=0, atol=1e-5)
    assert slim.conv1.out_channels == counts[-1]


def test_what_is_missing_at_the_cut_goes_by_damage_and_warns(groups):
    model, optimizer, method = begin(groups, 100, macs=0.6, threshold=0.0)
    for seed in range(6):
        step(model, optimizer, seed)
    with pytest.warns(CutWarning, match="channels go that the search has not chosen, so it costs accuracy"):
        kept = groups.kept_by(method.finalize())
    damage = method.scores()[inner(groups)]
    assert damage[kept[inner(groups)]].min() >= damage[~kept[inner(groups)]].max()
    bound = groups.for_budget("macs")
    assert bound.cost_of(kept) <= 0.6 * bound.total([IMAGES])


def test_nothing_is_measured_in_evaluation_nor_after_the_cut(groups):
    model, _, method = begin(groups, threshold=1.0)
    model.eval()(IMAGES)
    assert not method._total.any()
    model.train()(IMAGES)
    assert method._total.any()
    copied = copy.deepcopy(model)
    method.finalize()
    assert not model.conv2._forward_hooks
    total = method._total.clone()
    copied(IMAGES), model(IMAGES)
    assert torch.equal(total, method._total)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)])
@pytest.mark.parametrize("stop", [3, 7, 13])
def test_resume_to_the_same_bits(groups, make, stop):
    def start():
        model = Residual()
        optimizer = make(model)
        return model, optimizer, AOFP(optimizer, 16, model, groups, every=3, threshold=0.3, cut=0.75, macs=0.6)

    straight, again = straight_and_resumed(start, 16, stop)
    assert torch.equal(straight[2].damage, again[2].damage)
    assert_same_end(straight, again)


def test_linear_layers_and_nets_without_norms():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(800, 6), nn.ReLU(), nn.Linear(6, 5)),
    )
    groups = ChannelGroups.trace(model, IMAGES)
    optimizer = sgd(model)
    method = AOFP(optimizer, 40, model, groups, channels=0.5, every=4, threshold=10.0)
    assert [len(units) for units in method._layers] == [8, 6]
    for seed in range(20):
        step(model, optimizer, seed)
    slim = remove_channels(model, groups, method.finalize())
    assert slim[0].out_channels + slim[3].out_features == 7
    torch.testing.assert_close(slim(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


def test_only_inner_layers_of_blocks_are_searched():
    model = resnet_a(14)
    groups = ChannelGroups.trace(model, torch.rand(2, 3, 16, 16))
    method = AOFP(sgd(model), 10, model, groups, macs=0.6)
    names = [f"layer{stage}.{block}.bn1.weight" for stage in (1, 2, 3) for block in (0, 1)]
    expected = [groups.channels.rows[name][1].sort()[0].tolist() for name in names]
    assert [units.tolist() for units in method._layers] == expected


def test_bad_input(groups):
    model = Residual()
    optimizer = sgd(model)
    for options, said in (
        ({"every": 0}, "every must be at least 1 and threshold at least 0, not 0 and 0.01"),
        ({"threshold": -1.0}, "every must be at least 1 and threshold at least 0, not 1000 and -1"),
        ({"macs": 0.12}, r"inner layers alone can only come to 0\.\d+ of the dense net's cost"),
        ({"macs": 2.0}, "macs"),
    ):
        with pytest.raises(ValueError, match=said):
            AOFP(optimizer, 10, model, groups, **{"macs": 0.5, **options})
    assert not optimizer._optimizer_step_pre_hooks
    assert not model.conv2._forward_hooks
