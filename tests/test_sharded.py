"""Several processes: what is chosen and trained does not depend on how weights are spread over them."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gsm_sgd import (
    GSM,
    NM,
    Block,
    GSMAdamW,
    Masks,
    Phase,
    Schedule,
    keep_masked,
    magnitude_masks,
    prunable_parameters,
    sparsity_table,
)
from gsm_sgd.distributed import is_dtensor
from gsm_sgd.masks import sparsity_rows
from gsm_sgd.patterns import Pattern
from ranks import full

pytestmark = pytest.mark.slow
SHAPES = [(7, 5), (1, 9), (16, 3, 3, 3), (4, 4), (2, 50)]
TOTAL = sum(map(math.prod, SHAPES))


def weights(seed, ties):
    """Return tensors of odd shapes; of few different values, many of them zero, if there are to be ties."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(tensor * 1.5).round() for tensor in tensors] if ties else tensors


def layouts():
    """Return meshes and placements that spread a weight over all processes in different ways."""
    line = init_device_mesh("cpu", (dist.get_world_size(),))
    found = [(line, [placement]) for placement in (Shard(0), Shard(1), Replicate())]
    if line.size() == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [(grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Shard(1)]), (grid, [Shard(0), Shard(0)])]
    return found


# --- the choice ---


def choose_by_magnitude(ties, folder):
    """Compare masks of sharded weights with those of whole ones, at several ratios; save and load them."""
    whole = {str(number): weight for number, weight in enumerate(weights(0, ties))}
    for mesh, placements in layouts():
        spread = {key: distribute_tensor(weight, mesh, placements) for key, weight in whole.items()}
        spread["3"] = whole["3"].clone()  # and one that is whole on every process
        for compression in (1, 1.01, 7.3, TOTAL):
            masks = magnitude_masks(spread, compression=compression)
            expected = magnitude_masks(whole, compression=compression)
            assert all(torch.equal(full(masks[key]), mask) for key, mask in expected.items()), (placements, compression)
            assert masks.table() == expected.table()
        masks.save(folder / "masks")  # by all processes at once
        loaded = Masks.load(folder / "masks")
        assert all(torch.equal(loaded[key], mask) for key, mask in expected.items())
        loaded.apply_(spread)
        rows = sparsity_rows(spread)
        assert sum(row.nonzeros for row in rows) == 1
        assert [row.shape for row in rows] == SHAPES


@pytest.mark.parametrize("ties", [False, True])
def test_magnitude_masks_do_not_depend_on_how_weights_are_spread(ranks, tmp_path, ties):
    ranks(4).run(choose_by_magnitude, ties, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["masks"]


def spread_parameters(mesh, placements, ties=False, dtype=torch.float32):
    """Return parameters of which the third is whole on every process where the mesh is a grid."""
    params = [nn.Parameter(distribute_tensor(weight.to(dtype), mesh, placements)) for weight in weights(0, ties)]
    if mesh.ndim == 2:
        params[2] = nn.Parameter(full(params[2]))
    return params


def choose_at_random():
    """Return which weights are active in each of two steps and all layouts."""
    chosen = []
    for mesh, placements in layouts():
        params = spread_parameters(mesh, placements)
        settings = {"momentum": 0.0, "weight_decay": 0.5, "passive_decay": 0.0}  # passive weights do not move
        optimizer = GSM(params, 0.1, num_kept=99, score="random", **settings)
        for _ in range(2):
            before = [full(param) for param in params]
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            chosen.append([full(param) != old for param, old in zip(params, before, strict=True)])
    return chosen


def test_random_chooses_once_and_the_same_on_all_copies(ranks):
    first, *others = ranks(4).run(choose_at_random)
    for number, masks in enumerate(first):
        assert sum(int(mask.sum()) for mask in masks) == 99
        for theirs in (*(other[number] for other in others), first[number - number % 2]):
            assert all(torch.equal(one, two) for one, two in zip(masks, theirs, strict=True))


class Pairs(Pattern):
    size = 2


def use_a_pattern(pattern, layout, shape, steps):
    mesh, placements = layouts()[layout]
    param = nn.Parameter(distribute_tensor(torch.ones(shape), mesh, placements))
    budget = {} if pattern.density else {"compression": 2}
    optimizer = GSM([("layer", param)], 0.1, **budget, pattern=pattern)
    param.grad = torch.ones_like(param)
    optimizer.step() if steps else optimizer.finalize()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    ("pattern", "layout", "shape", "message"),
    [
        (Pairs(), 0, (8, 8), "the pattern Pairs does not take DTensors yet: use single weights"),
        (NM(2, 4), 1, (8, 8), "parameter 'layer' is sharded within units of NM(2, 4): shard it along another axis, or"),
        (Block(4, 4), 0, (8, 8), "parameter 'layer' is sharded within units of Block(4, 4)"),
        (Block(4, 1), 0, (20, 8), "parameter 'layer' is sharded within units of Block(4, 1)"),  # but for the first part
        (Block(1, 2), 1, (8, 8, 2), "parameter 'layer' is sharded within units of Block(1, 2)"),
    ],
)
def test_patterns_whose_units_are_cut_are_refused_on_every_process(ranks, pattern, layout, shape, message, steps):
    errors = ranks(4).errors(use_a_pattern, pattern, layout, shape, steps)
    assert len(set(errors)) == 1
    assert errors[0].startswith(f"ValueError: {message}")


