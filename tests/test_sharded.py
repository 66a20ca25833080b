import copy
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

from gsm_sgd import GSM, fused
from gsm_sgd.masks import (
    apply_masks_,
    freeze,
    magnitude_masks,
    prunable_parameters,
    sparsity_rows,
    sparsity_table,
)
from ranks import full

SHAPES = [(7, 5), (1, 9), (16, 3, 3, 3), (4, 4), (2, 50)]


def weights(seed, ties):
    """Return tensors of odd shapes; of few different values, many of them zero, if there are to be ties."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [(tensor * 1.5).round() for tensor in tensors] if ties else tensors


def layouts(size):
    """Return meshes and placements that spread a weight over all processes in different ways."""
    line = init_device_mesh("cpu", (size,))
    found = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        found += [(grid, [Replicate(), Shard(0)]), (grid, [Shard(0), Shard(1)]), (grid, [Shard(0), Shard(0)])]
    return found


def choose_by_magnitude(seed, ties):
    """Compare masks of sharded weights with those of whole ones, at several ratios."""
    for mesh, placements in layouts(dist.get_world_size()):
        whole = dict(enumerate(weights(seed, ties)))
        total = sum(weight.numel() for weight in whole.values())
        spread = {key: distribute_tensor(weight, mesh, placements) for key, weight in whole.items()}
        spread[3] = whole[3]  # and one that is whole on every process
        for compression in (1, 1.01, 2, 7.3, 50, total):
            masks = magnitude_masks(spread, compression)
            for key, mask in magnitude_masks(whole, compression).items():
                mine = masks[key] if key == 3 else masks[key].full_tensor()
                assert torch.equal(mine, mask), (placements, compression, key)
        apply_masks_(spread, masks)
        rows = sparsity_rows({str(key): weight for key, weight in spread.items()})
        assert sum(row.nonzeros for row in rows) == 1
        assert [row.shape for row in rows] == SHAPES


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_magnitude_masks_do_not_depend_on_how_weights_are_spread(ranks, size, ties):
    ranks(size).run(choose_by_magnitude, 0, ties)


def train_in_lockstep(compiled, ties):
    """Train whole and spread weights alike, through ramp, fade and cut; all must stay the same.

    But for rounding: where a vector register is not full torch's kernels round in another way.
    """
    settings = {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-2,
        "compression": 7.3,
        "nesterov": True,
        "fused": compiled,
    }
    schedule = {"compression_schedule": "cubic", "ramp_steps": 6, "fade_steps": 4, "cut_step": 16, "total_steps": 20}
    for mesh, placements in layouts(dist.get_world_size())[: 1 if compiled else None]:
        initial = [weight.double() for weight in weights(0, ties)]
        spread = [nn.Parameter(distribute_tensor(weight, mesh, placements)) for weight in initial]
        whole = [nn.Parameter(weight.clone()) for weight in initial]
        if mesh.ndim == 2:
            spread[2] = nn.Parameter(initial[2])  # one that is whole on every process
        biases = [nn.Parameter(bias) for bias in (torch.ones(5), distribute_tensor(torch.ones(5), mesh))]
        pairs = [tuple(biases), *zip(whole, spread, strict=True)]
        optimizers = [GSM([pair[i] for pair in pairs], **settings, **schedule) for i in range(2)]
        generator = torch.Generator().manual_seed(1)
        for _ in range(20):
            for ours, theirs in pairs:
                theirs.grad = ours.grad = torch.randn(ours.shape, generator=generator, dtype=ours.dtype)
                if isinstance(theirs, DTensor):
                    theirs.grad = distribute_tensor(ours.grad, mesh, theirs.placements)
            for optimizer in optimizers:
                optimizer.step()
            assert optimizers[0].compression == optimizers[1].compression
            for ours, theirs in pairs:
                torch.testing.assert_close(full(theirs), ours.detach(), rtol=1e-12, atol=1e-12)
        assert optimizers[1].finalized
        assert sum(int(mask.sum()) for mask in map(full, optimizers[1].finalize().values())) == optimizers[0].nonzeros
        assert sum(row.nonzeros for row in sparsity_rows(dict(enumerate(spread)))) == optimizers[0].nonzeros


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_training_does_not_depend_on_how_weights_are_spread(ranks, size, ties):
    ranks(size).run(train_in_lockstep, None, ties)


@pytest.mark.parametrize(("ties", "small"), [(False, fused._SMALL), (True, 0)])
def test_fused_training_does_not_depend_on_how_weights_are_spread(ranks, ties, small):
    ranks(2).run(train_fused, ties, small)


def train_fused(ties, small):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_SMALL", small)
        train_in_lockstep(True, ties)


def cut_ties_of_one_weight():
    """Update a weight all of whose importances are equal: the first ones in the model are active, on each copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_SMALL", 0)
        for mesh, placements in layouts(dist.get_world_size()):
            weight = nn.Parameter(distribute_tensor(torch.ones(6, 8), mesh, placements))
            optimizer = GSM([weight], lr=0.5, momentum=0, weight_decay=0, compression=3, fused=True)
            weight.grad = distribute_tensor(torch.ones(6, 8), mesh, placements)
            optimizer.step()
            expected = torch.ones(48).index_fill(0, torch.arange(16), 0.5).view(6, 8)
            assert torch.equal(full(weight), expected), placements


