"""The report's content: what it says of finished, unfinished, damaged and mixed runs."""

import base64
import hashlib
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
import yaml

from gsm_sgd import cli
from gsm_sgd.reports import accuracy, figures, nets, structure
from gsm_sgd.reports import sweep as overview
from gsm_sgd.reports.answer import answer
from gsm_sgd.reports.blocks import Group
from gsm_sgd.reports.runs import read_run
from made_runs import empty, make_run

pytestmark = pytest.mark.slow

HOSTILE = '</svg><script>alert(1)</script>$x_1$<img src=x onerror=alert(2)>"#0072b2 url(#x)'


class Page(HTMLParser):
    """The tables of a page by caption, its text, that of its figures, and what it would fetch."""

    def __init__(self, path):
        super().__init__()
        self.tables, self.links, self.ids, self.tags, self.text, self.drawn = {}, [], [], [], "", ""
        self._open, self._rows = [], []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        links = ("src", "href", "xlink:href", "action", "data", "srcset")
        self.links += [value for name, value in attributes if name in links]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        if tag == "table":
            self.tables.setdefault(self._caption, []).append(self._rows)

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside == "caption":
            self._caption = data
        if inside == "text":
            self.drawn += data
        elif inside in ("td", "th"):
            self._rows[-1][-1] += data
        self.text += data if inside != "style" else ""


def report(capsys, tmp_path, *runs, status=0):
    """Write a report and return its page, and the lines that say what is missing."""
    output = tmp_path / "page" / "report.html"
    assert cli.run(["report", *map(str, runs), "-o", str(output)]) == status
    said = capsys.readouterr()
    if status:
        assert not output.exists()
        return None, said.err.splitlines()
    assert said.out == f"{output}\n"
    return Page(output), said.err.splitlines()


@pytest.fixture(scope="module")
def lotteries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lotteries")
    return [make_run(folder / f"s{seed}", seed=seed) for seed in (0, 1, 2)]


def test_accuracies_are_those_of_the_results(lotteries, tmp_path, capsys):
    page, missing = report(capsys, tmp_path, *(path for path, _ in lotteries))
    assert missing == []
    (table,) = page.tables["Top-1 in %, mean ± standard deviation over the seeds; last ten: mean of ten epochs"]
    assert table[0] == ["net", "mean ± sd", "seed 0", "seed 1", "seed 2", "last ten", "the paper", "difference"]
    rows = {row[0]: row[1:] for row in table[1:]}
    titles = {"base net": "base", "pruned net": "pruned", "ticket by magnitude, retrained": "ticket_magnitude"}
    for title, key in titles.items():
        values, paper = [result["top1"][key] for _, result in lotteries], lotteries[0][1]["paper"][key]
        own = [f"{fmean(values):.2f} ± {stdev(values):.2f}", *(f"{value:.2f}" for value in values)]
        assert rows[title][:4] == own
        assert rows[title][5:] == [f"{paper:.2f}", f"{fmean(values) - paper:+.2f}"]
        assert f"{100 - fmean(values):.2f}" in page.drawn
    assert "4,436 of 266,200 weights are kept" in page.text


def test_layers_are_those_of_the_results(lotteries, tmp_path, capsys):
    path, result = lotteries[0]
    page, _ = report(capsys, tmp_path, path)
    (table,) = page.tables["What each layer keeps"]
    assert table[0] == ["layer", "shape", "weights", "kept by GSM", "%", "kept by magnitude", "%"]
    for row, layer in zip(table[1:], result["layers"], strict=False):
        share = f"{100 * layer['nonzeros'] / layer['params']:.2f}"
        shape = "×".join(map(str, layer["shape"]))
        assert row[:5] == [layer["name"], shape, f"{layer['params']:,}", f"{layer['nonzeros']:,}", share]
        assert f"{share} %" in page.drawn
    assert table[-1] == ["all", "", "266,200", "4,436", "1.67", "4,436", "1.67"]


