"""gsm export, verify, ticket and prune --target-size, on made-up data; and the formats of others."""

import json
import shutil
import sys

import h5py
import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import numpy_helper
from safetensors.torch import load_file

from gsm_sgd import cli, magnitude_masks, prunable_parameters
from gsm_sgd.experiments import UsageError, models
from gsm_sgd.experiments.rundir import read_weights
from gsm_sgd.export import hdf5_file, load_sparse, onnx_file, save_sparse
from gsm_sgd.export.hdf5_file import published_name, read_hdf5, to_hdf5
from gsm_sgd.export.ticket import read_ticket, write_ticket
from test_cli import SHORT, fails
from test_export import edited

pytestmark = pytest.mark.slow

AT = SHORT.index("--compression")
NO_RATIO = [*SHORT[:AT], *SHORT[AT + 2 :]]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished lottery."""
    out = tmp_path_factory.mktemp("out")
    assert cli.run(["lottery", "lenet300", *SHORT, "--out", str(out)]) == 0
    return next(out.iterdir())


@pytest.fixture
def own(run, tmp_path):
    """A copy of it, to write into."""
    return shutil.copytree(run, tmp_path / "run")


def gsm(capsys, *words):
    """Run, expect success, and return what it printed."""
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


# --- export and verify ---


def test_export_sparse_and_verify(own, capsys):
    said = gsm(capsys, "export", own)
    path = own / "pruned.sparse.safetensors.xz"
    size = path.stat().st_size
    assert (
        said
        == f"{path}: {size / 1000:.1f} kB, {1_067_000 / size:.1f} times smaller than the 1.1 MB of pruned.safetensors\n"
    )
    assert same(load_sparse(path), load_file(own / "pruned.safetensors"))
    said = gsm(capsys, "verify", path)
    assert "verified: 13,310 of 266,200 weights" in said
    assert "--accuracy measures it" in said
    top1 = json.loads((own / "result.json").read_text())["top1"]["pruned"]
    assert f"accuracy measured again: {top1:.2f} %" in gsm(capsys, "verify", path, "--accuracy")
    said = gsm(capsys, "show", path)
    assert "13,310" in said
    assert "20.00x" in said


def test_rounded_export_states_its_own_accuracy(own, capsys):
    path = own / "small.safetensors"
    gsm(capsys, "export", own, "--values", "bfloat16", "--out", path)
    gsm(capsys, "export", own)
    assert path.stat().st_size + 25_000 < (own / "pruned.sparse.safetensors.xz").stat().st_size
    gsm(capsys, "verify", path, "--accuracy")


def test_export_dense(own, capsys):
    gsm(capsys, "export", own, "--format", "safetensors")
    assert same(load_file(own / "pruned.dense.safetensors"), load_file(own / "pruned.safetensors"))


def test_export_hdf5_and_show_it(own, capsys):
    gsm(capsys, "export", own, "--format", "hdf5")
    weights = load_file(own / "pruned.safetensors")
    with h5py.File(own / "pruned.hdf5") as file:
        assert set(file) == {f"linear{n}.{kind}" for n in (1, 2, 3) for kind in ("weight", "bias")}
        assert (np.asarray(file["linear2.weight"]) == weights["fc2.weight"].numpy()).all()
    said = gsm(capsys, "show", own / "pruned.hdf5")
    assert "linear1.weight" in said
    assert "13,310" in said


def test_export_onnx(own, capsys):
    said = gsm(capsys, "export", own, "--format", "onnx")
    assert "onnxruntime's logits of 16 random images differ by " in said
    weights = load_file(own / "pruned.safetensors")
    stored = {one.name: numpy_helper.to_array(one) for one in onnx.load(own / "pruned.onnx").graph.initializer}
    for name in ("fc1.weight", "fc2.weight", "fc3.weight"):
        assert (stored[name] == weights[name].numpy()).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "{run}", "--format", "pdf"], "pdf"),
        (["export", "{run}", "--values", "int8"], "values"),
        (["export", "{run}", "--format", "onnx", "--values", "float16"], "--values is for --format sparse"),
        (["export", "nowhere"], "nowhere is not a run's folder"),
        (["export", "{run}", "--out", "/dev/null/x"], "cannot write /dev/null/x: Not a directory"),
        (["verify", "nowhere"], "cannot read nowhere: No such file"),
        (["verify", "{run}/pruned.safetensors"], "is not a sparse file, or damaged: its format is not"),
        (["ticket"], "gsm ticket takes an action: save or replay"),
        (["ticket", "save", "{run}", "--method", "chance"], "method"),
        (["ticket", "replay", "nowhere"], "cannot read nowhere: No such file"),
        (["ticket", "replay", "{run}/pruned.safetensors"], "is not a sparse file, or damaged"),
        (["prune", "lenet300", "--target-size", "20"], "a size is a number with B, KB, KiB, MB or MiB, like 20KB"),
        (["prune", "lenet300", "--target-size", "1KB"], "which is the smallest --target-size"),
        (
            ["prune", "lenet300", "--target-size", "20KB", "--compression=5"],
            "--compression and --target-size are two",
        ),
        (["lottery", "lenet300", "--target-size", "20KB"], "unrecognized arguments: --target-size"),
    ],
)
def test_bad_usage(words, message, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *(word.format(run=run) for word in words))
    assert not list(tmp_path.iterdir())


def test_an_unfinished_run(own, capsys):
    (own / "result.json").unlink()
    for words in (["export"], ["ticket", "save"]):
        assert fails(capsys, *words, own) == f"{own} is not finished: give its command again to go on"


def test_a_false_certificate_is_told(own, capsys):
    gsm(capsys, "export", own)
    path = own / "pruned.sparse.safetensors.xz"
    honest = path.read_bytes()
    for change, words, message, status in (
        (lambda about: about["certificate"].update(nonzeros=13_309), [], "it states nonzeros 13309, but has 13310", 2),
        (lambda about: about["certificate"].update(top1=5), ["--accuracy"], "states an accuracy of 5.00 %, but has", 1),
        (
            lambda about: about["recipe"].update(compression=60.0),
            ["--accuracy"],
            "ratio of 60, but keeps more weights",
            1,
        ),
    ):
        path.write_bytes(edited(honest, lambda about, _, change=change: change(about)))
        assert message in fails(capsys, "verify", path, *words, status=status)
    path.write_bytes(honest[:-20])
    fails(capsys, "verify", path)


def test_a_certificate_of_some_layers_only_is_a_failure(own, capsys):
    result = json.loads((own / "result.json").read_text())
    recipe = yaml.safe_load((own / "recipe.yaml").read_text())
    path = own / "some.safetensors"
    top1 = result["top1"]["pruned"]
    save_sparse(path, read_weights(own / "pruned.safetensors"), prunable=["fc1.weight"], recipe=recipe, top1=top1)
    said = gsm(capsys, "verify", path)
    assert "not counted, as it is stored as unpruned: fc2.weight, fc3.weight" in said
    said = gsm(capsys, "show", path)
    assert "fc1.weight" in said
    assert "fc2.weight" not in said
    said = fails(capsys, "verify", path, "--accuracy", status=1)
    assert "certifies other layers than those prunable in lenet300: fc2.weight" in said


def test_a_file_runs_no_code_that_the_user_has_not_named(own, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("from pathlib import Path\nPath('called').touch()\n")
    gsm(capsys, "export", own)
    path = own / "pruned.sparse.safetensors.xz"
    honest = path.read_bytes()
    path.write_bytes(edited(honest, lambda about, _: about["recipe"].update(model="evil:make")))
    said = fails(capsys, "verify", path, "--accuracy")
    assert "'evil:make' builds its net, which is not part of gsm-sgd" in said
    assert not (tmp_path / "called").exists()
    assert "evil" not in sys.modules
    fails(capsys, "verify", path, "--accuracy", "--model", "evil:make")
    assert (tmp_path / "called").exists()


EVIL = """
from pathlib import Path
from gsm_sgd.experiments import models, recipes

