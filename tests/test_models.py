import sys
from collections import OrderedDict

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from gsm_sgd.experiments import UsageError, cifar10, models
from gsm_sgd.experiments.loop import evaluate
from gsm_sgd.experiments.pretrained import load_pretrained
from gsm_sgd.experiments.recipes import find_recipe
from gsm_sgd.export.rebuild import load_data
from gsm_sgd.masks import prunable_parameters

MNIST, CIFAR = (1, 28, 28), (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "weights", "everything", "shape"),
    [
        ("lenet300", 266_200, 266_610, MNIST),
        ("lenet5", 430_500, 431_080, MNIST),
        ("resnet20", 270_896, 272_474, CIFAR),
        ("resnet56", 851_504, 855_770, CIFAR),
        ("resnet110", 1_722_416, 1_730_714, CIFAR),
        ("resnet20a", 268_336, 269_722, CIFAR),
        ("resnet56a", 848_944, 853_018, CIFAR),
        ("densenet40", 1_001_616, 1_019_722, CIFAR),
    ],
)
def test_counts_of_the_paper(name, weights, everything, shape):
    model = models.build(name, 0)
    assert sum(p.numel() for p in prunable_parameters(model).values()) == weights
    assert sum(p.numel() for p in model.parameters()) == everything
    assert model(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("name", ["lenet5", "resnet20", "densenet40"])
def test_initialisation_is_xavier_uniform_and_seeded(name):
    model, same, other = models.build(name, 3), models.build(name, 3), models.build(name, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    for weight, theirs in zip(model.parameters(), other.parameters(), strict=True):
        if weight.ndim >= 2:
            assert not torch.equal(weight, theirs)
            area = weight[0, 0].numel()
            bound = (6 / (weight.shape[0] * area + weight.shape[1] * area)) ** 0.5
            assert 0.9 * bound < weight.abs().max() <= bound
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())


def test_convolutions_are_channels_last():
    weight = models.build("resnet20", 0).stage2[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_shortcut_is_a_convolution_only_where_the_width_changes():
    model = models.build("resnet56", 0)
    shortcuts = [name for name in prunable_parameters(model) if "shortcut" in name]
    assert shortcuts == ["stage2.0.shortcut.0.weight", "stage3.0.shortcut.0.weight"]


def test_a_shortcut_without_weights_takes_every_second_pixel_and_pads_channels_on_both_sides():
    model = models.build("resnet20a", 0)
    assert not [name for name, _ in model.named_parameters() if "shortcut" in name]
    assert model.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    inputs = torch.randn(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = inputs[:, :, ::2, ::2]
    assert torch.equal(model.layer2[0].shortcut(inputs), expected)
    assert torch.equal(model.layer1[0].shortcut(inputs), inputs)


def test_torchvisions_networks():
    model, same = (models.build("torchvision:squeezenet1_1", 5, classes=7) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    state = torch.random.get_rng_state()
    models.build("torchvision:squeezenet1_1", 5)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_classifiers_for_training_alone(name, tmp_path):
    model = models.build(f"torchvision:{name}", 5, classes=7)
    assert model.training
    assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 7)
    theirs = torchvision.models.get_model(name, weights=None, num_classes=7, init_weights=False)
    assert set(theirs.state_dict()) > set(model.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    load_pretrained(model, f"torchvision:{name}", str(tmp_path / "net.pt"))
    images = torch.rand(2, 3, 96, 96)
    theirs.transform_input = True  # as torchvision itself sets it with its weights
    torch.testing.assert_close(model.eval()(images), theirs.eval()(images))


def test_the_users_own_network(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text("from torch import nn\ndef make(): return nn.Linear(3, 2)\nother = 5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert models.build("my_net:make", 0).weight.shape == (2, 3)
    assert torch.equal(models.build("my_net:make", 1).weight, models.build("my_net:make", 1).weight)
    for name, message in (
        ("my_net:nothing", "cannot be imported"),
        ("no_net:make", "cannot be imported"),
        (":make", "cannot be imported"),
        ("my_net:other", "is not a function"),
        ("builtins:dict", "returned dict, not a torch.nn.Module"),
    ):
        with pytest.raises(UsageError, match=message):
            models.build(name, 0)


def test_the_users_own_network_in_a_file(tmp_path, monkeypatch):
    """Wherever it lies, and whatever it is called: it may import what lies beside it, as a script may."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "beside_it.py").write_text("SIZE = 3\n")
    (folder / "random.py").write_text(
        "from dataclasses import dataclass\nfrom torch import nn\nfrom beside_it import SIZE\n"
        "@dataclass\nclass Settings:\n    size: 'int' = SIZE\n"
        "def make(): return nn.Linear(Settings().size, 2)\n"
    )
    (folder / "wrong.py").write_text("def make(:\n")
    (folder / "failing.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("elsewhere/random.py:make", f"{folder / 'random.py'}:make"):
        assert models.build(name, 0).weight.shape == (2, 3)
    for name, message in (
        ("random.py:make", "cannot be imported from .*No such file"),
        ("elsewhere/random.py:mak", "cannot be imported from .*no attribute 'mak'"),
        ("elsewhere/wrong.py:make", "cannot be imported from .*invalid syntax"),
        ("elsewhere/failing.py:make", "cannot be imported from .*division by zero"),
        ("elsewhere/random.py", "unknown model"),
    ):
        for _ in range(2):  # what fails once fails again
            with pytest.raises(UsageError, match=message):
                models.build(name, 0)


def test_unknown_models():
    with pytest.raises(UsageError, match="unknown model 'vgg': choose one of lenet300, lenet5, resnet20"):
        models.build("vgg", 0)
    with pytest.raises(UsageError, match="torchvision has no classifier 'vgg'"):
        models.build("torchvision:vgg", 0)
    with pytest.raises(UsageError, match="resnet20 tells 10 classes apart, the data have 100"):
        models.build("resnet20", 0, classes=100)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)
        self.two.weight = self.one.weight


def test_what_a_recipe_cannot_train_is_refused():
    def check(model, shape=(3, 2, 2), classes=10):
        models.check_fits(model, "my:net", "pictures", shape, classes)

    fitting = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 10))
    state = torch.random.get_rng_state()
    check(fitting)
    assert fitting.training
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(UsageError, match="my:net does not take the 3x4x4 images of pictures: choose another --model"):
        check(fitting, (3, 4, 4))
    with pytest.raises(UsageError, match=r"something of shape \(2, 10\), not a tensor of \(2, 7\)"):
        check(fitting, classes=7)
    with pytest.raises(UsageError, match="my:net has a weight under two names"):
        check(Tied())
    prune.l1_unstructured(fitting[2], "weight", 0.5)
    with pytest.raises(UsageError, match=r"my:net has a state .*: torch\.nn\.utils\.prune holds 2\.weight: make it"):
        check(fitting)
    prune.remove(fitting[2], "weight")
    fitting[2].register_buffer("table", torch.eye(2).to_sparse())
    with pytest.raises(UsageError, match=r"entry '2\.table' is of layout torch\.sparse_coo, not dense"):
        check(fitting)
    del fitting[2].table
    fitting[2].weight.requires_grad_(False)
    with pytest.raises(UsageError, match=r"my:net has frozen weights, 2\.weight"):
        check(fitting)


# --- weights from elsewhere ---


@pytest.mark.parametrize("form", ["safetensors", "pt", "wrapped", "parallel", "compiled", "pruned", "compiled net"])
def test_weights_from_a_file(form, tmp_path):
    source, model = models.build("resnet20", 1), models.build("resnet20", 2)
    state = {name: tensor.contiguous() for name, tensor in source.state_dict().items()}
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt")
    if form == "safetensors":
        save_file(state, path)
    elif form == "pruned":
        prune.l1_unstructured(source.fc, "weight", 0.5)
        torch.save(source.state_dict(), path)
        prune.remove(source.fc, "weight")
    else:
        prefix = {"parallel": "module.", "compiled": "module._orig_mod."}.get(form, "")
        saved = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": saved, "epoch": 3} if form == "wrapped" else saved, path)
    if form == "compiled net":
        model = torch.compile(model, backend="eager")
    load_pretrained(model, "resnet20", str(path))
    loaded = dict(zip(state, model.state_dict().values(), strict=True))
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in source.state_dict().items())


def published(name, path, **other):
    """Write a net as the authors of the public ResNets do: wrapped, of DataParallel, of an old torch."""
    state = {
        f"module.{key}": tensor
        for key, tensor in models.build(name, 1).state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save({"best_prec1": 91.0, "state_dict": OrderedDict(state | other)}, path)


def test_weights_as_the_public_resnets_are_published(tmp_path):
    path, model = tmp_path / "net.th", models.build("resnet20a", 2)
    published("resnet20a", path)
    load_pretrained(model, "resnet20a", str(path))
    source = models.build("resnet20a", 1)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in source.state_dict().items())

    for name, other, message in (
        ("resnet56a", {}, r"Unexpected key\(s\)"),
        ("resnet20a", {"module.linear.bias": torch.zeros(100)}, r"size mismatch for linear\.bias.*\[100\].*\[10\]"),
    ):
        published(name, path, **other)
        with pytest.raises(UsageError, match=f"do not fit resnet20a: give others, or .*{message}") as error:
            load_pretrained(model, "resnet20a", str(path))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "file", "top1"),
    [("resnet20a", "resnet20-12fca82f.th", 91.0), ("resnet56a", "resnet56-4bfd9763.th", 93.1)],
)
def test_the_public_resnets_are_as_good_as_published(name, file, top1, public_nets, cifar10_splits, monkeypatch):
    """On the first 1,000 test images; on all they have 91.73 and 93.39."""
    monkeypatch.setattr(cifar10, "find", lambda _: (None, cifar10_splits))
    recipe, model = find_recipe(name), models.build(name, 0)
    load_pretrained(model, name, str(public_nets / file))
    test = load_data(recipe, None).test
    assert evaluate(model, test.subset(torch.arange(1_000), training=False)) == pytest.approx(top1, abs=0.11)


class Danger:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_cannot_be_loaded(tmp_path, capsys):
    model = models.build("resnet20", 0)
    before = [param.clone() for param in model.parameters()]
    torch.save({"fc": Danger()}, tmp_path / "danger.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"net": {"w": torch.ones(2)}, "optimizer": {}}, tmp_path / "checkpoint.pt")
    torch.save(models.build("lenet5", 0).state_dict(), tmp_path / "lenet5.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    for name, message in (
        ("danger.pt", "neither safetensors nor a state dict that can be loaded safely"),
        ("noise.pt", "neither safetensors nor a state dict"),
        ("noise.safetensors", "is not a safetensors file"),
        ("missing.pt", "does not exist"),
        ("list.pt", "holds no state dict"),
        ("checkpoint.pt", r"holds no state dict: .* alone \(the state's entry 'net' is a dict of its own"),
        ("lenet5.pt", "do not fit resnet20"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            load_pretrained(model, "resnet20", str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert capsys.readouterr().out == ""
    with pytest.raises(UsageError, match="torchvision has no weights of resnet20"):
        load_pretrained(model, "resnet20", "torchvision")
    with pytest.raises(UsageError, match="torchvision has no weights 'NONE_SUCH' of resnet50"):
        load_pretrained(model, "resnet50", "torchvision:NONE_SUCH")
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
