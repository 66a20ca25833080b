"""The README's figures are those under results/."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KEYS = ("base", "gsm_before_cut", "gsm_after_cut", "ticket_gsm", "ticket_magnitude")


def cells(record):
    """Return the row that the README shows of a summary."""
    shown = []
    for key in KEYS:
        figure = record["top1"][key]
        shown.append(f"{figure['mean']:.2f}" + ("" if figure["std"] is None else f" ± {figure['std']:.2f}"))
    return " | ".join(shown)


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("lenet*.json")), ids=lambda path: path.stem)
def test_results_stand_in_the_readme(path):
    record = json.loads(path.read_text())
    assert cells(record) in (ROOT / "README.md").read_text()
    for processes in record["processes"]:
        for process in processes:
            assert not process["commit"].endswith("-dirty"), "results come from committed code"
            assert {"command", "torch", "processor", "cores", "threads"} <= set(process)


def test_commands_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for command in ("gsm list", "gsm lottery lenet300", "gsm prune lenet5", "gsm show", "make demo", "make test"):
        assert command in readme
