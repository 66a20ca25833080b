"""benchmarks/adaptive.py: rows keep what they say, rivals are what they are defined to be, no run is trained twice."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FILE = Path(__file__).parent.parent / "benchmarks" / "adaptive.py"


class Tiny(nn.Module):
    """Bytes to logits, with two matrices to prune."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, 16)
        self.blocks = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 256)

    def forward(self, tokens):
        hidden = self.bytes(tokens)
        return self.head(hidden + self.blocks(hidden))


@pytest.fixture
def adaptive(monkeypatch):
    path, threads = list(sys.path), torch.get_num_threads()
    spec = importlib.util.spec_from_file_location("adaptive", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "Transformer", Tiny)
    yield module
    sys.path[:] = path
    sys.modules.pop("language_model", None)
    torch.set_num_threads(threads)


# --- rows ---


def test_every_row_keeps_exactly_its_weights_and_is_another_one(adaptive):
    text = adaptive.texts()["train"]
    nets = {}
    for row, ratio in adaptive.pairs(adaptive.ROWS, [4.0, 2.0]):
        if ratio == 4 or adaptive.ROWS[row].only:
            settings = {"lr": 3e-3, "end": 0.6, "beta": 0.85}
            model = adaptive.train(adaptive.Run(row, ratio, settings, 0, 40), text)
            nets[row] = torch.cat([model.blocks[i].weight.detach().flatten() for i in (0, 2)])
            assert int(nets[row].count_nonzero()) == int(1024 / ratio), row
    assert list(nets) == list(adaptive.ROWS)
    assert len({tuple(net.tolist()) for net in nets.values()}) == len(nets)


def test_rows_for_one_ratio_are_left_out_at_others(adaptive):
    rows = ["dense", "gsm", "nm24", "block44"]
    assert adaptive.pairs(rows, [10.0, 4.0]) == [("dense", 1), ("gsm", 10), ("gsm", 4), ("block44", 4)]


def test_every_row_has_as_many_trials(adaptive):
    assert {len(adaptive.trials(row, 4.0, 40)) for row in adaptive.ROWS} == {4}


def one_step(adaptive, kind):
    """Take a step with one active and one passive weight; return the weight and its moments over their shares."""
    weight = nn.Parameter(torch.tensor([[2.0, 1.0]]))
    weight.grad = torch.tensor([[1.0, 0.5]])
    optimizer = kind([weight], 0.125, num_kept=1, weight_decay=0.0, passive_decay=4.0)
    optimizer.step()
    state = optimizer.state[weight]
    return weight.detach(), state["exp_avg"] / 0.1, state["exp_avg_sq"] / 1e-3


@pytest.mark.parametrize(
    ("kind", "weight", "first", "second"),
    [
        ("BothMasked", [1.875, 0.5], [1.0, 0.0], [1.0, 0.0]),
        ("MaskedAfter", [1.875, 0.5], [1.0, 0.5], [1.0, 0.25]),
        ("Coupled", [1.875, 1 - 0.125 * 4 / 4.5], [1.0, 4.0], [1.0, 4.5**2]),
    ],
)
def test_places_of_the_mask_and_the_decay_by_eye(adaptive, kind, weight, first, second):
    found = one_step(adaptive, getattr(adaptive, kind))
    torch.testing.assert_close(found, tuple(torch.tensor([row]) for row in (weight, first, second)))


