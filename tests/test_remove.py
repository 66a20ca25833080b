"""Removing channels for good: the narrow model, its optimizer, and its files."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from channel_nets import Residual, images, plain, random_kept, residual_net, shaken, small
from gsm_sgd import GSM, Masks, Schedule, keep_masked
from gsm_sgd.experiments import models
from gsm_sgd.structured import ChannelGroups, load_narrow, narrow, remove_channels, save_narrow, widths
from gsm_sgd.structured.surgery import Constant, Removed, difference

WIDTHS = "gsm_sgd.widths"


def masks_of(groups, kept):
    """Return the masks of an optimizer that keeps these units."""
    names = list(groups.channels.rows)
    scores = [torch.ones(groups.shapes[name]) for name in names]
    return Masks(zip(names, groups.over(names).expand([kept], scores), strict=True))


def removed(model, example, kept=None, optimizer=None, **options):
    groups = ChannelGroups.trace(model, example, **options)
    kept = random_kept(groups, 0) if kept is None else kept(groups)
    return remove_channels(model, groups, masks_of(groups, kept), optimizer), groups, masks_of(groups, kept)


def without(*weights):
    """Return what keeps all units but the outputs of some layers."""

    def kept(groups):
        units = torch.ones(groups.channels.count, dtype=torch.bool)
        for weight in weights:
            units[groups.channels.slots[weight, 0]] = False
        return units

    return kept


# --- the narrow model ---


@pytest.mark.parametrize("name", ["residual", "unet", "depthwise and grouped", "group norm", "prelu", "1d", "3d"])
def test_modules_know_their_new_sizes(name):
    model, example = small(name)
    slim, _, masks = removed(model, example)
    assert type(slim) is type(model)
    for module in slim.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            assert weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            assert weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.BatchNorm2d):
            assert len(weight) == module.num_features == len(module.running_mean)
        elif isinstance(module, nn.GroupNorm):
            assert len(weight) == module.num_channels
            assert module.num_groups in range(1, 4)
        elif isinstance(module, nn.PReLU):
            assert len(weight) == module.num_parameters
    assert repr(slim) != repr(model)
    quiet = copy.deepcopy(model)
    masks.apply_(dict(quiet.named_parameters()))
    assert difference(quiet, slim, (example,)) < 1e-5
    ChannelGroups.trace(slim, example)  # once more


def test_the_model_itself_stays_as_it_is():
    model = residual_net().train()
    model[4].eval()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    slim, _, _ = removed(model, images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    assert [module.training for module in slim.modules()] == [module.training for module in model.modules()]


def test_hooks_memory_formats_buffers_and_flags_are_kept():
    model = plain(lambda net, y: net.k * y).to(memory_format=torch.channels_last)
    model.register_buffer("k", torch.randn(1, 8, 1, 1), persistent=False)
    calls = []
    model.b.register_forward_hook(lambda *_: calls.append(1))
    model.h.weight.requires_grad_(False)
    slim, _, _ = removed(model, images())
    calls.clear()
    slim(images())
    assert calls == [1]
    assert slim.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert not slim.b.weight.is_contiguous()
    assert slim.k.shape[1] == slim.a.out_channels < 8
    assert "k" not in slim.state_dict()
    assert not slim.h.weight.requires_grad
    assert slim.a.weight.requires_grad


def test_old_gradients_are_not_carried_over():
    model = plain()
    model(images()).sum().backward()
    slim, _, _ = removed(model, images())
    assert all(param.grad is None for param in slim.parameters())
    assert all(param.grad is not None for param in model.parameters())


def test_tied_weights_stay_tied():
    model, example = small("tied")
    slim, _, _ = removed(model, example)
    assert slim.c.weight is slim.d.weight
    assert slim.c.out_channels == slim.d.out_channels < 8
    model, example = small("shared under two names")
    slim, _, _ = removed(model, example)
    assert slim.m is slim.n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_kept(dtype):
    model = residual_net().to(dtype)
    slim, _, _ = removed(model, images().to(dtype))
    assert {param.dtype for param in slim.parameters()} == {dtype}


# --- branches ---

BRANCHES = {
    "with norms": ({}, {"3.conv1", "3.conv2", "3.bn2"}, {"3.bn1"}),
    "without the last norm": ({"norm": False}, {"3.conv1", "3.conv2"}, {"3.bn1"}),
    "without biases": ({"norm": False, "bias": False}, {"3.conv1", "3.conv2"}, {"3.bn1"}),
}


@pytest.mark.parametrize("case", BRANCHES)
@pytest.mark.parametrize("others", [False, True])
def test_vanished_branches_become_constants(case, others, tmp_path):
    options, constants, gone = BRANCHES[case]
    model, seed = shaken(residual_net(**options)), 1

    def kept(groups):
        units = without("3.conv1.weight")(groups)
        return units & random_kept(groups, seed) if others else units

    slim, _, masks = removed(model, images(), kept)
    assert {path for path, module in slim.named_modules() if isinstance(module, Constant)} == constants
    assert {path for path, module in slim.named_modules() if isinstance(module, Removed)} == gone
    quiet = copy.deepcopy(model).eval()
    masks.apply_(dict(quiet.named_parameters()))
    for size in (8, 5):
        torch.testing.assert_close(slim.eval()(images(size=size)), quiet(images(size=size)))
    save_narrow(slim, tmp_path / "net")
    again = load_narrow(residual_net(seed=5, **options), tmp_path / "net")
    assert torch.equal(again.eval()(images()), slim(images()))
    outputs = slim.train()(images())
    outputs.sum().backward()
    assert all(param.grad is not None for param in slim.parameters() if param.numel())


class Windows(nn.Module):
    """Convolutions of all kinds whose inputs may vanish, beside a mean that does not."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, 4, 1), layer, nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(F.relu(self.first(x))).mean((2, 3)) + x.mean((1, 2, 3))[:, None])


