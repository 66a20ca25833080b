"""What a result depends on besides its recipe: command, commit, versions and machine."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from . import ranks


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: command, commit, versions and machine."""
    program, *words = sys.argv
    command = ["gsm"] if Path(program).name in ("gsm", "__main__.py") else ["python", program]
    return {
        "command": shlex.join([*command, *words]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # AVX2 and AVX512 round differently
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": ranks.world_size(),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """Return a device's type, and for a GPU what it is."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _commit() -> str | None:
    """Return the commit of the source tree, marked if files differ from it, or None outside a checkout."""
    here = Path(__file__)

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # a checkout around an installed copy is not ours
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()
