"""The report: one page of HTML that has everything in it, and asks no network for anything."""

import base64
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from .. import __version__
from ..experiments import UsageError
from ..experiments.rundir import Record
from ..experiments.whole_files import write_output
from . import accuracy, figures, production, structure, sweep
from .answer import answer
from .blocks import Block, Group, Table, tried
from .runs import PROGRESS, Run, by_recipe, comparable, read_run

_PANELS = {
    "results": "Results",
    "curves": "Curves",
    "layers": "Layers",
    "size": "Size and speed",
    "recipe": "Recipe and environment",
    "diagnostics": "Diagnostics",
}
_FOLDED = ("recipe", "diagnostics")  # parts that a reader opens
_SETTING = 60  # characters of a setting in a title
_MANY = 6  # groups of runs: with more each has no parts of its own


def write_report(paths: Sequence[Path], output: Path) -> list[str]:
    """Write a report of runs, finished or not, and return what is missing in it, each a line.

    Raises:
        UsageError: none of the paths is a run that can be read, or the page cannot be written.
    """
    missing: list[str] = []
    runs = {path.resolve(): run for path in paths if (run := tried(missing, read_run, path)) is not None}
    if not runs:
        raise UsageError("; ".join(missing))
    page = _page(_groups(list(runs.values()), missing), missing)
    write_output(output, page.encode(errors="replace"), "-o")  # a name may be no text
    return missing


def _groups(runs: Sequence[Run], missing: list[str]) -> list[Group]:
    """Return the finished runs in groups that differ in the seed alone, then each that is not finished."""
    finished = [comparable(group, missing) for group in by_recipe(runs)]
    groups = [Group(title, group) for title, group in zip(_titles(finished), finished, strict=True)]
    for run in runs:
        if tried(missing, run.finished) is None:
            groups.append(Group(f"{run.title}, seed {run.recipe['seed']}: not finished", [run]))
    return groups


def _titles(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Return a title for each group, with what tells it from others that would have the same.

    A setting that is off, or zero, is not mentioned: that it is on, or what it is, stands in the other's title.
    """
    titles = []
    for runs in groups:
        alike = [other[0].settings for other in groups if other[0].title == runs[0].title]
        own = runs[0].settings
        differing = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        said = [f"{key} {own[key]}"[:_SETTING] for key in differing if own[key]]
        titles.append(", ".join([runs[0].title, *said]))
    return titles


def _page(groups: Sequence[Group], missing: list[str]) -> str:
    """Return the page; what turns out to be missing on the way goes to `missing`."""
    panels: dict[str, list[tuple[str, Sequence[Block]]]] = {key: [] for key in _PANELS}
    finished = [group for group in groups if group.results]
    families = sweep.families(finished)
    for title, family in families.items():
        panels["results"] += [(title, blocks)] if (blocks := sweep.frontier(family)) else []
        panels["curves"] += [(title, blocks)] if (blocks := sweep.curves(family)) else []
    if len(finished) > 1:
        panels["results"].append(("All runs side by side", [accuracy.comparison(finished)]))
    many = len(groups) > _MANY
    for group in () if many else groups:
        said = {
            "curves": accuracy.curves(group),
            "diagnostics": accuracy.cut_now(group),
            "recipe": production.recipe_and_environment(group),
        }
        if group.results:
            masks = structure.read_masks(group, missing)
            said |= {
                "results": accuracy.results(group),
                "layers": structure.layers(group, masks),
                "size": production.size_and_speed(group, missing),
                "diagnostics": [*said["diagnostics"], *structure.agreement(group, masks)],
            }
        for key, blocks in said.items():
            panels[key] += [(group.title, blocks)] if blocks else []
    runs = [run for group in groups for run in group.runs]
    unfinished = [run for run in runs if run.result is None and run.progress]
    progress = [Table(str(run.path), list(PROGRESS), run.progress) for run in unfinished]
    keys = itertools.count()

    def drawn(block: Block) -> Markup:
        assert block.figure is not None
        return Markup(figures.inline(block.figure, block.description, f"f{next(keys)}"))

    loader = jinja2.PackageLoader("gsm_sgd.reports", "page")
    options: Record = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    titles = {key: title for key, title in _PANELS.items() if panels[key] or not many}
    script = Markup(loader.get_source(environment, "sort.js")[0].strip())
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sorts = any(table.sortable for of in panels.values() for _, blocks in of for one in blocks for table in one.tables)
    content = {
        "script": script,
        "digest": digest,
        "sorts": sorts,
        "many": many,
        "folded": _FOLDED,
        "titles": titles,
        "panels": panels,
        "answers": [(group.title, answer(group.runs)) for group in finished] if not many else [],
        "measured": "; ".join(dict.fromkeys(run.measured_on for run in runs)),
        "verdicts": {title: sweep.leaders(family) for title, family in families.items()},
        "missing": missing,
        "progress": progress,
        "drawn": drawn,
    }
    return environment.get_template("report.html").render(version=__version__, groups=groups, runs=len(runs), **content)
