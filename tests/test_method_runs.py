"""Runs of other methods than GSM: prune, its options, and the folders of runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gsm_sgd import METHODS, Masks, cli, prunable_parameters
from gsm_sgd.experiments import UsageError, data, models
from gsm_sgd.experiments.loop import evaluate, fitting_precision, lr_factor
from gsm_sgd.experiments.plan import dense_of, folder_of, parse_ratios, parse_seeds
from gsm_sgd.experiments.prune import prune
from gsm_sgd.experiments.recipes import Recipe, Training, by_method, check_stages, find_recipe
from gsm_sgd.experiments.rundir import RunFolder, read_metrics, read_weights
from test_cli import fails
from test_experiments import CPU, Interrupting, assert_same_files, run, without_seconds

pytestmark = pytest.mark.slow

GSM_RECIPE = replace(
    find_recipe("lenet300"),
    dataset="synthetic",
    gsm=Training(4, 0.05, momentum=0.9, cosine=0.5, warmup_epochs=0.5),
    compression=20.0,
    batch_size=256,
    fade=0.0,
)
SHORT = ["--dataset", "synthetic", "--gsm.epochs", "2", "--fade", "0", "--cut", "1", "--batch-size", "512"]
OTHERS = SHORT[:4] + SHORT[8:]
NAMES = ("init", "masks", "pruned")


@pytest.fixture(scope="module")
def synthetic():
    return data.synthetic(1_100, 200)


def recipe_for(method, **settings):
    """Return a recipe for 20 steps."""
    recipe = by_method(GSM_RECIPE, method)
    usual = {"every": 3} if "every" in recipe.settings else {"phase": 0.1} if method == "ac_dc" else {}
    return replace(recipe, settings={**recipe.settings, **usual, **settings})


# --- one run ---


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_interrupted_ends_in_the_same_bits(method, synthetic, tmp_path):
    recipe = recipe_for(method)
    recipe.check()
    result = run(prune, tmp_path / "straight", synthetic, recipe, checkpoint_seconds=1e9)
    q = 266_200 if method == "dense" else 13_310
    assert (result["method"], result["epochs"]) == (method, {method: 4})
    assert list(result["top1"]) == ["before_cut", "after_cut", "pruned"]
    assert Masks.load(tmp_path / "straight" / "masks.safetensors").num_kept == q
    assert result["nonzeros"] == sum(layer["nonzeros"] for layer in result["layers"]) <= q
    stops = 0
    while True:
        try:
            run(prune, tmp_path / "interrupted", synthetic, recipe, observer=Interrupting(6))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 3
    assert_same_files(tmp_path / "interrupted", tmp_path / "straight", (*NAMES, method))
    assert without_seconds(tmp_path / "interrupted") == without_seconds(tmp_path / "straight")


def test_masks_survive_a_kill_at_the_end_of_the_stage(synthetic, tmp_path, monkeypatch):
    """Once the stage's weights are there its checkpoint is of no use, and weights that are kept may be zero."""
    recipe = recipe_for("set")
    run(prune, tmp_path / "straight", synthetic, recipe)
    for name in ("set", "masks"):
        path = tmp_path / name
        with monkeypatch.context() as patch:
            save = getattr(RunFolder, how := "save_masks" if name == "masks" else "save_weights")

            def dying(self, saved, what, name=name, save=save):
                save(self, saved, what)
                if saved == name:
                    raise KeyboardInterrupt

            patch.setattr(RunFolder, how, dying)
            with pytest.raises(KeyboardInterrupt):
                run(prune, path, synthetic, recipe)
        run(prune, path, synthetic, recipe)
        assert_same_files(path, tmp_path / "straight", (*NAMES, "set"))


def test_the_pruned_net_is_the_trained_one_masked(synthetic, tmp_path):
    """A net that is cut in the end alone: the figures before and after the cut differ."""
    result = run(prune, tmp_path / "run", synthetic, recipe_for("one_shot", cut=1.0))
    weights, pruned = (read_weights(tmp_path / "run" / f"{name}.safetensors") for name in ("one_shot", "pruned"))
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    assert all(torch.equal(pruned[key], weights[key] * mask) for key, mask in masks.items())
    assert result["nonzeros"] == 13_310
    model = models.build("lenet300", 0)
    model.load_state_dict(weights)
    assert result["top1"]["before_cut"] == evaluate(model, synthetic.test)
    model.load_state_dict(pruned)
    assert result["top1"]["after_cut"] == result["top1"]["pruned"] == evaluate(model, synthetic.test)


