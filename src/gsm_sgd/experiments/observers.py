"""What a user sees of a run: progress bars or log lines on stderr, and TensorBoard event files."""

import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from .loop import Observer
from .rundir import Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG_SECONDS = 10.0  # at most one line in this time where there is no terminal to draw bars on
_LONG_EPOCH_SECONDS = 60.0  # then there is a line before its end
_FEW_STEPS = 10  # a second; below that decimals matter


class ProgressBars(Observer):
    """A bar for each stage: epoch, steps a second, loss, accuracy and time left; log lines without a terminal.

    Args:
        console: where to.
        tensorboard: a folder for event files of the same numbers; None means none.
    """

    def __init__(self, console: Console, tensorboard: Path | None = None) -> None:
        self._console, self._tensorboard = console, tensorboard
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            _Rate(),
            TextColumn("{task.fields[outcome]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._files = ExitStack()
        self._writer: SummaryWriter | None = None
        self._logged = 0.0

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bars as they are."""
        self._progress.stop()
        self._files.close()

    @property
    def _task(self) -> Task:
        return self._progress.tasks[-1]

    def start(self, stage: str, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Show a new bar, and purge the event files of what an interrupted run did after its checkpoint."""
        self._steps, self._warned, self._logged = steps_per_epoch, False, time.monotonic()
        done, total = epoch * steps_per_epoch + step, epochs * steps_per_epoch
        self._progress.add_task(stage, total=total, completed=done, epoch=epoch, epochs=epochs, outcome="")
        if done:
            self._console.print(f"{stage}: goes on in epoch {epoch + 1} of {epochs}")
        if self._tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._files.close()
            self._writer = self._files.enter_context(SummaryWriter(self._tensorboard / stage, purge_step=epoch + 1))

    def step(self) -> None:
        """Move the bar on; within a long epoch say at times how far it is."""
        self._progress.advance(self._task.id)
        if not self._console.is_terminal and time.monotonic() - self._logged >= _LONG_EPOCH_SECONDS:
            epoch, step = divmod(int(self._task.completed) - 1, self._steps)
            self._log(epoch + 1, f", step {step + 1}/{self._steps}", "")

    def epoch(self, record: Record) -> None:
        """Show the result of an epoch; a warning once in a stage."""
        outcome = f"loss {record['loss']:.4f}  top-1 {record['top1']:.2f}"
        if "cut_top1" in record:
            outcome += f"  if cut now {record['cut_top1']:.2f}"
        if "warning" in record and not self._warned:
            self._warned = True
            self._console.print(f"{record['stage']}, epoch {record['epoch']}: {record['warning']}", soft_wrap=True)
        self._progress.update(self._task.id, epoch=record["epoch"], outcome=outcome)
        over = record["epoch"] == self._task.fields["epochs"]
        if not self._console.is_terminal and (over or time.monotonic() - self._logged >= _LOG_SECONDS):
            self._log(record["epoch"], "", f"  {outcome}")
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(key, value, record["epoch"])
            self._writer.flush()

    def _log(self, epoch: int, step: str, outcome: str) -> None:
        """Write a line on how far a stage is, its result so far, and how long it will take."""
        self._logged, task = time.monotonic(), self._task
        where = f"{task.description}: epoch {epoch}/{task.fields['epochs']}{step}"
        left = "" if task.time_remaining is None else f"  {timedelta(seconds=task.time_remaining)} left"
        self._console.print(f"{where}  {_rate(task)} steps/s{outcome}{left}", highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Steps a second, updated once a second and not at each of a thousand steps."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        return Text(f"{_rate(task):>5} steps/s")


def _rate(task: Task) -> str:
    speed = task.finished_speed or task.speed or 0.0
    return f"{speed:.0f}" if speed >= _FEW_STEPS else f"{speed:.2f}"
