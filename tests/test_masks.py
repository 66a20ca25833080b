import copy
import io
import json
import struct

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gsm_sgd import GSM, Masks, keep_masked, magnitude_masks, prunable_parameters, sparsity_table
from gsm_sgd.masks import mask_gradients, sparsity_rows
from reference_gsm import naive_top


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10))


def net_and_masks():
    """Return a net and masks of 49 of its 196 weights."""
    model = net()
    return model, magnitude_masks(prunable_parameters(model), compression=4)


def backward(model, seed=0):
    images = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=model[3].weight.dtype)
    loss = F.cross_entropy(model(images), torch.arange(8))
    loss.backward()
    return loss


def train(model, optimizer, steps=5):
    for seed in range(steps):
        model.zero_grad()
        backward(model, seed)
        optimizer.step()


def nonzeros(model):
    return sum(row.nonzeros for row in sparsity_table(model))


def assert_nonzero_where_kept(tensor_of, masks):
    """Check what a function returns for each name: the weight, or its gradient, say."""
    for name, mask in masks.items():
        assert torch.equal(tensor_of(name) != 0, mask), name


def gradients(model):
    return lambda name: model.get_parameter(name).grad


# --- Masks ---


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        ({"compression": 1}, 196),
        ({"compression": 2.5}, 78),
        ({"compression": np.float32(4)}, 49),
        ({"compression": torch.tensor(4)}, 49),
        ({"density": 0.25}, 49),
        ({"sparsity": 0.75}, 49),
        ({"num_kept": 49}, 49),
    ],
)
def test_magnitude_masks_keep_the_largest(budget, kept):
    weights = prunable_parameters(net())
    masks = magnitude_masks(weights, **budget)
    expected = naive_top([w.detach().abs() for w in weights.values()], kept)
    assert masks.num_kept == sum(int(mask.sum()) for mask in masks.values()) == kept
    assert masks.density() == kept / 196
    assert all(torch.equal(mask, naive) for mask, naive in zip(masks.values(), expected, strict=True))


def test_the_number_kept_is_not_rounded_to_the_budgets_precision():
    """In float32, 2**24 + 3 weights would be 2**24 + 4."""
    weights = {"w": torch.zeros(2**24 + 3, dtype=torch.float16)}
    assert magnitude_masks(weights, compression=np.float32(1)).num_kept == 2**24 + 3


def test_magnitude_masks_refuse_too_much():
    with pytest.raises(ValueError, match="leaves none of 196 weights; use at most 196"):
        magnitude_masks(prunable_parameters(net()), compression=197)


def test_apply_and_table():
    model, masks = net_and_masks()
    original = copy.deepcopy(model)
    masks.apply_(model)
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name), original.get_parameter(name) * mask)
    assert [row[:3] for row in masks.table()] == [("0.weight", (4, 1, 3, 3), 36), ("3.weight", (10, 16), 160)]
    assert [row.nonzeros for row in masks.table()] == [int(mask.sum()) for mask in masks.values()]
    assert sparsity_table(model) == masks.table()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint64, torch.complex64])
def test_weights_of_any_type_are_counted(dtype):
    assert sparsity_rows({"w": torch.eye(4).to(dtype)})[0].nonzeros == 4


def test_a_saved_file_loads_as_it_was(tmp_path):
    model, masks = net_and_masks()
    masks["3.weight"] = masks["3.weight"].t().contiguous().t()  # whatever the memory layout
    masks = Masks(reversed(masks.items()))  # in model order, which safetensors does not keep
    path = tmp_path / "masks.safetensors"
    path.write_bytes(b"an older file")
    masks.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["masks.safetensors"]
    loaded = Masks.load(str(path))
    assert isinstance(loaded, Masks)
    assert list(loaded) == ["3.weight", "0.weight"]
    assert loaded.table() == masks.table()
    assert all(loaded[name].dtype == torch.bool and torch.equal(loaded[name], mask) for name, mask in masks.items())
    loaded.apply_(model)
    assert_nonzero_where_kept(model.get_parameter, masks)


