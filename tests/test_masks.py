import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gsm_sgd import GSM, apply_masks_, freeze, magnitude_masks, prunable_parameters, sparsity_table
from gsm_sgd.masks import sparsity_rows
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


# --- names that wrappers change ---

WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    "both, in the other order": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


def compile_inside(model):
    model[3] = torch.compile(model[3], backend="eager")
    return model


@pytest.mark.parametrize("wrap", [*WRAPPERS.values(), compile_inside])
def test_masks_of_a_wrapped_model_have_the_bare_names(wrap):
    bare, wrapped = net(), wrap(net())
    assert list(prunable_parameters(wrapped)) == list(prunable_parameters(bare))
    assert sparsity_table(wrapped) == sparsity_table(bare)
    optimizer = GSM(wrapped.named_parameters(), 0.1, compression=4)
    masks = optimizer.finalize()
    assert list(masks) == ["0.weight", "3.weight"]
    freeze(torch.optim.AdamW(bare.named_parameters()), masks)
    assert sparsity_table(bare) == sparsity_table(wrapped)
    assert sum(row.nonzeros for row in sparsity_table(bare)) == 49


@pytest.mark.parametrize("wrap", [*WRAPPERS.values(), compile_inside])
def test_masks_with_any_names_meet_any_model(wrap):
    """Masks of an older version have the wrapped names, and so has a dict that the user made."""
    wrapped = dict(wrap(net()).named_parameters())
    masks = magnitude_masks({name: p for name, p in wrapped.items() if p.ndim >= 2}, 4)
    assert masks.keys() & wrapped.keys() == masks.keys()
    for parameters in (prunable_parameters(net()), dict(wrap(net()).named_parameters())):
        apply_masks_(parameters, masks)
        assert sum(int(p.count_nonzero()) for p in parameters.values() if p.ndim >= 2) == 49


def test_a_wrapper_within_a_model_is_seen_through():
    """As pytorch's ImageNet example wraps VGG's features alone."""
    bare, wrapped = net(), net()
    wrapped[0] = nn.DataParallel(wrapped[0])
    assert list(prunable_parameters(wrapped)) == ["0.module.weight", "3.weight"]
    apply_masks_(prunable_parameters(bare), magnitude_masks(prunable_parameters(wrapped), 4))
    apply_masks_(prunable_parameters(wrapped), magnitude_masks(prunable_parameters(net()), 4))
    assert [row.nonzeros for row in sparsity_table(bare)] == [row.nonzeros for row in sparsity_table(wrapped)]


def test_a_module_that_is_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert list(prunable_parameters(model)) == ["module.weight", "head.weight"]
    model["weight"] = nn.ParameterList([torch.ones(4, 4)])
    one = magnitude_masks(prunable_parameters(model), 3)
    apply_masks_(prunable_parameters(model), {"module.weight": one["module.weight"]})
    assert torch.equal(model["module"].weight != 0, one["module.weight"])
    assert model["head"].weight.count_nonzero() == 16


def test_two_masks_for_one_parameter_are_refused():
    layer = nn.Linear(2, 2)
    masks = {"weight": torch.eye(2).bool(), "_orig_mod.weight": ~torch.eye(2).bool()}
    with pytest.raises(ValueError, match="two masks are for one parameter"):
        apply_masks_(prunable_parameters(layer), masks)
    assert layer.weight.count_nonzero() == 4


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64, torch.complex64])
def test_weights_of_any_type_are_counted(dtype):
    assert sparsity_rows({"w": torch.eye(4).to(dtype)})[0].nonzeros == 4


# --- torch.nn.utils.prune ---


def test_what_torch_prunes_is_counted_as_its_mask_leaves_it():
    model = net()
    prune.global_unstructured([(model[0], "weight"), (model[3], "weight")], prune.L1Unstructured, amount=0.75)
    prune.random_unstructured(model[3], "bias", 0.5)
    expected = [int(model[0].weight.count_nonzero()), int(model[3].weight.count_nonzero())]
    assert sum(expected) == 49
    table = sparsity_table(model)
    assert [(row.name, row.params, row.nonzeros) for row in table] == [
        ("0.weight", 36, expected[0]),
        ("3.weight", 160, expected[1]),
    ]
    with pytest.raises(ValueError, match=r"prune holds 0\.weight: .*\.remove\(model\.get_submodule\('0'\), 'weight'\)"):
        prunable_parameters(model)
    for module, name in ((model[0], "weight"), (model[3], "weight"), (model[3], "bias")):
        prune.remove(module, name)
    assert sparsity_table(model) == table
    assert list(prunable_parameters(model)) == ["0.weight", "3.weight"]


def test_other_parameters_with_such_names_are_left_alone():
    layer = nn.Linear(2, 2)
    layer.register_parameter("kernel_orig", nn.Parameter(torch.ones(2, 2)))
    layer.register_buffer("kernel_mask", torch.full((2, 2), 0.5))
    assert list(prunable_parameters(layer)) == ["weight", "kernel_orig"]
    assert [row.name for row in sparsity_table(layer)] == ["weight", "kernel_orig"]


# --- numbers ---


@pytest.mark.parametrize("compression", [np.float32(4), np.float64(4), np.int64(4), torch.tensor(4.0), torch.tensor(4)])
def test_numbers_may_be_numpy_or_tensors(compression):
    masks = magnitude_masks(prunable_parameters(net()), compression)
    assert sum(int(mask.sum()) for mask in masks.values()) == 49


def test_the_number_kept_is_not_rounded_to_the_ratio_s_precision():
    """In float32, 2**24 + 3 weights would be 2**24 + 4."""
    weights = {"w": torch.zeros(2**24 + 3, dtype=torch.float16)}
    assert int(magnitude_masks(weights, np.float32(1))["w"].sum()) == 2**24 + 3