def test_layers_that_keep_nothing_are_named(tmp_path, capsys):
    runs = [make_run(tmp_path / f"s{seed}", seed=seed)[0] for seed in (0, 1)]
    assert "no weight" not in report(capsys, tmp_path, *runs)[0].text
    empty(runs[1], "fc2.weight")
    page, _ = report(capsys, tmp_path, *runs)
    said = (
        "Seed 1: fc2.weight keeps no weight: nothing passes through it. Unless another path leads around it, such as a "
    )
    said += "residual connection, the output is the same for every input."
    assert page.text.count(said) == 2  # beside what the cut cost, and what each layer keeps


def test_curves_are_those_of_the_metrics(lotteries, tmp_path, capsys):
    path, _ = lotteries[0]
    page, _ = report(capsys, tmp_path, path)
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    (table,) = page.tables["GSM, by epoch"]
    expected = [
        [str(r["epoch"]), f"{r['loss']:.4f}", f"{r['top1']:.2f}", f"{r['cut_top1']:.2f}", f"{r['gap']:.3g}"]
        for r in records
        if r["stage"] == "gsm"
    ]
    assert [row[:5] for row in table[1:]] == expected
    panels = accuracy.training_panels(Group("", [read_run(path)]))
    loss, error = ({line.get_label(): line for line in axes.lines} for axes in figures.curves(panels).axes)
    assert list(loss["base net"].get_xdata()) == [1, 2, 3, 4, 5]
    assert list(loss["ticket by magnitude"].get_ydata()) == [
        r["loss"] for r in records if r["stage"] == "ticket-magnitude"
    ]
    cut = [100 - r["cut_top1"] for r in records if r["stage"] == "gsm"]
    assert list(error["GSM, if cut then"].get_ydata()) == cut


def test_page_is_whole_small_and_the_same_each_time(lotteries, tmp_path, capsys):
    page, again = (report(capsys, tmp_path, *(path for path, _ in lotteries))[0] for _ in range(2))
    assert page.source == again.source
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "default-src 'none'" in page.source
    assert "@import" not in page.source
    assert "script" not in page.tags
    assert len(page.source) < 500_000
    assert len(set(page.ids)) == len(page.ids)
    used = {link[1:] for link in page.links if link[0] == "#"} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert used <= set(page.ids)
    assert "#0072b2" not in page.source.split("</style>")[1]


def test_names_of_runs_are_no_markup(tmp_path, capsys):
    path, result = make_run(tmp_path / "run")
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "recipe": HOSTILE, "preset": HOSTILE}))
    (path / "environment.json").write_text(json.dumps({"processes": [{"command": HOSTILE}]}))
    (path / "inference.json").write_text(
        json.dumps({"rows": [{"engine": HOSTILE, "batch": 1, "threads": 1, "milliseconds": 1.5, "ratio": 0.5}]})
    )
    result["layers"][0]["name"] = HOSTILE
    (path / "result.json").write_text(json.dumps(result))
    page, missing = report(capsys, tmp_path, path)
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text
    assert "</svg><script>alert(1)</s" in page.drawn
    assert "$x_1$<img src=x" in page.drawn
    assert any("is not of the net that result.json beside it describes" in line for line in missing)


def test_groups_side_by_side(lotteries, tmp_path, capsys):
    others = [make_run(tmp_path / f"x100-s{seed}", seed=seed, compression=100.0)[0] for seed in (0, 1)]
    long, _ = make_run(tmp_path / "long", epochs=7)
    pruned, _ = make_run(tmp_path / "pruned", command="prune")
    page, missing = report(capsys, tmp_path, *(path for path, _ in lotteries), *others, long, pruned)
    assert missing == []
    (table,) = page.tables["Top-1 in % of all runs"]
    assert table[0][:3] == ["runs", "pruned net", "weights kept"]  # none knows the dense net
    assert [[row[0], *row[2:3], row[6]] for row in table[1:]] == [
        ["lenet300 at 60x, preset fast, command lottery, base.epochs 5, gsm.epochs 5", "4,436 of 266,200", "0, 1, 2"],
        ["lenet300 at 100x, preset fast", "2,662 of 266,200", "0, 1"],
        ["lenet300 at 60x, preset fast, command lottery, base.epochs 7, gsm.epochs 7", "4,436 of 266,200", "0"],
        ["lenet300 at 60x, preset fast, command prune, base.epochs 5, gsm.epochs 5", "4,436 of 266,200", "0"],
    ]
    assert "no choice by magnitude to compare with" in page.text


