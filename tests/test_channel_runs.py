"""Runs that prune channels: from the command to narrow nets, their files and their speed."""

import json
import shutil

import pytest
import torch
from torch import nn

from gsm_sgd import cli
from gsm_sgd.experiments import models
from gsm_sgd.experiments.rundir import read_weights
from gsm_sgd.structured import latency, load_narrow
from test_cli import fails

pytestmark = pytest.mark.slow

RUN = [
    *("prune", "lenet5", "--dataset", "synthetic", "--pattern", "channel", "--macs", "0.4", "--epochs-scale", "0.2"),
    *("--checkpoint-seconds", "0", "--name", "narrow"),
]
NAME = "narrow-macs0.4-s0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.run([*RUN, "--out", str(out)]) == 0
    return out / NAME


def logits(model):
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def test_the_result_counts_what_the_narrow_net_has(run):
    result = json.loads((run / "result.json").read_text())
    dense, narrow = models.build("lenet5", 0), load_narrow(models.build("lenet5", 0), run / "narrow.safetensors")
    assert result["macs"]["dense"] == 2_293_000
    assert 0.3 * 2_293_000 < result["macs"]["pruned"] <= 0.4 * 2_293_000
    counts = {"dense": dense, "pruned": narrow}
    for key, model in counts.items():
        assert result["parameters"][key] == sum(weight.numel() for weight in model.parameters())
    weights = dict(narrow.named_parameters())
    for row in result["widths"]:
        assert row["pruned"] == weights[row["name"]].shape[0] <= row["dense"]
    assert result["nonzeros"] == sum(weight.numel() for weight in weights.values() if weight.ndim > 1)
    assert result["compression"] == pytest.approx(2.5)


def test_the_narrow_net_computes_what_the_pruned_one_does(run):
    pruned = models.build("lenet5", 0)
    pruned.load_state_dict(read_weights(run / "pruned.safetensors"))
    narrow = load_narrow(models.build("lenet5", 3), run / "narrow.safetensors")
    torch.testing.assert_close(logits(narrow), logits(pruned), rtol=1e-5, atol=1e-5)


def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    real, taken = torch.optim.lr_scheduler.LambdaLR.step, 0

    def killed(self, *args):
        nonlocal taken
        taken += 1
        if taken == 40:  # in the ramp
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.lr_scheduler.LambdaLR, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            cli.run([*RUN, "--out", str(tmp_path)])
    assert cli.run([*RUN, "--out", str(tmp_path)]) == 0
    for file in ("gsm", "masks", "channels", "pruned", "narrow"):
        assert (tmp_path / NAME / f"{file}.safetensors").read_bytes() == (run / f"{file}.safetensors").read_bytes()
    for file in ("masks", "channels", "pruned", "narrow", "result"):  # killed between the stage and the result
        (tmp_path / NAME / f"{file}.{'json' if file == 'result' else 'safetensors'}").unlink()
    assert cli.run([*RUN, "--out", str(tmp_path)]) == 0
    assert (tmp_path / NAME / "narrow.safetensors").read_bytes() == (run / "narrow.safetensors").read_bytes()


def test_show_says_what_was_saved(run, capsys):
    assert cli.run(["show", str(run)]) == 0
    result = json.loads((run / "result.json").read_text())
    assert f"{result['macs']['pruned']:,} of 2,293,000 MACs" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["c_sgd", "aofp"])
def test_methods_that_need_no_norms_prune_a_small_net(method, tmp_path):
    words = [word if word != "0.2" else "0.1" for word in RUN]
    more = ["--aofp.every", "20"] if method == "aofp" else []
    assert cli.run([*words, "--method", method, *more, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / NAME / "result.json").read_text())
    assert result["method"] == method
    assert 0.2 * 2_293_000 < result["macs"]["pruned"] <= 0.4 * 2_293_000
    pruned = models.build("lenet5", 0)
    pruned.load_state_dict(read_weights(tmp_path / NAME / "pruned.safetensors"))
    narrow = load_narrow(models.build("lenet5", 0), tmp_path / NAME / "narrow.safetensors")
    torch.testing.assert_close(logits(narrow), logits(pruned), rtol=1e-5, atol=1e-5)