WINDOWS = [
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False),
    nn.Conv2d(4, 6, (3, 2), padding="valid"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    nn.ConvTranspose2d(4, 6, (2, 3), stride=(3, 1), dilation=2, bias=False),
]


@pytest.mark.parametrize("layer", WINDOWS, ids=str)
@pytest.mark.parametrize("size", [8, 11])
def test_constants_have_the_size_of_what_they_replace(layer, size):
    example = images(size=size)
    constant = removed(Windows(copy.deepcopy(layer)), example, without("first.weight"))[0].layer
    assert isinstance(constant, Constant)
    for other in (size, size + 1, size + 2):
        expected = layer(torch.zeros(2, 4, other, other))
        torch.testing.assert_close(constant(torch.zeros(2, 0, other, other)), expected)


def test_linear_branches_vanish():
    model, example = small("linear residual")
    slim, _, masks = removed(model, example, without("c.weight"))
    assert isinstance(slim.d, Constant)
    masks.apply_(dict(model.named_parameters()))
    torch.testing.assert_close(slim(example), model(example))
    torch.testing.assert_close(slim(example[:, :1]), model(example[:, :1]))


# --- what is refused ---


def test_what_was_compiled_is_removed_too():
    """Names get a prefix, in the optimizer or in the trace."""
    model = plain()
    groups = ChannelGroups.trace(model, images())
    optimizer = GSM(torch.compile(model).named_parameters(), lr=0.1, pattern=groups, macs=0.5)
    assert remove_channels(model, groups, optimizer.finalize(), optimizer).a.out_channels < 8
    wrapped = nn.DataParallel(plain())
    groups = ChannelGroups.trace(wrapped, images())
    optimizer = GSM(wrapped.named_parameters(), lr=0.1, pattern=groups, macs=0.5)
    assert remove_channels(wrapped, groups, optimizer.finalize(), optimizer).module.a.out_channels < 8


def test_a_layer_of_which_nothing_is_kept_is_a_constant():
    """Though no optimizer would choose so."""
    slim, _, _ = removed(plain(), images(), without("a.weight"))
    assert isinstance(slim.a, Constant)
    assert slim.a(images()).shape == (2, 0, 8, 8)
    assert torch.equal(slim(images())[0], slim(images())[1])


def test_a_model_that_has_changed_is_refused():
    model = plain()
    groups = ChannelGroups.trace(model, images())
    masks = masks_of(groups, random_kept(groups, 0))
    with pytest.raises(ValueError, match="the model is not what it was when its channels were traced"):
        remove_channels(plain(channels=4), groups, masks)
    other = plain()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the model is not what it was"):
        remove_channels(other, groups, masks)
    other = plain(lambda net, y: torch.sigmoid(y))
    with pytest.raises(ValueError, match=r"without these channels the outputs would differ by \d.* of the largest"):
        remove_channels(other, groups, masks)
    other = plain(lambda net, y: y.view(-1, 8, 8, 8))
    with pytest.raises(ValueError, match=r"the model does not run without these channels, so it stays as it is"):
        remove_channels(other, groups, masks)


