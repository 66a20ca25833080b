"""Which channels belong together, and is a net without some what it is with them at zero?"""

import copy
import re

import pytest
import torch
import torch_pruning
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from channel_nets import SMALL, Net, check_sliced, images, plain, residual_net, small
from gsm_sgd.experiments import models
from gsm_sgd.structured import ChannelGroups
from gsm_sgd.structured.graph import STAYS

TORCHVISION = {
    "resnet18": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "efficientnet_b0": 32,
    "densenet121": 32,
    "vgg11_bn": 32,
    "googlenet": 64,
    "shufflenet_v2_x0_5": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "convnext_tiny": 32,
    "swin_t": 32,
    "squeezenet1_1": 32,
    "mnasnet0_5": 32,
    "resnext50_32x4d": 32,
}


def build(name):
    torch.manual_seed(0)
    if name == "googlenet":
        return torchvision.models.get_model(name, weights=None, init_weights=False, num_classes=10)
    return torchvision.models.get_model(name, weights=None, num_classes=10)


def vision_transformer():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)


def locked(groups):
    """Return the modules of which all outputs stay."""
    return {weight.removesuffix(".weight") for weight in groups.channels.locked}


# --- sliced equals zeroed ---


@pytest.mark.parametrize("name", SMALL)
def test_sliced_equals_zeroed(name):
    model, example = small(name)
    groups = ChannelGroups.trace(model, example)
    check_sliced(model, groups, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_sliced_equals_zeroed_in_torchvisions_nets(name):
    model, example = build(name), torch.randn(2, 3, TORCHVISION[name], TORCHVISION[name])
    groups = ChannelGroups.trace(model, example)
    check_sliced(model, groups, example, seeds=range(2))
    if name not in ("swin_t", "convnext_tiny"):
        outputs = [weight for weight, reason in groups.channels.locked.items() if "output" in reason]
        assert set(groups.channels.locked) == set(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet56a", "densenet40"])
def test_sliced_equals_zeroed_in_our_nets(name):
    model, example = models.build(name, 0), images(size=32)
    check_sliced(model, ChannelGroups.trace(model, example), example)


def test_only_the_mlps_of_transformers_are_narrowed():
    model = vision_transformer()
    groups = ChannelGroups.trace(model, images(size=32))
    assert groups.channels.count == 2 * 32
    free = {layer.weight for layer in groups.channels.layers} - set(groups.channels.locked)
    assert free == {f"encoder.layers.encoder_layer_{i}.mlp.0.weight" for i in range(2)}
    assert (
        "scaled_dot_product_attention"
        in groups.channels.locked["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    )
    check_sliced(model, groups, images(size=32))


@pytest.mark.slow
@pytest.mark.parametrize("aux", [True, False])
def test_layers_of_training_alone_are_found(aux):
    model = torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=aux, num_classes=10)
    groups = ChannelGroups.trace(model, torch.randn(2, 3, 64, 64))
    assert any(name.startswith("aux1") for name in groups.shapes) == aux
    assert any(layer.weight.startswith("aux1") for layer in groups.channels.layers) == aux
    assert model.training
    check_sliced(model, groups, torch.randn(2, 3, 64, 64), seeds=[0])


# --- what belongs together ---


def units_of(groups, weight, dim=0):
    return groups.channels.slots[weight, dim].tolist()


def test_what_is_added_is_one_unit():
    groups = ChannelGroups.trace(residual_net(), images())
    stem = units_of(groups, "0.weight")
    assert (
        stem
        == units_of(groups, "3.conv2.weight")
        == units_of(groups, "4.conv2.weight")
        == units_of(groups, "7.weight", 1)
    )
    assert sorted({*stem, *units_of(groups, "3.conv1.weight"), *units_of(groups, "4.conv1.weight")}) == list(range(24))
    assert set(groups.channels.rows) == {
        *("1.weight", "1.bias", "3.bn1.weight", "3.bn1.bias", "3.bn2.weight", "3.bn2.bias"),
        *("4.bn1.weight", "4.bn1.bias", "4.bn2.weight", "4.bn2.bias"),
    }


def test_without_a_norm_filters_and_biases_silence():
    groups = ChannelGroups.trace(models.build("lenet5", 0), torch.randn(1, 1, 28, 28))
    assert set(groups.channels.rows) == {
        f"{layer}.{part}" for layer in ("conv1", "conv2", "fc1") for part in ("weight", "bias")
    }


def test_shortcuts_of_zeros_shift_channels():
    groups = ChannelGroups.trace(models.build("resnet20a", 0), images(size=16))
    (first, second) = groups.channels.paddings
    assert [len(side) for side in (*first.labels, *second.labels)] == [8, 8, 16, 16]
    wide = [
        units_of(groups, name) for name, dim in groups.channels.slots if dim == 0 and len(units_of(groups, name)) == 32
    ]
    stage = next(units for units in wide if set(first.labels[0].tolist()) <= set(units))
    assert stage[:8] == first.labels[0].tolist()
    assert stage[-8:] == first.labels[1].tolist()
    assert stage[8:24] == units_of(
        groups, "conv1.weight" if "conv1.weight" in groups.shapes else next(iter(groups.shapes))
    )


def test_groups_and_heads_stay_or_go_as_a_whole():
    model, example = small("depthwise and grouped")
    slots = ChannelGroups.trace(model, example).channels.slots
    assert slots["d.weight", 0].view(4, 4).unique(dim=1).shape == (4, 1)
    assert slots["g.weight", 0].view(4, 3).unique(dim=1).shape == (4, 1)
    assert (
        slots["g.weight", 0][::3].tolist() == slots["d.weight", 0][::4].tolist() == slots["a.weight", 0][::2].tolist()
    )


def test_a_channel_that_a_sigmoid_hides_stays():
    groups = ChannelGroups.trace(plain(lambda net, y: torch.sigmoid(y)), images())
    assert groups.channels.locked["a.weight"] == "nothing makes what b reads zero"


def test_padding_with_ones_keeps_channels():
    model = plain(lambda net, y: F.pad(y, (1, 1, 1, 1), value=1.0))
    assert locked(ChannelGroups.trace(model, images())) == {"a", "h"}
    model = plain(lambda net, y: F.pad(y, (1, 1, 1, 1)))
    assert locked(ChannelGroups.trace(model, images())) == {"h"}


def test_embeddings_keep_what_they_share():
    """A tied embedding takes the weight as a table, which would lose columns."""
    model = Net(
        lambda net, x: net.h(F.relu(net.l(net.e(x)))),
        e=nn.Embedding(9, 8),
        l=nn.Linear(8, 8),
        h=nn.Linear(8, 9, bias=False),
    )
    model.h.weight = model.e.weight
    with pytest.raises(
        ValueError, match=r"no channel of this model can be removed \(l.weight: embedding in e takes it"
    ):
        ChannelGroups.trace(model, torch.randint(9, (2, 5)))


def test_a_weight_that_is_used_both_ways_keeps_the_second():
    model = Net(lambda net, x: net.d(F.relu(net.a(x))), a=nn.Conv2d(3, 8, 3), d=nn.ConvTranspose2d(8, 3, 3))
    model.d.weight = model.a.weight
    groups = ChannelGroups.trace(model, images())
    assert groups.channels.count == 8
    check_sliced(model, groups, images())


def test_a_layer_that_also_reads_the_images_keeps_its_inputs():
    model = plain(lambda net, y: F.relu(net.c(y)), c=nn.Conv2d(8, 8, 1))
    both = Net(lambda net, x: net.m(x[:, :3]) + F.relu(net.m.c(x)).mean(), m=model)
    groups = ChannelGroups.trace(both, images(channels=8))
    assert set(units_of(groups, "m.c.weight", 1)) == {STAYS}
    check_sliced(both, groups, images(channels=8))


# --- Torch-Pruning as an oracle ---


LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def their_groups(model, example):
    """Return what Torch-Pruning removes together: sets of (weight, dimension, index)."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    found = set()
    for group in graph.get_all_groups(root_module_types=LAYERS):
        members = {}
        for item in group:
            module, way = item.dep.target.module, item.dep.handler.__name__
            if not isinstance(module, LAYERS) or ("in_channels" in way and getattr(module, "groups", 1) > 1):
                continue
            dim = int(("in_channels" in way) != isinstance(module, nn.ConvTranspose2d))
            for index, root in zip(item.idxs, item.root_idxs, strict=True):
                members.setdefault(root, set()).add((names[module], dim, index))
        found |= {frozenset(entries) for entries in members.values()}
    return found


def our_groups(groups):
    members = {}
    for (name, dim), units in groups.channels.slots.items():
        if len(groups.shapes.get(name, ())) > 1:
            for index, unit in enumerate(units.tolist()):
                members.setdefault(unit, set()).add((name, dim, index))
    stays = members.pop(STAYS, set())
    return {frozenset(entries) for entries in members.values()}, stays


ORACLE = {
    "lenet5": lambda: models.build("lenet5", 0),
    "lenet300": lambda: models.build("lenet300", 0),
    "resnet20": lambda: models.build("resnet20", 0),
    "u-net": lambda: small("unet")[0],
    **{
        name: pytest.param(lambda name=name: build(name), marks=pytest.mark.slow)
        for name in ("resnet18", "mobilenet_v2", "densenet121", "vgg11_bn", "squeezenet1_1", "mnasnet0_5")
    },
}


@pytest.mark.parametrize("make", ORACLE.values(), ids=ORACLE)
@pytest.mark.filterwarnings("ignore")
def test_groups_are_those_of_torch_pruning(make):
    model = make()
    first = next(model.parameters())
    example = torch.randn(1, 1, 28, 28) if first.shape[1] in (1, 784) else torch.randn(1, 3, 32, 32)
    ours, stays = our_groups(ChannelGroups.trace(model, example))
    theirs = {group for group in their_groups(model.eval(), example) if not group & stays}
    assert ours == theirs


# --- what is refused ---


def refused(model, example=None, **options):
    """Return why a model is refused; it stays as it is."""
    before = {name: (tensor.clone(), tensor._version) for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        ChannelGroups.trace(model, images() if example is None else example, **options)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][0])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_reordered_channels_are_refused():
    reason = "in the model's forward changes the order of channels: keep the channels that get there, with ignore=['a']"
    assert refused(plain(lambda net, y: y.flip(1))) == f"flip {reason}"
    assert refused(plain(lambda net, y: y.roll(1, 1))) == f"roll {reason}"
    assert refused(plain(lambda net, y: y.roll(1))) == f"roll {reason}"


UNKNOWN = {
    "index": lambda net, y: y[:, [1, 0, 2, 3, 4, 5, 6, 7]],
    "fft_fft2": lambda net, y: torch.fft.fft2(y).real,
    "channel_shuffle": lambda net, y: net.shuffle(y),
}


@pytest.mark.parametrize("operator", UNKNOWN)
def test_what_is_not_understood_is_refused_by_name_and_place(operator):
    model = plain(UNKNOWN[operator], shuffle=nn.ChannelShuffle(2))
    place = "shuffle" if operator == "channel_shuffle" else "the model's forward"
    assert refused(model) == (
        f"{operator} in {place} is not understood, and channels pass through it: keep the channels that get there, "
        "with ignore=['a']"
    )
    groups = ChannelGroups.trace(model, images(), ignore=["a"])
    assert locked(groups) == {"a", "h"}
    assert groups.channels.locked["a.weight"] == "it is ignored"
    check_sliced(model, groups, images())


@pytest.mark.filterwarnings("ignore")  # torch's of what the layer does to its weights
def test_recurrent_layers_are_refused():
    model = Net(
        lambda net, x: net.h(net.l(F.relu(net.p(x)))[0].mean(1)), p=nn.Linear(8, 6), l=nn.LSTM(6, 7), h=nn.Linear(7, 3)
    )
    assert refused(model, torch.randn(2, 5, 8)).startswith("lstm in l is not understood")


def test_ignore_takes_globs_and_modules_that_hold_layers():
    model = residual_net()
    assert locked(ChannelGroups.trace(model, images(), ignore=["*.conv1"])) == {"3.conv1", "4.conv1", "7"}
    assert locked(ChannelGroups.trace(model, images(), ignore=["4"])) == {"0", "3.conv2", "4.conv1", "4.conv2", "7"}
    assert refused(model, ignore=["5.conv*"]) == "ignore='5.conv*' is no module of the model"
    assert refused(model, ignore="4") == "ignore is a list of modules: ignore=['4']"
    assert refused(model, ignore=["*"]).startswith("no channel of this model can be removed (0.weight: it is ignored")


FIXED = {
    "a stored width": lambda net, y: y / net.n.num_features,
    "a width of today": lambda net, y: y / y.shape[1],
    "a view": lambda net, y: y.view(-1, 8, 64).view(-1, 8, 8, 8),
    "a shuffle": lambda net, y: y.view(2, 2, 4, 8, 8).transpose(1, 2).reshape(2, 8, 8, 8),
    "an assertion": lambda net, y: y if y.shape[1] == 8 else None,
    "a view that is changed": lambda net, y: (y.view(y.shape).sigmoid_(), y)[1],
}


@pytest.mark.parametrize("case", FIXED)
def test_a_forward_that_counts_channels_is_refused(case):
    said = refused(plain(FIXED[case]))
    assert said.startswith("without some channels of a the model does not compute what it computes with those at zero")
    check_sliced(plain(FIXED[case]), ChannelGroups.trace(plain(FIXED[case]), images(), ignore=["a"]), images())


def test_models_that_cannot_be_exported_are_refused_in_a_line(capfd):
    said = refused(plain(lambda net, y: y if y.sum() > 0 else -y))
    assert re.match(
        "the model cannot be exported in evaluation mode, so its channels are unknown: .*data-dependent", said
    )
    with pytest.raises(ValueError, match="cannot be exported in evaluation mode"):
        ChannelGroups.trace(plain(), torch.randn(2, 4, 8, 8))

    def forward(net, x):
        if net.training:
            raise RuntimeError("needs labels\nto train")
        return net.m(x)

    model = Net(forward, m=plain(), aux=nn.Linear(3, 3))
    assert refused(model) == "the model cannot be exported in training mode, so its channels are unknown: needs labels"


def test_models_without_data_or_layers_are_refused():
    with torch.device("meta"):
        assert "'a.weight' has no data yet" in refused_meta(plain())
    assert "has no data yet" in refused_meta(nn.Sequential(nn.LazyConv2d(3, 3)))
    assert refused(nn.ReLU()) == "no channel of this model can be removed (it has no layers)"
    assert refused(nn.Conv2d(3, 3, 1)).startswith("no channel of this model can be removed (weight: it is an output")


def refused_meta(model):
    with pytest.raises(ValueError, match="no data") as caught:
        ChannelGroups.trace(model, torch.zeros(2, 3, 8, 8, device="cpu"))
    return str(caught.value)


@pytest.mark.parametrize("options", [{"floor": -0.1}, {"floor": 1.1}, {"round_to": 0}, {"round_to": 1.5}])
def test_options_out_of_range_are_refused(options):
    assert refused(plain(), **options).startswith(next(iter(options)))


# --- what stays ---


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_the_model_and_the_random_numbers_as_they_are(training):
    model = plain(lambda net, y: net.d(y), d=nn.Dropout2d()).train(training)
    model.n.eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    ChannelGroups.trace(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.n.training, model.d.training) == (training, False, training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_frozen_silencers_lock_channels():
    model = plain()
    model.n.bias.requires_grad_(False)
    groups = ChannelGroups.trace(model, images())
    assert groups.channels.locked["a.weight"] == "nothing makes what b reads zero"
    assert set(groups.channels.rows) == {"b.weight", "b.bias"}


# --- costs ---


def check_macs(model, example):
    groups = ChannelGroups.trace(model, example)
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    weights = [torch.empty(1)]
    assert groups.for_budget("macs").total(weights) * len(example) == counter.get_total_flops() // 2
    assert groups.for_budget("parameters").total(weights) == sum(param.numel() for param in model.parameters())
    assert groups.for_budget("channels").total(weights) == groups.channels.count


FLOPS = [name for name in SMALL if name not in ("encoder",)]


@pytest.mark.parametrize("name", FLOPS)
def test_macs_are_those_of_torchs_counter(name):
    check_macs(*small(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TORCHVISION if name not in ("googlenet", "swin_t")])
def test_macs_of_torchvisions_nets_are_those_of_torchs_counter(name):
    check_macs(build(name), torch.randn(2, 3, TORCHVISION[name], TORCHVISION[name]))