@pytest.mark.parametrize("size", [2, 4])
def test_ties_of_one_weight_are_cut_alike_on_all_its_copies(ranks, size):
    ranks(size).run(cut_ties_of_one_weight)


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(20, 33), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 3))


def batch_of(step, size=8):
    """Return images and labels of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 20, generator=generator), torch.randint(3, (size,), generator=generator)


def batch(step):
    """Return images and labels of a step, and the part of them that is this process's."""
    images, labels = batch_of(step)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    return (images, labels), (images[mine], labels[mine])


SETTINGS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3, "compression": 10.0}


def backward(model, images, labels):
    nn.functional.cross_entropy(model(images), labels).backward()


def step(model, optimizer, images, labels):
    optimizer.zero_grad()
    backward(model, images, labels)
    optimizer.step()


def check_masked_gradients(model, masks):
    """Raise if the gradients of a model, whole on each process or spread over them, are not those of kept weights."""
    for name, mask in masks.items():
        grad = full(model.get_parameter(name).grad)
        assert grad.any()
        assert not grad[~full(mask)].any()


def sharded_net():
    model = Net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def train_by_fsdp():
    """Train a model by FSDP2 on a part of each batch, and the same model on all of it."""
    whole, spread = Net(), sharded_net()
    optimizers = [GSM(model.named_parameters(), **SETTINGS) for model in (whole, spread)]
    for number in range(20):
        everything, mine = batch(number)
        step(whole, optimizers[0], *everything)
        step(spread, optimizers[1], *mine)
        for ours, theirs in zip(whole.parameters(), spread.parameters(), strict=True):
            torch.testing.assert_close(full(theirs), ours.detach())
    masks = optimizers[1].finalize()
    for name, mask in optimizers[0].finalize().items():
        assert torch.equal(full(masks[name]), mask)
    assert sum(row.nonzeros for row in sparsity_table(spread)) == optimizers[1].nonzeros
    assert sparsity_table(spread) == sparsity_table(whole)
    assert spread[0].weight.to_local().shape[0] < 33

    for kept in (masks, optimizers[0].finalize()):  # spread as the weights are, and whole
        retrained = torch.optim.SGD(spread.named_parameters(), lr=0.1)
        handle = freeze(retrained, kept)
        step(spread, retrained, *batch(0)[1])
        assert sparsity_table(spread) == sparsity_table(whole)
        retrained.zero_grad()
        backward(spread, *batch(1)[1])
        check_masked_gradients(spread, kept)
        handle.remove()


@pytest.mark.parametrize("size", [2, 4])
def test_fsdp_trains_as_one_process_does(ranks, size):
    ranks(size).run(train_by_fsdp)


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


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("numel", "compression"), [(1_000, 10), (100_000, 3), (3_000_000, 50)])
def test_what_is_sent_does_not_grow_with_the_model(ranks, size, numel, compression):
    for sizes in ranks(size).run(count_communication, numel, compression):
        assert len(sizes) <= 4  # a guess, twice counts or numbers, and rarely a second guess
        assert sum(sizes) < 2**16


def train_with_a_bad_gradient(value, compression):
    """One process alone has a gradient, or a weight, that is not finite."""
    model = sharded_net()
    optimizer = GSM(model.named_parameters(), **{**SETTINGS, "compression": compression})
    step(model, optimizer, *batch(0)[1])
    before = [param.to_local().detach().clone() for param in model.parameters()]
    nn.functional.cross_entropy(model(batch(1)[1][0]), batch(1)[1][1]).backward()
    if dist.get_rank() == 1:
        model[2].weight.grad.to_local()[0, 0] = value
    try:
        optimizer.step()
    finally:
        for param, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(param.to_local(), old)


