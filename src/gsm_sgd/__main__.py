"""The command `gsm`, also `python -m gsm_sgd`."""

import os
import signal
import sys

_INTERRUPTED = 130


def main() -> int:
    """Run the command line and return its exit status."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else somebody wants it ignored, like nohup
    if ours:  # some packages swallow a KeyboardInterrupt while they are imported, and nothing is there to clean up
        signal.signal(signal.SIGINT, lambda *_: os._exit(_say_interrupted()))
    from .cli import load

    command = load(sys.argv[1:])
    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command()
    except KeyboardInterrupt:
        return _say_interrupted()


def _say_interrupted() -> int:
    """Say so, once, and return the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process is about to end: another one would add a traceback
    resumable = set(sys.argv[1:2]) & {"prune", "lottery", "compare", "ticket"}
    hint = ": give the same command again to go on where it was" if resumable else ""
    if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
        print(f"gsm: interrupted{hint}", file=sys.stderr, flush=True)
    return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