def train_a_pattern_in_lockstep(pattern, kind, ties, layout):
    """Train whole and spread weights alike through a schedule: the masks are the same, the counts exact."""
    mesh, placements = layouts()[layout]
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (16, 8, 1, 3), (24, 16)]
    whole = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    if ties:
        for param in whole:
            param.data = param.detach().sign()
    spread = [nn.Parameter(distribute_tensor(param.detach().clone(), mesh, placements)) for param in whole]
    settings = {"pattern": pattern, "schedule": Schedule(12, ramp=1 / 3, fade=1 / 6, cut=5 / 6)}
    settings |= {} if pattern.density else {"compression": 7.3}
    optimizers = [kind(side, 0.1, **settings) for side in (whole, spread)]
    for _ in range(12):
        for ours, theirs in zip(whole, spread, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
            ours.grad = ours.grad.sign() if ties else ours.grad
            theirs.grad = distribute_tensor(ours.grad, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
        for ours, theirs in zip(whole, spread, strict=True):
            torch.testing.assert_close(full(theirs), ours.detach(), rtol=1e-12, atol=1e-12)
    expected, masks = (optimizer.finalize() for optimizer in optimizers)
    assert all(torch.equal(full(masks[key]), mask) for key, mask in expected.items())
    assert masks.num_kept == optimizers[0].num_kept == optimizers[1].num_kept


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [(NM(2, 4), 0), (NM(1, 8), 0), (NM(1, 2), 1), (NM(2, 4), 3), (NM(2, 4), 4), (Block(2, 4), 0), (Block(1, 8), 5)],
)
@pytest.mark.parametrize("kind", [GSM, GSMAdamW])
def test_patterns_do_not_depend_on_how_weights_are_spread(ranks, pattern, kind, ties, layout):
    ranks(4).run(train_a_pattern_in_lockstep, pattern, kind, ties, layout)


# --- the update ---


def signed(weight, grad, state):
    return 100 * weight * grad


def train_in_lockstep(ties, score, kind):
    """Train whole and spread weights alike, through ramp, fade and cut; all must stay the same.

    But for rounding: where a vector register is not full torch's kernels round in another way.
    """
    settings = {"weight_decay": 1e-2, "compression": 7.3}
    settings |= {"momentum": 0.9, "nesterov": True} if kind is GSM else {"betas": (0.5, 0.9)}
    for mesh, placements in layouts():
        spread = spread_parameters(mesh, placements, ties, torch.float64)
        whole = [nn.Parameter(full(param)) for param in spread]
        biases = nn.Parameter(torch.ones(5)), nn.Parameter(distribute_tensor(torch.ones(5), mesh))
        pairs = [biases, *zip(whole, spread, strict=True)]
        schedule = Schedule(12, ramp=1 / 3, fade=1 / 6, cut=5 / 6)
        settings |= {"schedule": schedule, "score": score}
        optimizers = [kind(side, 0.1, **settings) for side in zip(*pairs, strict=True)]
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            for ours, theirs in pairs:
                theirs.grad = ours.grad = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
                if isinstance(theirs, DTensor):
                    theirs.grad = distribute_tensor(ours.grad, mesh, theirs.placements)
            for optimizer in optimizers:
                optimizer.step()
            assert optimizers[0].num_active == optimizers[1].num_active
            for ours, theirs in pairs:
                torch.testing.assert_close(full(theirs), ours.detach(), rtol=1e-12, atol=1e-12)
        assert optimizers[1].phase is Phase.DONE
        kept = optimizers[0].num_kept
        assert sum(int(full(mask).sum()) for mask in optimizers[1].finalize().values()) == kept
        assert sum(row.nonzeros for row in sparsity_rows(dict(enumerate(spread)))) == kept


@pytest.mark.parametrize(
    ("size", "ties", "score", "kind"),
    [
        (4, False, "taylor", GSM),
        (4, True, "taylor", GSM),
        (4, False, signed, GSM),
        (2, False, "taylor", GSM),
        (2, True, "magnitude", GSM),
        (4, True, "taylor", GSMAdamW),
        (4, False, "fisher", GSMAdamW),
        (2, True, "taylor", GSMAdamW),
    ],
    ids=["four", "ties", "scores below zero", "two", "magnitude", "AdamW", "fisher", "two by AdamW"],
)
def test_training_does_not_depend_on_how_weights_are_spread(ranks, size, ties, score, kind):
    ranks(size).run(train_in_lockstep, ties, score, kind)


def cut_ties_of_one_weight():
    """Update a weight all of whose importances are equal: the first ones in the model are active, on each copy."""
    for mesh, placements in layouts():
        weight = nn.Parameter(distribute_tensor(torch.ones(6, 8), mesh, placements))
        optimizer = GSM([weight], 0.5, momentum=0, weight_decay=0, compression=3)
        weight.grad = distribute_tensor(torch.ones(6, 8), mesh, placements)
        optimizer.step()
        expected = torch.ones(48).index_fill(0, torch.arange(16), 0.5).view(6, 8)
        assert torch.equal(full(weight), expected), placements


@pytest.mark.parametrize("size", [4, 2])
def test_ties_of_one_weight_are_cut_alike_on_all_its_copies(ranks, size):
    ranks(size).run(cut_ties_of_one_weight)


def fade_without_gradients():
    """Train a sharded weight, which has no gradient in the fade, and a bias beside it, as one process trains them."""
    mesh, _ = layouts()[0]
    torch.manual_seed(0)
    start = torch.randn(8, 8)
    ends = []
    for weight in (nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])), nn.Parameter(start.clone())):
        bias = nn.Parameter(torch.ones(8))
        schedule = Schedule(20, ramp=0.0, fade=0.9, cut=1.0)
        optimizer = GSM([("weight", weight), ("bias", bias)], 0.1, density=0.25, schedule=schedule)
        for step in range(8):
            torch.manual_seed(step)
            grad, bias.grad = torch.randn(8, 8), torch.randn(8)
            weight.grad = None
            if step < 4:
                weight.grad = distribute_tensor(grad, mesh, [Shard(0)]) if is_dtensor(weight) else grad
            optimizer.step()
        ends.append([full(weight), bias.detach()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_sharded_weights_without_a_gradient_fade_beside_a_bias_that_has_one(ranks):
    ranks(2).run(fade_without_gradients)


# --- FSDP2 and DDP ---


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 3))


