"""Blocks of several branches: one convolution in use, the same at every pixel, and put into models and taken out."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, GSMAdamW, Schedule, sparsity_table
from gsm_sgd.experiments import models
from gsm_sgd.export import load_sparse, save_sparse
from gsm_sgd.export.onnx_file import to_onnx
from gsm_sgd.reparam import ACB, CSLA, DBB, LargeKernel, RepMLP, RepVGG, fuse, multipliers, widen
from gsm_sgd.structured import ChannelGroups, narrow, remove_channels, widths

BLOCKS = [ACB, DBB, RepVGG, CSLA, LargeKernel]
CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "5 x 5": {"kernel_size": 5, "padding": 2},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "unpadded": {"kernel_size": 3},
    "wide borders": {"kernel_size": 3, "padding": 4, "stride": 3},
    "uneven": {"kernel_size": 3, "padding": (0, 2), "stride": (2, 1), "dilation": (1, 2)},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
    "more outputs": {"kernel_size": 3, "padding": 1, "out_channels": 9, "groups": 3},
    "large": {"kernel_size": 9, "padding": 4, "groups": 6},
    "large and strided": {"kernel_size": 13, "padding": 6, "stride": 2, "groups": 6},
}


def convolution(name, bias=False):
    return nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "bias": bias, **CONVOLUTIONS[name]})


def images(channels=6, size=15, batch=4, seed=0):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed)) + 0.5


@torch.no_grad()
def shaken(model, seed=0):
    """Put noise into all numbers, so that no norm, scale or mean is what it is at the start."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.requires_grad | name.endswith(("mean", "var")):
            noise = 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(noise.abs() if name.endswith("var") else noise)
    return model


def assert_equal(outputs, expected):
    assert outputs.shape == expected.shape
    assert (outputs - expected).abs().max() <= 1e-5 * expected.abs().max()


# --- fusing ---


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_is_one_convolution_at_every_pixel(kind, name):
    torch.manual_seed(0)
    conv = convolution(name)
    if kind is LargeKernel and conv.kernel_size[0] < 7:
        pytest.skip("it is for large kernels")
    block = shaken(kind(conv)).eval()
    fused = block.fuse()
    assert type(fused) is nn.Conv2d
    settings = ("in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups")
    assert all(getattr(fused, key) == getattr(conv, key) for key in settings)
    assert (fused.bias is None) == (kind is CSLA)
    with torch.no_grad():
        expected = block(images())
        assert_equal(fused(images()), expected)
        assert (block.branches[0].conv.weight - fused.weight).abs().max() > 0.1  # the others matter


def naive_kernels(kind, block):
    """Return the kernels that branches come to by the papers' formulas, for a 3 x 3 convolution of one group."""

    def scaled(weight, norm):
        return weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)

    def spread(weight):
        rows, columns = ((3 - size) // 2 for size in weight.shape[2:])
        return F.pad(weight, (columns, columns, rows, rows))

    if kind is ACB:
        return [spread(scaled(branch.conv.weight, branch.norm)) for branch in block.branches]
    if kind is RepVGG:
        *convs, itself = block.branches
        kernels = [spread(scaled(branch.conv.weight, branch.norm)) for branch in convs]
        return [*kernels, spread(scaled(torch.eye(6).view(6, 6, 1, 1), itself.norm))]
    first, small, chain, mean = block.branches
    kernels = [spread(scaled(branch.conv.weight, branch.norm)) for branch in (first, small)]
    for number, (one, between, two, norm) in enumerate((chain, mean)):
        weight = torch.diag_embed(torch.full((3, 3, 6), 1 / 9)).permute(2, 3, 0, 1) if number else two.weight
        ahead = scaled(one.weight, between).transpose(0, 1)
        kernels.append(scaled(F.conv2d(weight, ahead), norm))  # conv(K2, K1^T)
    return kernels


@pytest.mark.parametrize("kind", [ACB, RepVGG, DBB])
def test_the_kernel_is_the_sum_of_the_papers_formulas(kind):
    block = shaken(kind(convolution("plain")))
    expected = sum(naive_kernels(kind, block))
    assert_equal(block.fuse().weight, expected)
    assert len(block.branches) == {ACB: 3, RepVGG: 3, DBB: 4}[kind]


def test_only_where_the_shape_stays_the_input_is_a_branch():
    counts = {name: len(RepVGG(convolution(name)).branches) for name in CONVOLUTIONS}
    assert {name for name, count in counts.items() if count == 3} == {
        *("plain", "5 x 5", "dilated", "same", "grouped", "depthwise", "large"),
    }


def test_a_large_kernel_gets_the_small_one_in_its_middle():
    block = LargeKernel(convolution("large"))
    large, small = block.branches
    assert (large.conv.kernel_size, small.conv.kernel_size) == ((9, 9), (5, 5))
    change = block.fuse().weight
    with torch.no_grad():
        small.norm.weight.zero_()
    change = change - block.fuse().weight
    torch.testing.assert_close(change[:, :, 2:7, 2:7], small.conv.weight / (1 + 1e-5) ** 0.5)
    assert change.count_nonzero() == change[:, :, 2:7, 2:7].count_nonzero()


def test_in_float64_and_channels_last_blocks_fuse_too():
    block = shaken(DBB(convolution("strided").double().to(memory_format=torch.channels_last))).eval()
    fused = block.fuse()
    inputs = images().double().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(inputs), block(inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("conv", "kind"),
    [
        (nn.Conv2d(4, 4, 2), ACB),
        (nn.Conv2d(4, 4, (3, 5)), DBB),
        (nn.Conv2d(4, 4, 1), RepVGG),
        (nn.Conv2d(4, 4, 5), LargeKernel),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), ACB),
        (nn.Conv2d(4, 4, 3), CSLA),
        (nn.Linear(4, 4), ACB),
    ],
)
def test_other_convolutions_are_refused(conv, kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} takes square kernels of odd size from"):
        kind(conv)


