"""The notebook runs from its first cell to the last, without a network, and is committed without outputs."""

import json
from pathlib import Path

import pytest

from gsm_sgd import sparsity_table

NOTEBOOK = json.loads((Path(__file__).parent.parent / "examples" / "quickstart.ipynb").read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_notebook(tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf().axes) or plt.close())
    names = {}
    for number, cell in enumerate(CODE, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    assert names["masks"].num_kept == sum(row.nonzeros for row in sparsity_table(names["model"])) == 473
    assert names["accuracy"] > 0.95
    assert names["by_input"][:10].min() > names["by_input"][10:].max()  # the inputs that matter
    assert [len(axes) for axes in shown] == [2, 1]


def test_no_outputs_are_committed():
    assert [cell for cell in CODE if cell["outputs"] or cell["execution_count"]] == []
