import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from gsm_sgd import GSM, Masks, keep_masked, magnitude_masks, prunable_parameters, sparsity_table


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))


def test_prunable_parameters_are_those_of_two_dimensions():
    assert list(prunable_parameters(net())) == ["0.weight", "3.weight"]


def test_tied_weights_are_listed_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable_parameters(model)) == ["0.weight"]


def test_a_name_that_two_parameters_have_is_no_name():
    groups = [{"params": [("weight", nn.Parameter(torch.randn(4, 4)))]} for _ in range(2)]
    assert list(GSM(groups, 0.1, compression=4).finalize()) == ["0", "1"]


# --- what wrappers add to names ---


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    model[3] = compiled(model[3])
    return model


WRAPPERS = [
    compiled,
    compiled_inside,
    nn.DataParallel,
    lambda model: nn.DataParallel(compiled(model)),
    lambda model: compiled(nn.DataParallel(model)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_masks_of_a_wrapped_model_have_the_bare_names(wrap):
    bare, wrapped = net(), wrap(net())
    assert list(prunable_parameters(wrapped)) == list(prunable_parameters(bare))
    assert sparsity_table(wrapped) == sparsity_table(bare)
    masks = GSM(wrapped.named_parameters(), 0.1, compression=4).finalize()
    assert list(masks) == ["0.weight", "3.weight"]
    keep_masked(torch.optim.AdamW(bare.named_parameters()), masks)
    assert sparsity_table(bare) == sparsity_table(wrapped) == masks.table()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_masks_with_any_names_meet_any_model(wrap):
    """Masks that the user made may have the wrapped names."""
    wrapped = dict(wrap(net()).named_parameters())
    masks = magnitude_masks({name: p for name, p in wrapped.items() if p.ndim >= 2}, compression=4)
    assert masks.keys() <= wrapped.keys()
    for parameters in (prunable_parameters(net()), dict(wrap(net()).named_parameters())):
        masks.apply_(parameters)
        assert sum(int(p.count_nonzero()) for p in parameters.values() if p.ndim >= 2) == 49


def test_a_wrapper_within_a_model_is_seen_through():
    """As pytorch's ImageNet example wraps VGG's features alone."""
    bare, wrapped = net(), net()
    wrapped[0] = nn.DataParallel(wrapped[0])
    assert list(prunable_parameters(wrapped)) == ["0.module.weight", "3.weight"]
    magnitude_masks(prunable_parameters(wrapped), compression=4).apply_(bare)
    magnitude_masks(prunable_parameters(net()), compression=4).apply_(wrapped)
    assert [row.nonzeros for row in sparsity_table(bare)] == [row.nonzeros for row in sparsity_table(wrapped)]


def test_a_module_that_is_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert list(prunable_parameters(model)) == ["module.weight", "head.weight"]
    model["weight"] = nn.ParameterList([torch.ones(4, 4)])
    one = torch.eye(4).bool()
    Masks({"module.weight": one}).apply_(model)
    assert torch.equal(model["module"].weight != 0, one)
    assert model["head"].weight.count_nonzero() == 16


def test_two_masks_for_one_parameter_are_refused():
    layer = nn.Linear(2, 2)
    masks = Masks({"weight": torch.eye(2).bool(), "_orig_mod.weight": ~torch.eye(2).bool()})
    with pytest.raises(ValueError, match="two masks are for one parameter"):
        masks.apply_(layer)
    assert layer.weight.count_nonzero() == 4


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
