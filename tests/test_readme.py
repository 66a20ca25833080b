"""The README's figures are those under results/."""

import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean

import pytest

from gsm_sgd.experiments.recipes import find_recipe
from gsm_sgd.export.inference import ONNX, SPARSE, THREADS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
LOTTERY = ("base", "gsm_before_cut", "gsm_after_cut", "pruned", "ticket_gsm", "ticket_magnitude")
DEEP = ("base", "gsm_before_cut", "gsm_after_cut", "pruned")
ONE_SHOT = ("base", "pruned", "one_shot", "retrained")
PRUNE = ("gsm_before_cut", "gsm_after_cut", "pruned")
RUNS = {
    "lenet300-x60-paper": LOTTERY,
    "lenet300-x60-repo": LOTTERY,
    "lenet300-x60-fast": LOTTERY,
    "lenet5-x125-paper-quarter": LOTTERY,
    "lenet5-x300-paper-quarter": LOTTERY,
    "lenet300-x60-fast-24-tickets": LOTTERY,
    "lenet300-x60-fast-24": PRUNE,
    "lenet300-x68-fast": PRUNE,
    "lenet5-x125-fast": PRUNE,
    "lenet5-x300-fast": PRUNE,
    "lenet5-x280-fast": PRUNE,
    "lenet5-x500-fast": PRUNE,
    "lenet5-x1000-fast": PRUNE,
    "lenet5-x125-fast-24": PRUNE,
    "lenet5-x300-fast-24": PRUNE,
    "lenet300-x100-fast": PRUNE,
    "lenet300-x200-fast": PRUNE,
    "resnet20-x6.6-fast-12": DEEP,
    "resnet20-x10-fast": DEEP,
    "resnet20-x20-fast-12": DEEP,
    "resnet56-x10-fast-12": DEEP,
}


def cells(figures, keys):
    """Return the row that the README shows of means and deviations."""
    shown = []
    for key in keys:
        figure = figures[key]
        shown.append(f"{figure['mean']:.2f}" + ("" if figure["std"] is None else f" ± {figure['std']:.2f}"))
    return " | ".join(shown)


def test_no_result_is_missing_or_unnamed():
    runs = {path.stem for path in RESULTS.glob("*-x*.json")}
    assert {name for name in runs if not name.startswith("ablation-")} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_results_stand_in_the_readme(name):
    record = json.loads((RESULTS / f"{name}.json").read_text())
    row = cells(record["top1"], RUNS[name])
    if RUNS[name] is DEEP:
        row += f" | {record['top1']['base']['mean'] - record['top1']['pruned']['mean']:.2f} |"
    assert row in (ROOT / "README.md").read_text()
    for processes in record["processes"]:
        for process in processes:
            assert process["commit"] is not None
            assert not process["commit"].endswith("-dirty"), "results come from committed code"
            assert {"command", "torch", "processor", "cores", "threads"} <= set(process)


def test_that_the_instruction_set_decides_stands_in_the_readme():
    """The same seeds give the same nets under the same instruction set on another machine, and others under another."""

    names = ("lenet300-x60-fast-24", "instructions-avx2", "instructions-avx512")
    first, same, other = (json.loads((RESULTS / f"{name}.json").read_text()) for name in names)
    assert same["seeds"] == other["seeds"] == first["seeds"][:3] == [0, 1, 2]
    for there, here, differs in zip(first["runs"][:3], same["runs"], other["runs"], strict=True):
        assert (here["top1"], here["layers"]) == (there["top1"], there["layers"])
        assert differs["layers"] != here["layers"]
    one, two = (cells(record["top1"], ["pruned"]) for record in (other, same))
    assert f"they end at {one} in place of {two}" in (ROOT / "README.md").read_text()
    for record, instructions in ((same, "AVX2"), (other, "AVX512")):
        assert {process["instructions"] for run in record["processes"] for process in run} == {instructions}


