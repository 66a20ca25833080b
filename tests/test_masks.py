import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from gsm_sgd import GSM, apply_masks_, freeze, magnitude_masks, prunable_parameters, sparsity_table
from gsm_sgd.masks import mask_gradients, sparsity_rows
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
    assert all(p.grad.count_nonzero() == p.numel() for p in prunable_parameters(model).values())
    copy.deepcopy(handle).remove()  # a copy has nothing to remove


def backward(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    loss = F.cross_entropy(model(torch.randn(8, 1, 4, 4, generator=generator)), torch.arange(8))
    loss.backward()
    return loss


def test_gradients_of_masked_weights_are_zero_from_the_backward_pass_on():
    """So clipping counts the others alone, however often gradients are accumulated."""
    model, free = net(), net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    apply_masks_(prunable_parameters(free), masks)
    freeze(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    for seed in range(3):
        backward(model, seed)
        backward(free, seed)
        for name, mask in masks.items():
            ours, theirs = (net.get_parameter(name).grad for net in (model, free))
            assert theirs[~mask].any()
            assert torch.equal(ours, theirs * mask)
    theirs = [p.grad * masks[name] if name in masks else p.grad for name, p in free.named_parameters()]
    assert torch.equal(nn.utils.clip_grad_norm_(model.parameters(), 1.0), nn.utils.get_total_norm(theirs))


def test_gradients_set_by_hand_are_masked_by_the_step():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1, 0.9)
    freeze(optimizer, masks)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, mask in masks.items():
        assert torch.equal(optimizer.state[model.get_parameter(name)]["momentum_buffer"] != 0, mask)


def test_gradients_that_were_there_before_freezing_are_masked():
    model = net()
    backward(model)
    masks = magnitude_masks(prunable_parameters(model), 4)
    freeze(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert all(torch.equal(model.get_parameter(name).grad != 0, mask) for name, mask in masks.items())


def test_an_infinite_gradient_of_a_masked_weight_skips_no_step():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    freeze(optimizer, masks)
    model[3].weight.register_hook(lambda grad: grad.masked_fill(~masks["3.weight"], torch.inf))
    before = model[3].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.arange(8))).backward()
    scaler.step(optimizer)
    assert torch.equal(model[3].weight != before, masks["3.weight"])


