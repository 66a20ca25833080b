"""The examples run as they stand, and end with exactly Q weights."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *words, launcher=()):
    command = [sys.executable, *launcher, EXAMPLES / f"{name}.py", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [
        tuple(int(number.replace(",", "")) for number in line)
        for line in re.findall(r"([\d,]+) of ([\d,]+)", done.stdout)
    ]


def needs(package):
    return pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}: pip install -e '.[examples]'")


@needs("lightning")
def test_lightning():
    assert run("lightning_loop", "synthetic", 4) == [(266_200 // 60, 266_200)] * 2  # by the masks, and by the weights


@needs("accelerate")
@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate(processes):
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone"] if processes > 1 else []
    assert run("accelerate_loop", "synthetic", 4, launcher=launcher) == [(266_200 // 60, 266_200)]


@needs("transformers")
def test_transformers_trainer():
    assert run("transformers_trainer", 20) == [(98_304 // 10, 98_304)] * 2  # as planned, and in the end


def test_language_model():
    assert run("language_model", 10) == [(98_304, 98_304), (98_304 // 10, 98_304)]


@pytest.mark.parametrize("name", ["lightning_loop", "accelerate_loop", "transformers_trainer"])
def test_loops_of_others_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
