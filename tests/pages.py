"""The pages of documentation, and how to run the Python in them."""

import re
import shlex
from pathlib import Path

import torch
from torch import nn

from gsm_sgd.cli.arguments import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def what_snippets_expect():
    """Return a fresh model, its batches and the number of steps, and what one has imported."""
    batches = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(40)]
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return {"model": model, "batches": batches, "T": len(batches), "torch": torch, "F": nn.functional}


def snippets(page):
    """Return a page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def run_snippets(page, expected=what_snippets_expect):
    """Run a page's blocks of Python one after the other, each with what it expects, and yield what is defined."""
    names = {}
    for number, block in enumerate(snippets(page)):
        names |= expected()
        exec(compile(block, f"{page}, snippet {number + 1}", "exec"), names)
        yield names


def commands(page):
    """Return the commands of a page without `gsm`: the lines that begin with it, and those within the text."""
    text = (ROOT / page).read_text()
    lines = re.findall(r"^    (?:gsm|torchrun .* -m gsm_sgd) (.*)", text, re.M)
    return lines + [" ".join(line.split()) for line in re.findall(r"`gsm (\w+ [^`]+)`", text)]


def check_commands(page):
    """Check a page's commands: one or an option that does not exist, or a value of the wrong kind, is a UsageError."""
    for line in commands(page):
        words = shlex.split(line, comments=True)
        assert parse(words).command in (words[0], " ".join(words[:2]))
