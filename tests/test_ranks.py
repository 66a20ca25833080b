"""Runs by several processes that torchrun starts; what they train on is made up."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from gsm_sgd import Masks, cli
from gsm_sgd.experiments import ranks
from gsm_sgd.experiments.splits import Images
from test_cli import SHORT

pytestmark = pytest.mark.slow

RUN = "mine-x20-s0"


def torchrun(processes, *words, program=("-m", "--", "gsm_sgd"), restarts=0):
    """Run `gsm` in several processes and return what came of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--max-restarts", restarts]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *program, *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, env=environment, check=False
    )


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("count", range(1, 6))
def test_shards_make_up_the_batches(margin, count):
    """Of 11 images in batches of 4, the last of 3."""
    images = torch.randint(0, 255, (11, 6, 6, 1), dtype=torch.uint8)
    split = Images(images, torch.arange(11), margin=margin)
    shards = [split.shard(rank, count) for rank in range(count)]
    seen = torch.cat([labels for shard in shards for _, labels in shard.batches(4)])
    assert seen.sort().values.tolist() == list(range(11))
    for (pixels, labels), *mine in zip(*(part.shuffled(4, 7, 3, 1) for part in (split, *shards)), strict=True):
        for rank, (theirs, their_labels) in enumerate(mine):
            expected = list(range(rank, len(labels), count)) or [len(labels) - 1]
            assert torch.equal(their_labels, labels[expected])
            assert torch.equal(theirs, pixels[expected])


def test_the_mean_over_shares_is_that_of_the_batch(monkeypatch):
    losses = torch.rand(7)
    for count in range(1, 10):
        monkeypatch.setenv("WORLD_SIZE", str(count))
        mean = 0.0
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            mine = losses[rank::count] if rank < 7 else losses[-1:]
            mean += float(mine.mean()) * ranks.loss_weight(7) / count
        assert mean == pytest.approx(float(losses.mean()))


def test_two_processes_train_as_one_does(tmp_path):
    """Batches of 511 do not divide by two."""
    words = ["lottery", "lenet300", *SHORT, "--batch-size", "511", "--name", "mine"]
    assert cli.run([*words, "--out", str(tmp_path / "one")]) == 0
    done = torchrun(2, *words, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pruned net of seed 0") == 1
    assert "UserWarning" not in done.stderr
    one, two = (tmp_path / name / RUN for name in ("one", "two"))
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for ours, theirs in zip(*((run / "metrics.jsonl").read_text().splitlines() for run in (one, two)), strict=True):
        assert json.loads(theirs)["loss"] == pytest.approx(json.loads(ours)["loss"], rel=1e-4)
        assert json.loads(theirs)["top1"] == pytest.approx(json.loads(ours)["top1"], abs=0.5)
    result = json.loads((two / "result.json").read_text())
    assert result["nonzeros"] == result["prunable"] // 20
    (process,) = json.loads((two / "environment.json").read_text())["processes"]
    assert process["processes"] == 2


def test_two_processes_prune_by_another_method_as_one_does(tmp_path):
    """RigL's masks are chosen by gradients that are averages over all processes, and by a seed."""
    words = ["prune", "lenet300", "--dataset", "synthetic", "--gsm.epochs", "2", "--batch-size", "512"]
    words += ["--name", "mine", "--method", "rigl", "--rigl.every", "2", "--compression", "20"]
    assert cli.run([*words, "--out", str(tmp_path / "one")]) == 0
    done = torchrun(2, *words, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (Masks.load(tmp_path / name / RUN / "masks.safetensors") for name in ("one", "two"))
    assert one.num_kept == two.num_kept == 13_310
    agree = sum(int((mask & two[key]).sum()) for key, mask in one.items())
    assert agree > 0.99 * 13_310  # sums are rounded differently


def test_a_run_goes_on_when_torchrun_starts_it_again(tmp_path):
    program = tmp_path / "dies_once.py"
    program.write_text(
        textwrap.dedent("""
            import os, signal, sys
            from gsm_sgd import GSM, cli

            def step(self, closure=None, taken=[0], step=GSM.step):
                taken[0] += 1
                if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], taken[0]) == ("1", "0", 5):
                    os.kill(os.getpid(), signal.SIGKILL)
                return step(self, closure)

            GSM.step = step
            sys.exit(cli.run(sys.argv[1:]))
        """)
    )
    words = ["lottery", "lenet300", *SHORT, "--checkpoint-seconds", "0", "--out", tmp_path / "runs", "--name", "mine"]
    done = torchrun(2, *words, program=["--", program], restarts=1)
    assert done.returncode == 0, done.stderr
    assert "gsm: goes on in epoch 2 of 2" in done.stderr
    assert len(json.loads((tmp_path / "runs" / RUN / "environment.json").read_text())["processes"]) == 2
    result = json.loads((tmp_path / "runs" / RUN / "result.json").read_text())
    assert result["nonzeros"] == result["prunable"] // 20


def test_more_processes_than_images_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["prune", "lenet300", *SHORT, "--batch-size", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "gsm: error: batch_size 1 leaves some of 2 processes without an image\n"
    assert not list(tmp_path.iterdir())
