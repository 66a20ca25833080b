import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, Schedule
from gsm_sgd.structured import METHODS, ChannelGroups, latency, remove_channels
from gsm_sgd.structured.cost import Grid, Interpolated
from gsm_sgd.structured.surgery import narrowed

IMAGES = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A stem, a block, a depthwise convolution, one with a stride, a branch for training alone, and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep, self.bn3 = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.down, self.bn4 = nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.aux, self.fc = nn.Linear(16, 5), nn.Linear(16 * 9, 5)

    def forward(self, images):
        x = F.relu(self.bn0(self.stem(images)))
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.relu(self.bn4(self.down(self.bn3(self.deep(x)))))
        if self.training:
            return self.fc(x.flatten(1)) + self.aux(x.mean((2, 3)))
        return self.fc(x.flatten(1))


class Clock:
    """A made-up one: a layer takes so long for each pair, input and output, and the net more for all that it gives."""

    def __init__(self):
        self.measured = []

    def __call__(self, module, *inputs):
        self.measured.append(str(module))
        if isinstance(module, nn.Conv2d | nn.Linear):
            return self.layer(module)
        total = []
        hooks = [
            part.register_forward_hook(
                lambda part, _, output: total.append(self.layer(part) + 500 + 2 * output.numel())
            )
            for part in module.modules()
            if isinstance(part, nn.Conv2d | nn.Linear)
        ]
        assert not module.training
        module(*inputs)
        for hook in hooks:
            hook.remove()
        return sum(total)

    @staticmethod
    def layer(module):
        if getattr(module, "stride", 0) == (1, 1) and module.padding == (0, 0):  # it is depthwise, with one channel too
            return 1000 + 11 * len(module.weight)
        outputs, inputs = module.weight.shape[:2]
        return 1000 + 30 * inputs * outputs + 5 * inputs + 11 * outputs


@pytest.fixture
def clock(monkeypatch):
    made_up = Clock()
    monkeypatch.setattr(latency, "nanoseconds", made_up)
    return made_up


@pytest.fixture(scope="module")
def traced():
    return ChannelGroups.trace(Net(), IMAGES)


@pytest.fixture
def groups(traced, clock):
    traced.measure_latency(Net(), IMAGES)
    return traced.for_budget("latency")


# --- interpolation ---


def grid(costs, inputs=(1, 2, 4), outputs=(1, 3)):
    """Return a call of a layer whose inputs are family 0, and outputs family 1."""
    return Grid((0, torch.tensor([1.0, 0.0])), (0, torch.tensor([0.0, 1.0])), (inputs, outputs), costs)


def cost(*widths, costs=((10, 30), (20, 50), (40, 90)), each=0):
    return Interpolated([grid(costs)], each).total(torch.tensor(widths))


def test_exact_where_it_was_measured():
    assert [[cost(a, b) for b in (1, 3)] for a in (1, 2, 4)] == [[10, 30], [20, 50], [40, 90]]


def test_bilinear_in_between():
    assert cost(1, 2) == 20
    assert cost(3, 1) == 30
    assert cost(3, 2) == pytest.approx((20 + 50 + 40 + 90) / 4)


def test_nothing_costs_nothing():
    assert cost(0, 3, each=7) == cost(4, 0, each=7) == cost(0, 0, each=7) == 0
    assert cost(1, 1, each=7) == 17


def test_monotone_whatever_was_measured():
    costs = ((40, 35), (20, 90), (60, 10))
    found = [[cost(a, b, costs=costs) for b in range(4)] for a in range(5)]
    for a in range(5):
        for b in range(4):
            assert a == 0 or found[a][b] >= found[a - 1][b]
            assert b == 0 or found[a][b] >= found[a][b - 1]
    assert cost(4, 3, costs=costs) == 90


def test_grids_of_different_sizes_go_together():
    one, other = grid(((10, 30), (20, 50), (40, 90))), grid(((5,),), inputs=(4,), outputs=(3,))
    both = Interpolated([one, other])
    assert both.total(torch.tensor([2, 3])) == 50 + 5
    assert both.total(torch.tensor([4, 1])) == 40 + 5


def test_savings_are_differences_and_add_up():
    sizes, blocks, block_sizes = torch.tensor([4, 3]), torch.tensor([0, 0, 0, 1, 1]), torch.tensor([2, 1, 1, 2, 1])
    saved = Interpolated([grid(((10, 30), (20, 50), (40, 90)))], 7).savings(sizes, blocks, block_sizes)
    assert saved.tolist() == [
        *(cost(2, 3, each=7), cost(3, 3) - cost(2, 3), cost(4, 3) - cost(3, 3)),
        *(cost(4, 2, each=7), cost(4, 3) - cost(4, 2)),
    ]


# --- of a net ---


