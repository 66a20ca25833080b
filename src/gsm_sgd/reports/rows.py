"""Runs and their epochs as rows of a table, for pandas, polars or a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..experiments import UsageError
from ..experiments.rundir import dotted
from .runs import Run, read_run, sparse_bytes

Row = dict[str, Any]


def load_runs(*paths: str | Path) -> list[Row]:
    """Return a row for each finished run in these folders: its result and all its settings.

    `pandas.DataFrame(load_runs("runs"))` is a table of them. Keys are those of result.json, joined by dots, as
    `top1.pruned` in percent, `seconds.gsm`, `nonzeros` of `prunable` weights; `bytes` of the sparse file if there is
    one; `commit`, `processor`; and the recipe's fields as `recipe.gsm.lr`.

    Args:
        paths: run folders, or folders in which there are some at any depth.

    Raises:
        UsageError: there is no run in a folder, or a file of one is damaged.
    """
    return run_rows(find_runs(paths))


def load_metrics(*paths: str | Path) -> list[Row]:
    """Return a row for each epoch of each run in these folders, finished or not, with the run's folder as `run`.

    Args:
        paths: as of `load_runs`.

    Raises:
        UsageError: as of `load_runs`.
    """
    return epoch_rows(find_runs(paths))


def find_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return the runs in these folders, in order, each once."""
    found: dict[Path, Run] = {}
    for path in map(Path, paths):
        inside = [path] if (path / "recipe.yaml").exists() else sorted(one.parent for one in path.rglob("recipe.yaml"))
        if not inside:
            raise UsageError(f"{path} is not a run's folder, and has none in it")
        for folder in inside:
            found.setdefault(folder.resolve(), read_run(folder))
    return list(found.values())


def run_rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each finished run, as `load_runs` does."""
    return [_row(run) for run in runs if run.result is not None]


def epoch_rows(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each epoch of each run, as `load_metrics` does."""
    return [{"run": str(run.path), **record} for run in runs for record in run.metrics]


def as_csv(rows: Sequence[Row]) -> str:
    """Return rows as CSV, with a column for each key of any of them."""
    columns = dict.fromkeys(key for row in rows for key in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(run: Run) -> Row:
    result = {key: value for key, value in run.finished().items() if key not in ("layers", "widths", "paper", "recipe")}
    process = run.processes[-1] if run.processes else {}
    about = {key: process.get(key) for key in ("commit", "processor")}
    size = {"bytes": sparse_bytes(run.path)}
    named = {"run": str(run.path), "recipe": run.recipe["recipe"], "method": run.method}
    return {**named, **dotted(result), **size, **about} | {
        f"recipe.{key}": value for key, value in dotted(run.recipe).items()
    }
