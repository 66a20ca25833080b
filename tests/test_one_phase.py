"""one_phase: which parameters are pruned, left dense and decayed, the learning rate, and a net pruned by it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, NM, GSMAdamW, Phase, Schedule, one_phase
from gsm_sgd.optim.one_phase import lr_factor, parameter_groups


class Net(nn.Module):
    """A net that has a layer of each kind that can be left dense."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.bags = nn.EmbeddingBag(10, 8)
        self.pos_embed = nn.Parameter(torch.ones(1, 4, 8))
        self.cls_token = nn.Parameter(torch.ones(1, 1, 8))
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.single = nn.Conv2d(1, 8, 3)  # of one channel, and so in one group: not depthwise
        self.embedder = nn.Linear(8, 8)  # has a weight of an everyday name
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)


EMBEDDINGS = {"words.weight", "bags.weight", "pos_embed", "cls_token"}
OTHERS = {"grouped.weight", "single.weight", "embedder.weight", "fc.weight", "head.weight"}
VECTORS = {f"{name}.bias" for name in ("depthwise", "grouped", "single", "embedder", "norm", "fc", "head")} | {
    "norm.weight"
}


def names(groups):
    """Return the names of the groups' parameters by whether they are pruned and whether they decay."""
    found = {(group.get("prunable"), group["weight_decay"]): {name for name, _ in group["params"]} for group in groups}
    assert len(found) == len(groups)
    return found


@pytest.mark.parametrize(
    ("dense", "left"),
    [
        ((), set()),
        (("embeddings",), EMBEDDINGS),
        (("depthwise",), {"depthwise.weight"}),
        (("head",), {"head.weight"}),
        (("fc.weight",), {"fc.weight"}),
        (("*e*d.weight",), {"grouped.weight", "head.weight"}),
        (("fc.*", "head", "embeddings"), {"fc.weight", "head.weight"} | EMBEDDINGS),
    ],
    ids=lambda names: "+".join(sorted(names)),  # the same in all processes of pytest-xdist
)
def test_what_is_left_dense(dense, left):
    found = names(parameter_groups(Net(), 0.5, dense))
    weights = EMBEDDINGS | {"depthwise.weight"} | OTHERS
    expected = {(None, 0.5): weights - left, (False, 0.5): left, (False, 0.0): VECTORS}
    assert found == {key: members for key, members in expected.items() if members}


def test_a_model_that_is_one_layer():
    assert names(parameter_groups(nn.Linear(2, 2), 0.5, ["head"])) == {(False, 0.5): {"weight"}, (False, 0.0): {"bias"}}


