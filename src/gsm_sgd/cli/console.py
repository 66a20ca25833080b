"""What commands print with, and the device that they run on."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import rich.console
import torch
from jsonargparse import Namespace
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ..experiments import UsageError, bench
from ..experiments.own import Trusted
from ..export.inference import Latency
from ..reports import tables
from .arguments import in_options

_WIDTH = 100  # of a table in a file, which is not to be squeezed into 80 columns


class Console(rich.console.Console):
    """A console to which names, whoever has given them, are text: neither markup nor commands to the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal:
            self.width = _WIDTH

    def render_str(self, text: str, **options: Any) -> Text:  # of all that is printed, in tables too
        """Return a string as it is shown."""
        return super().render_str("\n".join(map(tables.printable, text.split("\n"))), **options)

    def say(self, text: object) -> None:
        """Print one line, however long, without colours."""
        self.print(str(text), highlight=False, soft_wrap=True)

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Say warnings in one line each, in the words of the command's options."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: self.say(f"warning: {in_options(str(message))}")
            yield

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show how far a measurement is: a bar that no thread draws, or without a terminal a line at its start."""
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        bars = Progress(*columns, console=self, transient=True, auto_refresh=False, disable=not self.is_terminal)
        task = bars.add_task(title, total=total)

        def show(what: str) -> None:
            if not (self.is_terminal or bars.tasks[task].completed):
                self.say(f"{title}: {total} measurements")
            bars.update(task, advance=1, description=f"{title}: {what}", refresh=True)

        with bars:
            yield show

    def warn_if_busy(self, measured: Sequence[bench.Cost] | Sequence[Latency]) -> None:
        """Warn if measurements scatter so much that something else must have run."""
        spreads = [spread for one in measured for spread in (one.milliseconds_spread, one.ratio_spread)]
        if warning := bench.busy(spreads):
            self.say(f"warning: {warning}")


def find_device(name: str) -> torch.device:
    """Return a device that works; `auto` is the GPU if there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {name!r} cannot be used here: choose auto or cpu") from error
    return device


def set_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads, as many as it likes without a number."""
    if threads is None:
        return
    if threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}")
    torch.set_num_threads(threads)


def trusted(options: Namespace) -> Trusted:
    """Return the functions of their own that the user lets a file name."""
    return Trusted(options.model, options.dataset)
