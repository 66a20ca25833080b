"""What a section of a report is made of, and how it writes numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple, ParamSpec, TypeVar

from matplotlib.figure import Figure

from ..experiments import UsageError
from ..experiments.rundir import Record
from .runs import Run

_T = TypeVar("_T")
_P = ParamSpec("_P")


class Table(NamedTuple):
    """A table; the first cell of a row names it, and numbers begin after `texts` cells; a click may sort it."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    texts: int = 1
    folded: bool = False
    sortable: bool = False


@dataclass(frozen=True)
class Block:
    """A part of a section: what it says, shows, and gives as tables; the description is for who cannot see a figure."""

    heading: str = ""
    texts: Sequence[str] = ()
    figure: Figure | None = None
    description: str = ""
    tables: Sequence[Table] = ()
    code: str = ""


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, all finished, or one that is not."""

    title: str
    runs: list[Run]

    @property
    def results(self) -> list[Record]:
        """The results of the runs; none of one that is not finished."""
        return [run.result for run in self.runs if run.result is not None]

    @property
    def seeds(self) -> list[int]:
        """The seeds, in the order of the runs."""
        return [run.recipe["seed"] for run in self.runs]

    @property
    def metrics(self) -> list[Record]:
        """The records of all runs."""
        return [record for run in self.runs for record in run.metrics]

    def over_seeds(self, text: str) -> str:
        """Return a text for a caption if there are several seeds, else nothing."""
        return text if len(self.runs) > 1 else ""


def tried(missing: list[str], read: Callable[_P, _T], *args: _P.args, **options: _P.kwargs) -> _T | None:
    """Return what is read, or None, the reason added to `missing`, if that cannot be."""
    try:
        return read(*args, **options)
    except UsageError as error:
        if str(error) not in missing:
            missing.append(str(error))
        return None


def number(values: Sequence[float], form: str = "") -> str:
    """Return a mean with its deviation, or the value if there is only one."""
    if len(set(values)) == 1:
        return f"{values[0]:{form or ',.0f'}}"
    return f"{fmean(values):{form or ',.1f'}} ± {stdev(values):{form or ',.1f'}}"


def percent(part: float, whole: float) -> float:
    """Return a share in percent, 0 of nothing."""
    return 100 * part / whole if whole else 0.0


def by(shape: Sequence[int]) -> str:
    """Return a shape, like 300×784."""
    return "×".join(map(str, shape))


def listed(values: Sequence[object]) -> str:
    """Return values with commas between."""
    return ", ".join(map(str, values))