def test_unfinished_runs_are_shown_as_far_as_they_are(lotteries, tmp_path, capsys):
    path, _ = make_run(tmp_path / "run", seed=4)
    (path / "result.json").unlink()
    barely, _ = make_run(tmp_path / "barely", seed=5)
    for name in ("result.json", "metrics.jsonl", "environment.json"):
        (barely / name).unlink()
    page, missing = report(capsys, tmp_path, path, barely, lotteries[0][0])
    assert missing == [f"missing: {one} is not finished: give its command again to go on" for one in (path, barely)]
    assert page.tables[str(path)][0][2][:2] == ["gsm", "5/5"]
    assert "No epoch has been logged yet." in page.text
    assert "environment.json is not there." in page.text
    page, _ = report(capsys, tmp_path, path)
    assert page.text.count("No run is finished yet.") == 3


def written(text):
    return lambda file: file.write_text(text, encoding="latin-1")


def instead(make):
    """Return what puts something else in the place of a file."""
    return lambda file: (file.unlink(), make(file))


def longer(file):
    os.truncate(file, 2**40)


def replaced(old, new):
    return lambda file: file.write_text(file.read_text().replace(old, new))


def changed(change):
    """Return what changes the content of a JSON file in place."""

    def put(file):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return put


FILES = ("recipe.yaml", "result.json", "metrics.jsonl", "environment.json")
HUGE = "1" + "0" * 400
DEEP = "[" * 60_000 + "\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
SETTINGS = "recipe: lenet300\npreset: fast\ncompression: 60\nseed: 0\nbase: {epochs: 1}\ngsm: {epochs: 1}\n"
CUT_SHORT = ("{", "\xff")  # by a kill, if it is the last line of the metrics
DAMAGES = [
    *((name, written(text)) for name in FILES for text in CUT_SHORT if name != "metrics.jsonl"),
    *(
        (name, written(text))
        for name in FILES
        for text in ("[]\n", '{"stage": []}\n', '{"top1": {"pruned": "high"}}\n')
    ),
    *((name, instead(make)) for name in FILES for make in (Path.mkdir, os.mkfifo)),
    *((name, damage) for name in FILES[:3] for damage in (written(DEEP), longer)),
    ("recipe.yaml", written(BOMB + SETTINGS)),
    ("recipe.yaml", written(SETTINGS + "x: &x [*x]\n")),
    ("recipe.yaml", written(SETTINGS.replace("60", ".nan"))),
    ("recipe.yaml", written(SETTINGS.replace("60", HUGE))),
    ("recipe.yaml", written(SETTINGS + "model: [1]\n")),
    ("metrics.jsonl", replaced('"loss": 1.0', '"loss": NaN')),
    ("metrics.jsonl", replaced('"loss": 1.0', f'"loss": {HUGE}')),
    ("metrics.jsonl", replaced('"stage": "gsm"', '"stage": "../x"')),
    ("result.json", replaced('"top1": {', '"top1": {"base": NaN, ')),
    ("result.json", changed(lambda result: result["top1"].update(pruned=10**400))),
    ("result.json", changed(lambda result: result["top1"].update(pruned=1e30))),
    ("result.json", changed(lambda result: result["top1"].update({"/etc/x": 1.0}))),
    ("result.json", changed(lambda result: result.update(command="../x"))),
    ("result.json", changed(lambda result: result.update(command="replay", top1={}))),
    ("result.json", changed(lambda result: result.update(layers=[]))),
    ("result.json", changed(lambda result: result["layers"][0].update(shape=["x"]))),
    ("result.json", changed(lambda result: result["layers"].append(result["layers"][0]))),
    ("result.json", changed(lambda result: result["seconds"].update({"x": 1}))),
]


@pytest.mark.parametrize("command", ["show", "report"])
def test_damaged_runs_are_named_and_the_others_shown(lotteries, tmp_path, capsys, command):
    paths = [tmp_path / str(number) for number in range(len(DAMAGES))]
    for path, (name, damage) in zip(paths, DAMAGES, strict=True):
        shutil.copytree(lotteries[1][0], path, ignore=shutil.ignore_patterns("*.safetensors"))
        damage(path / name)
    page = ["-o", str(tmp_path / "page")] if command == "report" else []
    assert cli.run([command, *map(str, paths), str(lotteries[0][0]), *page]) == 0
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for line, path, (name, _) in zip(lines, paths, DAMAGES, strict=True):
        assert line.startswith(f"missing: {path / name} is damaged")
        assert re.search(r"damaged( in line \d+)? \(.+\): delete", line)
    shown = Page(tmp_path / "page").text if page else said.out
    assert "pruned net" in shown
    assert not page or all(line.removeprefix("missing: ") in shown for line in lines)


