"""A run's folder: its recipe, environment, metrics and weights, and stages that resume where they were killed.

Every file is replaced as a whole, so that at any moment a kill leaves either the old one or the new one. A stage
is over when its weights are there; until then its checkpoint, and the metrics up to it, are what counts.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import filelock
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..masks import Masks, match
from ..structured.remove import save_narrow
from . import UsageError, ranks
from .environment import environment
from .reading import cause, check_regular, is_number, load_tensors, open_regular, read_json, read_yaml
from .recipes import Recipe, Training
from .states import load_state, plain_state, tensors_hash
from .whole_files import append, atomic_write

Record = dict[str, Any]
_NUMBERS = ("epoch", "lr", "loss", "top1", "seconds")
_CUT_NOW = ("cut_top1", "gap", "entered", "returned", "passive")
"""What an epoch's record has beside its stage; the latter in GSM training alone."""

_OF_NUMBERS = (*_NUMBERS, *_CUT_NOW)
_KEYS = ("stage", *_OF_NUMBERS, "warning")
_NEEDED = {"stage", *_NUMBERS}
_LONGEST_METRICS = 2**27  # bytes: what four stages of 100,000 epochs take, and more

NARROW_FILE = "narrow.safetensors"
_HASH = "gsm_sgd.sha256"  # in the metadata of our weight files