Path("called").touch()
Training = recipes.Training

def make():
    return models.build("lenet300", 0)
"""


@pytest.mark.parametrize("words", [
    ["export", "--format", "onnx"], ["export", "--values", "float16"], ["bench", "inference"],
])  # fmt: skip
def test_a_run_runs_no_code_that_the_user_has_not_named(own, capsys, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text(EVIL)
    recipe = yaml.safe_load((own / "recipe.yaml").read_text())
    honest = yaml.safe_dump(recipe)
    (own / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "evil:make"}))
    said = fails(capsys, *words, own)
    assert said.endswith("if you trust that code, add --model evil:make")
    assert "evil:other" in fails(capsys, *words, own, "--model", "evil:other")
    base = {"class_path": "evil.Training", "init_args": recipe["base"], "epochs": 2}
    (own / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "base": base}))
    assert "states no recipe of this version" in fails(capsys, *words, own)
    (own / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "torchvision:evil.make"}))
    assert "evil.make" in fails(capsys, *words, own)
    for command in (["show", own], ["report", own, "-o", tmp_path / "page"], ["ticket", "save", own]):
        cli.run([str(word) for word in command])
    assert not (tmp_path / "called").exists()
    (own / "recipe.yaml").write_text(honest)
    capsys.readouterr()
    assert "leave out --model" in fails(capsys, *words, own, "--model", "evil:make")
    assert not (tmp_path / "called").exists()
    assert "evil" not in sys.modules


def test_a_run_of_the_users_own_net_is_exported_when_it_is_named(own, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "evil", raising=False)
    (tmp_path / "evil.py").write_text(EVIL)
    recipe = yaml.safe_load((own / "recipe.yaml").read_text())
    (own / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "evil:make"}))
    gsm(capsys, "export", own)  # which needs no net
    assert not (tmp_path / "called").exists()
    gsm(capsys, "export", own, "--format", "onnx", "--model", "evil:make")
    assert (tmp_path / "called").exists()


def test_a_result_names_no_file_outside_its_folder(own, capsys, tmp_path):
    result = json.loads((own / "result.json").read_text())
    for name in (f"{tmp_path}/outside", "../outside"):
        (own / "result.json").write_text(json.dumps({**result, "command": "replay", "top1": {name: 50.0}}))
        (tmp_path / "outside.safetensors").write_bytes((own / "pruned.safetensors").read_bytes())
        for words in (["export", own], ["export", own, "--format", "onnx"], ["bench", "inference", own]):
            assert fails(capsys, *words).startswith(f"{own / 'result.json'} is damaged (it is no result)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.safetensors", "run"]


def test_classes_are_those_of_the_weights(own, capsys):
    result = json.loads((own / "result.json").read_text())
    result["layers"][-1]["shape"] = [10**12, 100]
    (own / "result.json").write_text(json.dumps(result))
    said = fails(capsys, "export", own, "--format", "onnx")
    assert "is not of the net that result.json beside it describes" in said


def test_a_recipe_that_is_none_is_told(own, capsys):
    gsm(capsys, "export", own)
    path = own / "pruned.sparse.safetensors.xz"
    honest = path.read_bytes()
    for fields in (
        {"base": 3}, {"base": {"epochs": "many"}}, {"model": ["lenet300"]}, {"x": 1}, {"compression": "sixty"},
        {"recipe": "../../elsewhere"}, {"preset": "/elsewhere"}, {"seed": 1.5}, {"dataset": "elsewhere"},
        {"compression": 0.5}, {"base": {"class_path": "evil.Training", "init_args": {}}},
    ):  # fmt: skip
        path.write_bytes(edited(honest, lambda about, _, fields=fields: about["recipe"].update(fields)))
        assert "states no recipe of this version" in fails(capsys, "verify", path, "--accuracy")


# --- eval ---


def test_eval_of_a_run_and_of_each_of_its_files(own, capsys, tmp_path):
    top1 = json.loads((own / "result.json").read_text())["top1"]
    for kind in ("sparse", "hdf5", "onnx", "safetensors"):
        gsm(capsys, "export", own, "--format", kind)
    pruned, stated = f"{top1['pruned']:.2f} % of 512 images of synthetic", f"; {top1['pruned']:.2f} % was stated\n"
    assert gsm(capsys, "eval", own) == f"{own}: {pruned}{stated}"
    sparse = own / "pruned.sparse.safetensors.xz"
    assert gsm(capsys, "eval", sparse) == f"{sparse}: {pruned}{stated}"
    for name in ("pruned.hdf5", "pruned.onnx", "pruned.dense.safetensors", "pruned.safetensors"):
        assert gsm(capsys, "eval", own / name) == f"{own / name}: {pruned}\n"
    assert f"{top1['base']:.2f} % of" in gsm(capsys, "eval", own / "base.safetensors")

    (tmp_path / "away").mkdir()
    moved = shutil.copy(own / "pruned.onnx", tmp_path / "away")
    said = fails(capsys, "eval", moved)
    assert said.endswith("away/recipe.yaml does not exist: add --recipe RUN/recipe.yaml, of the file's run")
    assert pruned in gsm(capsys, "eval", moved, "--recipe", own / "recipe.yaml")


def test_eval_of_what_is_no_net(own, capsys, tmp_path):
    assert "nowhere does not exist: give a run's folder, or a file of one" in fails(capsys, "eval", "nowhere")
    assert "is not a run's folder" in fails(capsys, "eval", tmp_path)
    (own / "x.onnx").write_bytes(b"no")
    assert "x.onnx is no ONNX file that onnxruntime can read" in fails(capsys, "eval", own / "x.onnx")
    assert "result.json is not a safetensors file" in fails(capsys, "eval", own / "result.json")
    (own / "recipe.yaml").write_text("{")
    assert "recipe.yaml is damaged" in fails(capsys, "eval", own / "pruned.safetensors")


# --- a size to prune to ---


def test_target_size(tmp_path, capsys):
    words = ["prune", "lenet300", *NO_RATIO, "--target-size", "20KB", "--seeds", "9,10", "--out", tmp_path]
    said = gsm(capsys, *words)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    for folder in folders:
        path = folder / "pruned.sparse.safetensors.xz"
        assert 13_000 < path.stat().st_size <= 20_000
        assert str(path) in said
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert f"-x{recipe['compression']:g}-" in folder.name
        gsm(capsys, "verify", path)
    path.unlink()
    assert "20,000" not in gsm(capsys, *words)  # the same folders again, and what is missing in them
    assert sorted(tmp_path.iterdir()) == folders
    assert path.exists()


# --- tickets ---


@pytest.mark.parametrize("method", ["gsm", "magnitude"])
def test_a_ticket_trains_to_the_same_bits(run, tmp_path, capsys, method):
    path = tmp_path / "x.ticket"
    said = gsm(capsys, "ticket", "save", run, "--method", method, "-o", path)
    assert "13,310 weights" in said
    assert path.stat().st_size < 13_310
    said = gsm(capsys, "ticket", "replay", path, "--out", tmp_path / "runs")
    assert said.startswith("identical: ")
    assert said.endswith("and the same weights to the bit\n")
    (again,) = (tmp_path / "runs").iterdir()
    assert again.name.startswith(f"lenet300-replay-{method}-fast-x20-s0-")
    ours, theirs = (read_weights(folder / f"ticket-{method}.safetensors") for folder in (again, run))
    assert same(ours, theirs)
    said = gsm(capsys, "show", again)
    assert f"ticket by {'GSM' if method == 'gsm' else 'magnitude'}, retrained" in said
    assert gsm(capsys, "ticket", "replay", path, "--out", tmp_path / "runs").startswith("identical: ")


def test_what_a_ticket_holds(run, capsys):
    gsm(capsys, "ticket", "save", run)
    path = run / "ticket-gsm.ticket.safetensors.xz"
    ticket = read_ticket(path)
    result = json.loads((run / "result.json").read_text())
    assert (ticket.top1, ticket.recipe["seed"], ticket.threads) == (result["top1"]["ticket_gsm"], 0, 1)
    trained = read_weights(run / "ticket-gsm.safetensors")
    for name, mask in ticket.masks.items():
        assert not trained[name][~mask].any()
    assert "13,310" in gsm(capsys, "show", path)
    path.unlink()


def test_a_replay_that_differs_is_told(run, tmp_path, capsys):
    path = tmp_path / "x.ticket"
    gsm(capsys, "ticket", "save", run, "-o", path)
    honest = path.read_bytes()

    def claim(about, _):
        about["certificate"]["top1"] = 1.5
        about["recipe"]["trained"] = 64 * "0"

    path.write_bytes(edited(honest, claim))
    said = gsm(capsys, "ticket", "replay", path, "--out", tmp_path / "runs")
    assert said.startswith("not identical: ")
    assert " here, 1.50 % there" in said
    path.write_bytes(edited(honest, lambda about, _: about["recipe"].update(init=64 * "0")))
    said = fails_at_the_end(capsys, "ticket", "replay", path, "--out", tmp_path / "runs")
    assert "the initialisation of seed 0 here is not that of" in said


def test_a_ticket_with_another_mask_is_not_taken_for_one_that_was_trained(run, tmp_path, capsys):
    paths = [tmp_path / "a.ticket", tmp_path / "b.ticket"]
    gsm(capsys, "ticket", "save", run, "-o", paths[0])
    ticket = read_ticket(paths[0])
    ticket.masks["fc1.weight"] = ticket.masks["fc1.weight"].flip(0)
    write_ticket(paths[1], ticket)
    for path, verdict in zip(paths, ("identical", "not identical"), strict=True):
        assert gsm(capsys, "ticket", "replay", path, "--out", tmp_path / "runs").startswith(f"{verdict}: ")
    ticket.masks["fc1.weight"][:] = True
    write_ticket(paths[1], ticket)
    said = fails(capsys, "ticket", "replay", paths[1], "--out", tmp_path / "none")
    assert "weights, which is not 20x of its net" in said
    del ticket.masks["fc1.weight"]
    write_ticket(paths[1], ticket)
    said = fails(capsys, "ticket", "replay", paths[1], "--out", tmp_path / "none")
    assert "does not fit lenet300: its masks are of other layers" in said
    assert not (tmp_path / "none").exists()


def fails_at_the_end(capsys, *words):
    """Run, expect bad usage after some progress, and return the last line."""
    capsys.readouterr()
    assert cli.run([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("facts", "recipe", "message"),
    [
        ({"method": "chance"}, {}, "is not a ticket"),
        ({"method": []}, {}, "is not a ticket"),
        ({"threads": 10_000_000}, {}, "is not a ticket"),
        ({"init": 3}, {}, "is not a ticket"),
        ({"recipe": None}, {}, "is not a ticket"),
        ({"masks": {}}, {}, "is not a ticket"),
        ({}, {"base": {"epochs": 10**18}}, "base.epochs must be at least 1 and at most"),
        ({}, {"gsm": {"epochs": 10**18}}, "gsm.epochs must be at least 1 and at most"),
        ({}, {"base": {"milestones": [1] * 10_000}}, "base.milestones must be at most 1000"),
        ({}, {"base": {"warmup_epochs": 10**60}}, "base.warmup_epochs must be finite"),
        ({}, {"batch_size": 10**18}, "batch_size must be at least 1 and at most"),
        ({}, {"holdout": 10**18}, "holdout must be at least 0 and below"),
        ({}, {"compression": 21.0}, "which is not 21x of its net"),
        ({}, {"model": "lenet5"}, "does not fit lenet5: its masks are of other layers"),
    ],
)
def test_tickets_that_lie_leave_no_folder(run, tmp_path, capsys, facts, recipe, message):
    def change(about, _):
        for name, value in recipe.items():
            old = about["recipe"]["recipe"][name]
            about["recipe"]["recipe"][name] = {**old, **value} if isinstance(value, dict) else value
        about["recipe"].update(facts)

    path = tmp_path / "x.ticket"
    gsm(capsys, "ticket", "save", run, "-o", path)
    path.write_bytes(edited(path.read_bytes(), change))
    assert message in fails(capsys, "ticket", "replay", path, "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_only_a_lottery_has_tickets(own, capsys):
    result = json.loads((own / "result.json").read_text()) | {"command": "prune"}
    (own / "result.json").write_text(json.dumps(result))
    assert f"{own} is no lottery and has no tickets" in fails(capsys, "ticket", "save", own)


# --- the formats of others ---


def test_published_names():
    """Those of its ResNet-56 and LeNet-5; of a net that it does not have, our own."""
    assert [published_name(name, "resnet56") for name in (
        "conv.weight", "bn.running_mean", "stage2.0.conv1.weight", "stage2.0.bn2.bias", "stage2.0.shortcut.0.weight",
        "stage3.0.shortcut.1.num_batches_tracked", "fc.bias",
    )] == [
        "conv1.conv.weight", "conv1.bn.running_mean", "stage2.0.conv1.conv.weight", "stage2.0.conv2.bn.bias",
        "stage2.0.shortcut.conv.weight", "stage3.0.shortcut.bn.num_batches_tracked", "linear.bias",
    ]  # fmt: skip
    assert published_name("conv2.bias", "lenet5") == "stem.conv2.bias"
    assert published_name("fc1.weight", "lenet5") == "linear1.weight"
    assert published_name("features.0.0.bn.weight", "densenet40") == "features.0.0.bn.weight"


@pytest.mark.parametrize("name", ["lenet5", "resnet56", "densenet40"])
def test_hdf5_holds_every_tensor_once(tmp_path, name):
    state = models.build(name, 0).state_dict()
    (tmp_path / "x.hdf5").write_bytes(to_hdf5(state, name))
    found = read_hdf5(tmp_path / "x.hdf5")
    assert len(found) == len(state)
    for key, tensor in state.items():
        theirs = found[published_name(key, name)]
        assert theirs.dtype == tensor.dtype
        assert torch.equal(theirs, tensor)


def test_hdf5_has_plus_for_slash(tmp_path):
    (tmp_path / "x.hdf5").write_bytes(to_hdf5({"a/b": torch.ones(2)}, "own"))
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert list(file) == ["a+b"]
    assert list(read_hdf5(tmp_path / "x.hdf5")) == ["a/b"]
    with pytest.raises(UsageError, match="bfloat16, which HDF5 does not have"):
        to_hdf5({"w": torch.ones(2, dtype=torch.bfloat16)}, "own")


def test_hostile_hdf5(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(b"12345678")
    with h5py.File(tmp_path / "other.hdf5", "w") as file:
        file["x"] = np.ones(3)
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "x", (3,))
    one_chunk = {"maxshape": (None,), "chunks": (2**25,)}
    for number, (write, message) in enumerate([
        (lambda file: file.create_dataset("x", (2**40,), "f4", chunks=(2**10,), fillvalue=0), "claim to hold tensors"),
        (lambda file: file.create_dataset("x", (2**30,), "f4", chunks=(2**10,), fillvalue=0), "claim to hold tensors"),
        (lambda file: file.create_dataset("x", (1,), "f4", **one_chunk, fillvalue=0), "claim to hold tensors"),
        (lambda file: file.create_dataset("x", data=[1, 2], chunks=(2,), scaleoffset=3), "compressed by more, or"),
        (lambda file: file.create_group("x"), "'x' is no data set in this file"),
        (lambda file: file.__setitem__("x", h5py.ExternalLink("other.hdf5", "x")), "'x' is no data set in this file"),
        (lambda file: file.create_virtual_dataset("x", layout), "'x' is no data set in this file"),
        (lambda file: file.create_dataset("x", (2,), "f4", external=[(str(secret), 0, 8)]), "'x' is no data set"),
        (lambda file: file.create_dataset("x", data=[b"text"]), "is not an HDF5 file of tensors"),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.hdf5"
        with h5py.File(path, "w") as file:
            write(file)
        with pytest.raises(UsageError, match=message):
            read_hdf5(path)
    path.write_bytes(hdf5_file._MAGIC + b"\0" * 99)
    with pytest.raises(UsageError, match="is not an HDF5 file of tensors, or damaged"):
        read_hdf5(path)


def test_onnx_of_a_deep_net_computes_the_same():
    model = models.build("resnet20", 0)
    weights = prunable_parameters(model)
    magnitude_masks(weights, compression=10).apply_(weights)
    file = onnx_file.to_onnx(model, (3, 32, 32))
    assert file.difference < 1e-5
    shape = onnx.load_from_string(file.content).graph.input[0].type.tensor_type.shape.dim
    assert (shape[0].dim_param, [side.dim_value for side in shape[1:]]) == ("batch", [3, 32, 32])


def test_onnx_that_computes_something_else_is_not_written(own, capsys, monkeypatch):
    monkeypatch.setattr(onnx_file, "_TOLERANCE", 0.0)
    assert "logits differ from torch's by" in fails(capsys, "export", own, "--format", "onnx", status=1)
    assert not (own / "pruned.onnx").exists()


@pytest.mark.parametrize(("kind", "module"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("hdf5", "h5py")])
def test_missing_packages_are_named(own, capsys, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    said = fails(capsys, "export", own, "--format", kind)
    assert said.endswith(f"needs {module}: in a clone of gsm-sgd, pip install -e '.[export]'")
