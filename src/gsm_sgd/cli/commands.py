"""Which function carries a command out; whatever it raises becomes one line."""

import errno
import sys
from collections.abc import Sequence

from ..experiments import UsageError, data, ranks
from ..reports import html, tables
from . import bench, compare, files, runs, show
from .arguments import RUNS, parse
from .console import Console

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk, of a user's share of it, of what a file may have


def carry_out(argv: Sequence[str]) -> int:
    """Carry a command out and return the exit status: 0 done, 1 failed, 2 bad usage; `--debug` lets errors pass."""
    # of several processes the first one speaks
    console, log = (Console(stderr=stderr, markup=False, quiet=ranks.rank() > 0) for stderr in (False, True))
    try:
        options = parse([word for word in argv if word != "--debug"])
        if ranks.is_distributed() and options.command not in RUNS:
            raise UsageError(f"gsm {options.command} takes one process: start it without torchrun")
        match options.command:
            case "list":
                console.print(tables.recipes_table())
            case "data":
                console.say(data.describe(options.dataset, options.data_dir))
            case "bench":
                bench.bench(options, console, log)
            case "show":
                show.show(options, console, log)
            case "report":
                for missing in html.write_report(options.runs, options.output):
                    log.say(f"missing: {missing}")
                console.say(options.output)
            case "export":
                files.export_run(options, console)
            case "eval":
                files.evaluate_file(options, console)
            case "verify":
                files.verify(options, console)
            case "ticket save":
                files.save(options, console)
            case "ticket replay":
                files.replay_ticket(options, console, log)
            case "compare":
                return compare.compare_methods(options, console, log)
            case command:
                runs.run(command, options, console, log)
    except Exception as error:
        if "--debug" in argv:
            raise
        return _complain(error)
    return 0


def _complain(error: Exception) -> int:
    """Print one line that says what is wrong, and return the exit status."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None:
        again = "; make room, then give the same command again" if error.errno in _FULL else ""
        text = f"{error.filename}: {error.strerror}{again}"
    elif not isinstance(error, UsageError):
        text += f" ({type(error).__name__}; --debug shows where)"
    who = f"gsm, process {ranks.rank()}" if ranks.rank() else "gsm"
    print(f"{who}: error: {tables.printable(text)}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1
