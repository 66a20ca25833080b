"""Data sets of the user's own, by a function of theirs."""

import re
import sys

import pytest
import torch
import yaml
from torch.utils.data import Dataset, TensorDataset

from gsm_sgd import cli
from gsm_sgd.experiments import UsageError, own_data
from gsm_sgd.experiments.own import NOTHING, Trusted
from gsm_sgd.experiments.own_data import Items
from test_cli import fails

CODE = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

def images(count, seed):
    made = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=made)
    shown = torch.eye(3)[labels].repeat_interleave(12, 1).view(count, 1, 6, 6)
    return shown + torch.randn(count, 1, 6, 6, generator=made) / 2, labels

def tensors():
    return TensorDataset(*images(256, 0)), TensorDataset(*images(64, 1))

class Noisy(Dataset):
    classes = ["a", "b", "c"]
    def __init__(self, count, seed, noise):
        self.images, self.labels = images(count, seed)
        self.noise = noise
    def __len__(self):
        return len(self.labels)
    def __getitem__(self, index):
        image = self.images[index]
        return image + self.noise * torch.randn_like(image), int(self.labels[index])

def items():
    return Noisy(256, 0, 0.1), Noisy(64, 1, 0.0)

def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 3))

def nothing():
    return None

class Odd(Noisy):
    def __getitem__(self, index):
        return "image", 0

def odd():
    return Odd(4, 0, 0.0), Odd(4, 0, 0.0)

class Nameless(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return torch.zeros(1, 2, 2), 0

def nameless():
    return Nameless(), Nameless()
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    yield tmp_path / "mine.py"
    own_data.load.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("function", ["tensors", "items"])
def test_a_net_and_data_of_ones_own_go_through_all_commands(file, tmp_path, capsys, function):
    dataset, net = f"{file}:{function}", f"{file}:net"
    words = ["--model", net, "--dataset", dataset, "--gsm.epochs", "10", "--compression", "4", "--batch-size", "32"]
    out = ["--precision", "float32", "--out", str(tmp_path / "runs")]
    assert cli.run(["prune", "lenet300", *words, *out]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    capsys.readouterr()
    trusted = ["--model", net, "--dataset", dataset]
    assert cli.run(["eval", str(run), *trusted]) == 0
    top1 = float(re.search(r"(\S+) % of 64 images", capsys.readouterr().out)[1])
    assert top1 > 80
    assert cli.run(["export", str(run), "--format", "onnx", *trusted]) == 0
    assert cli.run(["eval", str(run / "pruned.onnx"), *trusted]) == 0
    assert f"{top1:.2f} % of 64 images" in capsys.readouterr().out
    said = fails(capsys, "eval", run, "--model", net)
    assert said.endswith(f"if you trust that code, add --dataset {dataset}")
    assert "not 'other:one': leave out --dataset" in fails(
        capsys, "eval", run, "--model", net, "--dataset", "other:one"
    )


def test_what_is_random_in_items_repeats_with_seed_and_epoch(file):
    items = own_data.load(f"{file}:items").train
    assert isinstance(items, Items)

    def epoch(seed, number, first=0):
        return torch.cat([images for images, _ in items.shuffled(64, seed, number, first)])

    state = torch.get_rng_state()
    first = epoch(0, 0)
    assert torch.equal(first, epoch(0, 0))
    assert torch.equal(first[64:], epoch(0, 0, first=1))
    assert not torch.equal(first, epoch(0, 1))
    assert not torch.equal(first, epoch(1, 0))
    assert torch.equal(state, torch.get_rng_state())
    held = items.subset(torch.tensor([3, 5]), training=True)
    assert [len(held), *next(iter(held.batches(2)))[1].tolist()] == [2, *(items.items[one][1] for one in (3, 5))]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nothing", "must return two of torch's data sets, with lengths: (train, test)"),
        ("odd", "has items that are no (float image, int label): the first is (str, int)"),
        ("nameless", "does not say how many classes there are: give it an attribute `classes`"),
        ("absent", "cannot be imported from"),
        ("CODE", "cannot be imported from"),
    ],
)
def test_functions_that_make_no_data_set(file, function, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        own_data.load(f"{file}:{function}")


def test_an_iterable_has_no_length(file, monkeypatch):
    class Stream(Dataset):
        def __getitem__(self, index):
            raise AssertionError

    monkeypatch.setattr("gsm_sgd.experiments.own_data.find_function", lambda *_: lambda: (Stream(), Stream()))
    with pytest.raises(UsageError, match="with lengths"):
        own_data.load("a:stream")


def test_classes_of_tensors_are_those_of_the_labels(monkeypatch):
    made = TensorDataset(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 4, 2]))
    monkeypatch.setattr("gsm_sgd.experiments.own_data.find_function", lambda *_: lambda: (made, made))
    assert own_data.load("a:tensors").classes == 5
    own_data.load.cache_clear()


def test_only_what_the_user_names_is_trusted(tmp_path):
    NOTHING.check("model", "lenet300", tmp_path)
    NOTHING.check("model", "torchvision:resnet18", tmp_path)
    Trusted(model="a:b").check("model", "a:b", tmp_path)
    with pytest.raises(UsageError, match="add --dataset a:b"):
        Trusted(model="a:b").check("dataset", "a:b", tmp_path)


def test_a_config_of_others_loads_no_data_set(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wicked_data.py").write_text("from pathlib import Path\nPath('called').touch()\n")
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"dataset": "wicked_data:make"}))
    said = fails(capsys, "prune", "lenet300", "--config", "theirs.yaml", "--out", tmp_path / "out")
    assert said.endswith("if you trust that code, add --dataset wicked_data:make")
    assert not (tmp_path / "called").exists()
