"""benchmarks/transformer.py: what it compares keeps what it says, and its rivals are what their papers define."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

FILE = Path(__file__).parent.parent / "benchmarks" / "transformer.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("transformer_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_every_row_keeps_exactly_its_weights_and_is_trained_once(benchmark, tmp_path):
    cells = [*benchmark.cells(benchmark.ROWS, [4.0])]
    assert {row for row, _ in cells} == set(benchmark.ROWS)
    tasks = [(tmp_path, *cell, benchmark.grid(cell[0])[-1], 0, 40) for cell in cells]
    records = benchmark.all_of(tasks, 1, Console(quiet=True))  # each asserts what it keeps
    assert len({record["test"] for record in records}) == len(records)  # no two rows do the same
    for path in tmp_path.glob("*.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "test": 0.0}))
    assert {record["test"] for record in benchmark.all_of(tasks, 1, Console(quiet=True))} == {0.0}


def steps_of(benchmark, kind, steps, compression):
    """Train one weight matrix by plain SGD, and yield it with what a method makes of it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 5))
    method = kind([weight], steps, compression, end=0.5)
    for step in range(steps):
        gradient = torch.randn(6, 5)
        shown = weight.detach().clone()
        weight.grad = gradient.clone()
        with torch.no_grad():
            method.before_step(step)
            weight.sub_(0.1 * weight.grad)
            method.after_step(step + 1)
        yield step, gradient, shown, weight.detach().clone(), method


def test_movement_adds_up_the_moves_away_from_zero(benchmark):
    latent = moved = None
    mask = torch.ones(6, 5, dtype=torch.bool)
    for step, gradient, shown, weight, method in steps_of(benchmark, benchmark.Movement, 40, 5):
        latent = shown if latent is None else latent
        moved = torch.zeros(6, 5) if moved is None else moved
        moved -= gradient * latent
        latent = latent - 0.1 * gradient * mask
        if step + 1 <= 32:
            count = int(method.masks[0].sum())
            mask = moved >= moved.flatten().topk(count).values[-1]
        assert torch.equal(method.masks[0], mask)
        torch.testing.assert_close(weight, latent * mask)
    assert int(mask.sum()) == 6


def test_platon_keeps_the_largest_means_times_deviations(benchmark):
    mean = deviation = torch.zeros(6, 5)
    for step, gradient, shown, weight, method in steps_of(benchmark, benchmark.Platon, 40, 5):
        score = (shown * gradient).abs()  # what was cut begins at zero, and moves until the next choice
        mean = 0.85 * mean + 0.15 * score
        deviation = 0.95 * deviation + 0.05 * (score - mean).abs()
        if (step + 1) % 10 == 0 and step + 1 <= 32:
            kept = (mean * deviation).flatten().topk(int(method.masks[0].sum())).indices
            expected = torch.zeros(30, dtype=torch.bool)
            expected[kept] = True
            assert torch.equal(method.masks[0].flatten(), expected)
            assert not weight[~method.masks[0]].any()
        elif 11 < step < 19:
            assert weight[~method.masks[0]].all()
    assert int(method.masks[0].sum()) == int((weight != 0).sum()) == 6


def test_proximal_weights_come_back(benchmark):
    masks = [method.masks[0].clone() for *_, method in steps_of(benchmark, benchmark.Proximal, 40, 5)]
    gone = ~masks[20]
    assert any((mask & gone).any() for mask in masks[21:])
    assert all(int(mask.sum()) == 6 for mask in masks[19:])
    assert all(torch.equal(mask, masks[-1]) for mask in masks[31:])