def kept_at_random(groups, seed):
    """Return some units, at least one of each family but now and then none of the block's inner ones."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(groups.channels.count, generator=generator) < 0.3 + 0.1 * seed
    for family in groups.families.unique():
        kept[(groups.families == family).nonzero()[0]] = True
    if seed % 2:
        kept[groups.channels.rows["bn1.weight"][1]] = False
    return kept


@pytest.mark.parametrize("seed", range(6))
def test_the_latency_of_a_narrow_net_is_what_it_would_be_measured(groups, clock, seed):
    """With a clock that is linear in each width nothing is lost by interpolation."""
    model = Net()
    kept = kept_at_random(groups, seed)
    slim = narrowed(model, groups.channels, kept).eval()
    assert groups.cost_of(kept) == pytest.approx(clock(slim, IMAGES), rel=1e-6)


def test_the_dense_net_takes_what_was_measured(groups, clock):
    assert groups.total([IMAGES]) == clock(Net().eval(), IMAGES)


@pytest.mark.parametrize("narrow", [1, 10**9])
def test_a_disturbed_measurement_gives_no_negative_costs(traced, monkeypatch, narrow):
    """The narrower net seems to take no time, or for ever; the dense net still takes what was measured."""
    made_up, dense = Clock(), sum(param.numel() for param in Net().parameters())

    def disturbed(module, *inputs):
        size = sum(param.numel() for param in module.parameters())
        return narrow if isinstance(module, Net) and size < dense else made_up(module, *inputs)

    monkeypatch.setattr(latency, "nanoseconds", disturbed)
    traced.measure_latency(Net())
    bound = traced.for_budget("latency")
    assert bound._cost._each >= 0
    assert (bound._savings >= 0).all()
    assert bound.total([IMAGES]) == pytest.approx(made_up(Net().eval(), IMAGES), abs=1)


def test_layers_that_are_alike_are_measured_once(clock, traced):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(4)))
    groups = ChannelGroups.trace(model, IMAGES)
    times = groups.measure_latency(model)
    assert len(clock.measured) == len(set(clock.measured)) == len(times)


def test_the_model_is_as_before(clock, traced):
    model = Net()
    state, hooks = {k: v.clone() for k, v in model.state_dict().items()}, [m._forward_hooks for m in model.modules()]
    traced.measure_latency(model)
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(hooks)


def test_known_times_are_not_measured_again(clock, traced, monkeypatch):
    times = json.loads(json.dumps(traced.measure_latency(Net())))
    total = traced.for_budget("latency").total([IMAGES])
    monkeypatch.setattr(latency, "nanoseconds", None)
    again = ChannelGroups.trace(Net(), IMAGES)
    assert again.measure_latency(Net(), times=times) == times
    assert again.for_budget("latency").total([IMAGES]) == total


def test_the_layout_of_the_inputs_is_that_of_the_layers(clock, traced):
    last = {"memory_format": torch.channels_last}
    times = traced.measure_latency(Net().to(**last), IMAGES.contiguous(**last))
    assert any("Conv2d(8, 12" in key and key.endswith("channels-last") for key in times)
    assert not any("channels-last" in key for key in traced.measure_latency(Net()))


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_the_budget_is_met(groups, share):
    for name in ("slimming", "group_l1", "uniform"):
        method = METHODS[name]
        model = Net()
        masks = method(torch.optim.SGD(model.parameters(), lr=0.1), 10, model, groups, latency=share).finalize()
        used = groups.cost_of(groups.kept_by(masks)) / groups.total([IMAGES])
        assert used <= share, name
        assert name == "uniform" or used > share - 0.15, name


def test_gsm_trains_to_a_latency(groups):
    model = Net()
    optimizer = GSM(
        model.named_parameters(), lr=0.1, momentum=0.9, pattern=groups, latency=0.6, schedule=Schedule(20, cut=0.9)
    )
    for seed in range(20):
        images = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
        F.cross_entropy(model(images), torch.arange(8) % 5).backward()
        optimizer.step()
        optimizer.zero_grad()
    slim = remove_channels(model, groups, optimizer.finalize())
    assert Clock()(slim.eval(), IMAGES) <= 0.6 * groups.total([IMAGES]) * (1 + 1e-6)


def test_a_real_measurement(traced, monkeypatch):
    monkeypatch.setattr(latency, "_SECONDS", 1e-4)
    times = traced.measure_latency(Net())
    assert all(isinstance(time, int) and time > 0 for time in times.values())
    bound = traced.for_budget("latency")
    assert bound.total([IMAGES]) > 0
    assert (bound._savings >= 0).all()


# --- bad input ---


def test_bad_input(clock):
    groups = ChannelGroups.trace(Net(), IMAGES)
    with pytest.raises(ValueError, match="call measure_latency before"):
        groups.for_budget("latency")
    with pytest.raises(ValueError, match="trace it again"):
        groups.measure_latency(nn.Linear(2, 2))


class Own(nn.Module):
    """A layer of one's own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 3, 3, 3))

    def forward(self, images):
        return F.conv2d(images, self.weight)


def test_only_torchs_layers_can_be_measured(clock):
    model = nn.Sequential(Own(), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with pytest.raises(ValueError, match="0 is no convolution or linear layer of torch's"):
        ChannelGroups.trace(model, IMAGES).measure_latency(model)
