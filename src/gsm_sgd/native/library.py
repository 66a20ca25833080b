"""step.c as a library: compiled once by this machine's C compiler, and kept in the user's cache."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_SOURCE = Path(__file__).with_name("step.c")
_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fopenmp"]
# By what torch uses here: it looks at the processor with more care than -march=native, and rounds as these do.
_INSTRUCTIONS = {
    "AVX2": ["-mavx2", "-mfma", "-mpopcnt", "-mbmi"],
    "AVX512": ["-mavx2", "-mfma", "-mpopcnt", "-mbmi", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
_SECONDS = 60  # that the compiler may take; it takes less than one

_log = logging.getLogger("gsm_sgd")


@cache
def load_step() -> Callable[..., int] | None:
    """Return step.c's function, or None where it cannot be built; the log `gsm_sgd` says why not."""
    try:
        return _load_step()
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("steps use torch's operations, as step.c cannot be built here: %s", error)
        return None


def _load_step() -> Callable[..., int]:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or not torch.backends.openmp.is_available():
        raise OSError("there is no C compiler" if compiler is None else "torch has been built without OpenMP")
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions not in _INSTRUCTIONS:
        raise OSError(f"torch uses no AVX2 or AVX-512 on this processor, but {instructions}")
    flags = [*_FLAGS, *_INSTRUCTIONS[instructions]]
    key = [_SOURCE.read_text(), compiler, *flags, platform.machine(), torch.__version__]
    name = f"step-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsm-sgd"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (folder / name).exists():
            _build(compiler, flags, folder / name)
        return _opened(folder / name)
    except OSError:  # a cache that cannot be written to, or is damaged
        with tempfile.TemporaryDirectory() as apart:
            _build(compiler, flags, Path(apart) / name)
            return _opened(Path(apart) / name)


def _build(compiler: str, flags: list[str], path: Path) -> None:
    """Compile; several processes may at once, and none sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        compiled, linked = Path(folder) / "step.o", Path(folder) / path.name
        # Not linked to OpenMP's library: with torch's, which is loaded, its threads are those of torch.
        for command in (
            [compiler, *flags, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", "-nodefaultlibs", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS)
        linked.replace(path)


def _opened(path: Path) -> Callable[..., int]:
    step = ctypes.CDLL(str(path)).gsm_step
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    step.argtypes = [pointer, number, pointer, number, pointer, number, number, ctypes.c_int, ctypes.c_int]
    step.restype = ctypes.c_int
    return step