def sharded_net():
    model = Net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def batch_of(step, mine=slice(None)):
    """Return images and labels of a step, or a part of them."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 20, generator=generator)[mine], torch.randint(3, (8,), generator=generator)[mine]


def batch(step):
    """Return the part that is this process's."""
    return batch_of(step, slice(dist.get_rank(), None, dist.get_world_size()))


SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "compression": 10.0}
ADAMW = {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 1e-3, "compression": 10.0}
both = pytest.mark.parametrize(("kind", "settings"), [(GSM, SETTINGS), (GSMAdamW, ADAMW)], ids=["SGD", "AdamW"])
SCHEDULE = Schedule(16, ramp=5 / 16, fade=3 / 16, cut=10 / 16)


def backward(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()


def train(model, optimizer, batches):
    for images, labels in batches:
        optimizer.zero_grad()
        backward(model, images, labels)
        optimizer.step()


def assert_close(spread, whole):
    for ours, theirs in zip(spread, whole, strict=True):
        torch.testing.assert_close(full(ours), theirs.detach())


def check_masked_gradients(model, masks):
    """Raise if the gradients of a model, whole on each process or spread over them, are not those of kept weights."""
    for name, mask in masks.items():
        grad = full(model.get_parameter(name).grad)
        assert grad.any()
        assert not grad[~full(mask)].any()


def train_by_fsdp(kind, settings):
    """Train a model by FSDP2 on a part of each batch, and the same model on all of it."""
    whole, spread = Net(), sharded_net()
    optimizers = [kind(model.named_parameters(), **settings) for model in (whole, spread)]
    for number in range(10):
        train(whole, optimizers[0], [batch_of(number)])
        train(spread, optimizers[1], [batch(number)])
        assert_close(spread.parameters(), whole.parameters())
    expected, masks = (optimizer.finalize() for optimizer in optimizers)
    assert all(torch.equal(full(masks[name]), mask) for name, mask in expected.items())
    assert sum(row.nonzeros for row in sparsity_table(spread)) == masks.num_kept == optimizers[1].num_kept
    assert sparsity_table(spread) == sparsity_table(whole)
    assert spread[0].weight.to_local().shape[0] < 33

    for kept in (masks, expected):  # spread as the weights are, and whole
        retrained = torch.optim.SGD(spread.named_parameters(), lr=0.1)
        handle = keep_masked(retrained, kept)
        train(spread, retrained, [batch(0)])
        assert sparsity_table(spread) == sparsity_table(whole)
        retrained.zero_grad()
        backward(spread, *batch(1))
        check_masked_gradients(spread, kept)
        handle.remove()


@both
def test_fsdp_trains_as_one_process_does(ranks, kind, settings):
    ranks(4).run(train_by_fsdp, kind, settings)


class Counter:
    """Counts the collective calls made in a context, and the bytes that a process sends or receives by them."""

    def __enter__(self):
        self.sizes = []
        self._originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(original))
        return self

    def __exit__(self, *_):
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, original):
        def counted(tensor, *args):
            self.sizes.append(tensor.nbytes)
            return original(tensor, *args)

        return counted