# --- partitions ---


@pytest.mark.parametrize(
    ("outputs", "size", "kernels"), [(4, (3, 5), (1, 3)), (6, (5, 3), (3, 5, 1)), (3, (15, 15), ())]
)
def test_convolutions_beside_partitions_become_a_part_of_the_matrix(outputs, size, kernels):
    layer = shaken(RepMLP(2, outputs, size, kernels)).eval()
    plain = layer.fuse()
    assert [type(module) for module in plain.children()] == [nn.Linear, nn.Identity, nn.ModuleList]
    assert not plain.branches
    with torch.no_grad():
        assert_equal(plain(images(2)), layer(images(2)))


def test_partitions_do_not_see_each_other():
    layer = shaken(RepMLP(2, 3, (5, 5))).eval()
    whole, part = images(2), torch.zeros(4, 2, 15, 15)
    part[:, :, 5:10, 10:] = whole[:, :, 5:10, 10:]
    with torch.no_grad():
        assert torch.allclose(layer(part)[:, :, 5:10, 10:], layer(whole)[:, :, 5:10, 10:], atol=1e-5)
        assert torch.allclose(layer(whole[:, :, :5, :5]), layer(whole)[:, :, :5, :5], atol=1e-5)
    with pytest.raises(ValueError, match="partitions of 5 x 5 do not tile an image of 15 x 12"):
        layer(whole[:, :, :, :12])


# --- models ---


def trained(model, channels=3, size=12, steps=3):
    """Return a model after some steps, so that its norms have seen something."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.003, momentum=0.9)
    for seed in range(steps):
        optimizer.zero_grad()
        model(images(channels, size, 8, seed)).square().mean().backward()
        optimizer.step()
    return model


def resnet18():
    return torchvision.models.resnet18(num_classes=4)


@pytest.mark.parametrize(
    ("make", "size", "kind"),
    [
        *((lambda: models.build("resnet20a", 0), 12, kind) for kind in (ACB, DBB, RepVGG, CSLA)),
        pytest.param(resnet18, 33, ACB, marks=pytest.mark.slow),
    ],
)
def test_a_model_is_widened_and_comes_back(make, size, kind):
    model = make()
    wide = widen(model, block=kind)
    found = [module for module in wide.modules() if isinstance(module, kind)]
    assert len(found) == sum(isinstance(m, nn.Conv2d) and m.kernel_size[0] > 1 for m in model.modules())
    assert [*model.state_dict()] == [*make().state_dict()]
    trained(wide, size=size)
    plain = fuse(wide)
    assert type(plain) is type(model)
    shapes = {name: tensor.shape for name, tensor in plain.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert all(parameter.requires_grad for parameter in plain.parameters())
    assert plain.training
    with torch.no_grad():
        assert_equal(plain.eval()(images(3, size)), wide.eval()(images(3, size)))


def test_branches_begin_with_the_models_own_weights_and_norms():
    model = trained(models.build("resnet20", 0))
    first = widen(model).conv.branches[0]
    assert torch.equal(first.conv.weight, model.conv.weight)
    assert torch.equal(first.norm.weight, model.bn.weight)
    assert torch.equal(first.norm.running_var, model.bn.running_var)


def test_norms_that_come_back_know_mean_and_variance():
    """So that training goes on where it was: the fused net in training mode is the wide one in evaluation mode."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=1.0)
    wide = shaken(widen(nn.Sequential(*layers)))
    wide(images(3, batch=8))
    for module in wide.modules():  # statistics of the batch are those of evaluation
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    wide(images(3, batch=8))
    expected = wide.eval()(images(3, batch=8))
    plain = fuse(wide).train()
    assert (plain(images(3, batch=8)) - expected).abs().max() < 1e-3 * expected.abs().max()  # n / (n - 1)
    assert plain[1].num_batches_tracked == 3