@pytest.mark.parametrize("cut_short", CUT_SHORT)
def test_keys_of_other_versions_and_a_line_that_a_kill_cut_short_are_no_damage(lotteries, tmp_path, capsys, cut_short):
    path = shutil.copytree(lotteries[1][0], tmp_path / "run")
    changed(lambda result: (result.update(x=1), result["layers"][0].update(x=1)))(path / "result.json")
    first = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    with (path / "metrics.jsonl").open("a", encoding="latin-1") as stream:
        stream.write(json.dumps({**first, "x": [1]}) + "\n" + cut_short)
    assert cli.run(["show", str(path), str(lotteries[0][0])]) == 0
    said = capsys.readouterr()
    assert "fc1.weight" in said.out
    assert said.err == ""


def test_many_epochs_and_layers_make_a_page_that_can_be_read(tmp_path, capsys):
    path, result = make_run(tmp_path / "run", epochs=3)
    line = json.loads((path / "metrics.jsonl").read_text().splitlines()[3])
    (path / "metrics.jsonl").write_text("".join(json.dumps({**line, "epoch": n}) + "\n" for n in range(1, 20_001)))
    page, missing = report(capsys, tmp_path, path)
    assert missing == []
    (rows,) = page.tables["GSM, by epoch, 500 of all epochs"]
    assert [row[0] for row in (rows[1], rows[2], rows[-1])] == ["40", "80", "20000"]
    assert len(page.source) < 2_000_000
    layers = [{**result["layers"][0], "name": str(number)} for number in range(1_000)]
    (path / "result.json").write_text(json.dumps({**result, "layers": layers}))
    group = Group("", [read_run(path)])
    (axes,) = structure.density(group, structure.kept_by(group, {})).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(number) for number in range(300)]


def test_replays_of_two_tickets_are_two_groups(tmp_path, capsys):
    paths = [make_run(tmp_path / f"{seed}", seed=seed)[0] for seed in (0, 1)]
    for path, method in zip(paths, ("gsm", "magnitude"), strict=True):
        (path / f"ticket-{method}.safetensors").write_bytes((path / "pruned.safetensors").read_bytes())
        top1 = {f"ticket_{method}": 97.0}
        changed(lambda result, top1=top1: result.update(command="replay", top1=top1))(path / "result.json")
    page, missing = report(capsys, tmp_path, *paths)
    assert missing == []
    assert "ticket by magnitude, retrained" in page.text
    assert "ticket by GSM, retrained" in page.text


@pytest.mark.parametrize("name", ["base", "pruned"])
def test_weights_that_are_damaged_or_gone_are_named(tmp_path, capsys, name):
    path, _ = make_run(tmp_path / "run")
    (path / f"{name}.safetensors").write_bytes(b"nothing")
    page, missing = report(capsys, tmp_path, path)
    assert missing == [f"missing: {path / f'{name}.safetensors'} is not a safetensors file, or damaged"]
    (path / f"{name}.safetensors").unlink()
    page, missing = report(capsys, tmp_path, path)
    assert missing == ([] if name == "base" else [f"missing: {path / f'{name}.safetensors'} does not exist"])
    assert "pruned net" in page.text


def test_what_does_not_belong_together_is_left_out(tmp_path, capsys):
    one, again = (make_run(tmp_path / name)[0] for name in ("one", "again"))
    page, missing = report(capsys, tmp_path, one, one, again, tmp_path / "nowhere", one / "result.json")
    why = "is not a run's folder: there is no recipe.yaml in it"
    left_out = f"missing: {again} is left out: it is the same recipe and seed as {one}"
    assert missing == [f"missing: {tmp_path / 'nowhere'} {why}", f"missing: {one / 'result.json'} {why}", left_out]
    assert "Top-1 of 1 run, on the full test set" in page.text
    (tmp_path / "page" / "report.html").unlink()
    _, said = report(capsys, tmp_path, one / "result.json", tmp_path / "nowhere", status=2)
    assert said == [f"gsm: error: {one / 'result.json'} {why}; {tmp_path / 'nowhere'} {why}"]