def net_with_norms():
    """Return a small net with norms, of which two layers are inner."""
    first = nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, bias=False), nn.BatchNorm2d(12)
    return nn.Sequential(*first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def test_resrep_prunes_by_compactors(tmp_path):
    words = [word if word != "0.2" else "0.1" for word in RUN]
    words += ["--model", f"{__file__}:net_with_norms", "--resrep.every", "5"]
    assert cli.run([*words, "--method", "resrep", "--out", str(tmp_path)]) == 0
    folder = tmp_path / NAME
    weights = read_weights(folder / "resrep.safetensors")
    assert {"1.compactor.weight", "4.compactor.weight", "1.norm.weight"} <= weights.keys()
    result = json.loads((folder / "result.json").read_text())
    assert 0.2 < result["macs"]["pruned"] / result["macs"]["dense"] <= 0.4
    narrow = load_narrow(net_with_norms(), folder / "narrow.safetensors")
    pruned = net_with_norms()
    pruned.load_state_dict(read_weights(folder / "pruned.safetensors"))
    torch.testing.assert_close(logits(narrow), logits(pruned), rtol=1e-5, atol=1e-5)
    before = (folder / "narrow.safetensors").read_bytes()
    for file in ("masks", "channels", "pruned", "narrow"):
        (folder / f"{file}.safetensors").unlink(missing_ok=file == "narrow")
    (folder / "result.json").unlink()
    (folder / "resrep.safetensors").unlink()
    assert cli.run([*words, "--method", "resrep", "--out", str(tmp_path)]) == 0
    assert (folder / "narrow.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slimming", "group_l1", "uniform"])