@pytest.mark.parametrize("score", ["momentum", "update"])
def test_scores_are_of_the_moments_after_the_step(adaptive, score):
    weights, grads = torch.randn(4, 3), torch.randn(5, 4, 3)
    param = nn.Parameter(weights.clone())
    adam = torch.optim.AdamW([param], lr=0.0)
    state = {"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    for grad in grads:
        found = getattr(adaptive, score)(weights, grad, state)
        param.grad = grad.clone()
        adam.step()
        state = {key: value.clone() for key, value in adam.state[param].items()}
        over = state["exp_avg_sq"].sqrt() + 1e-8 if score == "update" else 1
        torch.testing.assert_close(found, (weights * state["exp_avg"] / over).abs())


# --- rivals and their naive twins ---


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def lockstep(adaptive, kind, steps=40):
    """Train a tiny net by SGD; yield its rival and, of all weights flat, values and gradients before each step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 4, bias=False))
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    rival = kind(optimizer, adaptive.Run("", 5.0, {"lr": 0.1, "end": 0.6, "beta": 0.85}, 0, steps))
    for _ in range(steps):
        optimizer.zero_grad()
        (net(torch.randn(8, 6)) - torch.randn(8, 4)).square().mean().backward()
        yield rival, flat(p.detach() for p in net.parameters()), flat(p.grad for p in net.parameters())
        optimizer.step()
    assert sum(int(p.count_nonzero()) for p in net.parameters()) == 10


def kept_at(step, steps=40):
    """Return how many of 50 weights are kept, ten in the end."""
    share = min(1.0, max(0.0, (step / steps - 0.3) / 0.3))
    return 50 - round(40 * (1 - (1 - share) ** 3))


def highest(scores, count):
    return torch.zeros_like(scores, dtype=torch.bool).index_fill(0, scores.topk(count).indices, True)


def test_platon_is_its_naive_twin(adaptive):
    importance = uncertainty = torch.zeros(50)
    mask, revived = torch.ones(50, dtype=torch.bool), False
    for step, (rival, weights, grads) in enumerate(lockstep(adaptive, adaptive.Platon)):
        torch.testing.assert_close(flat(rival.scores()), importance * uncertainty)
        if 0 < step <= 30 and (step % 10 == 0 or step == 30):
            mask = highest(importance * uncertainty, kept_at(step))
        assert torch.equal(flat(rival.masks), mask)
        if step % 10 == 0 or step > 30:
            assert not weights[~mask].any()
        else:
            revived |= bool(weights[~mask].any())
        if step < 30:
            now = (weights * grads).abs()
            importance = 0.85 * importance + 0.15 * now
            uncertainty = 0.95 * uncertainty + 0.05 * (now - importance).abs()
    assert revived


@pytest.mark.parametrize("kind", ["Movement", "Proximal"])
def test_latent_weights_move_as_those_of_the_naive_twin(adaptive, kind):
    latent, moved, mask, returned = None, torch.zeros(50), torch.ones(50, dtype=torch.bool), 0
    for step, (rival, weights, grads) in enumerate(lockstep(adaptive, getattr(adaptive, kind))):
        latent = weights if latent is None else latent
        if 0 < step <= 30:
            before, mask = mask, highest(latent.abs() if kind == "Proximal" else moved, kept_at(step))
            returned += int((mask & ~before).sum())
        assert torch.equal(flat(rival.masks), mask)
        torch.testing.assert_close(weights, latent * mask)
        if step < 30:
            moved = moved - latent * grads
            latent = latent - 0.1 * (grads if kind == "Proximal" else grads * mask)
        else:
            latent = (latent - 0.1 * grads) * mask
    assert returned


# --- the command ---


def command(adaptive, monkeypatch, folder):
    """Run the command on two rows; return how many nets it trained and what it wrote."""
    trained, train = [], adaptive.train
    monkeypatch.setattr(adaptive, "train", lambda run, text: trained.append(run) or train(run, text))
    words = ["--rows=dense,gsm", "--compression=4", "--seeds=0-1", "--steps=40", "--jobs=1"]
    monkeypatch.setattr(sys, "argv", ["adaptive.py", *words, f"--out={folder}", f"--json={folder}/found"])
    adaptive.main()
    monkeypatch.setattr(adaptive, "train", train)
    return len(trained), json.loads((folder / "found").read_text())


def test_settings_are_chosen_on_held_out_text_and_finished_runs_are_not_trained_again(
    adaptive, monkeypatch, tmp_path, capsys
):
    trained, found = command(adaptive, monkeypatch, tmp_path)
    assert trained == len(list(tmp_path.glob("*.json"))) == 2 * (4 + 1)
    for row in found["rows"]:
        best = min(row["trials"], key=lambda trial: trial["held_out"])
        assert row["settings"] == best["settings"]
        assert len(row["test"]["values"]) == 2
    assert [row["kept"] for row in found["rows"]] == [1024, 256]
    assert "0 of 8 runs are there already" in capsys.readouterr().out
    next(tmp_path.glob("*.json")).unlink()
    trained, again = command(adaptive, monkeypatch, tmp_path)
    assert trained == 1
    assert again["rows"] == found["rows"]