def test_page_that_cannot_be_written_leaves_what_is_there(lotteries, tmp_path, capsys, monkeypatch):
    run, page = str(lotteries[0][0]), tmp_path / "page" / "report.html"
    assert cli.run(["report", run, "-o", str(tmp_path)]) == 2
    assert "choose another -o" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    report(capsys, tmp_path, run)
    before = page.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    assert cli.run(["report", str(lotteries[1][0]), "-o", str(page)]) == 2
    assert page.read_bytes() == before


def test_sizes_and_latency(lotteries, tmp_path, capsys):
    page, _ = report(capsys, tmp_path, lotteries[0][0])
    assert f"Not measured yet: gsm bench inference {lotteries[0][0]} does it." in page.text
    path, _ = make_run(tmp_path / "run")
    (path / "pruned.onnx").write_bytes(bytes(2048))
    rows = [
        {"engine": engine, "batch": batch, "threads": threads, "milliseconds": 1.25, "ratio": 0.5}
        for threads in (1, 2)
        for engine in ("dense", "CSR", "onnxruntime")
        for batch in (1, 16, 256)
    ]
    (path / "inference.json").write_text(json.dumps({"benchmark": "inference", "rows": rows, "environment": {}}))
    page, missing = report(capsys, tmp_path, path)
    assert missing == []
    files = {row[0]: row[1:] for row in page.tables["Files of the pruned net"][0]}
    assert files["pruned.onnx"][:2] == ["1", "2.0"]
    assert float(files["pruned.safetensors"][1].replace(",", "")) > 1000
    (shown,) = page.tables["Inference; times as fast as torch's dense net"]
    assert shown[1 + 5] == ["CSR", "0", "256", "1", "1.25", "0.50"]
    assert "Latency, 1 thread" in page.text
    assert "Latency, 2 threads" in page.text
    (path / "inference.json").write_text('{"rows": [{"engine": 3}]}')
    _, missing = report(capsys, tmp_path, path)
    assert missing == [
        f"missing: {path / 'inference.json'} is damaged (it has no such rows): delete it and measure again"
    ]


def test_agreement_of_masks():
    ours = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False])}
    theirs = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, False])}
    found = nets.agreement(ours, theirs)
    assert found.overlap == pytest.approx(2 / 3)
    assert found.jaccard == pytest.approx(2 / 4)
    assert found.chance_overlap == pytest.approx((2 * 2 / 4 + 1 * 1 / 2) / 3)
    assert found.chance_jaccard == pytest.approx(1.5 / (6 - 1.5))
    none = {name: torch.zeros_like(mask) for name, mask in ours.items()}
    assert nets.agreement(none, theirs) == (0, 0, 0, 0)