@pytest.mark.parametrize(
    "use",
    [
        lambda masks, model: masks.apply_(model),
        lambda masks, model: keep_masked(torch.optim.SGD(model.parameters(), 0.1), masks),
    ],
)
def test_positional_masks_meet_parameters_in_order(tmp_path, use):
    """Of parameters of one shape, and more than ten: a file has "10" before "2"."""
    layers = [nn.Linear(3, 3, bias=False) for _ in range(12)]
    masks = GSM(nn.Sequential(*layers).parameters(), 0.1, compression=2).finalize()
    assert list(masks) == [str(number) for number in range(12)]
    masks.save(tmp_path / "masks")
    for found in (masks, Masks.load(tmp_path / "masks")):
        for layer in layers:
            nn.init.ones_(layer.weight)
        use(found, nn.Sequential(*layers))
        assert all(torch.equal(layer.weight != 0, masks[str(number)]) for number, layer in enumerate(layers))


def file_of(entries, data=b"", length=None):
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="BOOL", shape=(4,), end=4):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


def pickled(masks):
    file = io.BytesIO()
    torch.save(masks, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file, or damaged"),
        (b"junk" * 99, "is not a safetensors file"),
        (pickled({"w": torch.ones(4).bool()}), "is not a safetensors file"),
        (file_of({}, length=2**62), "is not a safetensors file"),
        (file_of(entry(), bytes(3)), "is not a safetensors file"),
        (file_of(entry(shape=[2**40], end=2**40), bytes(4)), "is not a safetensors file"),
        (file_of(entry(shape=[2**40]), bytes(4)), "is not a safetensors file"),
        (file_of(entry(shape=[2**32, 2**32], end=0)), "is not a safetensors file"),
        (file_of({**entry(), "v": entry()["w"]}, bytes(4)), "is not a safetensors file"),
        (file_of({}), "holds something else than masks"),
        (file_of(entry("F32", [1]), bytes(4)), "holds something else than masks"),
        (file_of(entry("U8"), bytes(4)), "holds something else than masks"),
    ],
)
def test_damaged_and_hostile_files_are_refused(tmp_path, content, message):
    path = tmp_path / "masks.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"masks\.safetensors {message}"):
        Masks.load(path)


def test_a_file_that_cannot_be_read_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Masks.load(tmp_path / "nothing-here")
    with pytest.raises(OSError, match=r".+"):
        Masks.load(tmp_path)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"nope": torch.ones(10, 16).bool()}, "no prunable parameter is named 'nope'"),
        ({"3.weight": torch.ones(16, 10).bool()}, r"mask of '3.weight' has shape \(16, 10\), its parameter \(10, 16\)"),
        ({"0": torch.ones(10, 16).bool()}, "1 masks for 2 prunable parameters"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks, message):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        Masks(masks).apply_(model)
    with pytest.raises(ValueError, match=message):
        keep_masked(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# --- keep_masked: weights ---


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.SGD(params, 0.1, 0.9),
        lambda params: torch.optim.SGD(params, 0.1, 0.9, fused=True),
        lambda params: torch.optim.AdamW(params, 0.1),
        lambda params: GSM(params, 0.1, density=1),
    ],
)
def test_any_optimizer_keeps_zeros(make, named):
    model, masks = net_and_masks()
    optimizer = make(model.named_parameters() if named else model.parameters())
    keep_masked(optimizer, masks)
    assert nonzeros(model) == 49  # at once, not after the first step
    start = copy.deepcopy(model)
    train(model, optimizer)
    for name, mask in masks.items():
        moved = model.get_parameter(name) != start.get_parameter(name)
        assert moved.any()
        assert not moved[~mask].any()


def test_it_can_be_undone():
    model, masks = net_and_masks()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    handle = keep_masked(optimizer, masks)
    handle.remove()
    train(model, optimizer)
    assert nonzeros(model) == 196
    assert all(p.grad.count_nonzero() == p.numel() for p in prunable_parameters(model).values())
    copy.deepcopy(handle).remove()  # a copy has nothing to remove