class Odd(nn.Module):
    """Convolutions of which some have a norm that is theirs alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.alone, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.read, self.biased = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.n, self.m, self.k = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.n(self.twice(F.relu(self.twice(F.relu(self.alone(x))))))
        y = self.read(x)
        return self.k(self.biased(F.relu(self.m(y) + y)))


def test_only_norms_that_alone_read_a_convolution_are_taken():
    wide = widen(Odd(), block=RepVGG)
    paths = {name: module.norm_path for name, module in wide.named_modules() if isinstance(module, RepVGG)}
    assert paths == {"alone": "", "twice": "", "read": "", "biased": "k"}
    trained(wide)
    plain = fuse(wide).eval()
    assert [conv.bias is not None for conv in (plain.alone, plain.twice, plain.read, plain.biased)] == [True] * 4
    with torch.no_grad():
        assert_equal(plain(images(3, 12)), wide.eval()(images(3, 12)))


def test_a_layer_under_two_names_stays_one():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
    model.append(model[0])
    wide = widen(model)
    assert wide[0] is wide[2]
    plain = fuse(wide)
    assert plain[0] is plain[2]


def test_hooks_stay():
    model, seen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    model[0].register_full_backward_hook(lambda module, *grads: seen.append("back"))
    wide = widen(model)
    for net in (wide, fuse(wide)):
        net(images(3).requires_grad_()).sum().backward()
    assert seen == [ACB, "back", nn.Conv2d, "back"]


def test_modes_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    wide = widen(model)
    assert not any(module.training for module in wide.modules())
    assert not any(module.training for module in fuse(wide).modules())


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(ValueError, match="ACB takes none of the model's convolutions"):
        widen(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace the model"):
        widen(Dynamic())
    with pytest.raises(ValueError, match="the model has no blocks with scales"):
        multipliers(nn.Linear(2, 2))
    assert isinstance(fuse(nn.Linear(3, 3)), nn.Linear)


# --- small nets of RepLKNet's and RepMLP's kind pass through everything else ---


class Large(nn.Module):
    """A depthwise convolution of 9 x 9 between two of 1 x 1, beside a shortcut."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.up, self.bn1 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.large, self.bn2 = nn.Conv2d(12, 12, 9, padding=4, groups=12, bias=False), nn.BatchNorm2d(12)
        self.down, self.bn3, self.head = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.bn2(self.large(F.relu(self.bn1(self.up(x))))))
        return self.head(F.relu(x + self.bn3(self.down(y))).mean((2, 3)))


def partitioned():
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 1)
    last = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    return nn.Sequential(*stem, nn.BatchNorm2d(6), nn.ReLU(), RepMLP(6, 5, (2, 4)), *last)


NETS = {
    "large kernel": lambda: widen(Large(), block=LargeKernel),
    "large kernel, fused": lambda: fuse(trained(widen(Large(), block=LargeKernel), size=16)),
    "partitions": partitioned,
    "partitions, fused": lambda: fuse(trained(partitioned(), size=16)),
}


@pytest.mark.parametrize("kind", [GSM, GSMAdamW])
@pytest.mark.parametrize("name", NETS)
def test_gsm_keeps_exactly_q(name, kind, tmp_path):
    model = NETS[name]()
    optimizer = kind(model.named_parameters(), lr=0.01, density=0.25, schedule=Schedule(10))
    for seed in range(10):
        optimizer.zero_grad()
        model(images(3, 16, 8, seed)).square().mean().backward()
        optimizer.step()
    masks = optimizer.finalize()
    assert sum(row.nonzeros for row in sparsity_table(model)) == masks.num_kept == optimizer.num_prunable // 4
    save_sparse(tmp_path / "net", model.state_dict())
    loaded = load_sparse(tmp_path / "net")
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_channels_go_or_stay_for_a_reason(name):
    """RepMLP's partitions lie along the axis of the batch: channels in front of them and behind them have to stay."""
    model = shaken(NETS[name]()).eval()
    example = images(3, 16)
    if name.startswith("partitions"):
        with pytest.raises(ValueError, match=r"ignore=\['6\.fc'\]|without some channels of 3 the model"):
            ChannelGroups.trace(model, example)
    ignore = ["3", "6"] if name.startswith("partitions") else []
    groups = ChannelGroups.trace(model, example, ignore=ignore)
    optimizer = GSM(model.named_parameters(), lr=0.01, pattern=groups, macs=0.8)
    slim = remove_channels(model, groups, optimizer.finalize())
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    again = narrow(NETS[name](), widths(slim))
    again.load_state_dict(slim.state_dict())
    with torch.no_grad():
        assert_equal(again.eval()(example), slim(example))
    if name == "large kernel":
        with pytest.raises(ValueError, match="channels of the model have been removed: fuse it before that"):
            fuse(slim)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_onnx_computes_the_same(name):
    assert to_onnx(shaken(NETS[name]()), (3, 16, 16)).difference < 1e-4