# --- many runs ---


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs of three methods and the dense net at two ratios, two seeds."""
    folder, paths = tmp_path_factory.mktemp("sweep"), []
    for method, ratio, top1 in (
        *(("gsm", 20.0, 98.0), ("gsm", 60.0, 97.0), ("rigl", 20.0, 97.5), ("rigl", 60.0, 97.2)),
        *(("gradual", 20.0, 97.9), ("gradual", 60.0, 95.0), ("dense", 1.0, 98.5)),
    ):
        for seed in (0, 1):
            figures = {"pruned": top1, "gsm_after_cut": top1}
            fields = {"command": "prune", "method": method, "compression": ratio, "top1": figures}
            paths.append(make_run(folder / f"{method}-{ratio:g}-{seed}", seed=seed, **fields)[0])
    (paths[0] / "pruned.sparse.safetensors.xz").write_bytes(bytes(1024))
    return paths


def test_many_runs_are_shown_together(sweep, tmp_path, capsys):
    page, missing = report(capsys, tmp_path, *sweep, sweep[0], sweep[1] / ".." / sweep[1].name)
    assert missing == []
    (rows,) = page.tables["Top-1 in % by method and compression ratio, mean ± standard deviation over the seeds 0, 1"]
    assert rows[0] == ["method", "20x", "60x"]
    assert {row[0]: row[1] for row in rows[1:]} == {
        "GSM": "97.98 ± 0.02", "RigL": "97.48 ± 0.02", "gradual magnitude": "97.89 ± 0.02", "dense net": "98.48 ± 0.02",
    }  # fmt: skip
    assert "At 20x GSM leads by 0.10, more than one deviation" in page.text
    assert "At 60x RigL leads by 0.20, more than one deviation" in page.text
    (sizes,) = page.tables["KiB of the sparse file, mean over the seeds"]
    assert sizes[1:] == [["GSM", "1", ""], ["RigL", "", ""], ["gradual magnitude", "", ""], ["dense net", "", ""]]
    (together,) = page.tables["Top-1 in % of all runs"]
    assert len(together) == 8
    for text in ("Top-1 error by epoch at 20x", "Top-1 error by epoch at 60x", "A report of fewer runs has the layers"):
        assert text in page.text
    assert not {"layers", "diagnostics"} & set(page.ids)
    assert len(page.source) < 300_000


def test_the_page_begins_with_the_answer(lotteries, tmp_path, capsys):
    paths = [path for path, _ in lotteries]
    for path in paths:
        (path / "pruned.sparse.safetensors.xz").write_bytes(bytes(22_100))
    page, _ = report(capsys, tmp_path, *paths)
    text = " ".join(page.text.split())
    head = text.partition("Top-1 of 3 runs")[0]
    assert "lenet300 at 60x, preset fast 98.32 ± 0.03 % with 4,436 of 266,200 weights (60x)" in head
    assert head.endswith("base net 98.38 ± 0.03 · 22.1 kB · the cut cost 0.01 points ")
    assert cli.run(["show", *map(str, paths)]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said == (
        "lenet300 at 60x, preset fast: 98.32 ± 0.03 % with 4,436 of 266,200 weights (60x): base net 98.38 ± 0.03, "
        "22.1 kB, the cut cost 0.01 points"
    )
    for path in paths:
        (path / "pruned.sparse.safetensors.xz").unlink()


def test_what_a_run_came_to_in_a_line(tmp_path):
    def said(name, change=None, **fields):
        path, result = make_run(tmp_path / name, command="prune", **fields)
        result["top1"] |= change or {}
        result |= {"macs": {"dense": 210, "pruned": 100}} if name == "narrow" else {}
        (path / "result.json").write_text(json.dumps(result))
        return str(answer([read_run(path)]))

    assert said("a", {"dense": 98.46, "gsm_after_cut": 98.07}) == (
        "98.35 % with 4,436 of 266,200 weights (60x): dense net 98.46, lossless cut"
    )
    assert said("narrow") == "98.35 % with 2.10 times fewer MACs: the cut cost 0.01 points"
    assert said("gradual", method="gradual").startswith("98.35 % with 4,436 of 266,200 weights (60x): the cut")
    assert said("dense", method="dense", compression=1.0) == "98.35 % by the dense net"


def test_channels_are_not_compared_with_weights(tmp_path, capsys):
    """Ten times fewer weights and twice fewer MACs are not on one axis."""
    weights, _ = make_run(tmp_path / "weights", command="prune", compression=10.0)
    narrow, _ = make_run(tmp_path / "narrow", command="prune", compression=2.0, pattern="channel")
    page, _ = report(capsys, tmp_path, weights, narrow)
    assert "Accuracy against" not in page.text
    more, _ = make_run(tmp_path / "more", command="prune", compression=4.0, pattern="channel")
    page, _ = report(capsys, tmp_path, weights, narrow, more)
    assert "lenet300 on mnist, by channels" in page.text
    assert "Accuracy against compression ratio" in page.text


def test_accuracy_stands_against_all_that_is_known(sweep, tmp_path):
    groups = [Group(str(number), [read_run(path) for path in sweep[number : number + 2]]) for number in (0, 4)]
    assert [block.heading for block in overview.frontier(groups)] == [
        "Accuracy against compression ratio",
        "Accuracy against KiB of the sparse file",
    ]
    rows = [
        {"engine": engine, "batch": batch, "threads": threads, "milliseconds": milliseconds, "ratio": 1.0}
        for engine, batch, threads, milliseconds in (
            ("a", 1, 1, 3.0),
            ("b", 1, 1, 2.5),
            ("b", 1, 2, 1.0),
            ("b", 16, 1, 1.0),
        )
    ]
    path = shutil.copytree(sweep[0], tmp_path / "measured")
    (path / "inference.json").write_text(json.dumps({"rows": rows}))
    result = json.loads((path / "result.json").read_text())
    (path / "result.json").write_text(json.dumps({**result, "macs": {"dense": 10, "pruned": 7}}))
    groups[0].runs[0] = read_run(path)
    *_, macs, speed = overview.frontier(groups)
    assert [block.tables[0].caption for block in (macs, speed)] == [
        "MACs, mean over the seeds",
        "milliseconds, batch 1, one thread, mean over the seeds",
    ]
    assert [block.tables[0].rows[0][1] for block in (macs, speed)] == ["7", "2.5"]
    (path / "inference.json").write_text("{")
    groups[0].runs[0] = read_run(path)
    assert overview.frontier(groups)[-1].heading == "Accuracy against MACs"


def test_figures_show_the_best_of_many_settings(tmp_path):
    groups = []
    for number in range(13):
        figures = {"pruned": 90.0 + (number * 5) % 13 / 2, "gsm_after_cut": 90.0}
        path, _ = make_run(tmp_path / str(number), command="prune", top1=figures, batch_size=32 + number)
        groups.append(Group("", [read_run(path)]))
    block = overview.frontier(groups)[0]
    assert block.texts == ["The figures show the 10 best of 13 settings, the table all."]
    assert len(block.tables[0].rows) == 13
    drawn = [container.get_label() for container in block.figure.axes[0].containers]
    worst = {f"GSM, batch_size {32 + number}" for number in range(13) if (number * 5) % 13 < 3}
    assert (len(drawn), worst & {*drawn}) == (10, set())


def test_smoothed_losses_are_marked(tmp_path):
    path, _ = make_run(tmp_path / "run")
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    recipe["gsm"]["label_smoothing"] = 0.1
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    loss, error = accuracy.training_panels(Group("", [read_run(path)]))
    assert [line.label for line in loss.lines] == [
        "base net", "GSM, labels smoothed by 0.1", "ticket by GSM", "ticket by magnitude",
    ]  # fmt: skip
    assert "smoothed" not in "".join(line.label for line in error.lines)


def test_methods_are_laid_over_each_other_by_epoch(sweep):
    groups = [Group(str(number), [read_run(path) for path in sweep[number : number + 2]]) for number in (0, 4, 12)]
    (block,) = overview.curves(groups)
    axes = block.figure.axes[0]
    labels = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines() if line.get_label()[0] != "_"}
    assert list(labels) == ["GSM", "RigL", "dense net"]
    for number, label in enumerate(labels):
        runs = groups[number].runs
        errors = [[100 - one["top1"] for one in run.metrics if one["stage"] == run.method] for run in runs]
        assert labels[label] == pytest.approx([fmean(pair) for pair in zip(*errors, strict=True)])


def test_the_one_script_is_ours_and_sorts_tables(sweep, tmp_path, capsys):
    page, _ = report(capsys, tmp_path, *sweep)
    assert page.tags.count("script") == 1
    script = re.search("<script>(.*)</script>", page.source, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.source
    assert page.source.count('<table class="sortable">') == 3
    assert "unsafe-inline'; img-src" in page.source  # for styles alone


def test_show_has_a_table_of_methods_and_ratios(sweep, capsys):
    assert cli.run(["show", *map(str, sweep)]) == 0
    said = capsys.readouterr().out
    assert "lenet300 on mnist" in said
    assert re.search("gradual magnitude │ 97.89 ± 0.02 │ 94.98 ± 0.02", said)
    assert "At 60x RigL leads by 0.20" in said
    assert "fc1.weight" not in said
    assert "7 groups of runs: gsm show of up to 6" in said
    assert cli.run(["show", *map(str, sweep[:4])]) == 0
    said = capsys.readouterr().out
    assert said.count("fc1.weight") == 2
    assert re.search("GSM    │ 97.98 ± 0.02 │ 96.98 ± 0.02", said)