def test_dense_is_gsm_at_compression_1(synthetic, tmp_path):
    run(prune, tmp_path / "dense", synthetic, dense_of(GSM_RECIPE))
    run(prune, tmp_path / "gsm", synthetic, replace(GSM_RECIPE, compression=1.0))
    ours, theirs = (read_weights(tmp_path / name / "pruned.safetensors") for name in ("dense", "gsm"))
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=1e-4, atol=1e-5)


def test_magnitude_prunes_the_base_net_at_once_and_retrains_it(synthetic, tmp_path):
    recipe = replace(recipe_for("one_shot", cut=0.0), start="base", base=Training(2, 0.05))
    result = run(prune, tmp_path / "run", synthetic, recipe)
    assert list(result["top1"]) == ["base", "before_cut", "after_cut", "pruned"]
    base = read_weights(tmp_path / "run" / "base.safetensors")
    model = models.build("lenet300", 0)
    model.load_state_dict(base)
    sizes = torch.cat([weight.detach().abs().flatten() for weight in prunable_parameters(model).values()])
    kept = torch.zeros(len(sizes), dtype=torch.bool).index_fill_(0, sizes.topk(13_310).indices, True)
    masks = Masks.load(tmp_path / "run" / "masks.safetensors")
    assert torch.equal(torch.cat([mask.flatten() for mask in masks.values()]), kept)


def test_random_masks_follow_the_seed_of_the_run(synthetic, tmp_path):
    masks = []
    for seed in (0, 1):
        run(prune, tmp_path / str(seed), synthetic, replace(recipe_for("random"), seed=seed))
        masks.append(Masks.load(tmp_path / str(seed) / "masks.safetensors"))
    assert not torch.equal(masks[0]["fc1.weight"], masks[1]["fc1.weight"])


def test_the_learning_rate_starts_again_at_the_cut(synthetic, tmp_path):
    training = Training(10, 1.0, (8,), warmup_epochs=1, cosine=0.5)
    whole, halves = lr_factor(training, 5), lr_factor(training, 10, restart=50)
    assert [halves(step) for step in range(100)] == [whole(step % 50) for step in range(100)]
    assert [lr_factor(training, 10, restart=0)(step) for step in range(100)] == [
        lr_factor(training, 10, restart=100)(step) for step in range(100)
    ]
    run(prune, tmp_path / "run", synthetic, recipe_for("one_shot"))
    lrs = [record["lr"] for record in read_metrics(tmp_path / "run")]
    assert lrs[1] == lrs[0] * 0 < lrs[2]  # back in the warm-up after two of four epochs


# --- recipes and folders ---


def test_a_recipe_of_another_method_comes_back_from_its_file():
    recipe = recipe_for("rigl", fraction=0.5)
    fields = yaml.safe_load(yaml.safe_dump(recipe.as_dict()))
    assert fields["rigl"] == {"layers": "erk", "every": 3, "fraction": 0.5, "until": 0.75}
    assert fields["method"] == "rigl"
    assert Recipe.from_dict(fields) == recipe
    del fields["rigl"]["until"]
    assert Recipe.from_dict(fields) == recipe  # what a file lacks is as it is by default
    assert "settings" not in GSM_RECIPE.as_dict()
    assert Recipe.from_dict(GSM_RECIPE.as_dict()) == GSM_RECIPE
    for theirs in ({"class_path": "os.system"}, "other.yaml"):
        with pytest.raises(ValueError, match="rigl has a setting that it does not know, or is not a group"):
            check_stages({**fields, "rigl": theirs})


