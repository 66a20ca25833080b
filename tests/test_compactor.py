import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from gsm_sgd import CutWarning
from gsm_sgd.experiments.models.resnet_cifar import resnet_a
from gsm_sgd.structured import ChannelGroups, ResRep, fold, insert_compactors, narrow, resrep_parameters, widths
from gsm_sgd.structured.compactor import compactors, merge
from nets import assert_same_bits, saved_and_loaded

IMAGES = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def net():
    """Return a net of three convolutions, of which the last two have norms, at 100, 64 and 36 places."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 10, 3), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
    )


@pytest.fixture(scope="module")
def groups():
    return ChannelGroups.trace(net(), IMAGES, ignore=["0"])


def begin(groups, steps=12, **options):
    model = insert_compactors(net(), groups)
    optimizer = torch.optim.SGD(resrep_parameters(model), lr=0.05, momentum=0.9, weight_decay=1e-3)
    budget = {} if {"parameters", "channels"} & set(options) else {"macs": 0.5}
    return model, optimizer, ResRep(optimizer, steps, model, groups, **{**budget, **options})


def backward(model, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 12, 12, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    F.cross_entropy(model(images), torch.randint(4, (8,), generator=generator)).backward()


def step(model, optimizer, seed):
    backward(model, seed)
    optimizer.step()


def matrices(model):
    return [module.compactor.weight for module in compactors(model).values()]


@torch.no_grad()
def noisy(model, seed=0):
    """Put noise into the norms and compactors of a model."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and (tensor.ndim == 1 or "compactor" in name):
            noise = 0.3 * torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.add_(noise.abs() if tensor.ndim == 1 else noise / len(tensor) ** 0.5)
    return model


# --- insertion ---


def test_compactors_begin_as_identities(groups):
    model = net()
    wide = insert_compactors(model, groups)
    assert list(compactors(wide)) == ["3", "6"]
    assert not compactors(model)
    for mode in (True, False):
        torch.testing.assert_close(wide.train(mode)(IMAGES), model.train(mode)(IMAGES), rtol=0, atol=1e-6)


def test_only_inner_layers_have_compactors():
    model = resnet_a(8)
    wide = insert_compactors(model, ChannelGroups.trace(model, torch.rand(2, 3, 16, 16)))
    assert list(compactors(wide)) == [f"layer{stage}.0.bn1" for stage in (1, 2, 3)]


def test_depthwise_convolutions_take_none():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    )
    groups = ChannelGroups.trace(model, IMAGES)
    with pytest.raises(ValueError, match="so no compactor fits"):
        insert_compactors(model, groups)