@pytest.mark.parametrize("name", ["epoch-lenet300", "epoch-lenet5"])
def test_speeds_stand_in_the_readme(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    for row in ("plain loop", "ours (channels_last, float32)"):
        assert f"{rows[row]['seconds']:.2f} s" in readme
    assert f"{rows['ours (channels_last, float32)']['ratio']:.1f}" in readme


@pytest.mark.parametrize("path", sorted(RESULTS.glob("train-*.json")), ids=lambda path: path.stem)
def test_the_speed_of_deep_nets_stands_in_the_readme(path):
    record = json.loads(path.read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    rows = record["rows"]
    names = ("plain loop", "ours, contiguous", "ours (channels_last, float32)", "ours, bfloat16")
    shown = [str(rows[name]["images_per_second"]) for name in names]
    automatic = "ours, bfloat16" if record["auto"] == "bfloat16" else "ours (channels_last, float32)"
    shown.append(f"{rows[automatic]['ratio']:.2f}")
    assert f"({path.relative_to(ROOT)}) | {' | '.join(shown)} |" in (ROOT / "README.md").read_text()


def test_what_the_fade_costs_stands_in_the_theory():
    rows = json.loads((RESULTS / "fade.json").read_text())["rows"]
    theory = (ROOT / "docs" / "theory.md").read_text()
    for name, row in rows.items():
        shown = " | ".join(f"{cell['mean']:.2f}" for cell in row.values())
        assert f"| {name.removeprefix('lenet300 ')} | {shown} |" in theory


@pytest.mark.parametrize("name", ["ablation-lenet300-x60", "ablation-no-fade"])
def test_the_ablation_stands_in_the_theory(name):
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    theory = (ROOT / "docs" / "theory.md").read_text()
    for variant, row in record["variants"].items():
        shown = " | ".join(f"{cell['mean']:.2f} ± {cell['std']:.2f}" for cell in row.values())
        assert f"| {variant.replace('|w|', 'magnitude')} | {shown} |" in theory


def test_the_frontier_stands_in_the_readme():
    record = json.loads((RESULTS / "frontier-lenet300.json").read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    for cells_of in record["methods"].values():
        shown = " | ".join(f"{cell['mean']:.2f} ± {cell['std']:.2f}" for cell in cells_of.values())
        assert f"| {shown} |" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(RESULTS.glob("one-shot-*.json")), ids=lambda path: path.stem)
def test_one_shot_pruning_stands_in_the_readme(path):
    """A row for each net and ratio, whose base and pruned nets are those of the runs' own results."""
    record = json.loads(path.read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    runs = [json.loads((RESULTS / f"{name}.json").read_text()) for name in RUNS]
    for key, row in record["rows"].items():
        model, compression = key.split(",")[0].split()
        name = f"[{model.replace('resnet', 'ResNet-')}]({path.relative_to(ROOT)}), {compression}"
        assert f"| {name} | {cells(row, ONE_SHOT)} |" in (ROOT / "README.md").read_text()
        assert {name: row[name]["mean"] for name in DEEP} in [
            {name: run["top1"][name]["mean"] for name in DEEP}
            for run in runs
            if run["recipe"]["model"] == model and f"{run['recipe']['compression']:g}x" == compression
        ]


@pytest.mark.parametrize("name", [name for name in RUNS if "fast" in name])
def test_results_of_fast_are_those_of_the_preset_as_it_is(name):
    """GSM training may have another length, or the whole recipe may be scaled; all else is the preset's."""
    recipe = json.loads((RESULTS / f"{name}.json").read_text())["recipe"]
    epochs = recipe["gsm"]["epochs"]
    preset = find_recipe(recipe["recipe"])
    lengths = [replace(preset, gsm=replace(preset.gsm, epochs=epochs)), preset.scaled(epochs / preset.gsm.epochs)]
    differ = [{key for key, value in length.as_dict().items() if recipe.get(key, value) != value} for length in lengths]
    assert any(keys <= {"compression", "seed", "precision", "weights"} for keys in differ)  # as the machine allows


def test_seconds_to_a_pruned_net_stand_in_the_readme():
    record = json.loads((RESULTS / "seconds.json").read_text())
    figure = record["top1"]["pruned"]
    shown = f"{figure['mean']:.2f} ± {figure['std']:.2f} in {fmean(record['seconds']):.0f} s"
    assert shown in (ROOT / "README.md").read_text()


def test_commands_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for command in (
        "gsm list",
        "gsm lottery lenet300",
        "gsm prune lenet5",
        "gsm show",
        "gsm report",
        "make demo",
        "make test",
    ):
        assert command in readme


def test_step_costs_stand_in_the_readme():
    """A row for each model: milliseconds of SGD, then the ratios of the others to it, and the fused step's memory."""
    record = json.loads((RESULTS / "step.json").read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    readme = (ROOT / "README.md").read_text()
    for model in record["models"].values():
        costs = {cost["name"]: cost for cost in model["costs"]}
        shown = [f"{costs['SGD, fused']['milliseconds']:.3g} ms"]
        shown += [f"{costs[name]['ratio']:.1f}" for name in ("GSM", "GSM, fused", "published approach")]
        assert " | ".join(shown) in readme


def test_the_profile_of_a_step_stands_in_the_readme():
    profiles = json.loads((RESULTS / "step-profile.json").read_text())["profiles"]
    readme = (ROOT / "README.md").read_text()
    for profile in profiles.values():
        assert f"{profile['pass: update']:.2f}" in readme
        assert f"{profile['find the threshold, its passes included']:.2f}" in readme


def test_sizes_and_inference_stand_in_the_readme():
    record = json.loads((RESULTS / "ship.json").read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    readme = (ROOT / "README.md").read_text()
    for row in record["rows"]:
        assert row["float32"]["top1"] == row["top1"]
        images = 1 if row["run"].startswith("resnet56") else 0  # of 10,000, the README says so
        assert row["top1"] - row["float16"]["top1"] == pytest.approx(images / 100)
        shown = [f"{row['top1']:.2f}", f"{row['dense_bytes']:,}", f"{row['xz_bytes']:,}"]
        for values in ("float32", "float16"):
            size = row[values]["bytes"]
            shown += [f"{size:,}", f"1/{row['dense_bytes'] / size:.0f}"]
        assert f"| {' | '.join(shown)} |" in readme
        for threads in THREADS:
            ratios = [
                f"{latency['ratio']:.2f}"
                for engine in (SPARSE, ONNX)
                for latency in row["inference"]
                if (latency["engine"], latency["threads"]) == (engine, threads)
            ]
            assert f", {threads} thread{'s' if threads > 1 else ''} | {' | '.join(ratios)} |" in readme


def test_what_several_processes_send_stands_in_the_readme():
    record = json.loads((RESULTS / "sharded.json").read_text())
    assert not record["environment"]["commit"].endswith("-dirty")
    readme = (ROOT / "README.md").read_text()
    for weights, rows in groupby(record["rows"], lambda row: row["weights"]):
        shown = [f"{row['bytes'] / 1000:.1f} KB" + (f", {row['ratio']:.1f}" if "ratio" in row else "") for row in rows]
        assert f"| {weights:,} | {' | '.join(shown)} |" in readme
    assert {row["calls"] for row in record["rows"]} == {3, 5}, "the README says so"


def test_the_language_model_stands_in_the_readme():
    record = json.loads((RESULTS / "language-model.json").read_text())
    dense, sparse = (row["bits_per_byte"] for row in record["rows"])
    assert f"in {dense} bits per byte, or in {sparse} with" in (ROOT / "README.md").read_text()