def test_rivals_prune_to_the_same_budget(method, tmp_path):
    words = [*RUN, "--model", "resnet20", "--gsm.epochs", "2", "--base.epochs", "1"]
    words[words.index("lenet5")] = "resnet20"
    words[words.index("0.2")] = "1"
    assert cli.run([*words, "--method", method, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == method
    assert 0.2 * 40_813_184 < result["macs"]["pruned"] <= 0.4 * 40_813_184
    narrow = load_narrow(models.build("resnet20", 0), folder / "narrow.safetensors")
    assert sum(weight.numel() for weight in narrow.parameters()) == result["parameters"]["pruned"]


@pytest.mark.slow
def test_the_report_takes_such_runs(run, tmp_path):
    assert cli.run(["report", str(run), "-o", str(tmp_path / "report.html")]) == 0
    assert "2.5" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_onnx_of_the_run_is_the_narrow_net(run, capsys):
    assert cli.run(["export", str(run), "--format", "onnx"]) == 0
    parameters = json.loads((run / "result.json").read_text())["parameters"]
    assert (run / "pruned.onnx").stat().st_size < 4 * parameters["pruned"] + 50_000 < 4 * parameters["dense"]


@pytest.mark.slow
def test_inference_is_measured_dense_and_narrow(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("gsm_sgd.export.inference.BATCHES", (2,))
    monkeypatch.setattr("gsm_sgd.export.inference.THREADS", (1,))
    folder = shutil.copytree(run, tmp_path / run.name)
    assert cli.run(["bench", "inference", str(folder)]) == 0
    engines = [row["engine"] for row in json.loads((folder / "inference.json").read_text())["rows"]]
    assert engines == ["torch, dense", "torch, narrow", "onnxruntime, dense", "onnxruntime, narrow"]
    assert "The narrow net is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prune", "lenet5", "--pattern", "channels"], "pattern takes weight or channel"),
        (["prune", "lenet5", "--pattern", "channel", "--macs", "0"], "macs must be above 0 and at most 1, not 0"),
        (["prune", "lenet5", "--pattern", "channel", "--macs", "0.001"], "below the smallest possible"),
        (["prune", "lenet5", "--latency", "0.5"], "latency is a budget of channels: add --pattern channel"),
        (["prune", "lenet5", "--pattern", "channel", "--latency", "2"], "latency must be above 0 and at most 1, not 2"),
        (["prune", "lenet5", "--pattern=channel", "--latency=.5", "--macs=.5"], "--macs and --latency are two budgets"),
        (["prune", "lenet5", "--method", "slimming"], "slimming is for --pattern channel"),
        (["prune", "lenet5", "--method", "rigl", "--pattern", "channel"], "rigl is for --pattern weight"),
        (["prune", "lenet5", "--method", "slimming", "--pattern", "channel"], "no norm scales the channels of"),
        (["compare", "lenet5", "--pattern", "channel"], "gradual is for --pattern weight"),
        (["compare", "lenet5", "--pattern", "channel", "--methods", "gsm,dense", "--macs", "0.5,x"], "like 20,60,200"),
        (["prune", "lenet5", "--method", "resrep", "--pattern", "channel"], "so no compactor fits"),
        (
            ["prune", "lenet5", "--method", "aofp", "--pattern", "channel", "--aofp.every", "0"],
            "every must be at least 1",
        ),
        (["lottery", "lenet5", "--pattern", "channel"], "a lottery is for single weights: leave out --pattern channel"),
    ],
)
def test_bad_usage(words, message, tmp_path, capsys):
    assert message in fails(capsys, *words, "--dataset", "synthetic", "--out", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_methods_are_compared_on_channels(tmp_path, capsys):
    """At shares of the MACs, beside the dense net; runs of gsm prune with the same settings are theirs too."""
    words = ["lenet5", "--dataset", "synthetic", "--pattern", "channel", "--epochs-scale=0.2", "--out", str(tmp_path)]
    assert cli.run(["prune", *words, "--macs", "0.4"]) == 0
    capsys.readouterr()
    assert cli.run(["compare", *words, "--macs", "0.4,0.3", "--methods", "gsm,uniform,dense"]) == 0
    assert "5 runs, 1 of them over" in capsys.readouterr().out
    (folder,) = tmp_path.glob("*-compare-*")
    methods = json.loads((folder / "compare.json").read_text())["methods"]
    assert [list(cells) for cells in methods.values()] == [["2.5", "3.33333"]] * 3
    shares = []
    for path in tmp_path.glob("*-prune-*macs*"):
        result = json.loads((path / "result.json").read_text())
        shares.append(float(path.name.partition("macs")[2].partition("-")[0]))
        assert result["macs"]["pruned"] <= shares[-1] * result["macs"]["dense"]
        assert "dense" in result["top1"]
    assert sorted(shares) == [0.3, 0.3, 0.4, 0.4]


IN_TIME = ["--latency" if word == "--macs" else word for word in RUN]
IN_TIME_NAME = "narrow-latency0.4-s0"


def test_a_budget_of_latency_is_measured_once_and_kept(tmp_path, monkeypatch, capsys):
    measured = []

    def nanoseconds(module, *inputs):  # of a clock that runs alike everywhere
        measured.append(module)
        return 1_000 + sum(parameter.numel() for parameter in module.parameters())

    monkeypatch.setattr(latency, "nanoseconds", nanoseconds)
    assert cli.run([*IN_TIME, "--out", str(tmp_path)]) == 0
    folder = tmp_path / IN_TIME_NAME
    result = json.loads((folder / "result.json").read_text())
    dense, pruned = result["latency"]["dense"], result["latency"]["pruned"]
    assert 0.2 * dense < pruned <= 0.4 * dense
    assert "an expected latency of" in capsys.readouterr().out
    before, count = (folder / "narrow.safetensors").read_bytes(), len(measured)
    assert 0 < count == len(json.loads((folder / "latency.json").read_text()))
    for file in ("gsm", "masks", "channels", "pruned", "narrow"):
        (folder / f"{file}.safetensors").unlink()
    (folder / "result.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert cli.run([*IN_TIME, "--out", str(tmp_path)]) == 0
    assert len(measured) == count
    assert (folder / "narrow.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 0}', '{"a": true}', '{"a": 1.5}'])
def test_times_that_are_damaged_are_refused(content, tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(latency, "nanoseconds", killed)
    with pytest.raises(KeyboardInterrupt):
        cli.run([*IN_TIME, "--out", str(tmp_path)])
    path = tmp_path / IN_TIME_NAME / "latency.json"
    assert not path.exists()
    path.write_text(content)
    assert cli.run([*IN_TIME, "--out", str(tmp_path)]) == 2
    assert f"{path} is damaged" in capsys.readouterr().err


def test_a_latency_that_cannot_be_reached_is_refused_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "nanoseconds", lambda *_: 1_000)  # however narrow
    assert cli.run([*IN_TIME, "--out", str(tmp_path)]) == 2
    assert "below the smallest possible" in capsys.readouterr().err
    assert not list((tmp_path / IN_TIME_NAME).glob("gsm*"))