class Gated(nn.Module):
    """A layer of which one half multiplies the other, so that two rows are one channel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.last = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(6, 4, 3)

    def forward(self, images):
        one, other = self.bn(self.conv(images)).chunk(2, 1)
        return self.last(one * other.sigmoid())


def test_layers_in_which_two_rows_are_one_channel_take_none():
    groups = ChannelGroups.trace(Gated(), IMAGES)
    assert groups.channels.count == 6
    with pytest.raises(ValueError, match="so no compactor fits"):
        insert_compactors(Gated(), groups)


def test_the_compactors_are_a_group_of_their_own(groups):
    model, optimizer, _ = begin(groups)
    rest, own = optimizer.param_groups
    assert own["params"] == matrices(model)
    assert (own["momentum"], own["weight_decay"], rest["momentum"], rest["weight_decay"]) == (0.99, 0, 0.9, 1e-3)
    assert {*rest["params"], *own["params"]} == {*model.parameters()}


# --- the update, against its definition ---


def naive_masks(model, groups, masked, at_once):
    """Return the rows that forget, as (compactor, row): smallest first until half of the MACs are left."""
    rows = {(i, j): row.norm().item() for i, q in enumerate(matrices(model)) for j, row in enumerate(q)}
    chosen = []
    for row in sorted(rows, key=rows.get):
        inner = [12 - sum(i == 0 for i, _ in chosen), 10 - sum(i == 1 for i, _ in chosen)]
        macs = 100 * 3 * 8 * 9 + 64 * 8 * inner[0] * 9 + 36 * inner[0] * inner[1] * 9 + inner[1] * 4
        dense = 100 * 3 * 8 * 9 + 64 * 8 * 12 * 9 + 36 * 12 * 10 * 9 + 10 * 4
        if macs <= dense // 2 or len(chosen) == masked + at_once:
            break
        if inner[row[0]] > 1:
            chosen.append(row)
    return chosen


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_lockstep_with_a_naive_twin(groups, make):
    """In each step G_j becomes m_j dL/dQ_j + lambda Q_j / ||Q_j||; masks from step 3 on, anew after every 2."""
    model = insert_compactors(net(), groups).double()
    with torch.no_grad():
        for matrix in matrices(model):
            matrix.add_(torch.rand_like(matrix) / 10)
    twin = copy.deepcopy(model)
    optimizer, reference = (make(resrep_parameters(part), lr=0.02) for part in (model, twin))
    method = ResRep(optimizer, 30, model, groups, begin=0.1, every=2, at_once=3, strength=0.1, macs=0.5)
    masked = []
    for number in range(12):
        step(model, optimizer, number)
        backward(twin, number)
        if number >= 3 and (number - 3) % 2 == 0:
            masked = naive_masks(twin, groups, len(masked), 3)
        for i, matrix in enumerate(matrices(twin)):
            for j in range(len(matrix)):
                m = 0 if (i, j) in masked else 1
                matrix.grad[j] = m * matrix.grad[j] + 0.1 * matrix[j].detach() / matrix[j].detach().norm()
        reference.step()
        for (name, param), its in zip(model.named_parameters(), twin.parameters(), strict=True):
            if name != "5.bias":  # the norm behind it leaves it no gradient but noise, which AdamW scales up
                torch.testing.assert_close(param, its, rtol=1e-9, atol=1e-11, msg=name)
        assert len(masked) == (0 if method.kept is None else (~method.kept).sum())
    assert len(masked) > 6


def test_masks_grow_by_a_few_rows_until_the_budget_is_met(groups):
    model, optimizer, method = begin(groups, 100, begin=0.03, every=2, at_once=4)
    counts = []
    for seed in range(14):
        step(model, optimizer, seed)
        counts.append(0 if method.kept is None else int((~method.kept).sum()))
    assert counts[:6] == [0, 0, 0, 4, 4, 8]
    assert counts[-1] == counts[-3] < 20
    bound = groups.for_budget("macs")
    assert bound.cost_of(method.kept) <= 0.5 * bound.total([IMAGES])


def test_without_masks_and_penalty_it_is_the_optimizer(groups):
    model, optimizer, _ = begin(groups, begin=1.0, strength=0)
    twin = insert_compactors(net(), groups)
    reference = torch.optim.SGD(resrep_parameters(twin), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for seed in range(4):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    assert_same_bits(model, twin)


# --- the cut ---


@pytest.mark.parametrize("budget", [{"macs": 0.4}, {"parameters": 0.5}, {"channels": 0.5}])
def test_the_budget_is_met_by_the_smallest_rows(groups, budget):
    model, _, method = begin(groups, **budget)
    noisy(model)
    scores = method.scores()
    with pytest.warns(CutWarning, match="of the compactors' norm, so it costs accuracy"):
        kept = groups.kept_by(method.finalize())
    ((kind, share),) = budget.items()
    bound = groups.for_budget(kind)
    most = int(share * bound.total([IMAGES]))
    assert bound.cost_of(kept) <= most
    assert scores[kept].min() > scores[~kept].max()
    last = scores.masked_fill(kept, 0).argmax()
    assert bound.cost_of(kept | (torch.arange(len(kept)) == last)) > most


def test_rows_that_have_vanished_go_beyond_the_budget(groups):
    model, _, method = begin(groups, macs=0.9)
    with torch.no_grad():
        matrices(model)[1][2:].mul_(1e-6)
    masks = method.finalize()
    assert masks["6.weight"].tolist() == [True, True] + [False] * 8
    assert masks["3.weight"].all()


def test_a_layer_keeps_one_row(groups):
    model, _, method = begin(groups, macs=0.9)
    with torch.no_grad():
        matrices(model)[1].mul_(1e-6)
    assert method.finalize()["6.weight"].sum() == 1


def test_rows_that_forget_vanish_and_cutting_them_changes_nothing(groups):
    model = insert_compactors(net(), groups)
    optimizer = torch.optim.SGD(resrep_parameters(model, momentum=0.0), lr=0.05)
    method = ResRep(optimizer, 200, model, groups, begin=0, every=1, at_once=2, strength=0.5, macs=0.6)
    for seed in range(200):
        optimizer.param_groups[1]["lr"] = 0.1 * (1 - seed / 200)
        step(model, optimizer, seed)
    before = model.eval()(IMAGES)
    masks = method.finalize()  # without a warning
    torch.testing.assert_close(model(IMAGES), before, rtol=0, atol=2e-3)
    assert not all(mask.all() for mask in masks.values())


def test_the_cut_is_made_when_it_is_planned_and_lasts(groups):
    model, optimizer, method = begin(groups, 8, cut=0.5)
    for seed in range(4):
        step(model, optimizer, seed)
        assert all(matrix.flatten(1).norm(dim=1).all() for matrix in matrices(model))
    with pytest.warns(CutWarning):
        step(model, optimizer, 4)
    for seed in range(5, 8):
        step(model, optimizer, seed)
        kept = [matrix.flatten(1).norm(dim=1) > 0 for matrix in matrices(model)]
        assert torch.equal(torch.cat(kept), torch.cat([method.finalize()[name] for name in ("3.weight", "6.weight")]))
        assert all(not matrix.grad[~rows].any() for matrix, rows in zip(matrices(model), kept, strict=True))


@pytest.mark.filterwarnings("ignore::gsm_sgd.CutWarning")
@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resume_to_the_same_bits(groups, stop):
    options = {"steps": 8, "cut": 0.75, "begin": 0.25, "every": 2, "strength": 0.1}
    model, optimizer, method = begin(groups, **options)
    for seed in range(8):
        if seed == stop:
            states = saved_and_loaded([part.state_dict() for part in (model, optimizer, method)])
        step(model, optimizer, seed)
    again = begin(groups, **options)
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for seed in range(stop, 8):
        step(*again[:2], seed)
    assert_same_bits(model, again[0])
    assert all(torch.equal(mask, method.finalize()[key]) for key, mask in again[2].finalize().items())


# --- folding ---


def folded(model, images, **options):
    """Return a model with noise in it and compactors, cut, and what it is folded into."""
    groups = ChannelGroups.trace(model, images, **options)
    wide = noisy(insert_compactors(model, groups))
    method = ResRep(torch.optim.SGD(resrep_parameters(wide), lr=0.1), 10, wide, groups, macs=0.6)
    with pytest.warns(CutWarning):
        masks = method.finalize()
    return wide.eval(), fold(wide, groups, masks), masks


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: resnet_a(20), 16),
        (torchvision.models.resnet18, 33),
        (lambda: resnet_a(8).to(memory_format=torch.channels_last), 16),
    ],
)
def test_folding_changes_no_output(make, size):
    torch.manual_seed(0)
    model, images = make(), torch.rand(2, 3, size, size)
    wide, slim, masks = folded(model, images)
    assert type(slim) is type(model)
    assert not compactors(slim)
    expected = wide(images)
    assert (slim.eval()(images) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    for name, mask in masks.items():
        assert len(slim.get_parameter(name)) == mask.sum(), name
    state = slim.state_dict()
    again = narrow(make(), widths(slim))
    again.load_state_dict(state)
    assert torch.equal(again.eval()(images), slim(images))


def test_layers_with_biases_linear_and_transposed_ones_fold_too():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4)),
    )
    wide, slim, _ = folded(model, IMAGES)
    assert list(compactors(wide)) == ["1", "4", "9"]
    torch.testing.assert_close(slim.eval()(IMAGES), wide(IMAGES), rtol=1e-5, atol=1e-5)


def test_folding_follows_the_formula(groups):
    """K'' = Q K' and b'' = Q b', where K' = gamma / sigma K and b' = beta - mu gamma / sigma."""
    wide = noisy(insert_compactors(net(), groups)).double().eval()
    norm, matrix, kernel = wide[3].norm, matrices(wide)[0].flatten(1), wide[2].weight
    sigma = (norm.running_var + norm.eps).sqrt()
    kernel = (norm.weight / sigma).view(-1, 1, 1, 1) * kernel
    bias = norm.bias - norm.running_mean * norm.weight / sigma
    images = torch.rand(2, 8, 10, 10).double()
    expected = F.conv2d(images, torch.tensordot(matrix, kernel, 1), matrix @ bias)
    plain = merge(wide)
    torch.testing.assert_close(plain[2].weight, torch.tensordot(matrix, kernel, 1).detach())
    torch.testing.assert_close(plain[3](plain[2](images)), expected)


def test_the_folded_model_trains_on(groups):
    """Where the rows mix nothing the folded model is the same in training, too: its norms know mean and variance."""
    wide = insert_compactors(net(), groups)
    for seed in range(3):
        wide(torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(seed)))
    noisy(wide[3].norm), noisy(wide[6].norm)
    with torch.no_grad():
        for matrix in matrices(wide):
            matrix.mul_(torch.rand(len(matrix), 1, 1, 1) + 0.5)
    plain = merge(wide).train()
    torch.testing.assert_close(plain(IMAGES), wide.train()(IMAGES), rtol=1e-4, atol=1e-4)
    before = copy.deepcopy(plain.state_dict())
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 0)
    assert all((param != before[name]).any() for name, param in plain.named_parameters() if not name.startswith("5.b"))


# --- bad input ---


def test_bad_input(groups):
    model = insert_compactors(net(), groups)
    optimizer = torch.optim.SGD(resrep_parameters(model), lr=0.1)
    for options, said in (
        ({"every": 0}, "every and at_once must be at least 1, not 0 and 4"),
        ({"begin": 2}, "begin is a share, from 0 to 1, not 2"),
        ({"strength": -1}, "strength must be finite and at least 0, not -1"),
        ({"macs": 0.05}, "the smallest possible|inner layers alone can only come to"),
    ):
        with pytest.raises(ValueError, match=said):
            ResRep(optimizer, 10, model, groups, **{"macs": 0.5, **options})
    plain = net()
    with pytest.raises(ValueError, match="call insert_compactors first"):
        ResRep(torch.optim.SGD(plain.parameters(), lr=0.1), 10, plain, groups, macs=0.5)
    with pytest.raises(ValueError, match="'3' silences channels, but the optimizer does not train it"):
        ResRep(torch.optim.SGD(resrep_parameters(model)[:1], lr=0.1), 10, model, groups, macs=0.5)
    with pytest.raises(ValueError, match="trace it again"):
        insert_compactors(nn.Linear(2, 2), groups)
    assert not optimizer._optimizer_step_pre_hooks


def test_inner_layers_may_not_suffice():
    model = resnet_a(8)
    groups = ChannelGroups.trace(model, torch.rand(2, 3, 16, 16))
    wide = insert_compactors(model, groups)
    with pytest.raises(ValueError, match=r"inner layers alone can only come to 0\.\d+ of the dense net's cost"):
        ResRep(torch.optim.SGD(resrep_parameters(wide), lr=0.1), 10, wide, groups, macs=0.05)
