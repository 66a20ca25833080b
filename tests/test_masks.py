import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, apply_masks_, freeze, magnitude_masks, prunable_parameters, sparsity_table
from reference_gsm import naive_top


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))


def train(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.randn(8, 1, 4, 4, generator=generator)
        model.zero_grad()
        F.cross_entropy(model(images), torch.arange(8)).backward()
        optimizer.step()


def test_prunable_parameters_are_those_of_two_dimensions():
    assert list(prunable_parameters(net())) == ["0.weight", "3.weight"]


def test_tied_weights_are_listed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]


@pytest.mark.parametrize("compression", [1, 2.5, 19.6])
def test_magnitude_masks_keep_the_largest(compression):
    weights = prunable_parameters(net())
    masks = magnitude_masks(weights, compression)
    kept = int(196 / compression)
    assert sum(int(mask.sum()) for mask in masks.values()) == kept
    expected = naive_top([w.detach().abs() for w in weights.values()], kept)
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))


def test_magnitude_masks_refuse_too_much():
    with pytest.raises(ValueError, match="leaves none of 196 weights; use at most 196"):
        magnitude_masks(prunable_parameters(net()), 197)


def test_apply_masks_and_table():
    model = net()
    weights = prunable_parameters(model)
    original = {name: w.detach().clone() for name, w in weights.items()}
    masks = magnitude_masks(weights, 4)
    apply_masks_(weights, masks)
    for name, w in weights.items():
        assert torch.equal(w.detach(), original[name] * masks[name])
    rows = sparsity_table(model)
    assert [(row.name, row.shape, row.params) for row in rows] == [
        ("0.weight", (4, 1, 3, 3), 36),
        ("3.weight", (10, 16), 160),
    ]
    assert [row.nonzeros for row in rows] == [int(mask.sum()) for mask in masks.values()]
    assert sum(row.nonzeros for row in rows) == 49


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, 0.1, 0.9),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, fused=True),
        lambda params: torch.optim.AdamW(params, 0.1),
        lambda params: GSM(params, 0.1, compression=1),
    ],
)
def test_freeze_keeps_zeros_with_any_optimizer(make, named):
    model = net()
    weights = prunable_parameters(model)
    masks = magnitude_masks(weights, 4)
    optimizer = make(model.named_parameters() if named else model.parameters())
    freeze(optimizer, masks)
    start = {name: w.detach().clone() for name, w in weights.items()}
    assert all(not start[name][~masks[name]].any() for name in masks)  # at once, not after the first step
    train(model, optimizer)
    for name, w in weights.items():
        assert not w[~masks[name]].any()
        assert (w[masks[name]] != start[name][masks[name]]).any()


def test_freeze_can_be_undone():
    model = net()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    handle = freeze(optimizer, magnitude_masks(prunable_parameters(model), 4))
    handle.remove()
    train(model, optimizer)
    assert sum(row.nonzeros for row in sparsity_table(model)) == 196


def test_freeze_meets_groups_by_name():
    """Groups in another order than the model's: names keep masks and parameters of one shape apart."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    masks = {"0.weight": torch.eye(4).bool(), "1.weight": ~torch.eye(4).bool()}
    groups = [{"params": [("1.weight", model[1].weight)]}, {"params": [("0.weight", model[0].weight)]}]
    freeze(torch.optim.SGD(groups, 0.1), masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert torch.equal(model[1].weight != 0, masks["1.weight"])
    unnamed = [{"params": [model[1].weight]}, {"params": [model[0].weight]}]
    with pytest.raises(ValueError, match="named parameters"):
        freeze(torch.optim.SGD(unnamed, 0.1), masks)


def test_freeze_refuses_to_guess_between_groups():
    """Masks without names, or an optimizer without, would go by an order that groups may have changed."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    numbered = {0: torch.eye(4).bool(), 1: ~torch.eye(4).bool()}
    groups = [{"params": [("1.weight", model[1].weight)]}, {"params": [("0.weight", model[0].weight)]}]
    with pytest.raises(ValueError, match="which mask belongs to which parameter"):
        freeze(torch.optim.SGD(groups, 0.1), numbered)


def test_freeze_of_a_bias():
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.bias)
    optimizer = GSM([{"params": list(layer.named_parameters()), "prunable": True}], 0.1, compression=2)
    other = torch.optim.SGD(layer.named_parameters(), 0.1)
    freeze(other, optimizer.finalize())
    assert int(layer.weight.count_nonzero() + layer.bias.count_nonzero()) == 6


def test_masks_of_an_unnamed_gsm_fit_a_model():
    model = net()
    optimizer = GSM(model.parameters(), 0.1, compression=4)
    masks = optimizer.finalize()
    other = net(seed=1)
    apply_masks_(prunable_parameters(other), masks)
    assert sum(row.nonzeros for row in sparsity_table(other)) == 49


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"nope": torch.ones(10, 16).bool()}, "no prunable parameter is named 'nope'"),
        (
            {"3.weight": torch.ones(16, 10).bool()},
            r"mask '3.weight' has shape \(16, 10\), its parameter \(10, 16\)",
        ),
        ({0: torch.ones(10, 16).bool()}, "1 masks for 2 prunable parameters"),
    ],
)
def test_masks_that_do_not_fit(masks, message):
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply_masks_(prunable_parameters(model), masks)
    with pytest.raises(ValueError, match=message):
        freeze(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
