"""Those who watch a run: progress bars or log lines on stderr, and TensorBoard event files."""

import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import UsageError
from .loop import Observer
from .rundir import Record

_LOG_SECONDS = 10.0  # at most one line in this time where there is no terminal to draw bars on
_LONG_EPOCH_SECONDS = 60.0  # then there is a line before its end
_RATE_SECONDS = 1.0  # the rate is shown anew in this time, not at each of a thousand steps a second
_FEW_STEPS = 10  # a second; below that decimals matter


class ProgressBars:
    """A bar for each stage: epoch, steps a second, loss, accuracy and time left; log lines without a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=None),
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            TextColumn("{task.fields[rate]:>5} steps/s"),
            TextColumn("{task.fields[outcome]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._task = TaskID(0)
        self._taken = 0
        self._began = self._logged = self._shown = time.monotonic()
        self._epochs = self._steps = 0
        self._warned = False

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bars as they are."""
        self._progress.stop()

    def start(self, stage: str, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Show a new bar."""
        self._epochs, self._steps = epochs, steps_per_epoch
        self._warned = False
        self._taken, self._began = 0, time.monotonic()
        first_step = epoch * steps_per_epoch + step
        self._task = self._progress.add_task(
            stage,
            total=epochs * steps_per_epoch,
            completed=first_step,
            epoch=epoch,
            epochs=epochs,
            rate="",
            outcome="",
        )
        if first_step:
            self._console.print(f"{stage}: goes on in epoch {epoch + 1} of {epochs}")

    def step(self) -> None:
        """Move the bar on; within a long epoch say at times how far it is."""
        self._taken += 1
        self._progress.advance(self._task)
        now = time.monotonic()
        if now - self._shown >= _RATE_SECONDS:
            self._shown = now
            self._progress.update(self._task, rate=self._rate(now))
        if not self._console.is_terminal and now - self._logged >= _LONG_EPOCH_SECONDS:
            task = self._progress.tasks[self._task]
            epoch, step = divmod(int(task.completed) - 1, self._steps)
            self._log(now, f"{task.description}: epoch {epoch + 1}/{self._epochs}, step {step + 1}/{self._steps}")

    def epoch(self, record: Record) -> None:
        """Show what an epoch came to; a warning once in a stage."""
        outcome = f"loss {record['loss']:.4f}  top-1 {record['top1']:.2f}"
        if "cut_top1" in record:
            outcome += f"  if cut now {record['cut_top1']:.2f}"
        if "warning" in record and not self._warned:
            self._warned = True
            self._console.print(f"{record['stage']}, epoch {record['epoch']}: {record['warning']}", soft_wrap=True)
        now = time.monotonic()
        self._progress.update(self._task, epoch=record["epoch"], rate=self._rate(now), outcome=outcome)
        over = record["epoch"] == self._epochs
        if not self._console.is_terminal and (over or now - self._logged >= _LOG_SECONDS):
            self._log(now, f"{record['stage']}: epoch {record['epoch']}/{self._epochs}", outcome)

    def _log(self, now: float, where: str, outcome: str = "") -> None:
        """Write a line on how far a stage is, what it came to so far, and how long it will take."""
        self._logged = now
        words = [where, f"{self._rate(now)} steps/s", outcome]
        if self._taken:
            task = self._progress.tasks[self._task]
            left = (now - self._began) / self._taken * ((task.total or 0) - task.completed)
            words.append(f"{timedelta(seconds=round(left))} left")
        self._console.print("  ".join(filter(None, words)), highlight=False, soft_wrap=True)

    def _rate(self, now: float) -> str:
        rate = self._taken / (now - self._began)
        return f"{rate:.0f}" if rate >= _FEW_STEPS else f"{rate:.2f}"


class TensorBoard:
    """Writes each epoch's figures as event files into a run's folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        self._open = lambda stage, epoch: SummaryWriter(self._folder / stage, purge_step=epoch)
        self._writer: SummaryWriter | None = None

    def start(self, stage: str, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Write to a stage's own files; what an interrupted run wrote beyond its checkpoint is purged."""
        self.close()
        for path in (self._folder, self._folder / stage):
            if path.is_symlink():
                raise UsageError(f"{path} is a link: delete it, or do without --tensorboard")
        self._writer = self._open(stage, epoch + 1)

    def step(self) -> None:
        """Do nothing: figures come by the epoch."""

    def epoch(self, record: Record) -> None:
        """Write what an epoch came to."""
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, float):
                    self._writer.add_scalar(key, value, record["epoch"])
            self._writer.flush()

    def close(self) -> None:
        """Finish the files of the stage."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Several:
    """Passes everything on to several observers."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def start(self, stage: str, epochs: int, steps_per_epoch: int, epoch: int, step: int) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.start(stage, epochs, steps_per_epoch, epoch, step)

    def step(self) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.step()

    def epoch(self, record: Record) -> None:
        """Tell all of them."""
        for observer in self._observers:
            observer.epoch(record)
