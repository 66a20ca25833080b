"""The command line, in this process; what it trains is made-up data, and short."""

import json
import re
import resource
import runpy
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from gsm_sgd import __version__, cli
from gsm_sgd.cli.arguments import parse
from gsm_sgd.experiments import UsageError, bench, observers
from gsm_sgd.experiments.plan import parse_ratios
from gsm_sgd.experiments.recipes import Recipe
from gsm_sgd.experiments.rundir import RunFolder, read_weights
from gsm_sgd.export import save_sparse
from made_runs import empty, make_run

pytestmark = pytest.mark.slow

SHORT = [
    "--dataset", "synthetic", "--base.epochs", "2", "--gsm.epochs=2", "--compression", "20",
    "--batch-size", "512", "--base.milestones", "[1]", "--gsm.milestones", "[]",
    "--start", "base", "--ramp", "0", "--fade", "0", "--cut", "1", "--passive-decay", "0.05",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Lotteries of two seeds."""
    out = tmp_path_factory.mktemp("out")
    assert cli.run(["lottery", "lenet300", *SHORT, "--seeds", "0,1", "--out", str(out), "--tensorboard"]) == 0
    return sorted(out.iterdir())


def fails(capsys, *words, status=2):
    """Run, expect the exit status, and return the one line that says why."""
    assert cli.run([str(word) for word in words]) == status
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("gsm: error: ")
    assert "Traceback" not in said.err
    return lines[0].removeprefix("gsm: error: ")


def test_list(capsys):
    assert cli.run(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("lenet300", "lenet5", "60x", "125x", "300x", "98.18", "840", "880", "paper", "repo", "fast"):
        assert word in out


def test_folders_and_pictures(runs):
    first, second = (run.name for run in runs)
    assert re.fullmatch("lenet300-lottery-fast-[0-9a-f]{6}-x20-s0", first)
    assert second == first.replace("s0", "s1")
    for run in runs:
        for name in ("density.png", "density.svg", "curves.png", "curves.svg"):
            head = (run / name).read_bytes()[:200]
            assert head.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in head or b"<?xml" in head
        (process,) = json.loads((run / "environment.json").read_text())["processes"]
        assert process["version"] == __version__
        assert {"command", "commit", "torch", "processor", "cores", "threads", "device", "started"} <= set(process)
        assert process["instructions"] == torch.backends.cpu.get_cpu_capability()
        stages = {path.name for path in (run / "tensorboard").iterdir()}
        assert stages == {"base", "gsm", "ticket-gsm", "ticket-magnitude"}


def test_event_files_are_not_written_where_a_link_leads(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "tensorboard").symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="tensorboard is a link: delete it"):
        observers.ProgressBars(Console(quiet=True), tmp_path / "tensorboard").start("base", 1, 1, 0, 0)
    assert not list((tmp_path / "mine").iterdir())


def test_tensorboard_has_the_metrics(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(runs[0] / "tensorboard" / "gsm")).Reload()
    logged = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    expected = [(record["epoch"], record["top1"]) for record in logged if record["stage"] == "gsm"]
    assert [(event.step, pytest.approx(event.value, abs=1e-4)) for event in events.Scalars("top1")] == expected


def test_fields_reach_the_recipe(runs):
    recipe = yaml.safe_load((runs[1] / "recipe.yaml").read_text())
    expected = {"recipe": "lenet300", "preset": "fast", "dataset": "synthetic", "seed": 1}
    expected |= {"batch_size": 512, "compression": 20}
    assert {key: recipe[key] for key in expected} == expected
    assert (recipe["base"]["epochs"], recipe["base"]["milestones"], recipe["gsm"]["milestones"]) == (2, [1], [])


def test_recipe_from_a_yaml_file(runs, tmp_path):
    """The recipe.yaml of one run is the --config of another, which then has the same bits."""
    assert cli.run(["prune", "lenet300", "--config", str(runs[1] / "recipe.yaml"), "--out", str(tmp_path)]) == 0
    (again,) = tmp_path.iterdir()
    assert again.name == runs[1].name.replace("lottery", "prune")
    ours, theirs = (read_weights(run / "pruned.safetensors") for run in (again, runs[1]))
    assert all((ours[key] == value).all() for key, value in theirs.items())


def test_options_beside_a_yaml_file_have_the_last_word(runs, tmp_path, capsys):
    config = str(runs[1] / "recipe.yaml")
    words = ["prune", "lenet300", "--gsm.lr", "0.02", "--config", config, "--seed=3", "--out", str(tmp_path)]
    assert cli.run(words) == 0
    (run,) = tmp_path.iterdir()
    assert run.name.endswith("-x20-s3")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert (recipe["gsm"]["lr"], recipe["batch_size"]) == (0.02, 512)
    capsys.readouterr()
    assert "recipe.yaml is for the recipe lenet300, not lenet5" in fails(capsys, "prune", "lenet5", "--config", config)


def test_all_seeds_are_checked_before_the_first_is_trained(runs, tmp_path, capsys):
    other = tmp_path / runs[0].name.replace("-s0", "-s7")
    other.mkdir()
    (other / "recipe.yaml").write_bytes((runs[0] / "recipe.yaml").read_bytes())
    said = fails(capsys, "lottery", "lenet300", *SHORT, "--seeds", "6,7", "--out", tmp_path)
    assert "another recipe (seed 0 there, 7 here)" in said
    assert list(tmp_path.iterdir()) == [other]


def test_finished_run_is_shown_again_and_left_alone(runs, capsys):
    def state():
        return {path: path.read_bytes() for path in runs[0].rglob("*") if path.suffix in (".json", ".safetensors")}

    before = state()
    capsys.readouterr()
    assert cli.run(["lottery", "lenet300", *SHORT, "--out", str(runs[0].parent)]) == 0
    said = capsys.readouterr()
    assert said.err == f"{runs[0]}: finished already, nothing to do\n"
    assert "ticket by GSM" in said.out
    assert state() == before


def test_a_resumed_run_says_where_it_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(stage, epoch):
        def raising(self, record):
            if (record["stage"], record["epoch"]) == (stage, epoch):
                raise KeyboardInterrupt

        return raising

    words = ["prune", "lenet300", *SHORT, "--checkpoint-seconds", "0", "--out", str(tmp_path), "--name", "mine"]
    path = tmp_path / "mine-x20-s0"
    for stage, said in (("base", str(path)), ("gsm", f"{path}: resumes\nbase: goes on in epoch 1 of 2\n")):
        with monkeypatch.context() as patch:
            patch.setattr(observers.ProgressBars, "epoch", interrupted(stage, 1))
            with pytest.raises(KeyboardInterrupt):
                cli.run(words)
        assert capsys.readouterr().err.startswith(said)
    assert cli.run(words) == 0
    assert capsys.readouterr().err.startswith(f"{path}: resumes, base done already\ngsm: goes on in epoch 1 of 2\n")


def test_prune_and_lottery_are_not_mixed(runs, tmp_path, capsys):
    assert cli.run(["prune", "lenet300", *SHORT, "--out", str(tmp_path)]) == 0
    (pruned,) = tmp_path.iterdir()
    capsys.readouterr()
    assert cli.run(["show", str(pruned), str(runs[0]), str(runs[0])]) == 0
    assert capsys.readouterr().out.count("seed 0: 13,310") == 2  # two tables, of one run each
    said = fails(capsys, "show", pruned, runs[0], "--json", tmp_path / "x.json")
    assert "differ in more than the seed" in said


def test_show_runs(runs, capsys):
    assert cli.run(["show", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    words = (
        "seeds 0, 1",
        "±",
        "ticket by GSM",
        "ticket by magnitude",
        "13,310",
        "266,200",
        "fc1.weight",
        "made-up data",
    )
    assert all(word in out for word in words)


def test_the_same_run_counts_once(runs, tmp_path, capsys):
    """Its folder may be given by several names, or be copied, and finished or not."""
    (tmp_path / "link").symlink_to(runs[0])
    shutil.copytree(runs[0], tmp_path / "copy")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs[0], unfinished)
    (unfinished / "result.json").unlink()
    words = [*runs, runs[0], runs[0] / ".." / runs[0].name, tmp_path / "link", tmp_path / "copy"]
    words += [unfinished, unfinished / ".", runs[0] / "init.safetensors", runs[0] / "." / "init.safetensors"]
    assert cli.run(["show", *map(str, words)]) == 0
    said = capsys.readouterr()
    assert "seeds 0, 1: 13,310" in " ".join(said.out.split())
    assert said.out.count("not finished") == 1
    assert " ".join(said.out.split()).count("init.safetensors") == 1
    assert f"missing: {tmp_path / 'copy'} is left out: it is the same recipe and seed as" in said.err
    assert cli.run(["report", *map(str, words[:-2]), "-o", str(tmp_path / "report.html")]) == 0
    assert capsys.readouterr().err.count("is left out") == 1


def test_show_file(runs, capsys):
    assert cli.run(["show", str(runs[0] / "pruned.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "13,310" in out
    assert "20.00x" in out


def test_layers_that_keep_nothing_are_named(tmp_path, capsys):
    """Also where the cut is called lossless: the net before it may be as empty."""
    paths = [make_run(tmp_path / f"s{seed}", seed=seed)[0] for seed in (0, 1)]
    assert cli.run(["show", *map(str, paths)]) == 0
    assert "no weight" not in capsys.readouterr().out
    empty(paths[1], "fc2.weight", "fc3.weight")
    assert cli.run(["show", *map(str, paths)]) == 0
    assert (
        "Seed 1: fc2.weight and fc3.weight keep no weight: nothing passes through them. Unless another path leads "
        "around them, such as a residual connection, the output is the same for every input.\n"
    ) in capsys.readouterr().out
    empty(paths[0], "fc2.weight")
    assert cli.run(["show", str(paths[0])]) == 0
    assert "\nfc2.weight keeps no weight: nothing passes through it. Unless" in capsys.readouterr().out


def test_layers_of_a_file_that_keep_nothing_are_named(tmp_path, capsys):
    weights = {f"\x1b{index}.weight": torch.zeros(2, 2) for index in range(8)}
    save_file({**weights, "bias": torch.zeros(2)}, tmp_path / "net.safetensors")
    assert cli.run(["show", str(tmp_path / "net.safetensors")]) == 0
    named = ", ".join(f"\\x1b{index}.weight" for index in range(5))
    assert f"{named} and 3 more keep no weight: nothing passes through them." in capsys.readouterr().out
    save_sparse(tmp_path / "net.sparse.safetensors.xz", {"a": torch.zeros(2, 2), "b": torch.eye(2)})
    assert cli.run(["verify", str(tmp_path / "net.sparse.safetensors.xz")]) == 0
    assert "\na keeps no weight: nothing passes through it." in capsys.readouterr().out


def test_a_run_names_layers_that_keep_nothing(tmp_path, capsys):
    words = [*SHORT, "--compression", "26000", "--out", str(tmp_path)]  # ten weights
    assert cli.run(["prune", "lenet300", *words]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^fc\d.weight.* keeps? no weight: nothing passes through", out, re.MULTILINE)


def test_show_goes_on_after_what_cannot_be_read(runs, tmp_path, capsys):
    assert cli.run(["show", str(tmp_path / "nowhere"), str(runs[0])]) == 0
    said = capsys.readouterr()
    assert "missing: " in said.err
    assert "nowhere is not a run's folder" in said.err
    assert "ticket by GSM" in said.out
    assert cli.run(["show", str(tmp_path / "nowhere"), str(runs[0]), "--json", str(tmp_path / "x")]) == 2


def test_show_json(runs, tmp_path):
    target = tmp_path / "summary.json"
    assert cli.run(["show", *map(str, runs), "--json", str(target)]) == 0
    record = json.loads(target.read_text())
    assert record["seeds"] == [0, 1]
    values = [run["top1"]["pruned"] for run in record["runs"]]
    assert record["top1"]["pruned"]["mean"] == pytest.approx(sum(values) / 2, abs=1e-4)
    assert record["top1"]["pruned"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-4)
    assert record["processes"][0][0]["processor"]


@pytest.fixture
def unfinished(runs, tmp_path):
    folder = tmp_path / "unfinished"
    folder.mkdir()
    for name in ("recipe.yaml", "metrics.jsonl"):
        shutil.copy(runs[0] / name, folder)
    return folder


def test_show_unfinished(unfinished, tmp_path, capsys):
    assert cli.run(["show", str(unfinished)]) == 0
    out = capsys.readouterr().out
    assert "not finished" in out
    assert "2/2" in out
    assert "not finished" in fails(capsys, "show", unfinished, "--json", tmp_path / "x.json")
    assert not (unfinished / ".lock").exists()


def test_show_says_that_a_run_is_going_on(unfinished, capsys):
    with RunFolder(unfinished, Recipe.from_dict(yaml.safe_load((unfinished / "recipe.yaml").read_text()))):
        assert cli.run(["show", str(unfinished)]) == 0
        assert "still running" in capsys.readouterr().out
        assert fails(capsys, "export", unfinished) == f"{unfinished} is still running: wait for it"
    assert cli.run(["show", str(unfinished)]) == 0
    assert "not finished" in capsys.readouterr().out


def test_show_does_not_write_where_a_link_leads(unfinished, tmp_path):
    (tmp_path / "mine").write_text("precious")
    (unfinished / ".lock").symlink_to(tmp_path / "mine")
    assert cli.run(["show", str(unfinished)]) == 0
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lottery", "lenet30"], "unknown recipe 'lenet30': did you mean 'lenet300'?"),
        (["prune", "lenet300", "--compression", "0.5"], "must be a finite number of at least 1, not 0.5"),
        (["prune", "lenet300", "--compression", ".inf"], "must be a finite number of at least 1, not inf"),
        (["prune", "lenet300", "--compression", ".nan"], "must be a finite number of at least 1, not nan"),
        (["prune", "lenet300", "--compression", "266201"], "leaves none of 266200 weights"),
        (["prune", "lenet300", "--compression", "many"], "compression"),
        (["prune", "lenet300", "--preset", "slow"], "preset"),
        (["prune", "lenet300", "--gsm.momentum", "1"], "gsm.momentum must be"),
        (["prune", "lenet300", "--base.lr", "-1"], "base.lr must be"),
        (["prune", "lenet300", "--base.milestones", "[-5]"], "base.milestones must be"),
        (["prune", "lenet300", "--passive-decay", "-1"], "passive_decay must be"),
        (["prune", "lenet300", "--seeds=-1"], "seed must be at least 0"),
        (["prune", "lenet300", "--seeds", "0,99999999999999"], "seed must be"),
        (["prune", "lenet300", "--device", "meta"], "device 'meta' cannot be used here"),
        (["prune", "lenet300", "--base.epochs", "0"], "base.epochs must be at least 1"),
        (["prune", "lenet300", "--batch-size", "0"], "batch_size must be at least 1"),
        (["prune", "lenet300", "--epochs-scale", "0"], "epochs-scale must be"),
        (["prune", "lenet300", "--seeds", "0,x"], "seeds must be whole numbers"),
        (["prune", "lenet300", "--seeds", "1,1"], "a seed stands twice"),
        (["prune", "lenet300", "--seed", "-1"], "seed must be"),
        (["prune", "lenet300", "--device", "abacus"], "device 'abacus' cannot be used here"),
        (["prune", "lenet300", "--threads", "0"], "threads must be at least 1"),
        (["prune", "lenet300", "--model", "vgg"], "unknown model 'vgg': choose one of lenet300, lenet5, resnet20"),
        (["prune", "lenet300", "--model", "resnet65"], "unknown model 'resnet65': did you mean 'resnet56'?"),
        (["prune", "lenet300", "--model", "torchvision:vgg_16"], "no classifier 'vgg_16': did you mean 'vgg16'?"),
        (["prune", "lenet300", "--dataset", "cifar"], "unknown dataset 'cifar': did you mean 'cifar10'?"),
        (["prune", "lenet300", "--dataset", "svhn"], "unknown dataset 'svhn': choose one of mnist, cifar10"),
        (["prune", "resnet50", "--data-dir", "."], "ImageNet has to be there already"),
        (["prune", "resnet20", "--weights", "no.safetensors"], "weights no.safetensors do not exist: give a file"),
        (["prune", "lenet300", "--weights", "torchvision"], "weights are a base net to start from: add --start base"),
        (["lottery", "resnet50"], "trains its base net from the ticket's initialisation: leave out --weights"),
        (["prune", "resnet20", "--precision", "float16"], "precision"),
        (["prune", "lenet300", "--nonsense", "3"], "unrecognized arguments: --nonsense 3; gsm prune --help shows what"),
        (["prune", "lenet300", "--epochs", "2"], "--epochs 2; did you mean --base.epochs or --gsm.epochs?"),
        (["prune", "lenet300", "--epoch=2"], "--epoch=2; did you mean --base.epochs or --gsm.epochs?"),
        (["prune", "lenet300", "--lr", "1"], "--lr 1; did you mean --base.lr or --gsm.lr?"),
        (["prune", "lenet300", "--weight-decay", "1"], "did you mean --base.weight_decay or --gsm.weight_decay?"),
        (["prune", "lenet300", "--gsm.epoch", "2"], "--gsm.epoch 2; did you mean --gsm.epochs?"),
        (["lottery", "lenet300", "--batchsize", "2"], "--batchsize 2; did you mean --batch_size?"),
        (["prune", "lenet300", "--thread", "1"], "--thread 1; did you mean --threads?"),
        (["export", "run", "--form", "onnx"], "unrecognized arguments: --form onnx; did you mean --format?"),
        (["ticket", "save", "run", "--meth", "gsm"], "unrecognized arguments: --meth gsm; did you mean --method?"),
        (["show", "run", "--jso", "x"], "unrecognized arguments: --jso x; did you mean --json?"),
        (["--versio"], "unknown option '--versio': did you mean '--version'?"),
        (["prune"], "the following arguments are required: recipe; gsm prune --help shows what there is"),
        (["bench"], "the following arguments are required: subject, names"),
        (["prune", "lenet300", "--preset", "best"], "preset takes fast or paper or repo, not 'best'"),
        (["prune", "lenet300", "--preset", "papr"], "fast or paper or repo, not 'papr': did you mean 'paper'?"),
        (["prune", "lenet300", "--gsm.epochs", "few"], "gsm.epochs takes a whole number, not 'few'"),
        (["prune", "lenet300", "--passive-decay", "x"], "passive_decay takes a number or auto or null, not 'x'"),
        (["prune", "lenet300", "--config", "no.yaml"], "--config no.yaml cannot be read: No such file or directory"),
        (["show", "nowhere"], "nowhere is not a run's folder"),
        (["show"], "runs"),
        (["data", "imagenet"], "unknown data set 'imagenet': choose one of mnist, cifar10"),
        (["data", "minst"], "unknown data set 'minst': did you mean 'mnist'?"),
        (["bench", "steps"], "unknown benchmark 'steps': did you mean 'step'?"),
        (["bench", "step", "resnet"], "no parameter shapes are known for 'resnet': did you mean 'resnet56'?"),
        (["frobnicate"], "unknown command 'frobnicate': choose one of prune, lottery, compare, list"),
        (["prun", "lenet300"], "unknown command 'prun': did you mean 'prune'?"),
        (["ticket", "rply"], "unknown action 'rply': did you mean 'replay'?"),
    ],
)
def test_bad_usage(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = fails(capsys, *words)
    assert message in said
    assert said.count("did you mean") <= 1
    assert not list(tmp_path.iterdir())


def test_the_help_needs_no_torch():
    """So it is there at once: torch takes seconds to import."""
    code = "import sys; sys.modules['torch'] = None; from gsm_sgd.__main__ import main; sys.exit(main())"
    for words in ([], ["--help"], ["-h"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        for group in cli.COMMANDS.values():
            for name, text in group.items():
                assert f"  {name} " in done.stdout
                assert text in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 80
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == f"gsm-sgd {__version__}\n"


@pytest.mark.parametrize("command", [name for group in cli.COMMANDS.values() for name in group])
def test_help_is_for_people(command, capsys, monkeypatch):
    """No types of Python's, 80 columns, and two examples, which are commands that the parser takes."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        cli.run([command, "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for word in ("type:", "<class", "Literal", "NoneType", " None", "jsonargparse", "(required"):
        assert word not in out
    assert max(map(len, out.splitlines())) <= 80
    for example in cli.EXAMPLES[command]:
        assert f"  {example}\n" in out
        words = example.partition("|")[0].split()
        assert words[0] == "gsm"
        assert parse(words[1:]).command.split()[0] == command


@pytest.mark.parametrize(
    ("words", "ratios"),
    [
        (["--sparsity", "0.95"], [20]),
        (["--density", "0.05,0.1"], [20, 10]),
        (["--sparsity=0.9,0.99"], [10, 100]),
        (["--compression", "7.5"], [7.5]),
    ],
)
def test_a_budget_in_the_librarys_words(words, ratios):
    assert parse_ratios(parse(["prune", "lenet300", *words]).compression) == ratios


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sparsity", "1"], "--sparsity takes shares of the weights, like 0.9 or 0.9,0.95, not '1'"),
        (["--density", "half"], "--density takes shares of the weights"),
        (["--density", "0"], "--density takes shares of the weights"),
        (["--density", "1e400"], "--density takes shares of the weights"),
        (["--sparsity", "0.9", "--compression", "5"], "--compression and --sparsity are two budgets: leave out one"),
        (["--sparsity", "0.9", "--pattern", "channel", "--macs=.5"], "--sparsity and --macs are two budgets"),
    ],
)
def test_budgets_that_cannot_be(words, message, capsys, tmp_path):
    assert message in fails(capsys, "prune", "lenet300", *words, "--out", tmp_path)