def test_masks_of_other_parameters_are_refused():
    model = plain()
    groups = ChannelGroups.trace(model, images())
    masks = masks_of(groups, random_kept(groups, 0))
    with pytest.raises(ValueError, match=r"the masks lack 'n.bias', which silences channels"):
        remove_channels(model, groups, {name: mask for name, mask in masks.items() if name != "n.bias"})
    with pytest.raises(ValueError, match=r"the mask of 'n.bias' has shape \(3,\), not \(8,\)"):
        remove_channels(model, groups, {**masks, "n.bias": torch.ones(3, dtype=torch.bool)})


def test_a_refusal_leaves_the_optimizer_as_it_is():
    model = plain()
    groups = ChannelGroups.trace(model, images())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model._forward = plain(lambda net, y: torch.sigmoid(y))._forward
    with pytest.raises(ValueError, match="outputs would differ"):
        remove_channels(model, groups, masks_of(groups, random_kept(groups, 0)), optimizer)
    assert optimizer.param_groups[0]["params"] == list(model.parameters()) or all(
        one is other for one, other in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True)
    )


# --- the optimizer ---


def step(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    loss = F.cross_entropy(
        model(torch.randn(8, 3, 8, 8, generator=generator)), torch.randint(3, (8,), generator=generator)
    )
    loss.backward()
    optimizer.step()


OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.named_parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "AdamW": lambda model: torch.optim.AdamW(model.named_parameters(), lr=0.01, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("branch", [False, True])
def test_the_narrow_net_trains_in_lockstep_with_the_masked_one(name, branch):
    """Its momenta are those of the masked net."""
    model = residual_net(norm=False).double()
    optimizer = OPTIMIZERS[name](model)
    for number in range(3):
        step_double(model, optimizer, number)
    groups = ChannelGroups.trace(model, images().double())
    kept = random_kept(groups, 0)
    kept[groups.channels.slots["3.conv1.weight", 0]] = not branch
    masks = masks_of(groups, kept)
    twin, its = copy.deepcopy((model, optimizer))
    keep_masked(its, masks, twin) if name == "Adam" else keep_masked(its, masks)
    forget(its, masks, dict(twin.named_parameters()))
    slim = remove_channels(model, groups, masks, optimizer)
    for number in range(3, 9):
        step_double(slim, optimizer, number)
        step_double(twin, its, number)
        with torch.no_grad():
            apart = (slim(images().double()) - twin(images().double())).abs().max()
        assert apart < 1e-6
    assert all(
        (before != now).any()
        for before, now in zip(model.parameters(), slim.parameters(), strict=False)
        if before.shape == now.shape
    )
    for group in optimizer.param_groups:
        assert {id(param) for param in group["params"]} == {id(param) for param in slim.parameters()}
        assert set(optimizer.state) <= set(group["params"])
    for param, state in optimizer.state.items():
        assert all(value.shape in (param.shape, ()) for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_where_a_branch_with_norms_has_vanished(name):
    model = residual_net().double()
    optimizer = OPTIMIZERS[name](model)
    step_double(model, optimizer, 0)
    slim, _, _ = removed(
        model, images().double(), lambda groups: without("3.conv1.weight")(groups) & random_kept(groups, 1), optimizer
    )
    before = [param.detach().clone() for param in slim.parameters()]
    step_double(slim, optimizer, 1)
    assert all((now != then).any() for now, then in zip(slim.parameters(), before, strict=True) if now.numel())
    for param, state in optimizer.state.items():
        assert all(value.shape in (param.shape, ()) for value in state.values() if isinstance(value, torch.Tensor))


def forget(optimizer, masks, parameters):
    """Set the moments of masked weights to zero, which keep_masked alone does not need."""
    for name, mask in masks.items():
        for value in optimizer.state[parameters[name]].values():
            if isinstance(value, torch.Tensor) and value.shape == mask.shape:
                value.masked_fill_(~mask, 0)


def step_double(model, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    inputs = torch.randn(8, 3, 8, 8, generator=generator).double()
    F.cross_entropy(model(inputs), torch.randint(3, (8,), generator=generator)).backward()
    optimizer.step()


def finished(total=20, at=20):
    model = residual_net()
    groups = ChannelGroups.trace(model, images())
    schedule = Schedule(total, ramp=0.2, fade=0.4, cut=0.8)
    optimizer = GSM(model.named_parameters(), lr=0.05, momentum=0.5, pattern=groups, macs=0.4, schedule=schedule)
    for number in range(at):
        step(model, optimizer, number)
    return model, groups, optimizer


def test_gsm_goes_on_with_the_narrow_net():
    model, groups, optimizer = finished(total=40, at=33)
    masks = optimizer.finalize()
    twin, its = copy.deepcopy((model, optimizer))
    slim = remove_channels(model, groups, masks, optimizer)
    before = [param.detach().clone() for param in slim.parameters()]
    for number in range(33, 39):
        step(slim, optimizer, number)
        step(twin, its, number)
        torch.testing.assert_close(slim(images()), twin(images()), rtol=1e-4, atol=1e-5)
    assert all((now != then).any() for now, then in zip(slim.parameters(), before, strict=True) if now.numel())
    assert sum(mask.sum() for mask in optimizer.masks.values()) == sum(
        mask.numel() for mask in optimizer.masks.values()
    )


def test_the_narrow_nets_state_resumes_to_the_same_bits():
    model, groups, optimizer = finished(total=40, at=33)
    slim = remove_channels(model, groups, optimizer.finalize(), optimizer)
    step(slim, optimizer, 33)
    again, its = copy.deepcopy((slim, optimizer))
    state = optimizer.state_dict()
    its.load_state_dict(copy.deepcopy(state))
    for number in range(34, 38):
        step(slim, optimizer, number)
        step(again, its, number)
    assert all(torch.equal(a, b) for a, b in zip(slim.parameters(), again.parameters(), strict=True))


def test_a_narrow_net_can_be_pruned_by_single_weights():
    model, groups, optimizer = finished()
    slim = remove_channels(model, groups, optimizer.finalize())
    sparse = GSM(slim.named_parameters(), lr=0.05, density=0.5)
    for number in range(5):
        step(slim, sparse, number)
    masks = sparse.finalize()
    weights = [param for param in slim.parameters() if param.ndim > 1]
    assert (
        masks.num_kept == sum(param.numel() for param in weights) // 2 == sum(int(p.count_nonzero()) for p in weights)
    )


def test_parameters_of_others_stay_in_the_optimizer():
    model, other = plain(), nn.Linear(3, 3)
    params = [{"params": list(model.parameters())}, {"params": list(other.parameters()), "lr": 0.5}]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    other(model(images())).sum().backward()
    optimizer.step()
    slim, _, _ = removed(model, images(), optimizer=optimizer)
    assert optimizer.param_groups[1]["params"] == list(other.parameters())
    assert other.weight in optimizer.state
    assert len(optimizer.param_groups[0]["params"]) == len(list(slim.parameters()))


# --- files ---


@pytest.fixture(scope="module")
def narrow_net():
    """A narrow resnet20a with constants."""
    model = models.build("resnet20a", 0)
    groups = ChannelGroups.trace(model, images(size=16))
    kept = random_kept(groups, 0)
    branch = groups._choice._branches[0]
    kept[branch.units] = kept[branch.useless] = False
    return remove_channels(shaken(model), groups, masks_of(groups, kept))


@pytest.fixture
def narrow_file(narrow_net, tmp_path):
    """It and its file."""
    save_narrow(narrow_net, tmp_path / "net.safetensors")
    return narrow_net, tmp_path / "net.safetensors"


def test_files_bring_the_narrow_net_back(narrow_file):
    slim, path = narrow_file
    fresh = models.build("resnet20a", 7)
    again = load_narrow(fresh, path)
    assert any(isinstance(module, Constant) for module in again.modules())
    assert widths(again) == widths(slim)
    assert torch.equal(again.eval()(images(size=16)), slim.eval()(images(size=16)))
    assert sum(p.numel() for p in fresh.parameters()) == sum(
        p.numel() for p in models.build("resnet20a", 0).parameters()
    )
    assert path.stat().st_size < 4 * sum(p.numel() for p in fresh.parameters())
    shaped = narrow(fresh, json.loads(json.dumps(widths(slim))))
    shaped.load_state_dict(slim.state_dict())
    assert torch.equal(shaped.eval()(images(size=16)), slim(images(size=16)))


@pytest.mark.parametrize("name", ["shared under two names", "tied", "buffer", "encoder", "3d", "lenet300"])
def test_nets_of_all_kinds_are_saved(name, tmp_path):
    model, example = small(name)
    slim, _, _ = removed(model, example)
    save_narrow(slim, tmp_path / "net")
    again = load_narrow(shaken(model, 3), tmp_path / "net")
    assert torch.equal(again.eval()(example), slim.eval()(example))


def edited(path, change):
    """Write a file whose widths have been changed."""
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()[WIDTHS])
    change(found)
    save_file(tensors, path, {WIDTHS: json.dumps(found)})


HOSTILE = {
    "a size larger than the model's": lambda w: w["shapes"].update(
        {"conv1.weight": [99, 3, 3, 3], "0.weight": [99, 3, 3, 3]}
    ),
    "a huge size": lambda w: w["shapes"].update(
        {name: [10**30, *shape[1:]] for name, shape in w["shapes"].items() if shape}
    ),
    "a negative size": lambda w: w["shapes"].update(
        {name: [-1, *shape[1:]] for name, shape in w["shapes"].items() if shape}
    ),
    "NaN for a size": lambda w: w["shapes"].update(
        {name: [float("nan")] * len(shape) for name, shape in w["shapes"].items()}
    ),
    "a fraction for a size": lambda w: w["shapes"].update(
        {name: [1.0] * len(shape) for name, shape in w["shapes"].items()}
    ),
    "true for a size": lambda w: w["shapes"].update({name: [True] * len(shape) for name, shape in w["shapes"].items()}),
    "text for a size": lambda w: w["shapes"].update({name: ["1"] * len(shape) for name, shape in w["shapes"].items()}),
    "null for a shape": lambda w: w["shapes"].update(dict.fromkeys(w["shapes"])),
    "too many dimensions": lambda w: w["shapes"].update({name: [*shape, 1] for name, shape in w["shapes"].items()}),
    "another name": lambda w: w["shapes"].update({"another": [3]}),
    "a missing name": lambda w: w["shapes"].pop(next(iter(w["shapes"]))),
    "no shapes": lambda w: w.pop("shapes"),
    "shapes as a list": lambda w: w.update(shapes=[1, 2]),
    "a constant in place of what is none": lambda w: w["constants"].append("layer1"),
    "a constant in place of everything": lambda w: w["constants"].append(""),
    "a constant in place of nothing": lambda w: w["constants"].append("nothing"),
    "a removed activation": lambda w: w["removed"].append("relu"),
    "something else removed": lambda w: w["removed"].append("layer2.0.shortcut"),
    "everything removed": lambda w: w["removed"].append(""),
    "a number removed": lambda w: w.update(removed=3),
    "huge paddings": lambda w: w["paddings"].update({path: [10**9] * 6 for path in w["paddings"]}),
    "NaN for paddings": lambda w: w["paddings"].update({path: [float("nan")] * 6 for path in w["paddings"]}),
    "too many paddings": lambda w: w["paddings"].update({path: [0] * 8 for path in w["paddings"]}),
    "negative paddings": lambda w: w["paddings"].update({path: [0, 0, 0, 0, -1, -1] for path in w["paddings"]}),
    "paddings of what pads nothing": lambda w: w["paddings"].update({"layer1": [0] * 6}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_widths_are_refused(case, narrow_file):
    _, path = narrow_file
    edited(path, HOSTILE[case])
    fresh = models.build("resnet20a", 0)
    before = repr(fresh), copy.deepcopy(fresh.state_dict())
    with pytest.raises(
        ValueError, match="is not a narrow model of this class, or damaged: the widths are of another model"
    ):
        load_narrow(fresh, path)
    assert repr(fresh) == before[0]
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in fresh.state_dict().items())


def test_other_files_are_refused(narrow_file, tmp_path):
    slim, path = narrow_file
    fresh = models.build("resnet20a", 0)
    for content in (b"", b"no file", path.read_bytes()[:-10]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="is not a narrow model of this class, or damaged"):
            load_narrow(fresh, tmp_path / "broken")
    for text in ("null", "[]", "{", "3", "[" * 100_000):
        save_file(load_file(path), tmp_path / "text", {WIDTHS: text})
        with pytest.raises(ValueError, match="is not a narrow model of this class, or damaged"):
            load_narrow(fresh, tmp_path / "text")
    save_file(load_file(path), tmp_path / "bare")
    with pytest.raises(ValueError, match="it has no widths"):
        load_narrow(fresh, tmp_path / "bare")
    with pytest.raises(ValueError, match="the widths are of another model"):
        load_narrow(models.build("resnet20", 0), path)
    with pytest.raises(FileNotFoundError):
        load_narrow(fresh, tmp_path / "missing")
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 1 and len(tensor) > 1)
    save_file({**tensors, name: tensors[name][:1].clone()}, tmp_path / "short", {WIDTHS: json.dumps(widths(slim))})
    with pytest.raises(ValueError, match=f"{name} has shape"):
        load_narrow(fresh, tmp_path / "short")


# --- random nets ---


class Random(nn.Module):
    """Layers that read earlier values, each by a random operation."""

    def __init__(self, plan):
        super().__init__()
        self.plan, widths = plan, [3]
        self.layers = nn.ModuleList()
        for kind, source, other, width in plan:
            a, b = widths[source % len(widths)], widths[other % len(widths)]
            layer, out = nn.Identity(), a
            if kind == "conv":
                layer, out = nn.Conv2d(a, width, 3, padding=1), width
            elif kind == "norm":
                layer, out = nn.Sequential(nn.Conv2d(a, width, 1, bias=False), nn.BatchNorm2d(width)), width
            elif kind == "depthwise":
                layer, out = nn.Conv2d(a, 2 * a, 3, padding=1, groups=a), 2 * a
            elif kind == "grouped" and a % 2 == 0:
                layer, out = nn.Conv2d(a, 2 * width, 1, groups=2), 2 * width
            elif kind == "residual":
                layer = Residual(a, inner=width)
            elif kind in ("add", "multiply") and a != b:
                layer = nn.Conv2d(b, a, 1)
            elif kind == "cat":
                out = a + b
            elif kind == "excite":
                layer = nn.Sequential(
                    nn.AdaptiveAvgPool2d(1), nn.Conv2d(a, width, 1), nn.ReLU(), nn.Conv2d(width, a, 1)
                )
            self.layers.append(layer)
            widths.append(out)
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x):
        values = [x]
        for (kind, source, other, _), layer in zip(self.plan, self.layers, strict=True):
            a, b = values[source % len(values)], values[other % len(values)]
            if kind == "add":
                values.append(F.gelu(a + layer(b)))
            elif kind == "multiply":
                values.append(a * torch.tanh(layer(b)))
            elif kind == "cat":
                values.append(torch.cat([a, b], 1))
            elif kind == "excite":
                values.append(a * torch.sigmoid(layer(a)))
            else:
                values.append(F.relu(layer(a)))
        return self.head(values[-1].mean((2, 3)))


KINDS = ["conv", "norm", "depthwise", "grouped", "residual", "add", "multiply", "cat", "excite"]
CALLS = st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(2, 5))


@pytest.mark.slow
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_random_nets_are_sliced_as_zeroed(count):
    @settings(max_examples=count, derandomize=True, database=None)
    @given(st.lists(CALLS, min_size=2, max_size=9))
    def check(plan):
        torch.manual_seed(0)
        # the last values come first, so that most of what is computed is read
        model = Random(
            [
                (kind, index - source % 3, index - other % 4, width)
                for index, (kind, source, other, width) in enumerate(plan)
            ]
        )
        try:
            groups = ChannelGroups.trace(model, images(size=6))
        except ValueError as error:
            if "no channel of this model can be removed" not in str(error):
                raise
            return
        for seed in range(2):
            kept = random_kept(groups, seed)
            other = shaken(model, seed)
            slim = remove_channels(other, groups, masks_of(groups, kept))
            assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
            cost = groups.for_budget("parameters")
            assert cost.cost_of(kept) == sum(p.numel() for p in slim.parameters()) or any(
                isinstance(module, Constant) for module in slim.modules()
            )

    check()
