"""The command `gsm show`, and what others print of runs that are over."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from ..experiments import UsageError
from ..experiments.rundir import Record
from ..experiments.whole_files import write_output
from ..export.files import layers_in
from ..masks import LayerSparsity
from ..reports import sweep, tables
from ..reports.answer import answer
from ..reports.blocks import Group, tried
from ..reports.frontier import frontier_table, ratios_of, series_of, verdicts
from ..reports.rows import as_csv, epoch_rows, run_rows
from ..reports.runs import Run, by_recipe, comparable, read_run, summary
from .console import Console

_MANY = 6  # groups of runs, of which more are shown together alone


def show(options: Namespace, console: Console, log: Console) -> None:
    """Show what can be read of runs and files, and say what cannot."""
    json_path: Path | None = options.json
    paths = list({os.path.realpath(path): path for path in options.runs}.values())  # each once, however it is written
    files = [path for path in paths if os.path.isfile(path)]  # noqa: PTH113  # False of what may not be looked at
    missing: list[str] = []
    layers = {path: rows for path in files if (rows := tried(missing, layers_in, path)) is not None}
    runs = [one for path in paths if path not in files and (one := tried(missing, read_run, path))]
    if missing and (json_path is not None or not (runs or layers)):
        raise UsageError("; ".join(missing))
    groups = [comparable(group, missing) for group in by_recipe(runs)]
    for reason in missing:
        log.say(f"missing: {reason}")
    if json_path is not None:
        if files:
            raise UsageError("--json takes run folders, not files")
        write_output(json_path, (json.dumps(summary(runs), indent=1) + "\n").encode(), "--json")
    for name, rows_of in (("csv", run_rows), ("metrics", epoch_rows)):
        if options[name] is not None:
            write_output(options[name], as_csv(rows_of(runs)).encode(), f"--{name}")
    for path, rows in layers.items():
        print_layers(rows, path, console)
    for one in (one for one in runs if one.result is None):
        console.print(tables.progress_table(one))
    print_groups(groups, console)


def print_layers(layers: Sequence[LayerSparsity], path: Path, console: Console) -> None:
    """Print what each layer of a file keeps."""
    console.print(tables.layers_table(layers, str(path)))
    if text := tables.empty_layers((row.name, row.params, row.nonzeros) for row in layers):
        console.say(text)


def print_groups(groups: Sequence[list[Run]], console: Console) -> None:
    """Print runs of each recipe, if there are few, and what they have in common: net, data and a range of ratios."""
    for group in groups if len(groups) <= _MANY else ():
        _print_results(group, console)
    for title, family in sweep.families([Group("", group) for group in groups]).items():
        series = series_of([group.runs for group in family])
        if ratios_of(series):
            console.print(frontier_table(series, title, "top-1 % of the pruned net, mean ± deviation over the seeds"))
            for text in verdicts(series):
                console.say(text)
    if len(groups) > _MANY:
        console.say(f"{len(groups)} groups of runs: gsm show of up to {_MANY} has layers and stages of each")


def _print_results(runs: Sequence[Run], console: Console) -> None:
    """Print accuracies of runs of one recipe, and what each layer of the first keeps."""
    result: Record | None = runs[0].result
    assert result is not None
    console.say(f"{runs[0].title}: {answer(runs)}")
    layers = [LayerSparsity(**layer) for layer in result["layers"]]
    console.print(tables.results_table(runs))
    replayed = result["command"] == "replay"
    what = "ticket" if replayed else "pruned net"
    console.print(tables.layers_table(layers, f"{what} of seed {result['seed']}"))
    if not replayed and (text := tables.cut_line(runs)):
        console.say(text)
    for text in tables.empty_layers_of(runs):
        console.say(text)
    if text := tables.costs_line(result):
        console.say(text)
    seconds = sum(sum(one.result["seconds"].values()) for one in runs if one.result)
    where = runs[0].path if len(runs) == 1 else f"{runs[0].path} and {len(runs) - 1} more"
    files = "weights" if replayed else "weights, curves.png, density.png"
    console.say(f"{seconds:.0f} s of training; {files} in {where}")
