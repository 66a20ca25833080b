"""The documentation holds: snippets run, commands exist, tables are made from results/, links lead somewhere."""

import importlib.util
import json
import re
from dataclasses import replace
from itertools import chain

import pytest
import torch
from torch import nn

import gsm_sgd
from gsm_sgd import callbacks, sparsity_table
from gsm_sgd.experiments.recipes import find_recipe
from gsm_sgd.structured import ChannelGroups
from pages import PAGES, ROOT, check_commands, commands, run_snippets

RESULTS = sorted((ROOT / "results").glob("*.json"))

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def test_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (first,) = run_snippets("README.md")
    assert first["masks"].num_kept == sum(row.nonzeros for row in sparsity_table(first["model"])) == 473
    assert first["accuracy"] > 0.95


def test_what_the_readme_offers_in_a_line_is_there():
    """The table of what one has: each line's call, with what it leaves out."""
    given = {
        **{"T": 10, "x": torch.randn(2, 64), "TransformersCallback": callbacks.TransformersCallback},
        **{"LightningCallback": callbacks.LightningCallback, "ChannelGroups": ChannelGroups, "Trainer": dict},
        **vars(gsm_sgd),
        **{name: getattr(gsm_sgd, name) for name in gsm_sgd.__all__},
    }
    lines = re.findall(r"^\| .*? \| (.*`\w+\(.*`.*) \|$", (ROOT / "README.md").read_text(), re.M)
    calls = [call for line in lines for call in re.findall(r"`(\w+\(.*?\))`", line)]
    assert len(calls) >= 6
    for call in calls:
        model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
        filled = {
            "one_phase(...,": "one_phase(model, total_steps=10, lr=0.1,",  # NM prescribes the density
            "GSM(...,": "GSM(model.named_parameters(), lr=0.1,",
            "(...)": "(model.named_parameters(), lr=0.1, sparsity=0.5)",
            "(...,": "(",
        }
        for left_out, said in filled.items():
            call = call.replace(left_out, said)
        assert eval(call, {**given, "model": model}) is not None


def test_commands_parse():
    assert commands("README.md")
    check_commands("README.md")


def test_targets_of_make_exist():
    made = {target for page in PAGES for target in re.findall(r"`make (\w+)`", page.read_text())}
    assert made == {"demo", "docs", "test"}
    assert made <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        titles = re.findall(r"^#+ (.*)", path.read_text(), re.M) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_tables_are_up_to_date():
    """`python docs/generate.py` changes nothing."""
    for page, root in generate.PAGES.items():
        text = (ROOT / page).read_text()
        assert generate.render(text, root) == text, f"run python docs/generate.py: {page}"


def test_no_result_is_left_out():
    markers = " ".join(re.findall(r"<!-- (.*) -->", " ".join(page.read_text() for page in PAGES)))
    assert {path.stem for path in RESULTS} <= set(re.split("[ =]", markers))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_come_from_committed_code(path):
    record = json.loads(path.read_text())
    made = [record["environment"]] if "environment" in record else list(chain(*record["processes"]))
    for process in made:
        assert re.fullmatch("[0-9a-f]{12}", process["commit"])
        assert {"command", "torch", "processor", "cores", "threads"} <= set(process)


@pytest.mark.parametrize("path", [path for path in RESULTS if "-fast" in path.stem], ids=lambda path: path.stem)
def test_results_of_fast_are_those_of_the_preset_as_it_is(path):
    """GSM training may have another length, or the whole recipe may be scaled; all else is the preset's."""
    recipe = json.loads(path.read_text())["recipe"]
    epochs = recipe["gsm"]["epochs"]
    preset = find_recipe(recipe["recipe"])
    lengths = [replace(preset, gsm=replace(preset.gsm, epochs=epochs)), preset.scaled(epochs / preset.gsm.epochs)]
    differ = [{key for key, value in length.as_dict().items() if recipe.get(key, value) != value} for length in lengths]
    free = {"compression", "seed", "precision", "weights", "pattern", "macs"}  # as the machine allows, or one asks
    assert any(keys <= free for keys in differ)
