"""The command `gsm`, also `python -m gsm_sgd`."""

import sys


def main() -> int:
    """Run the command line and return its exit status; say what to install if the extras are missing."""
    try:
        from .cli import run
    except ModuleNotFoundError as error:
        print(f"gsm: error: {error.name} is missing: pip install 'gsm-sgd[experiments]'", file=sys.stderr)
        return 2
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
