"""Runs and their epochs as rows of a table, in Python and as CSV."""

import csv
import io
import json

import pytest

import gsm_sgd
from gsm_sgd import METHODS, cli
from gsm_sgd.experiments import UsageError
from gsm_sgd.reports.rows import as_csv
from made_runs import make_run


@pytest.fixture
def runs(tmp_path):
    """A lottery, and a run by another method, deeper down."""
    (first, _), (second, _) = (
        make_run(tmp_path / "a"),
        make_run(tmp_path / "deep" / "b", seed=1, command="prune", method="gradual"),
    )
    return first, second


def test_a_row_for_each_run_below_a_folder(runs, tmp_path):
    rows = gsm_sgd.load_runs(tmp_path)
    assert [row["run"] for row in rows] == [str(run) for run in runs]
    for row, run in zip(rows, runs, strict=True):
        result = json.loads((run / "result.json").read_text())
        assert row["top1.pruned"] == result["top1"]["pruned"]
        assert (row["prunable"], row["nonzeros"], row["seed"]) == (266_200, 4_436, result["seed"])
        assert (row["recipe.gsm.lr"], row["recipe.batch_size"], row["commit"]) == (0.1, 128, "0123456789ab")
        assert row["bytes"] is None
    assert [row["method"] for row in rows] == ["gsm", "gradual"]
    assert rows[1]["recipe.gradual.end"] == METHODS["gradual"].settings()["end"]
    (runs[0] / "pruned.sparse.safetensors.xz").write_bytes(b"12345")
    assert gsm_sgd.load_runs(runs[0])[0]["bytes"] == 5


def test_a_row_for_each_epoch_of_runs_finished_or_not(runs):
    (runs[0] / "result.json").unlink()
    assert gsm_sgd.load_runs(*runs) == gsm_sgd.load_runs(runs[1])
    rows = gsm_sgd.load_metrics(*runs, runs[0])
    logged = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert rows == [{"run": str(run), **one} for run, records in zip(runs, logged, strict=True) for one in records]


def test_where_no_run_is(runs, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="none is not a run's folder, and has none in it"):
        gsm_sgd.load_runs(tmp_path / "none")
    (runs[0] / "result.json").write_text("{")
    with pytest.raises(UsageError, match=r"result.json is damaged"):
        gsm_sgd.load_runs(tmp_path)


def test_columns_are_those_of_any_row():
    assert as_csv([{"a": 1, "b": "x,y"}, {"a": 2, "c": None}]) == 'a,b,c\n1,"x,y",\n2,,\n'
    assert as_csv([]) == "\n"


def test_gsm_show_writes_them(runs, tmp_path, capsys):
    words = ["--csv", str(tmp_path / "runs.csv"), "--metrics", str(tmp_path / "epochs.csv")]
    assert cli.run(["show", *map(str, runs), *words]) == 0
    capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO((tmp_path / "runs.csv").read_text())))
    assert [(row["run"], float(row["top1.pruned"])) for row in rows] == [
        (row["run"], row["top1.pruned"]) for row in gsm_sgd.load_runs(*runs)
    ]
    epochs = list(csv.DictReader(io.StringIO((tmp_path / "epochs.csv").read_text())))
    assert [float(row["loss"]) for row in epochs] == [row["loss"] for row in gsm_sgd.load_metrics(*runs)]