def test_lbfgs_trains_the_kept_weights():
    model, masks = net_and_masks()
    optimizer = torch.optim.LBFGS(model.named_parameters(), line_search_fn="strong_wolfe")
    keep_masked(optimizer, masks)

    def closure():
        optimizer.zero_grad()
        return backward(model)

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100
    assert_nonzero_where_kept(model.get_parameter, masks)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_earlier_momenta_move_no_masked_weight(make):
    model, masks = net_and_masks()
    optimizer = make(model.named_parameters(), 0.1)
    train(model, optimizer)
    keep_masked(optimizer, masks)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert_nonzero_where_kept(model.get_parameter, masks)


def test_dense_weights_loaded_later_are_masked_by_the_next_step():
    model, masks = net_and_masks()
    dense = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.1)
    keep_masked(optimizer, masks)
    train(model, optimizer)
    model.load_state_dict(dense)
    train(model, optimizer, steps=1)
    assert_nonzero_where_kept(model.get_parameter, masks)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_model_are_free(how):
    model, masks = net_and_masks()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    keep_masked(optimizer, masks)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied = copy.deepcopy(model) if how == "deepcopy" else torch.load(file, weights_only=False)
    train(copied, torch.optim.SGD(copied.named_parameters(), 0.1))
    assert nonzeros(copied) == 196
    train(model, optimizer)
    assert nonzeros(model) == 49


def test_masks_of_a_bias():
    layer = nn.Linear(3, 3)
    nn.init.ones_(layer.bias)
    optimizer = GSM([{"params": list(layer.named_parameters()), "prunable": True}], 0.1, compression=2)
    keep_masked(torch.optim.SGD(layer.named_parameters(), 0.1), optimizer.finalize())
    assert int(layer.weight.count_nonzero() + layer.bias.count_nonzero()) == 6


# --- keep_masked: gradients ---


def test_gradients_of_masked_weights_are_zero_from_the_backward_pass_on():
    """So clipping counts the others alone, however often gradients are accumulated."""
    (model, masks), (free, _) = net_and_masks(), net_and_masks()
    masks.apply_(free)
    keep_masked(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    for seed in range(3):
        backward(model, seed)
        backward(free, seed)
        for name, mask in masks.items():
            assert gradients(free)(name)[~mask].any()
            assert torch.equal(gradients(model)(name), gradients(free)(name) * mask)
    theirs = [p.grad * masks[name] if name in masks else p.grad for name, p in free.named_parameters()]
    assert torch.equal(nn.utils.clip_grad_norm_(model.parameters(), 1.0), nn.utils.get_total_norm(theirs))


def test_gradients_set_by_hand_are_masked_by_the_step():
    model, masks = net_and_masks()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1, 0.9)
    keep_masked(optimizer, masks)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert_nonzero_where_kept(lambda name: optimizer.state[model.get_parameter(name)]["momentum_buffer"], masks)


def test_gradients_from_before_are_masked_at_once():
    model, masks = net_and_masks()
    backward(model)
    keep_masked(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert_nonzero_where_kept(gradients(model), masks)


def test_parameters_unfrozen_later_have_masked_gradients():
    model, masks = net_and_masks()
    model.requires_grad_(False)
    keep_masked(torch.optim.SGD(model.named_parameters(), 0.1), masks)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    backward(model)
    assert_nonzero_where_kept(gradients(model), masks)


def test_a_model_that_is_converted_later():
    model, masks = net_and_masks()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    keep_masked(optimizer, masks)
    train(model.double(), optimizer, steps=1)
    assert_nonzero_where_kept(gradients(model), masks)
    assert_nonzero_where_kept(model.get_parameter, masks)


def test_an_infinite_gradient_of_a_masked_weight_skips_no_step():
    model, masks = net_and_masks()
    optimizer = torch.optim.SGD(model.named_parameters(), 0.1)
    keep_masked(optimizer, masks)
    model[3].weight.register_hook(lambda grad: grad.masked_fill(~masks["3.weight"], torch.inf))
    before = model[3].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(F.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.arange(8))).backward()
    scaler.step(optimizer)
    assert torch.equal(model[3].weight != before, masks["3.weight"])


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_of_gradients():
    layer = nn.Linear(2, 1, bias=False)
    keep_masked(torch.optim.SGD(layer.named_parameters(), 0.1), {"weight": torch.tensor([[True, False]])})
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
    keep_masked(optimizer, masks)
    embedding(torch.tensor([1, 3, 1])).sum().backward()
    expected = torch.tensor([0.0, 2, 0, 1, 0]).view(5, 1) * masks["weight"]
    assert torch.equal(embedding.weight.grad.to_dense(), expected)
    optimizer.step()
    assert torch.equal(embedding.weight != 0, masks["weight"])