def test_lbfgs_trains_a_frozen_net():
    model = net()
    weights = prunable_parameters(model)
    masks = magnitude_masks(weights, 4)
    optimizer = torch.optim.LBFGS(model.named_parameters(), line_search_fn="strong_wolfe")
    freeze(optimizer, masks)

    def closure():
        optimizer.zero_grad()
        return backward(model)

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100
    assert not any(weights[name][~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_momenta_from_before_freezing_move_no_masked_weight(make):
    model = net()
    optimizer = make(model.named_parameters(), 0.1)
    train(model, optimizer)
    weights = prunable_parameters(model)
    masks = magnitude_masks(weights, 4)
    freeze(optimizer, masks)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert not any(weights[name][~mask].any() for name, mask in masks.items())


def test_dense_weights_loaded_after_freezing_are_masked_by_the_next_step():
    model = net()
    dense = copy.deepcopy(model.state_dict())
    masks = magnitude_masks(prunable_parameters(model), 4)
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    freeze(optimizer, masks)
    train(model, optimizer)
    model.load_state_dict(dense)
    train(model, optimizer, steps=1)
    assert all(torch.equal(model.get_parameter(name) != 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_frozen_model_are_free(how):
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    freeze(optimizer, masks)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = copy.deepcopy(model) if how == "deepcopy" else torch.load(file, weights_only=False)
    train(copied, torch.optim.SGD(copied.named_parameters(), 0.1))
    assert sum(row.nonzeros for row in sparsity_table(copied)) == 196
    train(model, optimizer)
    assert sum(row.nonzeros for row in sparsity_table(model)) == 49


def test_parameters_unfrozen_later_have_masked_gradients():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    model.requires_grad_(False)
    freeze(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    backward(model)
    assert all(torch.equal(model.get_parameter(name).grad != 0, mask) for name, mask in masks.items())


def test_a_model_converted_after_freezing():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    freeze(optimizer, masks)
    model.double()
    F.cross_entropy(model(torch.randn(8, 1, 4, 4).double()), torch.arange(8)).backward()
    assert all(torch.equal(model.get_parameter(name).grad != 0, mask) for name, mask in masks.items())
    optimizer.step()
    assert sum(row.nonzeros for row in sparsity_table(model)) == 49


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_of_gradients():
    layer = nn.Linear(2, 1, bias=False)
    freeze(torch.optim.SGD(layer.named_parameters(), 0.1), {"weight": torch.tensor([[True, False]])})
    inputs = torch.tensor([[3.0, 5.0]], requires_grad=True)
    layer(inputs).square().sum().backward(create_graph=True)  # gradient 2 (w x) x
    kept = float(layer.weight[0, 0].detach())
    assert layer.weight.grad.tolist() == [[pytest.approx(2 * 9 * kept), 0]]
    (again,) = torch.autograd.grad(layer.weight.grad.sum(), inputs)
    assert again.tolist() == [[pytest.approx(4 * 3 * kept), 0]]


def test_sparse_gradients_are_masked():
    embedding = nn.Embedding(5, 3, sparse=True)
    masks = {"weight": torch.arange(15).view(5, 3) % 2 == 0}
    optimizer = torch.optim.SGD(embedding.named_parameters(), 0.1)
    freeze(optimizer, masks)
    embedding(torch.tensor([1, 3, 1])).sum().backward()
    expected = torch.tensor([0.0, 2, 0, 1, 0]).view(5, 1) * masks["weight"]
    assert torch.equal(embedding.weight.grad.to_dense(), expected)
    optimizer.step()
    assert torch.equal(embedding.weight != 0, masks["weight"])


class Wrapper(torch.optim.Optimizer):
    """What Accelerate makes of an optimizer: a subclass that is not initialised as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Unhooked(torch.optim.Optimizer):
    """A wrapper that does not say where its optimizer is."""

    def __init__(self, optimizer):
        self.param_groups = optimizer.param_groups


def test_freeze_in_a_wrapper():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    wrapped = Wrapper(Wrapper(torch.optim.AdamW(model.named_parameters(), 0.1)))
    freeze(wrapped, masks)
    train(model, wrapped)
    assert sum(row.nonzeros for row in sparsity_table(model)) == 49


def test_freeze_refuses_what_calls_no_hooks_before_anything_changes():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    unhooked = Unhooked(torch.optim.AdamW(model.named_parameters(), 0.1))
    with pytest.raises(ValueError, match="Unhooked calls no hooks at its steps: give freeze the torch optimizer in it"):
        freeze(unhooked, masks)
    assert sum(row.nonzeros for row in sparsity_table(model)) == 196
    backward(model)
    assert all(model.get_parameter(name).grad[~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_freeze_takes_names_from_the_model(wrap):
    """Groups as timm and the Transformers Trainer make them: by weight decay, without names."""
    model = net()
    masks = magnitude_masks(prunable_parameters(wrap(model)), 4)
    unnamed = [{"params": [p for p in model.parameters() if (p.ndim < 2) == flat]} for flat in (True, False)]
    optimizer = torch.optim.AdamW([*unnamed], 0.1)
    with pytest.raises(ValueError, match=r"and the model: freeze\(optimizer, masks, model\)"):
        freeze(optimizer, masks)
    freeze(optimizer, masks, wrap(model))
    train(model, optimizer)
    assert [int(model[i].weight.count_nonzero()) for i in (0, 3)] == [int(mask.sum()) for mask in masks.values()]


def test_freeze_refuses_masks_of_what_the_optimizer_does_not_train():
    model = net()
    masks = magnitude_masks(prunable_parameters(model), 4)
    with pytest.raises(ValueError, match=r"the optimizer does not train 0\.weight, but a mask is of it"):
        freeze(torch.optim.SGD(model[3].parameters(), 0.1), masks, model)
    assert sum(row.nonzeros for row in sparsity_table(model)) == 196


def test_mask_gradients_alone():
    """What an optimizer that masks its own weights needs."""
    layer = nn.Linear(3, 3, bias=False)
    handle = mask_gradients([(layer.weight, torch.eye(3).bool())])
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, 1 - torch.eye(3))
    handle.remove()
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, 2 - torch.eye(3))


def test_freeze_meets_groups_by_name():
    """Groups in another order than the model's: names keep masks and parameters of one shape apart."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    masks = {"0.weight": torch.eye(4).bool(), "1.weight": ~torch.eye(4).bool()}
    groups = [{"params": [("1.weight", model[1].weight)]}, {"params": [("0.weight", model[0].weight)]}]
    freeze(torch.optim.SGD(groups, 0.1), masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert torch.equal(model[1].weight != 0, masks["1.weight"])
    unnamed = [{"params": [model[1].weight]}, {"params": [model[0].weight]}]
    with pytest.raises(ValueError, match="and the model"):
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
