"""The report: one page of HTML that has everything in it, and asks no network for anything."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from plotly.offline import get_plotlyjs

from .. import __version__
from ..experiments import UsageError
from ..experiments.rundir import Record, dotted
from ..experiments.whole_files import write_output
from . import accuracy, production, structure
from .blocks import Block, Group, Picture, Table, tried
from .runs import Run, by_recipe, comparable, read_run

_PANELS = {
    "results": "Results",
    "curves": "Curves",
    "layers": "Layers",
    "weights": "Weights",
    "masks": "Masks",
    "size": "Size and speed",
    "recipe": "Recipe and environment",
}
_SETTING = 60  # characters of a setting in a title


class Section(NamedTuple):
    """What a panel says of one group of runs, or of all."""

    title: str
    blocks: Sequence[Block]


def write_report(paths: Sequence[Path], output: Path) -> list[str]:
    """Write a report of runs, finished or not, and return what is missing in it, each a line.

    Raises:
        UsageError: none of the paths is a run that can be read, or the page cannot be written.
    """
    missing: list[str] = []
    groups = _groups(_readable(paths, missing), missing)
    page = _page(groups, missing)
    write_output(output, page.encode(errors="replace"), "-o")  # a name may be no text
    return missing


def _readable(paths: Sequence[Path], missing: list[str]) -> list[Run]:
    """Return the runs among some paths, each once; the reasons against the others go to `missing`."""
    runs: dict[Path, Run] = {}
    for path in paths:
        try:
            runs.setdefault(path.resolve(), read_run(path))
        except UsageError as error:
            missing.append(str(error))
    if not runs:
        raise UsageError("; ".join(missing))
    return list(runs.values())


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
        alike = [_settings(other[0]) for other in groups if other[0].title == runs[0].title]
        own = _settings(runs[0])
        differing = [key for key in own if any(other.get(key) != own[key] for other in alike)]
        said = [f"{key} {own[key]}"[:_SETTING] for key in differing if own[key]]
        titles.append(", ".join([runs[0].title, *said]))
    return titles


def _settings(run: Run) -> Record:
    """Return all that tells one group from another."""
    assert run.result is not None
    return {"command": run.result["command"], **dotted({**run.recipe, "seed": None})}


def _page(groups: Sequence[Group], missing: list[str]) -> str:
    """Return the page; what turns out to be missing on the way goes to `missing`."""
    panels: dict[str, list[Section]] = {key: [] for key in _PANELS}
    finished = [group for group in groups if group.results]
    if len(finished) > 1:
        panels["results"].append(Section("All runs side by side", [accuracy.comparison(finished)]))
    for group in groups:
        said = {"curves": accuracy.curves(group), "recipe": production.recipe_and_environment(group)}
        if group.results:
            masks = structure.read_masks(group, missing)
            said |= {
                "results": accuracy.results(group),
                "layers": structure.layers(group, masks),
                "weights": structure.weights(group, missing),
                "masks": structure.agreement(group, masks),
                "size": production.size_and_speed(group, missing),
            }
        for key, blocks in said.items():
            panels[key].append(Section(group.title, blocks))
    return _render(groups, panels, missing)


def _render(groups: Sequence[Group], panels: dict[str, list[Section]], missing: Sequence[str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gsm_sgd.reports", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures: list[Record] = []

    def place(picture: Picture) -> int:
        """Return the number under which the page's script finds a figure."""
        pictures.append(picture.figure)
        return len(pictures) - 1

    unfinished = [run for group in groups for run in group.runs if run.result is None]
    columns = ["stage", "epoch", "loss", "top-1 %", "seconds"]
    progress = [
        Table(str(run.path), columns, [list(row) for row in run.progress]) for run in unfinished if run.progress
    ]
    return environment.get_template("report.html").render(
        version=__version__,
        groups=groups,
        runs=sum(len(group.runs) for group in groups),
        titles=_PANELS,
        panels=panels,
        missing=missing,
        progress=progress,
        place=place,
        pictures=pictures,
        # "</" is the only thing that ends a script early, and in its strings "<\/" is the same
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
    )
