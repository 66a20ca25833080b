"""The command `gsm`: a file for each group of commands, imported once one is called for, as torch takes seconds."""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from .. import __version__
from ..experiments import suggestion

COMMANDS: dict[str, dict[str, str]] = {
    "train": {
        "prune": "train with GSM, or another method, to an exact sparsity",
        "lottery": "find winning tickets by GSM and by magnitude, and train them",
        "compare": "several methods at several ratios and seeds: the frontier",
    },
    "look": {
        "list": "the recipes, the paper's figures and what the presets cost",
        "show": "tables of runs, finished or not, or the layers of a file",
        "report": "one HTML page about runs",
        "eval": "measure the accuracy of a run or a file",
    },
    "give away": {
        "export": "write a pruned net as a small file, ONNX, safetensors or HDF5",
        "verify": "check all that a sparse file states of itself",
        "ticket": "store a winning ticket in a few KB, or train it again",
    },
    "measure": {
        "bench": "time an optimizer step, or the nets of runs",
        "data": "fetch a data set and verify it",
    },
}
EXAMPLES: dict[str, tuple[str, str]] = {
    "prune": ("gsm prune lenet300 --gsm.epochs 24", "gsm prune resnet20 --model mynet.py:make_net --sparsity 0.9"),
    "lottery": ("gsm lottery lenet300 --seeds 0-2", "gsm lottery lenet5 --compression 300"),
    "compare": (
        "gsm compare lenet300 --methods gsm,rigl --compression 10,60 --seeds 0-4",
        "gsm compare lenet300 --holdout 5000 --tune gsm.lr=0.05,0.1 rigl.fraction=0.3",
    ),
    "list": ("gsm list", "gsm list | less"),
    "show": ("gsm show runs/*", "gsm show runs/* --csv runs.csv"),
    "report": ("gsm report runs/*", "gsm report RUN -o lenet.html"),
    "eval": ("gsm eval RUN", "gsm eval pruned.onnx --recipe RUN/recipe.yaml"),
    "export": ("gsm export RUN", "gsm export RUN --format onnx -o net.onnx"),
    "verify": ("gsm verify pruned.sparse.safetensors.xz", "gsm verify pruned.sparse.safetensors.xz --accuracy"),
    "ticket": ("gsm ticket save RUN", "gsm ticket replay RUN/ticket.xz"),
    "bench": ("gsm bench step resnet56", "gsm bench inference RUN"),
    "data": ("gsm data mnist", "gsm data cifar10 --data-dir DATA"),
}


def run(argv: Sequence[str]) -> int:
    """Run `gsm` with its arguments and return the exit status: 0 done, 1 failed, 2 bad usage."""
    return load(argv)()


def load(argv: Sequence[str]) -> Callable[[], int]:
    """Import what a command takes, and return what carries it out; the help takes next to nothing."""
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        return lambda: _say(_help())
    if first == "--version":
        return lambda: _say(f"gsm-sgd {__version__}")
    known = [name for group in COMMANDS.values() for name in group]
    if first not in known:
        what, choices = ("option", ["--help", "--version"]) if first.startswith("-") else ("command", known)
        return lambda: _say(f"gsm: error: unknown {what} {first!r}: {suggestion(first, choices)}", sys.stderr, status=2)
    try:
        with _loading(first):
            carry_out = importlib.import_module(".commands", __name__).carry_out
    except ModuleNotFoundError as error:
        missing = f"gsm: error: {error.name} is missing: in a clone of gsm-sgd, pip install -e '.[experiments]'"
        return lambda: _say(missing, sys.stderr, status=2)
    return lambda: carry_out(argv)


def _say(text: str, file: TextIO | None = None, status: int = 0) -> int:
    print(text, file=file or sys.stdout)
    return status


def _help() -> str:
    """Return the commands by what they are for, with examples."""
    lines = ["usage: gsm COMMAND [options]", "", "Train a neural network to an exact, chosen sparsity."]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<9}{text}" for name, text in commands.items())]
    lines += ["", "examples:", f"  {EXAMPLES['prune'][0]}", f"  {EXAMPLES['prune'][1]}", f"  {EXAMPLES['report'][0]}"]
    return "\n".join([*lines, "", "gsm COMMAND --help shows the options of a command."])


@contextmanager
def _loading(command: str) -> Iterator[None]:
    """Show on a terminal that something happens."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print(f"gsm {command}: loading PyTorch ...", end="", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