def test_frozen_parameters_are_left_out():
    model = Net()
    model.fc.requires_grad_(False)
    model.words.requires_grad_(False)
    optimizer, _ = one_phase(model, 100, 0.1, sparsity=0.9)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["grouped.weight", "single.weight", "embedder.weight", "head.weight"],
        ["pos_embed", "cls_token", "bags.weight", "depthwise.weight"],
        [name for name, _ in model.named_parameters() if name in VECTORS - {"fc.bias"}],
    ]
    assert optimizer.num_prunable == 8 * 4 * 9 + 8 * 9 + 8 * 8 + 2 * 8
    with pytest.raises(ValueError, match=r"no parameter that is trained is named 'fc\.weight'"):
        one_phase(model, 100, 0.1, sparsity=0.9, dense=["fc.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dense": ["fc.wieght"]}, r"is named 'fc\.wieght': embeddings, depthwise, head are kinds of layers"),
        ({"dense": ["convs"]}, "no parameter that is trained is named 'convs'"),
        ({"dense": ["*"]}, "nothing to prune"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"lr": -1}, "must be finite and at least 0, not -1"),
        ({"weight_decay": -1}, r"weight_decay must be finite and at least 0, not -1\.0"),
        ({"sparsity": None}, "give exactly one of compression, density, sparsity and num_kept, not none"),
        ({"density": 0.1}, "give exactly one of .* not density and sparsity"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd' or 'adamw', not 'adam'"),
        ({"optimizer": "adamw", "momentum": 0.9}, "momentum does not go with optimizer='adamw', which takes betas"),
        ({"betas": (0.9, 0.99)}, "betas does not go with optimizer='sgd', which takes momentum"),
        ({"optimizer": "adamw", "betas": (0.9, 1.0)}, "betas must be at least 0 and below 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        one_phase(Net(), **{"total_steps": 100, "lr": 0.1, "sparsity": 0.9, **arguments})


@pytest.mark.parametrize("budget", [{"compression": 10}, {"density": 0.1}, {"sparsity": 0.9}, {"num_kept": 50}])
def test_the_optimizer_gets_what_was_asked_for(budget):
    optimizer, _ = one_phase(Net(), 200, 0.25, momentum=0.8, weight_decay=0.01, **budget)
    assert (optimizer.num_prunable, optimizer.num_kept) == (504, 50)
    assert optimizer.schedule == Schedule(200, peak_lr=0.25)
    for group in optimizer.param_groups:
        assert (group["momentum"], group["passive_decay"], group["first_lr"]) == (0.8, "auto", 0.25)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.01, 0.0]


def test_what_there_is_by_default():
    sgd, adamw = (one_phase(Net(), 10_000, 0.1, sparsity=0.9, optimizer=kind)[0] for kind in ("sgd", "adamw"))
    assert (type(sgd), type(adamw)) == (GSM, GSMAdamW)
    assert (sgd.param_groups[0]["momentum"], adamw.param_groups[0]["betas"]) == (0.9, (0.9, 0.999))
    assert [[group["weight_decay"] for group in one.param_groups] for one in (sgd, adamw)] == [
        [5e-4, 5e-4, 0.0],
        [1e-2, 1e-2, 0.0],
    ]
    assert (sgd.num_prunable, adamw.num_prunable) == (504, 504 - 16)  # with AdamW the head stays dense
    everything = one_phase(Net(), 10_000, 0.1, sparsity=0.9, optimizer="adamw", betas=(0.8, 0.95), dense=())[0]
    assert everything.num_prunable == sum(param.numel() for param in Net().parameters() if param.ndim > 1)
    assert everything.param_groups[0]["betas"] == (0.8, 0.95)


class Transformer(nn.Module):
    """Layers by the names of timm's, and a head tied to an embedding that is named after it."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.words = nn.Embedding(11, 8)
        self.lm_head.weight = self.words.weight


def test_a_transformer_is_pruned_in_its_blocks_alone():
    optimizer, _ = one_phase(Transformer(), 10_000, 1e-3, optimizer="adamw", sparsity=0.75)
    blocks = 3 * 8 * 8 + 8 * 8 + 2 * 8 * 16
    assert optimizer.num_prunable == blocks
    assert optimizer.summary == (
        f"keeps {blocks // 4} of {blocks} weights in 4 tensors; dense: pos_embed, cls_token, lm_head.weight, "
        "8 biases and other vectors"
    )
    names = {"block.self_attn.in_proj_weight", "block.self_attn.out_proj.weight", "block.linear1.weight"}
    assert set(optimizer.param_groups[0]["param_names"]) == names | {"block.linear2.weight"}


def test_a_pattern_takes_the_place_of_the_budget():
    optimizer, _ = one_phase(Transformer(), 10_000, 1e-3, optimizer="adamw", pattern=NM(2, 4))
    assert optimizer.num_kept * 2 == optimizer.num_prunable
    only, _ = one_phase(nn.Linear(8, 8, bias=False), 10_000, 0.1, sparsity=0.5)
    assert only.summary == "keeps 32 of 64 weights in 1 tensor; dense: nothing"


def test_the_learning_rate_rises_stays_and_falls():
    optimizer, scheduler = one_phase(Net(), 200, 0.5, sparsity=0.9)
    rates = []
    for _ in range(200):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rates.append([group["lr"] for group in optimizer.param_groups])
    with pytest.warns(UserWarning, match="more than total_steps=200 steps were taken"):
        scheduler.step()
    assert all(len(set(row)) == 1 for row in rates)
    rates = [row[0] for row in rates]
    assert rates[:6] == pytest.approx([0.5 * (step + 1) / 6 for step in range(6)])  # 3 %
    assert rates[6:101] == [0.5] * 95
    assert rates[100:201] == pytest.approx([0.25 + 0.25 * math.cos(math.pi * step / 100) for step in range(101)])


@pytest.mark.parametrize("total", [1, 2, 10, 33, 1_000])
def test_no_step_has_a_learning_rate_of_zero(total):
    factors = [lr_factor(total)(step) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert lr_factor(total)(total) == pytest.approx(0)


@pytest.mark.filterwarnings("error::gsm_sgd.CutWarning")
@pytest.mark.parametrize("trained", [True, False], ids=["from a trained net", "from a random start"])
def test_a_net_on_easy_data_loses_nine_in_ten_weights_and_no_accuracy(trained):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 16, generator=generator)
    labels = torch.arange(512) % 4
    points = centres[labels] + 0.3 * torch.randn(512, 16, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def train(steps, optimizer, scheduler=None):
        for step in range(steps):
            batch = slice(step % 8 * 64, step % 8 * 64 + 64)
            optimizer.zero_grad()
            F.cross_entropy(model(points[batch]), labels[batch]).backward()
            optimizer.step()
            if scheduler:
                scheduler.step()

    def accuracy():
        return (model(points).argmax(1) == labels).double().mean().item()

    if trained:
        train(60, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        assert accuracy() > 0.99
    optimizer, scheduler = one_phase(model, 600, 0.1, sparsity=0.9, momentum=0.8)
    train(420, optimizer, scheduler)
    assert optimizer.phase is Phase.FADE
    assert optimizer.passive_residual < 1e-4  # the cut is about to come, and takes nothing
    train(180, optimizer, scheduler)
    assert optimizer.phase is Phase.DONE
    assert sum(int(layer.weight.count_nonzero()) for layer in (model[0], model[2])) == optimizer.num_kept == 64
    assert optimizer.finalize().num_kept == 64
    assert accuracy() > 0.99


def test_positions_and_scales_stay_dense():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.layer_scale = nn.Parameter(torch.full((8, 1, 1), 1e-6))
            self.pos = nn.Parameter(torch.randn(4, 8))
            self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))

    optimizer, _ = one_phase(Branch(), 10_000, 0.1, sparsity=0.5)
    assert optimizer.num_prunable == 64


def test_a_name_alone_is_one_name():
    optimizer, _ = one_phase(Net(), 10_000, 0.1, sparsity=0.9, dense="head")
    assert optimizer.num_prunable == one_phase(Net(), 10_000, 0.1, sparsity=0.9, dense=["head"])[0].num_prunable