def count_communication(numel, compression):
    """Return the sizes of what the third step on so many weights sends."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(distribute_tensor(torch.randn(numel, 1, generator=generator), mesh))
    optimizer = GSM([weight], **{**SETTINGS, "compression": compression})
    for _ in range(3):
        weight.grad = distribute_tensor(torch.randn(numel, 1, generator=generator), mesh)
        with Counter() as counter:
            optimizer.step()
    return counter.sizes


@pytest.mark.parametrize(("numel", "compression"), [(1_000, 10), (100_000, 3), (1_000_000, 50)])
def test_what_is_sent_does_not_grow_with_the_model(ranks, numel, compression):
    for sizes in ranks(4).run(count_communication, numel, compression):
        assert 0 < len(sizes) <= 4  # a guess, twice counts or numbers, and rarely a second guess
        assert sum(sizes) < 2**16


def train_by_ddp(check_ranks, kind, settings):
    """Train a model by DDP; return what it came to, and the collective calls of the optimizer."""
    model = DistributedDataParallel(Net())
    optimizer = kind(model.module.named_parameters(), **settings, check_ranks=check_ranks)
    with Counter() as counter:
        train(model, optimizer, map(batch, range(10)))
    optimizer.finalize()
    return [param.detach() for param in model.parameters()], len(counter.sizes)


@both
def test_ddp_needs_no_communication_of_ours_and_ends_in_the_same_bits(ranks, kind, settings):
    (ours, calls), *others = ranks(4).run(train_by_ddp, False, kind, settings)
    assert calls == 0
    (checked, calls), *_ = ranks(4).run(train_by_ddp, True, kind, settings)
    assert calls > 0
    for theirs in (checked, *(params for params, _ in others)):
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))
    whole = Net()
    optimizer = kind(whole.named_parameters(), **settings, check_ranks=True)  # asks nobody where there is nobody
    train(whole, optimizer, map(batch_of, range(10)))
    optimizer.finalize()
    assert_close(ours, whole.parameters())


# --- masks ---


def keep_masked_under_ddp(bucket_view):
    """Accumulate masked gradients, with and without a reduction, and let a step follow."""
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=bucket_view)
    net = model.module
    masks = magnitude_masks(prunable_parameters(net), compression=2)
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    keep_masked(optimizer, masks)
    with model.no_sync():
        backward(model, *batch(0))
    check_masked_gradients(net, masks)
    for number in (1, 2):
        backward(model, *batch(number))
        check_masked_gradients(net, masks)
    optimizer.step()
    assert all(torch.equal(net.get_parameter(name) != 0, mask) for name, mask in masks.items())
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("bucket_view", [False, True])
def test_gradients_are_masked_before_and_after_ddp_reduces_them(ranks, bucket_view):
    ours, *others = ranks(4).run(keep_masked_under_ddp, bucket_view)
    for theirs in others:
        assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def use_masks_of_other_layouts():
    """Apply masks to weights, and mask gradients, that lie in another way than the masks do."""
    mesh = init_device_mesh("cpu", (4,))
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5

    def lies(tensor, placement):
        return tensor.clone() if placement is None else distribute_tensor(tensor, mesh, [placement])

    placements = [None, Shard(0), Shard(1), Replicate()]
    for of_mask in placements:
        for of_weight in placements:
            weight = lies(torch.ones(6, 4), of_weight)
            Masks({"w": lies(mask, of_mask)}).apply_({"w": weight})
            assert torch.equal(full(weight), mask.float()), (of_mask, of_weight)
    weight = nn.Parameter(lies(torch.ones(6, 4), Shard(0)))
    optimizer = torch.optim.SGD([("weight", weight)], lr=0.1, momentum=0.9)
    keep_masked(optimizer, {"weight": mask})
    weight.grad = lies(torch.ones(6, 4), Replicate())
    optimizer.step()
    assert torch.equal(full(weight) != 0, mask)
    assert torch.equal(full(optimizer.state[weight]["momentum_buffer"]) != 0, mask)


def test_masks_meet_weights_that_lie_in_another_way(ranks):
    ranks(4).run(use_masks_of_other_layouts)


# --- errors, on every process ---


def train_with_a_bad_gradient(value, compression):
    """One process alone has a gradient that is not finite."""
    model = sharded_net()
    optimizer = GSM(model.named_parameters(), **{**SETTINGS, "compression": compression})
    train(model, optimizer, [batch(0)])
    before = [param.to_local().detach().clone() for param in model.parameters()]
    backward(model, *batch_of(1))
    if dist.get_rank() == 1:
        model[2].weight.grad.to_local()[0, 0] = value
    try:
        optimizer.step()
    finally:
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param.to_local(), old)


@pytest.mark.parametrize("compression", [1.0, 10.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_process_refuses_a_gradient_that_is_not_finite_on_one(ranks, value, compression):
    message = "NonFiniteGradientError: the gradient of parameter '2.weight' is not finite"
    assert ranks(4).errors(train_with_a_bad_gradient, value, compression) == [message] * 4


def disagree(settings):
    """The first process has settings of its own."""
    model = sharded_net()
    mine = {**SETTINGS, **settings[dist.get_rank() > 0]}
    kind = GSMAdamW if mine["momentum"] is None else GSM
    optimizer = kind(model.named_parameters(), **{key: value for key, value in mine.items() if value is not None})
    train(model, optimizer, [batch(0)])


def density_of_a_rank(step):
    return 1 / (2 + dist.get_rank())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{}, {"compression": 1.0}], "the number of active weights: it is 127 on one and 1272 on another"),
        ([{"lr": 0.25}, {}], "processes disagree about lr: it is 0.05 on one and 0.25 on another"),
        ([{"schedule": Schedule(9, cut=share)} for share in (0.6, 0.7)], "cut: it is 0.6 on one and 0.7 on another"),
        ([{"passive_decay": 1e-3}, {}], "processes disagree about passive_decay"),
        ([{"betas": (0.5, 0.9), "momentum": None}, {"betas": (0.6, 0.9), "momentum": None}], "disagree about betas[0]"),
        ([{"schedule": density_of_a_rank}] * 2, "active weights: it is 254 on one and 636 on another"),
    ],
)
def test_every_process_refuses_settings_that_differ(ranks, settings, message):
    for error in ranks(4).errors(disagree, settings):
        assert message in error
        assert "build model and optimizer alike" in error


def use_a_part_of_the_processes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))["b"]
    weight = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh))
    weight.grad = distribute_tensor(torch.ones(8, 8), mesh)
    GSM([weight], **SETTINGS).step()


def test_a_mesh_of_some_processes_is_refused_on_all(ranks):
    errors = ranks(4).errors(use_a_part_of_the_processes)
    assert set(errors) == {
        "ValueError: a device mesh has 2 of 4 processes: GSM chooses among the weights of all of them, "
        "so each mesh has to cover them all; distribute such a parameter over the whole mesh (Replicate() does), "
        'or put it into a group with "prunable": False'
    }


def train_without_ddp(missing):
    """Gradients are of other batches, or, being the same, missing on one process."""
    model = Net()
    optimizer = GSM(model.named_parameters(), **SETTINGS, check_ranks=True)
    backward(model, *(batch(0) if missing is None else batch_of(0)))
    if dist.get_rank() == 1:
        for name in missing or ():
            model.get_parameter(name).grad = None
    optimizer.step()


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (None, "the gradient of 0.weight is not the same on all processes: is the model wrapped in"),
        (["2.weight"], "the gradient of 2.weight exists on some processes only: is the model wrapped in"),
        ([*dict(Net().named_parameters())], "the gradient of 0.weight exists on some processes only"),
    ],
    ids=["not reduced", "one missing", "all missing"],
)
def test_check_ranks_finds_gradients_that_are_not_the_same(ranks, missing, message):
    for error in ranks(4).errors(train_without_ddp, missing):
        assert message in error


# --- states ---


def go_on_with_a_whole_state(steps, kind, settings):
    """Train whole, load the state into an optimizer of the same weights spread over processes, and train both on."""
    whole, spread = Net(), sharded_net()
    optimizers = [kind(model.named_parameters(), **settings, schedule=SCHEDULE) for model in (whole, spread)]
    train(whole, optimizers[0], map(batch_of, range(steps)))
    for ours, theirs in zip(whole.parameters(), spread.parameters(), strict=True):
        theirs.data.copy_(distribute_tensor(ours.detach(), theirs.device_mesh, theirs.placements))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in range(steps, 16):
        train(whole, optimizers[0], [batch_of(number)])
        train(spread, optimizers[1], [batch(number)])
        assert_close(spread.parameters(), whole.parameters())


@both
@pytest.mark.parametrize("steps", [3, 8, 12])
def test_a_state_of_one_process_goes_on_on_several(ranks, steps, kind, settings):
    ranks(4).run(go_on_with_a_whole_state, steps, kind, settings)


def test_a_state_of_another_model_is_refused():
    model = Net()
    optimizer = GSM(model.named_parameters(), **SETTINGS)
    train(model, optimizer, [batch_of(0)])
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(33, 19)
    with pytest.raises(ValueError, match=r"momentum_buffer has shape \(33, 19\), its parameter \(33, 20\)"):
        optimizer.load_state_dict(state)
    train(model, optimizer, [batch_of(1)])


def begin_and_save(folder, steps, kind, settings):
    """Train for some steps, and put all that is needed to go on into a distributed checkpoint."""
    model = sharded_net()
    optimizer = kind(model.named_parameters(), **settings, schedule=SCHEDULE)
    train(model, optimizer, map(batch, range(steps)))
    model_state, state = get_state_dict(model, optimizer)
    quietly(dcp.save, {"model": model_state, "optimizer": state}, checkpoint_id=folder)


def load_and_go_on(folder, steps, make, batches, kind, settings):
    """Load such a checkpoint, train on, and return what all came to."""
    model = make()
    optimizer = kind(model.named_parameters(), **settings, schedule=SCHEDULE)
    model_state, state = get_state_dict(model, optimizer)
    quietly(dcp.load, {"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
    train(model, optimizer, map(batches, range(steps, 16)))
    kept = {name: full(mask) for name, mask in optimizer.masks.items()}
    return [full(param) for param in model.parameters()], kept, optimizer.param_groups[0]["step"]


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


@both
@pytest.mark.parametrize("steps", [3, 8, 12])
def test_a_distributed_checkpoint_goes_on_with_another_number_of_processes(ranks, tmp_path, steps, kind, settings):
    """Saved in the ramp, in the fade, and after the cut, by four processes; loaded by two, and by this one."""
    ranks(4).run(begin_and_save, tmp_path, steps, kind, settings)
    whole = Net()
    optimizer = kind(whole.named_parameters(), **settings, schedule=SCHEDULE)
    train(whole, optimizer, map(batch_of, range(16)))
    for params, kept, taken in (
        ranks(2).run(load_and_go_on, tmp_path, steps, sharded_net, batch, kind, settings)[0],
        load_and_go_on(tmp_path, steps, Net, batch_of, kind, settings),
    ):
        assert taken == 16
        assert all(torch.equal(kept[name], mask) for name, mask in optimizer.masks.items())
        assert_close(params, whole.parameters())
