"""GSM with what else training loops have: each pair of features on one process, each alone on several."""

import copy
import itertools
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from gsm_sgd import GSM, GSMAdamW, Phase, Schedule, sparsity_table
from gsm_sgd.distributed import to_local
from ranks import full

pytestmark = pytest.mark.slow

# Of these the weights do not depend: with them training ends as it does without them.
NEUTRAL = [
    "GradScaler",
    "gradient accumulation",
    "torch.compile",
    "gradient checkpointing",
    "parameter groups",
    "EMA of weights",
    "resumed in the middle",
]
CHANGING = ["bfloat16 autocast", "gradient clipping", "tied weights", "LR scheduler"]
FEATURES = [*NEUTRAL, *CHANGING]
STEPS = 24
SETTINGS = {GSM: {"lr": 0.2, "momentum": 0.9}, GSMAdamW: {"lr": 0.01, "betas": (0.5, 0.9)}}
SCHEDULE = Schedule(STEPS, ramp=8 / STEPS, fade=4 / STEPS, cut=18 / STEPS)


class Net(nn.Module):
    def __init__(self, features):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.body = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))
        self.checkpointed = "gradient checkpointing" in features
        if "tied weights" in features:
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        change = checkpoint(self.body, hidden, use_reentrant=False) if self.checkpointed else self.body(hidden)
        return self.head(hidden + change)


class Training:
    """All that a training loop has, wrapped for one or for several processes."""

    def __init__(self, features, wrapping, kind):
        self.features = features
        self.model = Net(features)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if wrapping == "FSDP2":
            for model in (self.model, self.averaged.module):
                fully_shard(model.body)
                fully_shard(model)
        self.net = DistributedDataParallel(self.model) if wrapping == "DDP" else self.model
        if "torch.compile" in features:
            self.net = torch.compile(self.net, backend="aot_eager")
        named = list(self.model.named_parameters())
        if "parameter groups" in features:
            named = [{"params": named[:2]}, {"params": named[2:]}]
        self.optimizer = kind(named, **SETTINGS[kind], weight_decay=1e-2, compression=6, schedule=SCHEDULE)
        factor = (lambda step: 1 / (1 + step)) if "LR scheduler" in features else (lambda _: 1.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled="GradScaler" in features)

    def parts(self):
        return (self.model, self.averaged, self.optimizer, self.scheduler, self.scaler)

    def backward(self, tokens, labels, factor=1.0):
        autocast = "bfloat16 autocast" in self.features
        pieces = 2 if "gradient accumulation" in self.features else 1
        self.optimizer.zero_grad()
        for some, their_labels in zip(tokens.chunk(pieces), labels.chunk(pieces), strict=True):
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                loss = nn.functional.cross_entropy(self.net(some), their_labels) / pieces
            self.scaler.scale(loss * factor).backward()

    def step(self, tokens, labels):
        if self.scaler.is_enabled() and self.scheduler.last_epoch == 5:
            before = (
                copy.deepcopy(self.optimizer.state_dict()),
                [to_local(p.detach()).clone() for p in self.model.parameters()],
            )
            scale = self.scaler.get_scale()
            self.backward(tokens, labels, math.inf)
            self.scaler.step(self.optimizer)
            self.scaler.update(scale)
            assert str(self.optimizer.state_dict()) == str(before[0]), "a skipped step changed the state"
            for param, old in zip(self.model.parameters(), before[1], strict=True):
                assert torch.equal(to_local(param.detach()), old), "a skipped step changed a weight"
        self.backward(tokens, labels)
        if "gradient clipping" in self.features:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update(2.0**10)
        self.scheduler.step()
        if "EMA of weights" in self.features:
            self.averaged.update_parameters(self.model)


def train(features, wrapping=None, kind=GSM):
    """Return the weights that training with these features ends with."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if wrapping else (0, 1)
    training = Training(features, wrapping, kind)
    for number in range(STEPS):
        if "resumed in the middle" in features and number in (5, 11, 20):  # in the ramp, before the fade, after the cut
            states = [copy.deepcopy(part.state_dict()) for part in training.parts()]
            training = Training(features, wrapping, kind)
            for part, state in zip(training.parts(), states, strict=True):
                part.load_state_dict(state)
        generator = torch.Generator().manual_seed(number)
        tokens, labels = torch.randint(12, (2, 32), generator=generator)
        training.step(tokens[rank::ranks], labels[rank::ranks])

    optimizer, model = training.optimizer, training.model
    assert optimizer.phase is Phase.DONE
    assert sum(row.nonzeros for row in sparsity_table(model)) == optimizer.num_kept
    assert sum(row.params for row in sparsity_table(model)) == optimizer.num_prunable
    if "EMA of weights" in features:
        optimizer.masks.apply_(training.averaged.module)
        assert sum(row.nonzeros for row in sparsity_table(training.averaged.module)) == optimizer.num_kept
    return {name: full(parameter) for name, parameter in model.named_parameters()}


_EXPECTED = {}


def check(features, weights, kind=GSM):
    """Hold weights against those of training without what must not matter; autocast rounds, so it is left out."""
    assert all(weight.isfinite().all() for weight in weights.values())
    changing = frozenset(features) - set(NEUTRAL)
    if "bfloat16 autocast" not in features:
        if (changing, kind) not in _EXPECTED:
            _EXPECTED[changing, kind] = train(changing, kind=kind)
        for name, weight in _EXPECTED[changing, kind].items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
def test_each_pair_of_features(pair):
    check(pair, train(frozenset(pair)))


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_with_adamw(feature):
    check([feature], train(frozenset([feature]), kind=GSMAdamW), GSMAdamW)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("wrapping", ["DDP", "FSDP2"])
def test_each_feature_with_adamw_on_two_processes(ranks, wrapping, feature):
    for weights in ranks(2).run(train, frozenset([feature]), wrapping, GSMAdamW):
        check([feature], weights, GSMAdamW)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("wrapping", ["DDP", "FSDP2"])
@pytest.mark.parametrize("size", [2, 4])
def test_each_feature_on_several_processes(ranks, size, wrapping, feature):
    for weights in ranks(size).run(train, frozenset([feature]), wrapping):
        check([feature], weights)


def test_the_guide_has_the_matrix():
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "trainers.md").read_text()
    rows = "".join(f"| {feature} | ✓ | ✓ | ✓ |\n" for feature in FEATURES)
    assert rows in guide
    assert "The first seven features do not change the result" in guide
    assert len(NEUTRAL) == 7