class RunFolder:
    """The folder of one run, locked against a second run while it is open.

    Of several processes of one run the first one writes, and the others see what it wrote.

    Args:
        path: the folder, made if it is not there.
        recipe: what the run does; a folder that was made by another is refused.
        checkpoint_seconds: the time after which a running stage is saved again.

    Raises:
        UsageError: the folder belongs to another recipe or to a running process, or cannot be written.
    """

    def __init__(self, path: Path, recipe: Recipe, checkpoint_seconds: float = 20.0) -> None:
        self.path = path
        self.recipe = recipe
        self.checkpoint_seconds = checkpoint_seconds
        self.writes = ranks.rank() == 0
        self._lock = filelock.FileLock(path / ".lock")
        if self.writes:
            check_recipe(path, recipe)
            self._take(path, recipe)
        ranks.barrier()
        if not self.writes:
            check_recipe(path, recipe)

    def _take(self, path: Path, recipe: Recipe) -> None:
        """Make the folder this run's own."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            if (path / ".lock").is_symlink():
                raise UsageError(f"{path / '.lock'} is a link: delete it, or choose another --out")
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise UsageError(f"{path} is in use by another process: wait for it, or choose another --out") from error
        except OSError as error:
            raise UsageError(f"cannot write to {path}: {error.strerror}; choose another --out") from error
        check_recipe(path, recipe)  # another process may have made it while this one waited
        atomic_write(path / "recipe.yaml", yaml.safe_dump(recipe.as_dict(), sort_keys=False).encode())

    def __enter__(self) -> Self:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let other runs have the folder."""
        self._lock.release()

    # --- what a run leaves ---

    def note_environment(self, device: torch.device) -> None:
        """Add this process to environment.json: what ran the run, once more for each time it was resumed."""
        if not self.writes:
            return
        processes = [*read_processes(self.path), environment(device)]
        atomic_write(self.path / "environment.json", _json({"processes": processes}))

    def check_data(self, identity: str) -> None:
        """Raise UsageError if the run has trained on other data than `Dataset.identity` is of; else note them."""
        path = self.path / "data.json"
        if not (self.writes and identity):
            return
        if not path.exists():
            atomic_write(path, _json({"sha256": identity}))
            return
        try:
            theirs = read_json(path)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is damaged ({cause(error)}): choose another --out") from error
        if theirs != {"sha256": identity}:
            raise UsageError(f"{self.path} has been trained on other images than these: choose another --out")

    @property
    def finished(self) -> bool:
        """Whether the run is over: result.json is there."""
        return ranks.from_rank_0((self.path / "result.json").exists())

    def finish(self, result: Record) -> None:
        """Write result.json: the run is over."""
        if self.writes:
            atomic_write(self.path / "result.json", _json(result))
        ranks.barrier()

    @property
    def times(self) -> dict[str, int] | None:
        """Nanoseconds of layers as this run has measured them, or None if it has not."""
        path = self.path / "latency.json"
        if not ranks.from_rank_0(path.exists()):
            return None
        try:
            times: dict[str, int] = read_json(path)
            if not all(type(time) is int and time > 0 for time in times.values()):
                raise ValueError("it has other things than nanoseconds")
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({cause(error)}): delete {self.path} to begin anew") from error
        return times

    def save_times(self, times: Mapping[str, int] | None) -> None:
        """Write times of layers, if there are any, for the run to go on by the same ones."""
        if times is not None:
            atomic_write(self.path / "latency.json", _json(dict(times)))
        ranks.barrier()

    def add_top1(self, figures: Mapping[str, float]) -> None:
        """Add accuracies, in percent, to the result of a run that is over; nothing is written if they are there."""
        if not self.writes:
            return
        path = self.path / "result.json"
        try:
            result = read_json(path)
            known = result["top1"]
            if not known.items() >= figures.items():
                atomic_write(path, _json({**result, "top1": {**known, **figures}}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({cause(error)}): delete it and give the command again") from error

    def save_figure(self, name: str, write: Callable[[Any], None]) -> None:
        """Have `write` fill a file's stream, and put the file in its place as a whole."""
        atomic_write(self.path / name, write)

    # --- weights ---

    def has_weights(self, name: str) -> bool:
        """Return whether `<name>.safetensors` is there."""
        return ranks.from_rank_0((self.path / f"{name}.safetensors").exists())

    def save_weights(self, name: str, model: nn.Module) -> None:
        """Write a model's state to `<name>.safetensors`, with a hash of it in the metadata."""
        state = plain_state(model.state_dict())
        tensors = {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
        if self.writes:
            # one entry: safetensors writes several in any order, and the same weights are to give the same file
            atomic_write(self.path / f"{name}.safetensors", save(tensors, {_HASH: tensors_hash(tensors)}))
        ranks.barrier()

    def load_weights(self, name: str, model: nn.Module) -> None:
        """Load `<name>.safetensors` into a model of the same architecture, in place."""
        path = self.path / f"{name}.safetensors"
        try:
            weights = read_weights(path)
        except UsageError as error:
            raise UsageError(f"{error}; delete it to run its stage again") from error
        try:
            load_state(model, weights)
        except RuntimeError as error:
            raise UsageError(f"{path} does not fit the model: delete it to run its stage again") from error

    def save_narrow(self, model: nn.Module) -> None:
        """Write a narrow net with its widths to narrow.safetensors."""
        if self.writes:
            save_narrow(model, self.path / NARROW_FILE)
        ranks.barrier()

    def save_masks(self, name: str, masks: Masks) -> None:
        """Write masks to `<name>.safetensors`."""
        if self.writes:
            atomic_write(self.path / f"{name}.safetensors", masks.to_bytes())
        ranks.barrier()

    def load_masks(self, name: str, weights: Mapping[str, Tensor]) -> Masks:
        """Return the masks of `<name>.safetensors`, checked against the weights that they are of."""
        path = self.path / f"{name}.safetensors"
        try:
            masks = read_masks(path)
            match(weights, masks)
        except (UsageError, ValueError) as error:
            raise UsageError(f"{error}; delete {path} to choose again what is kept") from error
        return Masks({key: mask.to(weights[key].device) for key, mask in masks.items()})

    def stage(self, name: str) -> "Stage":
        """Return the stage that ends with `<name>.safetensors`."""
        return Stage(self, name)


class Stage:
    """One stage of a run as `train` sees it: somewhere to log to, to save its state in and to resume from."""

    def __init__(self, run: RunFolder, name: str) -> None:
        self.name = name
        self._writes = run.writes
        self._metrics = run.path / "metrics.jsonl"
        self._checkpoint = run.path / f"{name}.checkpoint"
        self._interval = run.checkpoint_seconds
        self._saved_at = time.monotonic()

    def resume(self, device: torch.device) -> dict[str, Any] | None:
        """Return the state last saved, or None, and forget the metrics logged after it.

        Raises:
            UsageError: the checkpoint is damaged.
        """
        state: dict[str, Any] | None = None
        if self._checkpoint.exists():
            try:
                state = load_tensors(self._checkpoint, device)
                if state["stage"] != self.name:
                    raise ValueError("another stage's")
                epoch = int(state["epoch"])
            except Exception as error:  # a damaged file can fail in any way
                raise self.damaged() from error
        else:
            epoch = 0
        if self._writes:
            kept = [line for line, r in _metrics(self._metrics) if r["stage"] != self.name or r["epoch"] <= epoch]
            atomic_write(self._metrics, b"".join(kept))
        ranks.barrier()  # all have read the checkpoint before the first one replaces it
        return state

    def damaged(self) -> UsageError:
        """Return the error that names the checkpoint."""
        return UsageError(f"{self._checkpoint} is damaged: delete it to run its stage from the start")

    def due(self) -> bool:
        """Return whether it is time to save the state again."""
        return self._writes and time.monotonic() - self._saved_at >= self._interval

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        atomic_write(self._checkpoint, lambda stream: torch.save({"stage": self.name, **state}, stream))
        self._saved_at = time.monotonic()

    def log(self, record: Record) -> None:
        """Append a record to metrics.jsonl."""
        if self._writes:
            append(self._metrics, (json.dumps(record) + "\n").encode())

    def discard_checkpoint(self) -> None:
        """Delete the checkpoint: the stage's weights are there."""
        if self._writes:
            self._checkpoint.unlink(missing_ok=True)


def in_use(folder: Path) -> bool:
    """Return whether a process has a run's folder at this moment; of a folder that cannot be written nobody knows."""
    path = folder / ".lock"
    try:
        if path.is_file() and not path.is_symlink():  # asking makes a file, or empties what a link leads to
            with filelock.FileLock(path, timeout=0):
                pass
    except filelock.Timeout:
        return True
    except OSError:
        pass
    return False


def check_recipe(folder: Path, recipe: Recipe) -> None:
    """Raise UsageError if a folder holds anything but a run of this recipe; nothing is written."""
    path = folder / "recipe.yaml"
    if not path.exists():
        ours_at_once = {".lock", "recipe.yaml.partial"}  # all that a run killed at its very start leaves
        if folder.is_dir() and any(file.name not in ours_at_once for file in folder.iterdir()):
            raise UsageError(f"{folder} is not a run's folder but holds files: choose another --out")
        return
    try:
        theirs = dotted(read_yaml(path))
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is damaged ({cause(error)}): delete {folder} or choose another --out") from error
    theirs = {**DEFAULTS, **theirs}  # an older version's recipe lacks what has been added since
    ours = dotted(recipe.as_dict())
    other = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if other:
        difference = ", ".join(f"{key} {theirs.get(key)} there, {ours.get(key)} here" for key in other[:3])
        hint = f"add --precision {theirs['precision']}" if other == ["precision"] else "choose another --out"
        raise UsageError(f"{folder} was made by another recipe ({difference}): {hint}")


def read_metrics(folder: Path) -> list[Record]:
    """Return the whole records of a run's metrics.jsonl; a last line cut short by a kill does not count."""
    return [{key: record[key] for key in _KEYS if key in record} for _, record in _metrics(folder / "metrics.jsonl")]


def _metrics(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield the whole lines of a metrics.jsonl and the records in them, one by one."""
    number = 0
    try:
        with open_regular(path, _LONGEST_METRICS) as stream:
            for line in stream:
                number += 1
                if not line.endswith(b"\n"):
                    return
                record = json.loads(line)  # parse_json would take several times as long
                if not (isinstance(record, dict) and record.keys() >= _NEEDED and isinstance(record["stage"], str)):
                    raise ValueError("it is no epoch's record")
                if not all(is_number(record[key]) for key in _OF_NUMBERS if key in record):
                    raise ValueError("it is no epoch's record")
                yield line, record
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{path} is damaged ({cause(error)}): delete it") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged in line {number} ({cause(error)}): delete that line") from error


def read_processes(folder: Path) -> list[Record]:
    """Return what environment.json says of each process that worked on a run."""
    path = folder / "environment.json"
    try:
        processes = read_json(path)["processes"]
        if not all(isinstance(process, dict) for process in processes):
            raise ValueError("it is no list of records")
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({cause(error)}): delete it") from error
    return list(processes)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file; one of ours is checked against its hash.

    Raises:
        UsageError: the file is missing, damaged, or not safetensors.
    """
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
            expected = (file.metadata() or {}).get(_HASH)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a safetensors file, or damaged") from error
    if expected is not None and expected != tensors_hash(tensors):
        raise UsageError(f"{path} is damaged: its weights are not those that were saved")
    return tensors


def read_masks(path: Path) -> Masks:
    """Return the masks of a file.

    Raises:
        UsageError: the file is missing, damaged, or holds something else.
    """
    try:
        check_regular(path)
        return Masks.load(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is damaged: it holds no masks") from error


def _defaults(kind: type, prefix: str = "") -> Record:
    """Return the defaults of a dataclass under dotted names."""
    return {f"{prefix}{field.name}": field.default for field in fields(kind) if field.default is not MISSING}


def dotted(nested: Record, prefix: str = "") -> Record:
    """Return nested fields under dotted names."""
    flat: Record = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _json(value: Record) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


DEFAULTS = {**_defaults(Recipe), **_defaults(Training, "base."), **_defaults(Training, "gsm.")}
