"""The documentation holds: snippets run, commands exist, tables are made from results/, links lead somewhere."""

import importlib.util
import json
import re
import shlex
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from gsm_sgd import sparsity_table
from gsm_sgd.arguments import parse
from gsm_sgd.experiments.recipes import find_recipe

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results").glob("*.json"))
SNIPPETS = ("README.md", "docs/guide.md")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate)


def what_snippets_expect():
    """Return a fresh model, its batches and the number of steps, and what one has imported."""
    batches = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(40)]
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return {"model": model, "batches": batches, "T": len(batches), "torch": torch, "F": nn.functional}


def run_snippets(page):
    """Run a page's blocks of Python one after the other, each with a fresh model, and yield what is defined."""
    names = {}
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)):
        names |= what_snippets_expect()
        exec(compile(block, f"{page}, snippet {number + 1}", "exec"), names)
        yield names


def test_snippets_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = run_snippets("README.md")
    first = next(blocks)
    assert first["masks"].num_kept == sum(row.nonzeros for row in sparsity_table(first["model"])) == 473
    assert first["accuracy"] > 0.95
    scheduled = [row.nonzeros for row in sparsity_table(next(blocks)["model"])]
    assert sum(scheduled) == (64 * 16 + 16 * 10) // 10
    assert next(blocks)["slim"][0].out_features == 8  # of 16, which is half of the MACs
    assert [row.nonzeros for row in sparsity_table(next(blocks)["model"])] == scheduled
    assert next(blocks)["optimizer"].num_kept == 116  # a tenth of 1,184, in whole blocks of four


def test_snippets_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(list(run_snippets("docs/guide.md"))) == 13


@pytest.mark.parametrize("page", SNIPPETS)
def test_commands_parse(page):
    """A command or an option that does not exist, or a value of the wrong kind, is a UsageError."""
    text = (ROOT / page).read_text()
    lines = re.findall(r"^    (?:gsm|torchrun .* -m gsm_sgd) (.*)", text, re.M) + re.findall(r"`gsm (\w+ [^`]+)`", text)
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        assert parse(words).command in (words[0], " ".join(words[:2]))


def test_targets_of_make_exist():
    made = {target for page in PAGES for target in re.findall(r"`make (\w+)`", page.read_text())}
    assert made == {"demo", "test"}
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