def test_a_trial_run_goes_through_everything_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    words = ["--dataset", "synthetic", "--start", "base", "--fast-dev-run", "--baseline", "--tensorboard"]
    assert cli.run(["prune", "lenet300", *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "4 epochs of 4 batches went through all stages, of 2 run(s); none was kept" in said.out
    assert "base: epoch 4/4" in said.err
    assert not list(tmp_path.iterdir())
    assert "cannot be imported" in fails(capsys, "prune", "lenet5", *words, "--model", "nothing:here")
    assert not list(tmp_path.iterdir())


def test_what_to_do_next_is_told(tmp_path, capsys):
    assert cli.run(["prune", "lenet300", *SHORT, "--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    (run,) = tmp_path.iterdir()
    assert last == f"next: gsm report {run} (or gsm export, gsm bench inference)"
    assert parse(last.removeprefix("next: gsm ").partition(" (")[0].split()).runs == [run]


def test_other_recipe_in_the_folder(runs, capsys):
    name = runs[0].name.removesuffix("-x20-s0")
    words = ("--gsm.lr", "0.5", "--out", runs[0].parent, "--name", name)
    said = fails(capsys, "lottery", "lenet300", *SHORT, *words)
    assert "was made by another recipe (gsm.lr 0.1 there, 0.5 here): choose another --out" in said


def test_weights_that_do_not_fit_leave_no_folder_behind(runs, tmp_path, capsys):
    words = ("prune", "lenet5", *SHORT, "--weights", runs[0] / "init.safetensors", "--out", tmp_path / "out")
    assert "init.safetensors do not fit lenet5: give others" in fails(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_file_that_is_not_safetensors(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\xff" * 64)
    assert f"{path} is not a safetensors file" in fails(capsys, "show", path)


def test_names_are_no_markup(runs, tmp_path, capsys):
    save_file({"[/red]x": torch.ones(2, 2)}, tmp_path / "[b].safetensors")
    assert cli.run(["show", str(tmp_path / "[b].safetensors")]) == 0
    assert "[/red]x" in capsys.readouterr().out


CONTROLS = "\x1b]0;x\x07\x1b[31m\x9b2J\u202e"
ESCAPED = r"\x1b]0;x\x07\x1b[31m\x9b2J\u202e"


def test_names_are_no_commands_to_the_terminal(runs, tmp_path, capsys):
    """Of recipe, preset, stage, layer and file, in tables, lines and errors."""
    save_file({f"w{CONTROLS}": torch.ones(2, 2)}, tmp_path / f"a{CONTROLS}.safetensors")
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    paths = [shutil.copytree(runs[0], tmp_path / f"{number}{CONTROLS}") for number in range(3)]
    for path in paths:
        named = {**recipe, "recipe": f"r{CONTROLS}", "preset": f"p{CONTROLS}"}
        (path / "recipe.yaml").write_text(yaml.safe_dump(named))
    (paths[1] / "result.json").unlink()
    first = json.loads((paths[2] / "metrics.jsonl").read_text().splitlines()[0])
    (paths[2] / "metrics.jsonl").write_text(json.dumps({**first, "stage": f"s{CONTROLS}"}) + "\n")
    words = [str(path) for path in (*paths, tmp_path / f"a{CONTROLS}.safetensors", tmp_path / f"none{CONTROLS}")]
    assert cli.run(["show", *words]) == 0
    said = capsys.readouterr()
    assert cli.run(["report", *words[:3], "-o", str(tmp_path / f"page{CONTROLS}")]) == 0
    reported = capsys.readouterr()
    fails_at = fails(capsys, "verify", tmp_path / f"gone{CONTROLS}")
    shown = [said.out, said.err, reported.out, reported.err, fails_at]
    for text in shown:
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & {*text}
    for name in ("w", "r", "p", "1"):
        assert f"{name}{ESCAPED}" in said.out.replace("\n", "")
    assert f"none{ESCAPED} is not a run's folder" in said.err
    assert f"{paths[2]}/metrics.jsonl is damaged".replace(CONTROLS, ESCAPED) in said.err
    assert f"page{ESCAPED}" in reported.out
    assert f"gone{ESCAPED}" in fails_at


def test_a_recipe_of_others_as_config_runs_no_code(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "wicked.py").write_text("from pathlib import Path\nPath('called').touch()\n")
    recipe = yaml.safe_load((runs[0] / "recipe.yaml").read_text())
    path = tmp_path / "theirs.yaml"
    for change, message in (
        ({"model": "wicked:make"}, "if you trust that code, add --model wicked:make"),
        (
            {"base": {"class_path": "wicked.Training", "init_args": recipe["base"]}},
            "base has a setting that no stage has",
        ),
        ({"base.class_path": "wicked.Training"}, "it names another file, or a part of a setting"),
        ({"config": "other.yaml"}, "it names another file, or a part of a setting"),
    ):
        path.write_text(yaml.safe_dump({**recipe, **change}))
        for words in (["--config", path], [f"--config={path}"]):
            assert message in fails(capsys, "prune", "lenet300", *words, "--out", tmp_path / "out")
    path.write_text("a: &a [x]\nb: [*a, *a]\n")
    assert "it has an alias" in fails(capsys, "prune", "lenet300", "--config", path)
    assert not (tmp_path / "called").exists()
    path.write_text(yaml.safe_dump({**recipe, "model": "wicked:make"}))
    assert "cannot be imported" in fails(capsys, "prune", "lenet300", "--config", path, "--model", "wicked:make")
    assert (tmp_path / "called").exists()


def test_a_recipe_in_the_folder_of_a_run_is_compared_and_not_obeyed(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vicious.py").write_text("from pathlib import Path\nPath('called').touch()\n")
    folder = shutil.copytree(runs[0], tmp_path / "out" / runs[0].name)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "model": "vicious:make"}))
    said = fails(capsys, "lottery", "lenet300", *SHORT, "--out", tmp_path / "out")
    assert "was made by another recipe (model vicious:make there, lenet300 here)" in said
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("name", ["result.json", "environment.json", "recipe.yaml", "metrics.jsonl"])
def test_files_of_the_wrong_form_are_named(runs, tmp_path, capsys, name):
    shutil.copytree(runs[0], tmp_path / "run")
    for content in ("5\n", "{}\n", "[]\n", "{\n"):
        (tmp_path / "run" / name).write_text(content)
        assert f"{name} is damaged" in fails(capsys, "show", tmp_path / "run")


def test_no_data(no_network, capsys, tmp_path):
    assert cli.run(["prune", "lenet300", "--out", str(tmp_path / "runs")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gsm: error: MNIST is not on this machine")
    assert "Three ways" in last
    assert not (tmp_path / "runs").exists()


def test_divergence_is_a_failure(capsys, tmp_path):
    assert cli.run(["prune", "lenet300", *SHORT, "--base.lr", "1e30", "--out", str(tmp_path)]) == 1
    assert "gsm: error: the loss of stage base is nan in epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "name"), [(500_000, "init.safetensors"), (1_500_000, "gsm.checkpoint")])
def test_a_full_disk_is_told_with_path_and_cause_and_the_run_goes_on_later(size, name, tmp_path, capsys):
    """A limit on the size of files, which the disk reports in the same way."""
    words = ["prune", "lenet300", *SHORT, "--start", "init", "--checkpoint-seconds", "0"]
    words += ["--out", str(tmp_path), "--name", "mine"]
    run = tmp_path / "mine-x20-s0"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert cli.run(words) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"gsm: error: {run / name}: File too large; make room, then give the same command again"
    assert not list(run.glob("*partial*"))
    assert cli.run(words) == 0


def test_debug_shows_where():
    with pytest.raises(Exception, match="unknown recipe"):
        cli.run(["prune", "nope", "--debug"])


def test_help_shows_the_presets_own_settings(capsys):
    with pytest.raises(SystemExit):
        cli.run(["lottery", "lenet300", "--preset", "repo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--gsm.epochs EPOCHS" in text
    assert "default: 280" in text
    assert "passes over the training set" in text  # a field's docstring is its help


def test_a_cut_on_the_way_is_told(tmp_path, capsys):
    words = ["--dataset", "synthetic", "--gsm.epochs", "5", "--gsm.momentum", "0.02", "--compression", "60"]
    assert cli.run(["prune", "lenet300", *words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "pruned net" in said.out
    assert "base net" not in said.out
    assert "The cut after epoch 4 of GSM training " in said.out
    assert "if cut now" in said.err
    (run,) = tmp_path.iterdir()
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["cut_top1"] == record["top1"]


@pytest.mark.filterwarnings("always::gsm_sgd.CutWarning")
def test_a_warning_is_one_line(tmp_path, capsys):
    words = ["prune", "lenet300", "--dataset", "synthetic", "--gsm.epochs", "2", "--ramp", "0", "--out", str(tmp_path)]
    assert cli.run(words) == 0
    said = capsys.readouterr().err
    warned = [line for line in said.splitlines() if line.startswith("warning: the cut will remove weights")]
    assert warned
    assert all("fade" in line and "--gsm.momentum" in line for line in warned)
    assert ".py:" not in said


def test_the_precision_chosen_for_this_machine_stands_in_the_recipe(tmp_path, monkeypatch, capsys):
    short = [word for word in SHORT if word not in ("--gsm.milestones", "[]")]
    words = ["prune", "lenet300", *short, "--base.epochs", "1", "--precision", "auto", "--out", str(tmp_path)]
    words += ["--name", "mine"]
    path = tmp_path / "mine-x20-s0"
    for flags, precision in (({}, "float32"), ({"avx512_bf16": True}, "bfloat16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        assert cli.run(words) == 0
        assert yaml.safe_load((path / "recipe.yaml").read_text())["precision"] == precision
        weights = read_weights(path / "pruned.safetensors")
        assert all(weight.dtype == torch.float32 for weight in weights.values())
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: {"bf16": not flags}, raising=False)
        capsys.readouterr()
        said = fails(capsys, *words)
        assert f"(precision {precision} there" in said
        assert said.endswith(f": add --precision {precision}")
        shutil.rmtree(path)


def test_a_net_trained_elsewhere_is_pruned_without_a_base_training(runs, tmp_path, capsys):
    base = runs[0] / "base.safetensors"
    words = ["prune", "lenet300", *SHORT, "--weights", str(base), "--out", str(tmp_path)]
    assert cli.run(words) == 0
    (run,) = tmp_path.iterdir()
    result, theirs = (json.loads((path / "result.json").read_text()) for path in (run, runs[0]))
    assert result["epochs"] == {"gsm": 2}
    assert result["top1"] == {key: value for key, value in theirs["top1"].items() if "ticket" not in key}
    assert "base net" in capsys.readouterr().out
    assert (run / "density.png").exists()


def test_each_seed_is_pruned_from_its_own_base_net(runs, tmp_path, capsys):
    out, record = tmp_path / "out", tmp_path / "both.json"
    words = ["prune", "lenet300", *SHORT, "--seeds", "0,1", "--weights", str(tmp_path / "{seed}.safetensors")]
    for seed, theirs in enumerate(runs):
        said = fails(capsys, *words, "--out", out)
        assert f"weights {tmp_path / str(seed)}.safetensors do not exist" in said
        shutil.copy(theirs / "base.safetensors", tmp_path / f"{seed}.safetensors")
    assert cli.run([*words, "--out", str(out)]) == 0
    assert cli.run(["show", *map(str, sorted(out.iterdir())), "--json", str(record)]) == 0
    pruned = [run["top1"]["pruned"] for run in json.loads(record.read_text())["runs"]]
    assert pruned == [json.loads((theirs / "result.json").read_text())["top1"]["pruned"] for theirs in runs]


def test_weights_are_needed_once(runs, tmp_path):
    base = tmp_path / "base.safetensors"
    shutil.copy(runs[0] / "base.safetensors", base)
    words = ["prune", "lenet300", *SHORT, "--weights", str(base), "--out", str(tmp_path / "out")]
    assert cli.run(words) == 0
    base.unlink()
    assert cli.run(words) == 0


def test_a_net_for_other_images_leaves_no_folder_behind(tmp_path, capsys):
    """Made-up images fit every net for images; this one wants rows of twelve numbers."""
    (tmp_path / "rows.py").write_text("from torch import nn\ndef make(): return nn.Linear(12, 10)\n")
    model = f"{tmp_path / 'rows.py'}:make"
    words = ("prune", "lenet300", *SHORT, "--model", model, "--out", tmp_path / "out")
    said = f"{model} makes no logits of images of any of 1x28x28, 3x32x32, 3x224x224: choose another --model"
    assert fails(capsys, *words) == said
    assert not (tmp_path / "out").exists()


def test_a_net_of_other_make_is_trained_on_images_that_fit_it_and_called_by_its_name(tmp_path, capsys):
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(), nn.Linear(64, 7))\n"
    )
    model = f"{tmp_path / 'mynet.py'}:make"
    assert cli.run(["prune", "resnet20", *SHORT, "--model", model, "--out", str(tmp_path / "out")]) == 0
    (run,) = (tmp_path / "out").iterdir()
    assert re.fullmatch("mynet-make-prune-fast-[0-9a-f]{6}-x20-s0", run.name)
    result = json.loads((run / "result.json").read_text())
    assert (result["recipe"], [layer["shape"] for layer in result["layers"]]) == ("resnet20", [[4, 3, 8, 8], [7, 64]])
    assert "mynet-make at 20x, preset fast of resnet20, seed 0: 60" in " ".join(capsys.readouterr().out.split())


def test_a_long_epoch_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(observers, "_LONG_EPOCH_SECONDS", 0.0)
    assert cli.run(["prune", "lenet300", *SHORT, "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert any(re.fullmatch(r"base: epoch 2/2, step 3/4  [\d.]+ steps/s  \d+:\d\d:\d\d left", line) for line in lines)
    assert any(re.fullmatch(r"gsm: epoch 2/2  .* top-1 .*  if cut now .*  0:00:00 left", line) for line in lines)


@pytest.mark.parametrize(
    ("slow", "warning"), [(1.0, ""), (1.4, ""), (3.0, "warning: the times vary by ± 50%: measure")]
)
def test_bench_step_shows_how_much_its_figures_vary(slow, warning, monkeypatch, capsys):
    """GSM's second and fourth step of four take longer: half of the measurements lie between 1 and that many ms."""
    names, turns = [], []

    def timed(step, device):
        turns.append(step)
        turn, place = divmod(len(turns) - 1, 7)
        return 1e-3 * (slow if place == 2 and turn % 2 else 1.0)

    monkeypatch.setattr(bench, "_timed", timed)
    monkeypatch.setattr(bench, "_extra_mib", lambda *_: None)
    costs = bench.measure(bench.workload("lenet300"), 4, torch.device("cpu"), names.append)
    assert names[:2] == ["SGD, fused, its first step", "SGD, foreach, its first step"]
    assert names[-1] == "GSMAdamW"
    assert len(names) == len(turns) == bench.steps_in_all(4)
    share = (slow - 1) / 2 / ((slow + 1) / 2)
    spreads = {cost.name: (cost.milliseconds_spread, cost.ratio_spread) for cost in costs}
    assert spreads.pop("GSM") == pytest.approx((share, share))
    assert set(spreads.values()) == {(0.0, 0.0)}

    turns.clear()
    assert cli.run(["bench", "step", "lenet300", "--repeats", "4"]) == 0
    said = capsys.readouterr()
    assert f"{(slow + 1) / 2:.3g} ± {share:.0%}" in said.out
    assert said.err.startswith("lenet300: 42 measurements\n")
    assert said.err.removeprefix("lenet300: 42 measurements\n").startswith(warning)
    assert bool(warning) == ("warning" in said.err)


def test_one_measurement_has_no_spread():
    assert bench.spread([2.0]) == 0.0
    assert bench.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(1 / 3)


def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gsm", "--version"])
    monkeypatch.delitem(sys.modules, "gsm_sgd.__main__", raising=False)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("gsm_sgd", run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"gsm-sgd {__version__}\n"


@pytest.mark.parametrize(
    ("words", "hint", "when"),
    [
        (["prune", "lenet300"], ": give the same command again", "torch"),
        (["prune", "lenet300"], ": give the same command again", "run"),
        (["list"], "\n", "rich"),
        (["list"], "\n", "run"),
    ],
)
def test_however_often_it_is_interrupted_it_says_so_in_one_line(words, hint, when):
    """Ctrl-C in the first seconds too, while slow packages are imported, some of which swallow it; and at the end."""
    code = f"""if True:
        import atexit, os, signal, sys, types
        interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)

        class Packages:
            def find_spec(self, name, *_):
                try:
                    if name == {when!r}:
                        interrupt()
                except KeyboardInterrupt:
                    pass

        def run(argv):
            try:
                interrupt()
            finally:
                interrupt()

        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.meta_path.insert(0, Packages())
        sys.argv = ["gsm", *{words}]
        atexit.register(interrupt)
        from gsm_sgd.__main__ import main
        if {when!r} == "run":
            sys.modules["gsm_sgd.cli"] = types.SimpleNamespace(load=lambda argv: lambda: run(argv))
        sys.exit(main())
    """
    # `python -m` would have imported the package already
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.startswith(f"gsm: interrupted{hint}")
    assert done.stderr.count("\n") == 1