def test_a_folder_is_called_by_what_differs_from_the_preset():
    preset = find_recipe("lenet300")

    def name(recipe, command="prune", **options):
        return folder_of(Path("runs"), recipe, command, CPU, **options).name

    assert name(preset) == "lenet300-prune-fast-x60-s0"
    assert name(replace(preset, seed=3, compression=6.6), "lottery") == "lenet300-lottery-fast-x6.6-s3"
    assert name(by_method(preset, "rigl")) == "lenet300-prune-rigl-fast-x60-s0"
    assert name(dense_of(preset)) == "lenet300-prune-dense-fast-x1-s0"
    slower = replace(preset, gsm=replace(preset.gsm, lr=0.05))
    names = [name(one) for one in (slower, replace(slower, seed=1), replace(preset, holdout=5), preset.scaled(0.5))]
    assert all(re.fullmatch(r"lenet300-prune-fast-[0-9a-f]{6}-x60-s[01]", one) for one in names)
    assert names[1] == names[0].replace("s0", "s1")
    assert len(set(names)) == 4
    other = by_method(preset, "rigl")
    assert name(replace(other, settings={**other.settings, "every": 7})) != name(other)
    assert name(slower, name="mine") == "mine-x60-s0"
    here = replace(find_recipe("resnet20"), precision=fitting_precision("auto", CPU))
    assert name(here) == "resnet20-prune-fast-x10-s0"
    with pytest.raises(UsageError, match="a name is made of letters, digits, dots and dashes"):
        name(slower, name="../x")


def test_a_run_of_an_earlier_version_goes_on_in_its_folder(tmp_path):
    slower = replace(find_recipe("lenet300"), batch_size=64)
    plain = tmp_path / "lenet300-prune-fast-x60-s0"
    with RunFolder(plain, slower):
        pass
    assert folder_of(tmp_path, slower, "prune", CPU) == plain
    assert folder_of(tmp_path, replace(slower, batch_size=32), "prune", CPU) != plain


def test_seeds_and_ratios_are_lists():
    assert parse_seeds("0-4") == [0, 1, 2, 3, 4]
    assert parse_seeds("7") == [7]
    assert parse_seeds("3,0-1, 9") == [3, 0, 1, 9]
    assert parse_ratios(20.0) == [20.0]
    assert parse_ratios("20,6.6") == [20.0, 6.6]
    for text in ("0-", "a", "", "1,,2", "0..3"):
        with pytest.raises(UsageError, match="seeds must be whole numbers"):
            parse_seeds(text)


# --- the command ---


def test_several_ratios_and_a_baseline_that_they_share(tmp_path, capsys):
    words = ["prune", "lenet300", *OTHERS, "--method", "rigl", "--rigl.every", "2", "--compression", "20,60"]
    words += ["--seeds", "1", "--out", str(tmp_path), "--baseline"]
    assert cli.run(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    names = sorted(path.name for path in tmp_path.iterdir())
    kinds = [re.sub("-[0-9a-f]{6}-", "-", name) for name in names]
    assert kinds == [
        "lenet300-prune-dense-fast-x1-s1",
        "lenet300-prune-rigl-fast-x20-s1",
        "lenet300-prune-rigl-fast-x60-s1",
    ]
    results = {name: json.loads((tmp_path / name / "result.json").read_text()) for name in names}
    for name in names[1:]:
        assert results[name]["top1"]["dense"] == results[names[0]]["top1"]["pruned"]
    for text in ("RigL", "at 20x", "at 60x", "dense net, as many epochs"):
        assert text in said
    dense = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*dense*/*.safetensors")}
    before = (tmp_path / names[2] / "result.json").read_bytes()
    ours = ["prune", "lenet300", *SHORT, "--compression", "20", "--seed", "1", "--out", str(tmp_path), "--baseline"]
    assert cli.run(ours) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*dense*/*.safetensors")} == dense
    (ours,) = tmp_path.glob("lenet300-prune-fast-*")
    assert json.loads((ours / "result.json").read_text())["top1"]["dense"] == results[names[0]]["top1"]["pruned"]
    assert cli.run(words) == 0
    assert (tmp_path / names[2] / "result.json").read_bytes() == before


def test_a_recipe_file_of_another_method_is_a_config(tmp_path, capsys):
    words = ["prune", "lenet300", *OTHERS, "--method=gradual", "--gradual.every", "2", "--compression", "20"]
    assert cli.run([*words, "--out", str(tmp_path / "a")]) == 0
    (theirs,) = (tmp_path / "a").iterdir()
    config = ["prune", "lenet300", "--config", str(theirs / "recipe.yaml")]
    assert cli.run([*config, "--out", str(tmp_path / "b")]) == 0
    (again,) = (tmp_path / "b").iterdir()
    assert again.name == theirs.name
    assert_same_files(again, theirs, NAMES)
    assert cli.run([*config, "--gradual.every", "3", "--out", str(tmp_path / "c")]) == 0
    (other,) = (tmp_path / "c").iterdir()
    assert yaml.safe_load((other / "recipe.yaml").read_text())["gradual"]["every"] == 3
    assert other.name != theirs.name
    capsys.readouterr()
    assert "has settings of gradual: leave out --method rigl" in fails(capsys, *config, "--method", "rigl")
    assert "a lottery is of GSM's tickets" in fails(capsys, "lottery", *config[1:], "--out", tmp_path / "d")
    recipe = yaml.safe_load((theirs / "recipe.yaml").read_text())
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump({**recipe, "gradual": {"class_path": "os.system"}}))
    bad = ["prune", "lenet300", "--config", tmp_path / "bad.yaml"]
    assert "gradual has a setting that it does not know" in fails(capsys, *bad)