def test_mask_gradients_alone():
    """What an optimizer that masks its own weights needs."""
    layer = nn.Linear(3, 3, bias=False)
    handle = mask_gradients([(layer.weight, torch.eye(3).bool())])
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, 1 - torch.eye(3))
    handle.remove()
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, 2 - torch.eye(3))


# --- keep_masked: whose mask is it? ---


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


def test_wrapped_optimizers():
    model, masks = net_and_masks()
    wrapped = Wrapper(Wrapper(torch.optim.AdamW(model.named_parameters(), 0.1)))
    keep_masked(wrapped, masks)
    train(model, wrapped)
    assert nonzeros(model) == 49


def test_what_calls_no_hooks_is_refused_before_anything_changes():
    model, masks = net_and_masks()
    unhooked = Unhooked(torch.optim.AdamW(model.named_parameters(), 0.1))
    with pytest.raises(ValueError, match="Unhooked calls no hooks at its steps: give keep_masked the torch optimizer"):
        keep_masked(unhooked, masks)
    assert nonzeros(model) == 196
    backward(model)
    assert all(gradients(model)(name)[~mask].any() for name, mask in masks.items())


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_names_are_taken_from_the_model(wrap):
    """Groups as timm and the Transformers Trainer make them: by weight decay, without names."""
    model = net()
    masks = magnitude_masks(prunable_parameters(wrap(model)), compression=4)
    unnamed = [{"params": [p for p in model.parameters() if (p.ndim < 2) == flat]} for flat in (True, False)]
    optimizer = torch.optim.AdamW(unnamed, 0.1)
    with pytest.raises(ValueError, match=r"and the model: keep_masked\(optimizer, masks, model\)"):
        keep_masked(optimizer, masks)
    keep_masked(optimizer, masks, wrap(model))
    train(model, optimizer)
    assert_nonzero_where_kept(model.get_parameter, masks)


def test_masks_of_what_the_optimizer_does_not_train_are_refused():
    model, masks = net_and_masks()
    with pytest.raises(ValueError, match=r"the optimizer does not train 0\.weight, but a mask is of it"):
        keep_masked(torch.optim.SGD(model[3].parameters(), 0.1), masks, model)
    assert nonzeros(model) == 196


def test_groups_in_another_order_than_the_models():
    """Names keep masks and parameters of one shape apart; without them on both sides nothing is guessed."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    masks = {"0.weight": torch.eye(4).bool(), "1.weight": ~torch.eye(4).bool()}
    named = [{"params": [("1.weight", model[1].weight)]}, {"params": [("0.weight", model[0].weight)]}]
    unnamed = [{"params": [model[1].weight]}, {"params": [model[0].weight]}]
    numbered = {str(number): mask for number, mask in enumerate(masks.values())}
    for groups, theirs in ((unnamed, masks), (named, numbered)):
        with pytest.raises(ValueError, match="which mask belongs to which parameter"):
            keep_masked(torch.optim.SGD(copy.copy(groups), 0.1), theirs)
    keep_masked(torch.optim.SGD(named, 0.1), masks)
    assert_nonzero_where_kept(model.get_parameter, masks)
