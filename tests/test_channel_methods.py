import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import keep_masked
from gsm_sgd.experiments.models.resnet_cifar import resnet_a
from gsm_sgd.selection.stored import select_top
from gsm_sgd.structured import METHODS, ChannelGroups, GroupL1, Slimming, Uniform, remove_channels
from nets import assert_same_bits, saved_and_loaded

SIMPLE = ("slimming", "group_l1", "uniform")  # that only silence channels
PLAIN = (*SIMPLE, "c_sgd")  # that train a model as it is
IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    """A stem, a block with an inner width of its own and an addition, and a classifier."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)
        for norm in (self.bn0, self.bn1, self.bn2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def forward(self, images):
        x = F.relu(self.bn0(self.stem(images)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))

    def members(self):
        """Return all that belongs to each channel: first the inner ones, then those that are added."""
        inner = [
            [self.conv1.weight[i], self.bn1.weight[i], self.bn1.bias[i], self.conv2.weight[:, i]] for i in range(12)
        ]
        added = [
            [
                *(self.stem.weight[i], self.bn0.weight[i], self.bn0.bias[i], self.conv1.weight[:, i]),
                *(self.conv2.weight[i], self.bn2.weight[i], self.bn2.bias[i], self.fc.weight[:, i]),
            ]
            for i in range(8)
        ]
        return inner, added


@pytest.fixture(scope="module")
def groups():
    return ChannelGroups.trace(Residual(), IMAGES)


def sgd(model):
    return torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def step(model, optimizer, seed, penalty=lambda: 0):
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(16, 3, 12, 12, generator=generator).to(next(model.parameters()).dtype)
    loss = F.cross_entropy(model(images), torch.randint(5, (16,), generator=generator))
    (loss + penalty()).backward()
    optimizer.step()


def straight_and_resumed(begin, steps, stop):
    """Return (model, optimizer, method) trained at a stretch, and again from a state saved on the way."""
    straight, again = begin(), begin()
    for seed in range(steps):
        if seed == stop:
            states = saved_and_loaded([part.state_dict() for part in straight])
        step(*straight[:2], seed)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for seed in range(stop, steps):
        step(*again[:2], seed)
    return straight, again


def assert_same_end(straight, again):
    assert_same_bits(straight[0], again[0])
    masks = straight[2].finalize()
    assert all(torch.equal(mask, masks[key]) for key, mask in again[2].finalize().items())


def in_order(groups, inner, added):
    """Return numbers of channels in order of their units."""
    units = torch.cat([groups.channels.rows[name][1] for name in ("bn1.weight", "bn0.weight")])
    return torch.stack([*inner, *added])[units.argsort()]


def widths(masks):
    return int(masks["bn1.weight"].sum()), int(masks["bn0.weight"].sum())


# --- against the definitions ---


def assert_lockstep(groups, method, penalty, scores):
    """Take steps with a method, and with its penalty as a part of the loss."""
    model = Residual().double()
    twin = copy.deepcopy(model)
    optimizer, reference = sgd(model), sgd(twin)
    mine = method(optimizer, 100, model, groups, macs=0.5, strength=0.02)
    for seed in range(5):
        step(model, optimizer, seed)
        step(twin, reference, seed, lambda: 0.02 * penalty(twin))
        for name, param in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(mine.scores(), in_order(groups, *scores(twin)).detach())


def test_slimming_is_l1_on_the_scales(groups):
    assert_lockstep(
        groups,
        Slimming,
        lambda net: sum(norm.weight.abs().sum() for norm in (net.bn0, net.bn1, net.bn2)),
        lambda net: (net.bn1.weight.abs(), net.bn0.weight.abs() + net.bn2.weight.abs()),
    )


def norms(net):
    return [[torch.cat([part.flatten() for part in unit]).norm() for unit in side] for side in net.members()]


def test_group_l1_is_the_norm_of_all_that_belongs_to_a_channel(groups):
    assert_lockstep(groups, GroupL1, lambda net: sum(itertools.chain(*norms(net))), norms)


def test_a_group_of_zeros_stays_as_it_is(groups):
    model = Residual()
    with torch.no_grad():
        for part in model.members()[0][3]:
            part.zero_()
    optimizer = sgd(model)
    GroupL1(optimizer, 100, model, groups, macs=0.5)
    step(model, optimizer, 0)
    assert all(param.isfinite().all() for param in model.parameters())


def test_slimming_cuts_the_smallest_scales_of_all(groups):
    model = Residual()
    masks = Slimming(sgd(model), 100, model, groups, channels=0.5).finalize()
    kept = groups.kept_by(masks)
    assert kept.sum() == 10
    fresh = Residual()
    scores = in_order(groups, fresh.bn1.weight.abs(), fresh.bn0.weight.abs() + fresh.bn2.weight.abs())
    assert scores[kept].min() > scores[~kept].max()


def test_costs_do_not_count_in_the_order(groups):
    """Inner channels matter a little less, and cost far less: by score alone they go first, by score per cost last."""
    model = Residual()
    with torch.no_grad():
        for norm, scale in ((model.bn1, 0.9), (model.bn0, 0.5), (model.bn2, 0.5)):
            norm.weight.fill_(scale)
    method = Slimming(sgd(model), 100, model, groups, parameters=0.7)
    scores, bound = method.scores(), groups.for_budget("parameters")
    inner, added = widths(method.finalize())
    assert inner < 12
    assert added == 8
    (kept,) = bound.select([scores], int(bound.total([scores]) * 0.7), select_top)
    assert kept[groups.channels.rows["bn1.weight"][1]].all()


def test_uniform_keeps_the_largest_filters_of_each_layer(groups):
    model = Residual()
    masks = Uniform(sgd(model), 100, model, groups, macs=0.5).finalize()
    inner, added = widths(masks)
    assert abs(inner / 12 - added / 8) <= 1 / 8
    fresh = Residual()
    lengths = fresh.conv1.weight.abs().sum((1, 2, 3))
    assert lengths[masks["bn1.weight"]].min() > lengths[~masks["bn1.weight"]].max()
    lengths = (fresh.stem.weight.abs().sum((1, 2, 3)) + fresh.conv2.weight.abs().sum((1, 2, 3))).detach()
    assert lengths[masks["bn0.weight"]].min() > lengths[~masks["bn0.weight"]].max()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.05])
def test_uniform_takes_the_largest_share_that_fits(groups, share):
    kept = groups.kept_by(Uniform(sgd(model := Residual()), 100, model, groups, macs=share).finalize())
    bound = groups.for_budget("macs")
    most = share * bound.total([IMAGES])
    assert bound.cost_of(kept) <= most
    inner, added = (kept[groups.channels.rows[name][1]].sum().item() for name in ("bn1.weight", "bn0.weight"))
    costs = [
        144 * (3 * a * 9 + 2 * a * i * 9) + a * 5
        for a, i in ((added + 1, inner), (added, inner + 1))
        if a <= 8 and i <= 12
    ]
    assert max(costs) > most  # with one channel more of the layer whose turn is next it does not fit


# --- budgets, the cut, and what follows ---


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"parameters": 0.4}, {"channels": 0.3}])
def test_the_budget_is_met_and_used(groups, name, budget):
    model = Residual()
    masks = METHODS[name](sgd(model), 100, model, groups, **budget).finalize()
    ((kind, share),) = budget.items()
    bound = groups.for_budget(kind)
    used = bound.cost_of(groups.kept_by(masks)) / bound.total([IMAGES])
    assert share - 0.15 < used <= share  # a channel of this small net is up to an eighth of it
    slim = remove_channels(model, groups, masks)
    assert sum(param.numel() for param in slim.parameters()) < sum(param.numel() for param in model.parameters())
    model.eval(), slim.eval()
    torch.testing.assert_close(slim(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["slimming", "group_l1"])
def test_the_schedule_cuts_and_the_rest_trains_on(groups, name):
    model = Residual()
    optimizer = sgd(model)
    method = METHODS[name](optimizer, 10, model, groups, cut=0.4, macs=0.5)
    for seed in range(4):
        step(model, optimizer, seed)
        assert model.bn1.weight.all()
    step(model, optimizer, 4)
    masks = {key: mask.clone() for key, mask in method.finalize().items()}
    assert 0 < masks["bn1.weight"].sum() < 12 or 0 < masks["bn0.weight"].sum() < 8
    before = {key: param.detach().clone() for key, param in model.named_parameters()}
    for seed in range(5, 8):
        step(model, optimizer, seed)
    for key, mask in masks.items():
        param = model.get_parameter(key)
        assert not param[~mask].any(), key
        assert not param.grad[~mask].any(), key
        assert (param[mask] != before[key][mask]).all(), key
    assert all(torch.equal(masks[key], mask) for key, mask in method.finalize().items())


@pytest.mark.parametrize("name", SIMPLE)
def test_after_the_cut_it_is_keep_masked(groups, name):
    model, twin = Residual(), Residual()
    optimizer, reference = sgd(model), sgd(twin)
    masks = METHODS[name](optimizer, 100, model, groups, macs=0.5).finalize()
    keep_masked(reference, masks, twin)
    for seed in range(3):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    assert_same_bits(model, twin)


def test_clipping_does_not_count_what_was_cut(groups):
    model = Residual()
    masks = Uniform(sgd(model), 100, model, groups, macs=0.5).finalize()
    F.cross_entropy(model(IMAGES), torch.arange(4)).backward()
    before = [(name, param.grad) for name, param in model.named_parameters() if name in masks]
    model.bn2.weight.sum().backward()  # also where nothing passes
    assert not any(grad[~masks[name]].any() for name, grad in before)


class Dense(nn.Module):
    """A norm over the image's own channels, which must stay, and those of a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(9)
        self.last = nn.Conv2d(9, 4, 3)

    def forward(self, images):
        return self.last(F.relu(self.bn(torch.cat([images, self.conv(images)], 1))))