def test_runs_of_a_method_are_shown_reported_exported_and_verified(tmp_path, capsys):
    words = ["prune", "lenet300", *OTHERS, "--method", "snip", "--compression", "20", "--out", str(tmp_path)]
    assert cli.run(words) == 0
    (path,) = tmp_path.iterdir()
    assert cli.run(["show", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "lenet300 at 20x, SNIP, preset fast, seed 0: 13,310 of 266,200 weights" in out
    assert "GSM" not in out
    assert cli.run(["report", str(path), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "kept by SNIP" in page
    assert cli.run(["export", str(path)]) == 0
    assert cli.run(["verify", str(path / "pruned.sparse.safetensors.xz"), "--accuracy"]) == 0
    assert "measured again" in capsys.readouterr().out
    assert "is a file of the run itself" in fails(capsys, "export", path, "--out", path / "snip.safetensors")
    (path / "result.json").unlink()
    assert cli.run(["show", str(path)]) == 0
    assert "2/2" in capsys.readouterr().out


def test_help_shows_the_settings_of_the_method(capsys):
    with pytest.raises(SystemExit):
        cli.run(["prune", "lenet300", "--method", "rigl", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--rigl.every EVERY" in text
    assert "steps between two replacements (default: 100)" in text
    assert "--gradual" not in text
    assert "--rigl.seed" not in text  # the run has one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "rgl"], "unknown method 'rgl': did you mean 'rigl'?"),
        (["--method"], "argument --method: expected one argument"),
        (["--method", "rigl", "--ramp", "0.2"], "ramp is a setting of GSM, not of rigl: leave it out"),
        (["--method", "rigl", "--score", "magnitude"], "score is a setting of GSM, not of rigl: leave it out"),
        (["--method", "rigl", "--gradual.every", "2"], "--gradual.every is a setting of --method gradual: add that?"),
        (["--rigl.every", "2"], "--rigl.every is a setting of --method rigl: add that?"),
        (["--method", "rigl", "--every", "2"], "--every 2; did you mean --rigl.every?"),
        (["--method", "rigl", "--rigl.layers", "global"], "rigl.layers takes erk or uniform, not 'global'"),
        (["--method", "rigl", "--rigl.every", "0"], "every must be at least 1, not 0"),
        (["--method", "rigl", "--compression", "100000"], "erk densities leave 'fc3.weight' none of 2 weights"),
        (["--method", "set", "--compression", "20,300000"], "leaves none of 266200 weights"),
        (
            ["--method", "dense", "--compression", "3"],
            "dense keeps all 266200 weights, not 88733: set compression to 1",
        ),
        (["--compression", "20,x"], "compression must be a number, or several with commas between, like 20,60,200"),
        (["--compression", "20,20.0"], "a compression ratio stands twice in '20,20.0'"),
        (["--seeds", "4-1"], "seeds must rise from the first to the last"),
        (["--seeds", "0-1,1"], "a seed stands twice in '0-1,1'"),
        (["--name", "a/b"], "a name is made of letters, digits, dots and dashes, not 'a/b'"),
    ],
)
def test_bad_usage(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "prune", "lenet300", *words)
    assert not list(tmp_path.iterdir())
