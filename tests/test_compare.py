"""gsm compare: what it runs, that it goes on after a kill, how it tunes, and what it says of the result."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gsm_sgd import cli
from gsm_sgd.experiments import UsageError, compare, data, observers
from gsm_sgd.experiments.compare import best, parse_grid, parse_methods, seconds_of_runs, share_left, with_settings
from gsm_sgd.experiments.reading import read_yaml
from gsm_sgd.experiments.recipes import Recipe, by_method, find_recipe
from gsm_sgd.reports.frontier import frontier_csv, frontier_figure, frontier_table, series_of, verdicts
from gsm_sgd.reports.runs import by_recipe, read_run
from made_runs import make_run
from test_cli import fails

pytestmark = pytest.mark.slow

SHORT = [
    "--dataset", "synthetic", "--gsm.epochs", "2", "--fade", "0", "--cut", "1", "--ramp", "0.2", "--batch-size", "512",
]  # fmt: skip
CPU = torch.device("cpu")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


def outputs(out):
    """Return the one folder of what came out."""
    (folder,) = [path for path in out.iterdir() if "-compare-" in path.name]
    return folder


# --- the command ---


def test_what_is_missing_is_run_and_all_of_it_is_written(tmp_path, capsys, monkeypatch):
    """Interrupted in the fourth of five runs, given again, and once more when all is there."""
    words = ["compare", "lenet300", *SHORT, "--methods", "gsm,rigl,dense", "--compression", "20,60"]
    words += ["--rigl.every", "2", "--seeds", "0", "--checkpoint-seconds", "0"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli.run([*words, "--out", str(whole)]) == 0
    said = capsys.readouterr()
    assert re.search(r"5 runs, 0 of them over; the others take about 0:00:\d\d \(a run of gsm \d+ s, rigl", said.out)
    table = " ".join(said.out.split())
    for text in ("GSM", "RigL", "dense net", "20x", "60x", "top-1 % on the test set, mean ± deviation over seeds 0"):
        assert text in table
    assert "At 20x one seed tells no lead" in table
    assert "5/5 lenet300-prune-dense-fast-" in said.out

    with monkeypatch.context() as patch:
        epochs = []

        def interrupted(self, record):
            epochs.append(record)
            if len(epochs) == 7:
                raise KeyboardInterrupt

        patch.setattr(observers.ProgressBars, "epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cli.run([*words, "--out", str(out)])
    assert len(list(out.glob("*/result.json"))) == 3
    capsys.readouterr()
    assert cli.run([*words, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "5 runs, 3 of them over" in said.out
    assert "rigl: goes on in epoch 1 of 2" in said.err
    ours, theirs = ({path.relative_to(top): content for path, content in files(top).items()} for top in (out, whole))
    assert ours == theirs

    folder = outputs(out)
    assert folder.name == outputs(whole).name
    names = {path.name for path in folder.iterdir()}
    assert names == {"frontier.png", "frontier.svg", "frontier.csv", "compare.json", "report.html"}
    rows = list(csv.DictReader((folder / "frontier.csv").read_text().splitlines()))
    assert [(row["method"], row["compression"], row["seed"]) for row in rows] == [
        *(("gsm", "20", "0"), ("gsm", "60", "0"), ("rigl", "20", "0"), ("rigl", "60", "0"), ("dense", "1", "0")),
    ]
    for row in rows:
        result = json.loads((out / row["folder"] / "result.json").read_text())
        assert float(row["top1"]) == result["top1"]["pruned"]
        assert int(row["bytes"]) == (out / row["folder"] / "pruned.sparse.safetensors.xz").stat().st_size
        assert result["top1"].get("dense") == (None if row["method"] == "dense" else float(rows[-1]["top1"]))
    record = json.loads((folder / "compare.json").read_text())
    assert record["methods"]["RigL"]["60"]["values"] == [float(rows[3]["top1"])]
    assert record["methods"]["dense net"]["20"] == record["methods"]["dense net"]["60"]
    assert record["recipes"]["rigl"]["rigl"]["every"] == 2
    assert "tuning" not in record

    before = files(out)
    assert cli.run([*words, "--out", str(out)]) == 0
    assert "5 runs, 5 of them over\n" in capsys.readouterr().out
    assert files(out) == before


def test_settings_are_tuned_on_held_out_images_with_as_many_trials_each(tmp_path, capsys):
    words = ["compare", "lenet300", *SHORT, "--methods", "snip,one_shot", "--compression", "20", "--seeds", "1-2"]
    words += ["--holdout", "500", "--tune", "gsm.lr=0.05,1e-1", "one_shot.cut=0.25,0.5", "snip:gsm.momentum=0.8,.9"]
    assert cli.run([*words, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    record = json.loads((outputs(tmp_path) / "compare.json").read_text())
    assert (record["holdout"], record["tuning"]["holdout"], record["tuning"]["seed"]) == (0, 500, 0)
    for method, axis in (("snip", "gsm.momentum"), ("one_shot", "one_shot.cut")):
        found = record["tuning"]["methods"][method]["20"]
        assert [list(trial["settings"]) for trial in found["trials"]] == [["gsm.lr", axis]] * 4
        assert len({tuple(trial["settings"].values()) for trial in found["trials"]}) == 4
        top1 = [trial["top1"] for trial in found["trials"]]
        assert found["chosen"] == found["trials"][top1.index(max(top1))]["settings"]
        assert f"{found['chosen']['gsm.lr']}, {axis} {found['chosen'][axis]}" in said
        finals = [path.parent for path in tmp_path.glob(f"*{method}*/recipe.yaml")]
        assert len(finals) == 2
        for path in finals:
            recipe = Recipe.from_dict(read_yaml(path / "recipe.yaml"))
            assert (recipe.holdout, recipe.method) == (0, method)
            assert recipe.gsm.lr == float(found["chosen"]["gsm.lr"])
        trials = [path.parent for path in (tmp_path / "tuning").glob(f"*{method}*/recipe.yaml")]
        assert {Recipe.from_dict(read_yaml(path / "recipe.yaml")).holdout for path in trials} == {500}
        values = sorted(json.loads((path / "result.json").read_text())["top1"]["pruned"] for path in trials)
        assert values == sorted(top1)
    assert "SNIP: 4 trials; 20x gsm.lr" in said


def test_several_at_a_time_come_to_the_same(tmp_path, capsys):
    words = ["compare", "lenet300", *SHORT, "--methods", "random,snip", "--compression", "20"]
    for jobs in ("1", "2"):
        assert cli.run([*words, "--jobs", jobs, "--threads", "1", "--out", str(tmp_path / jobs)]) == 0
    one, two = ({path.relative_to(tmp_path / jobs): c for path, c in files(tmp_path / jobs).items()} for jobs in "12")
    assert one == two
    assert len(one) == 2 * 4
    assert re.findall(r"(\d)/2 ", capsys.readouterr().out) == ["1", "2"] * 2


def test_a_run_that_diverges_is_told_and_the_others_go_on(tmp_path, capsys):
    words = ["compare", "lenet300", *SHORT, "--methods", "snip,random", "--compression", "20", "--gsm.lr", "1e30"]
    assert cli.run([*words, "--out", str(tmp_path)]) == 2
    assert "every run has failed" in capsys.readouterr().err
    trials = ["--holdout", "500", "--tune", "gsm.lr=1e30,0.05"]
    assert cli.run([*words, *trials, "--out", str(tmp_path / "tuned")]) == 1  # each has a trial that is not chosen
    said = capsys.readouterr()
    assert said.err.count("failed: ") == 2
    assert "the loss of stage snip is nan in epoch 1" in said.err
    assert "SNIP: 2 trials; 20x gsm.lr 0.05" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "gsm,rgl"], "unknown method 'rgl': did you mean 'rigl'?"),
        (["--methods", "gsm,gsm"], "a method stands twice in 'gsm,gsm'"),
        (["--methods", "dense"], "methods must name something that prunes, not dense alone"),
        (["--methods", "gsm,rigl", "--compression", "100000"], "erk densities leave 'fc3.weight' none of 2 weights"),
        (["--method", "rigl"], "a comparison starts from a recipe of GSM"),
        (["--methods", "gsm", "--rigl.every", "2"], "--rigl.every is a setting of --method rigl"),
        (["--jobs", "0"], "jobs must be at least 1, not 0"),
        (["--seeds", "a-b"], "seeds must be whole numbers"),
        (["--compression", "a"], "compression must be a number, or several"),
        (["--tune", "gsm.lr=0.1,0.2"], "--tune chooses settings on held-out training images: add --holdout 5000, say"),
        (["--holdout", "9", "--tune", "gsm.lr"], "--tune takes settings like gsm.lr=0.05,0.1"),
        (["--holdout", "9", "--tune", "gsm.lt=0.1,1"], "gsm has no setting 'gsm.lt': did you mean 'gsm.lr'?"),
        (["--holdout", "9", "--tune", "gsm.lr=0.1,x"], "gsm.lr=x is of a wrong type"),
        (["--holdout", "9", "--tune", "gsm.lr=0.1,-1"], "gsm.lr must be finite and at least 0, not -1"),
        (["--holdout", "9", "--tune", "seed=0,1"], "--tune seed=0,1: seed is not for tuning"),
        (["--holdout", "9", "--tune", "snip:gsm.lr=0.1,1"], "'snip' is not compared"),
        (
            ["--holdout", "9", "--tune", "ramp=0.1,0.2", "rigl.fraction=0.1,0.2,0.3"],
            "every method needs as many trials, not gsm 2, gradual 1, rigl 3, one_shot 1, dense 1",
        ),
    ],
)
def test_bad_usage(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "compare", "lenet300", *words)
    assert not list(tmp_path.iterdir())


def test_a_base_net_is_trained_once_for_all_methods(tmp_path, capsys, monkeypatch):
    """A run that has its base net from another one ends in the bits, and with the metrics, of one that trained it."""
    trained = []
    epoch = observers.ProgressBars.epoch
    monkeypatch.setattr(
        observers.ProgressBars, "epoch", lambda self, record: (trained.append(record["stage"]), epoch(self, record))
    )
    words = [*SHORT, "--start", "base", "--base.epochs", "2", "--base.milestones", "[]", "--compression", "20"]
    assert cli.run(["compare", "lenet300", *words, "--methods", "snip,random", "--out", str(tmp_path / "both")]) == 0
    assert trained == ["base"] * 2 + ["snip"] * 2 + ["random"] * 2
    other = ["--base.lr", "0.01"]  # another base net
    assert cli.run(["compare", "lenet300", *words, *other, "--methods", "snip", "--out", str(tmp_path / "both")]) == 0
    assert trained[6:] == ["base"] * 2 + ["snip"] * 2
    assert cli.run(["compare", "lenet300", *words, "--methods", "random", "--out", str(tmp_path / "alone")]) == 0
    (ours,), (theirs,) = ((tmp_path / name).glob("*random*") for name in ("both", "alone"))
    assert ours.name == theirs.name
    for name in ("base", "random", "pruned", "masks"):
        assert (ours / f"{name}.safetensors").read_bytes() == (theirs / f"{name}.safetensors").read_bytes(), name
    results = [json.loads((path / "result.json").read_text()) for path in (ours, theirs)]
    assert results[0]["epochs"] == results[1]["epochs"] == {"base": 2, "random": 2}
    assert results[0]["top1"] == results[1]["top1"]


# --- how it plans ---


def test_a_grid_is_spanned_for_each_method():
    words = ["gsm.lr=1,2", "ramp=0.1,0.2,0.3", "rigl.every=5,6,7", "dense:gsm.momentum=0.7,0.8,0.9"]
    grid = parse_grid(words, ["gsm", "rigl", "dense"])
    assert [len(trials) for trials in grid.values()] == [6, 6, 6]
    assert grid["gsm"][1] == {"gsm.lr": "1", "ramp": "0.2"}
    assert grid["rigl"][-1] == {"gsm.lr": "2", "rigl.every": "7"}
    assert grid["dense"][0] == {"gsm.lr": "1", "gsm.momentum": "0.7"}
    assert parse_grid([], ["gsm", "rigl"]) == {"gsm": [{}], "rigl": [{}]}


def test_settings_have_the_types_of_the_recipe():
    recipe = by_method(find_recipe("lenet300"), "rigl")
    changed = with_settings(recipe, {"gsm.lr": "5e-2", "batch_size": "64", "rigl.every": "7", "rigl.layers": "uniform"})
    expected = replace(recipe, gsm=replace(recipe.gsm, lr=0.05), batch_size=64)
    assert changed == replace(expected, settings={**recipe.settings, "every": 7, "layers": "uniform"})
    assert with_settings(recipe, {}) == recipe
    with pytest.raises(UsageError, match=r"rigl has no setting 'gradual\.every'"):
        with_settings(recipe, {"gradual.every": "7"})
    with pytest.raises(UsageError, match=r"rigl\.every=x is of a wrong type"):
        with_settings(recipe, {"rigl.every": "x"})


def test_the_first_of_the_most_accurate_trials_is_chosen():
    trials = [({"a": "1"}, 90.0), ({"a": "2"}, None), ({"a": "3"}, 91.0), ({"a": "4"}, 91.0)]
    assert best(trials) == {"a": "3"}
    assert best([({"a": "1"}, None), ({"a": "2"}, 0.0)]) == {"a": "2"}


def test_methods_are_a_list():
    assert parse_methods("gsm, rigl") == ["gsm", "rigl"]


def test_time_is_estimated_from_what_is_left(tmp_path, monkeypatch):
    recipe = replace(find_recipe("lenet300"), dataset="synthetic", batch_size=100)
    cells = [compare.Cell(recipe, tmp_path / "none"), compare.Cell(recipe, make_run(tmp_path / "over")[0])]
    begun = compare.Cell(replace(recipe, gsm=replace(recipe.gsm, epochs=8)), make_run(tmp_path / "begun", epochs=2)[0])
    (begun.path / "result.json").unlink()
    lines = (begun.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun.path / "metrics.jsonl").write_text("".join(line for line in lines if '"gsm"' in line))
    assert [share_left(cell) for cell in (*cells, begun)] == [1.0, 0.0, 0.75]
    ticks = iter(range(1_000))
    monkeypatch.setattr(compare.time, "perf_counter", lambda: float(next(ticks)))
    found = seconds_of_runs([begun], data.synthetic(500, 100), CPU)
    # the clock moves by a second whenever it is read: 0 steps warm up of 5, and 4 are measured in one second
    assert found == {"gsm": 8 * (5 * 1 + 1)}


# --- what it says ---


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """GSM, RigL and the dense net at two ratios, three seeds."""
    folder = tmp_path_factory.mktemp("series")
    top1 = {
        ("gsm", 20.0): (98.0, 98.1, 98.2),
        ("gsm", 60.0): (97.0, 97.5, 98.0),
        ("rigl", 20.0): (97.0, 97.1, 97.2),
        ("rigl", 60.0): (97.2, 97.7, 98.2),
        ("dense", 1.0): (98.5, 98.6, 98.7),
    }
    runs = []
    for (method, ratio), values in top1.items():
        for seed, value in enumerate(values):
            path = folder / f"{method}-{ratio:g}-{seed}"
            figures = {"pruned": value + 0.03 * seed, "gsm_after_cut": value + 0.03 * seed}
            fields = {"method": method, "compression": ratio, "command": "prune", "top1": figures}
            make_run(path, seed=seed, **fields)
            runs.append(read_run(path))
    (folder / "gsm-20-0" / "pruned.sparse.safetensors.xz").write_bytes(bytes(2048))
    return series_of(by_recipe(runs))


def test_a_table_has_mean_and_deviation_by_method_and_ratio(series):
    table = frontier_table(series, "title", "caption")
    cells = [list(column.cells) for column in table.columns]
    assert [column.header for column in table.columns] == ["method", "20x", "60x"]
    assert cells[0] == ["GSM", "RigL", "dense net"]
    assert cells[1] == ["98.10 ± 0.10", "97.10 ± 0.10", "98.60 ± 0.10"]
    assert cells[2] == ["97.50 ± 0.50", "97.70 ± 0.50", "98.60 ± 0.10"]


def test_a_lead_is_told_from_chance(series):
    first, second = verdicts(series)
    assert first == ("At 20x GSM leads by 1.00, more than one deviation: GSM 98.10 ± 0.10 against RigL 97.10 ± 0.10.")
    assert second == ("At 60x nobody leads by more than one deviation: RigL 97.70 ± 0.50 against GSM 97.50 ± 0.50.")


def test_a_line_for_each_run_is_in_the_csv(series):
    rows = list(csv.DictReader(frontier_csv(series).splitlines()))
    assert len(rows) == 15
    assert rows[0]["bytes"] == "2048"
    assert rows[1]["bytes"] == ""
    assert {(row["method"], row["compression"], row["prunable"]) for row in rows} == {
        *(("gsm", "20", "266200"), ("gsm", "60", "266200"), ("rigl", "20", "266200"), ("rigl", "60", "266200")),
        ("dense", "1", "266200"),
    }


def test_the_figure_has_a_line_for_each_method(series):
    axes = frontier_figure(series).axes[0]
    drawn = {line.get_label(): line for line in axes.get_lines()}
    bars = {container.get_label(): container[0] for container in axes.containers}
    assert list(bars["GSM"].get_xdata()) == [20.0, 60.0]
    assert list(bars["RigL"].get_ydata()) == pytest.approx([2.9, 2.3])
    assert drawn["dense net"].get_ydata()[0] == pytest.approx(1.4)
    by_size = frontier_figure(series, "KiB of the sparse file").axes[0]
    assert [container.get_label() for container in by_size.containers] == ["GSM"]
    assert list(by_size.containers[0][0].get_xdata()) == [2.0]


def test_runs_with_other_settings_are_another_line_unless_tuned(tmp_path):
    fields = {"command": "prune", "compression": 20.0}
    paths = [make_run(tmp_path / "a", **fields)[0], make_run(tmp_path / "b", batch_size=64, **fields)[0]]
    groups = by_recipe([read_run(Path(path)) for path in paths])
    assert [one.label for one in series_of(groups)] == ["GSM, batch_size 128", "GSM, batch_size 64"]
    other = read_run(make_run(tmp_path / "c", batch_size=64, **{**fields, "compression": 60.0})[0])
    (one,) = series_of([groups[0], [other]])
    assert (one.label, list(one.runs)) == ("GSM", [20.0, 60.0])