def test_scales_of_channels_that_must_stay_are_not_penalized():
    model = Dense()
    groups = ChannelGroups.trace(model, IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Slimming(optimizer, 100, model, groups, macs=0.5, strength=0.25)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert model.bn.weight.tolist() == [1.0] * 3 + [0.75] * 6


def test_uniform_cuts_before_the_first_step(groups):
    model = Residual()
    Uniform(sgd(model), 100, model, groups, macs=0.5)
    assert not model.bn1.weight.all()


def pushed(model, optimizer):
    """Return whether a step of plain gradients moves all channels."""
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return bool(model.bn0.bias.all())


def test_remove_lets_the_weights_move(groups):
    model = Residual()
    optimizer = sgd(model)
    method = Uniform(optimizer, 100, model, groups, macs=0.5)
    assert not pushed(model, optimizer)
    method.remove()
    assert pushed(model, optimizer)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("stop", [2, 6])
def test_resume_to_the_same_bits(groups, name, make, stop):
    def begin():
        model = Residual()
        optimizer = make(model)
        return model, optimizer, METHODS[name](optimizer, 8, model, groups, cut=0.5, macs=0.5)

    assert_same_end(*straight_and_resumed(begin, 8, stop))


def test_a_state_from_before_the_cut_undoes_it(groups):
    model = Residual()
    optimizer = sgd(model)
    method = Slimming(optimizer, 100, model, groups, macs=0.5)
    state = method.state_dict()
    method.finalize()
    assert not pushed(model, optimizer)
    method.load_state_dict(state)
    assert pushed(model, optimizer)


def test_a_deep_net_without_weights_in_its_shortcuts():
    model = resnet_a(8)
    images = torch.rand(2, 3, 16, 16)
    groups = ChannelGroups.trace(model, images)
    for name in PLAIN:
        net = copy.deepcopy(model)
        masks = METHODS[name](sgd(net), 100, net, groups, macs=0.5).finalize()
        bound = groups.for_budget("macs")
        used = bound.cost_of(groups.kept_by(masks)) / bound.total([images])
        assert 0.45 < used <= 0.5, name
        remove_channels(net, groups, masks)


def test_channels_of_transposed_convolutions_are_filters_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    groups = ChannelGroups.trace(model, torch.rand(1, 3, 8, 8))
    lengths = model[0].weight.detach().abs().sum((0, 2, 3))
    kept = Uniform(sgd(model), 100, model, groups, channels=0.5).finalize()["1.weight"]
    assert kept.sum() == 3
    assert lengths[kept].min() > lengths[~kept].max()


# --- bad input ---


def test_bad_input(groups):
    model = Residual()
    optimizer = sgd(model)
    for budget in ({}, {"macs": 0.5, "channels": 0.5}, {"sparsity": 0.5}):
        with pytest.raises(ValueError, match="give one of macs, parameters, channels, latency, not"):
            Slimming(optimizer, 100, model, groups, **budget)
    with pytest.raises(ValueError, match="below the smallest possible"):
        Slimming(optimizer, 100, model, groups, macs=0.01)
    with pytest.raises(ValueError, match="total_steps must be at least 1, not 0"):
        Slimming(optimizer, 0, model, groups, macs=0.5)
    with pytest.raises(ValueError, match="cut is a share, from 0 to 1, not 2"):
        Uniform(optimizer, 100, model, groups, cut=2, macs=0.5)
    with pytest.raises(ValueError, match="strength must be finite"):
        GroupL1(optimizer, 100, model, groups, macs=0.5, strength=-1)
    with pytest.raises(ValueError, match="trace it again"):
        Slimming(optimizer, 100, nn.Linear(3, 3), groups, macs=0.5)
    with pytest.raises(ValueError, match=r"'bn0\.bias' silences channels, but the optimizer does not train it"):
        Slimming(torch.optim.SGD([model.bn0.weight], lr=0.1), 100, model, groups, macs=0.5)
    assert not optimizer._optimizer_step_pre_hooks


def test_slimming_needs_norms():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    groups = ChannelGroups.trace(model, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"no norm scales the channels of '0\.weight': leave its"):
        Slimming(sgd(model), 100, model, groups, macs=0.5)


@pytest.mark.parametrize("name", ["slimming", "group_l1"])
def test_weights_that_are_not_finite_cannot_be_ranked(groups, name):
    model = Residual()
    method = METHODS[name](sgd(model), 100, model, groups, macs=0.5)
    with torch.no_grad():
        model.bn1.weight[3] = torch.nan
    with pytest.raises(ValueError, match="training has diverged"):
        method.finalize()
    assert model.bn0.weight.all()


def test_a_closure_is_refused(groups):
    model = Residual()
    optimizer = sgd(model)
    Slimming(optimizer, 100, model, groups, macs=0.5)
    with pytest.raises(ValueError, match="take steps without a closure"):
        optimizer.step(lambda: 0.0)


def test_a_state_of_something_else_is_refused(groups):
    model = Residual()
    method = Slimming(sgd(model), 100, model, groups, macs=0.5)
    state = method.state_dict()
    for other, said in (
        ({"kept": torch.ones(3, dtype=torch.bool)}, "the state is of a model of 3 units, not 20"),
        ({"method": "group_l1"}, "saved with method group_l1, which is slimming here"),
        ({"strength": 0.5}, "saved with strength 0.5, which is 0.0001 here"),
        ({"macs": 0.25}, "saved with macs 0.25, which is 0.5 here"),
    ):
        with pytest.raises(ValueError, match=said):
            method.load_state_dict({**state, **other})


def test_settings_of_the_methods():
    assert {name: method.settings() for name, method in METHODS.items()} == {
        "slimming": {"cut": 0.7, "strength": 1e-4},
        "group_l1": {"cut": 0.7, "strength": 1e-4},
        "uniform": {"cut": 0.0},
        "resrep": {"cut": 1.0, "begin": 0.01, "every": 200, "at_once": 4, "strength": 1e-4},
        "c_sgd": {"cut": 1.0, "strength": 0.05},
        "aofp": {"cut": 0.7, "every": 1000, "threshold": 0.01},
    }