@pytest.mark.parametrize("compression", [1.0, 10.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_process_refuses_a_gradient_that_is_not_finite_on_one(ranks, value, compression):
    errors = ranks(2).errors(train_with_a_bad_gradient, value, compression)
    message = "NonFiniteGradientError: the gradient of prunable parameter '2.weight' is not finite"
    assert errors == [message, message]


def disagree(settings):
    """Each process has settings of its own."""
    model = sharded_net()
    optimizer = GSM(model.named_parameters(), **{**SETTINGS, **settings[dist.get_rank()]})
    step(model, optimizer, *batch(0)[1])


def schedule_of_a_rank(step):
    return 2.0 + dist.get_rank()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{}, {"compression": 1.0}], "processes disagree about compression: it is 1 on one and 10 on another"),
        ([{"lr": 0.25}, {}], "processes disagree about lr: it is 0.05 on one and 0.25 on another"),
        ([{"cut_step": 5, "total_steps": 9}, {"cut_step": 6, "total_steps": 9}], "cut_step: it is 5 on one and 6 on"),
        ([{"passive_decay": 1e-3}, {}], "processes disagree about passive_decay"),
        ([{"compression_schedule": schedule_of_a_rank}] * 2, "compression: it is 2 on one and 3 on another"),
    ],
)
def test_every_process_refuses_settings_that_differ(ranks, settings, message):
    for error in ranks(2).errors(disagree, settings):
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


def freeze_under_ddp(bucket_view):
    """Accumulate gradients of a frozen net, with and without a reduction, and let a step follow."""
    model = DistributedDataParallel(Net(), gradient_as_bucket_view=bucket_view)
    net = model.module
    masks = magnitude_masks(prunable_parameters(net), 2)
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    freeze(optimizer, masks)
    with model.no_sync():
        backward(model, *batch(0)[1])
    check_masked_gradients(net, masks)
    for number in (1, 2):
        backward(model, *batch(number)[1])
        check_masked_gradients(net, masks)
    optimizer.step()
    assert all(torch.equal(net.get_parameter(name) != 0, mask) for name, mask in masks.items())
    return [param.detach() for param in net.parameters()]


@pytest.mark.parametrize("bucket_view", [False, True])
def test_freeze_under_ddp_masks_gradients_before_and_after_the_reduction(ranks, bucket_view):
    ours, theirs = ranks(2).run(freeze_under_ddp, bucket_view)
    assert all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


def freeze_with_a_gradient_spread_otherwise():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    mask = torch.arange(24).view(4, 6) % 3 == 0
    optimizer = torch.optim.SGD([("weight", weight)], lr=0.1, momentum=0.9)
    freeze(optimizer, {"weight": mask})
    weight.grad = distribute_tensor(torch.ones(4, 6), mesh, [Replicate()])
    optimizer.step()
    assert torch.equal(full(weight) != 0, mask)
    assert torch.equal(full(optimizer.state[weight]["momentum_buffer"]) != 0, mask)


def test_freeze_masks_gradients_that_are_spread_otherwise(ranks):
    ranks(2).run(freeze_with_a_gradient_spread_otherwise)


def train_by_ddp(check_ranks):
    """Train a model by DDP; return what it came to, and the collective calls of the optimizer."""
    model = DistributedDataParallel(Net())
    optimizer = GSM(model.module.named_parameters(), **SETTINGS, check_ranks=check_ranks)
    with Counter() as counter:
        for number in range(10):
            step(model, optimizer, *batch(number)[1])
    optimizer.finalize()
    return [param.detach() for param in model.parameters()], len(counter.sizes)


def test_ddp_needs_no_communication_of_ours_and_ends_in_the_same_bits(ranks):
    (ours, calls), (theirs, _) = ranks(2).run(train_by_ddp, False)
    assert calls == 0
    (checked, calls), _ = ranks(2).run(train_by_ddp, True)
    assert calls > 0
    for one, two, three in zip(ours, theirs, checked, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    whole = Net()
    optimizer = GSM(whole.named_parameters(), **SETTINGS)
    for number in range(10):
        step(whole, optimizer, *batch_of(number))
    optimizer.finalize()
    for one, two in zip(ours, whole.parameters(), strict=True):
        torch.testing.assert_close(one, two.detach())


def train_without_ddp():
    model = Net()
    optimizer = GSM(model.named_parameters(), **SETTINGS, check_ranks=True)
    step(model, optimizer, *batch(0)[1])


def test_check_ranks_finds_gradients_that_were_not_reduced(ranks):
    for error in ranks(2).errors(train_without_ddp):
        assert "the gradient of 0.weight is not the same on all processes: is the model wrapped in" in error


def train_with_a_gradient_on_one_process(everything):
    model = Net()
    optimizer = GSM(model.named_parameters(), **SETTINGS, check_ranks=True)
    nn.functional.cross_entropy(model(batch_of(0)[0]), batch_of(0)[1]).backward()
    if dist.get_rank() == 1:
        for param in model.parameters() if everything else [model[2].weight]:
            param.grad = None
    optimizer.step()


@pytest.mark.parametrize(("everything", "name"), [(True, "0.weight"), (False, "2.weight")])
def test_check_ranks_finds_a_gradient_that_only_one_process_has(ranks, everything, name):
    for error in ranks(2).errors(train_with_a_gradient_on_one_process, everything):
        assert f"the gradient of {name} is there on some processes only: is the model wrapped in" in error


def test_check_ranks_asks_nobody_where_there_is_nobody():
    model = Net()
    step(model, GSM(model.named_parameters(), **SETTINGS, check_ranks=True), *batch_of(0))


def apply_masks_of_other_layouts():
    """Apply masks to weights that lie in another way than the masks do."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 4, generator=generator) < 0.5
    layouts = [None, [Shard(0)], [Shard(1)], [Replicate()]]
    for of_mask in layouts:
        for of_weight in layouts:
            whole = torch.ones(6, 4)
            weight = whole.clone() if of_weight is None else distribute_tensor(whole, mesh, of_weight)
            spread = mask if of_mask is None else distribute_tensor(mask, mesh, of_mask)
            apply_masks_({"w": weight}, {"w": spread})
            assert torch.equal(full(weight), mask.float()), (of_mask, of_weight)


@pytest.mark.parametrize("size", [2, 4])
def test_masks_meet_weights_that_lie_in_another_way(ranks, size):
    ranks(size).run(apply_masks_of_other_layouts)


def go_on_with_a_whole_state(steps, schedule):
    """Train whole, load the state into an optimizer of the same weights spread over processes, and train both on."""
    whole, spread = Net(), sharded_net()
    optimizers = [GSM(model.named_parameters(), **SETTINGS, **schedule) for model in (whole, spread)]
    for number in range(steps):
        step(whole, optimizers[0], *batch_of(number))
    for ours, theirs in zip(whole.parameters(), spread.parameters(), strict=True):
        theirs.data.copy_(distribute_tensor(ours.detach(), theirs.device_mesh, theirs.placements))
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for number in range(steps, 16):
        step(whole, optimizers[0], *batch_of(number))
        step(spread, optimizers[1], *batch(number)[1])
        for ours, theirs in zip(whole.parameters(), spread.parameters(), strict=True):
            torch.testing.assert_close(full(theirs), ours.detach())


@pytest.mark.parametrize("steps", [3, 8, 12])
def test_a_state_of_one_process_goes_on_on_several(ranks, steps):
    schedule = {"compression_schedule": "cubic", "ramp_steps": 5, "fade_steps": 3, "cut_step": 10, "total_steps": 16}
    ranks(2).run(go_on_with_a_whole_state, steps, schedule)


def test_a_state_of_another_model_is_refused():
    model = Net()
    optimizer = GSM(model.named_parameters(), **SETTINGS)
    step(model, optimizer, *batch_of(0))
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(33, 19)
    with pytest.raises(ValueError, match=r"a momentum has shape \(33, 19\), its parameter \(33, 20\)"):
        optimizer.load_state_dict(state)
    step(model, optimizer, *batch_of(1))


def begin_and_save(folder, steps, schedule):
    """Train for some steps, and put all that is needed to go on into a distributed checkpoint."""
    model = sharded_net()
    optimizer = GSM(model.named_parameters(), **SETTINGS, **schedule)
    for number in range(steps):
        step(model, optimizer, *batch(number)[1])
    model_state, state = get_state_dict(model, optimizer)
    quietly(dcp.save, {"model": model_state, "optimizer": state}, checkpoint_id=folder)


def load_and_go_on(folder, steps, last, schedule):
    """Load such a checkpoint, train on, and return what all came to."""
    model = sharded_net()
    optimizer = GSM(model.named_parameters(), **SETTINGS, **schedule)
    model_state, state = get_state_dict(model, optimizer)
    quietly(dcp.load, {"model": model_state, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=state)
    for number in range(steps, last):
        step(model, optimizer, *batch(number)[1])
    kept = {name: full(mask) for name, mask in optimizer.masks.items()}
    return [full(param) for param in model.parameters()], kept, optimizer.param_groups[0]["steps"]


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


@pytest.mark.parametrize("steps", [3, 8, 12])
def test_a_distributed_checkpoint_goes_on_with_another_number_of_processes(ranks, tmp_path, steps):
    """Saved in the ramp, in the fade, and after the cut."""
    schedule = {"compression_schedule": "cubic", "ramp_steps": 5, "fade_steps": 3, "cut_step": 10, "total_steps": 16}
    ranks(4).run(begin_and_save, tmp_path, steps, schedule)
    params, kept, taken = ranks(2).run(load_and_go_on, tmp_path, steps, 16, schedule)[0]
    whole = Net()
    optimizer = GSM(whole.named_parameters(), **SETTINGS, **schedule)
    for number in range(16):
        step(whole, optimizer, *batch_of(number))
    assert taken == 16
    for name, mask in optimizer.masks.items():
        assert torch.equal(kept[name], mask)
    for one, two in zip(params, whole.parameters(), strict=True):
        torch.testing.assert_close(one, two.detach())
