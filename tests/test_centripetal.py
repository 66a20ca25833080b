"""C-SGD: clusters of filters, their update against its definition, and the merge, which changes nothing."""

import copy

import pytest
import torch

from channel_nets import SMALL, shaken, small
from gsm_sgd import CutWarning
from gsm_sgd.structured import CSGD, ChannelGroups, load_narrow, narrow, remove_channels, save_narrow, widths
from gsm_sgd.structured.centripetal import k_means
from test_channel_methods import IMAGES, Residual, sgd, step


@pytest.fixture(scope="module")
def groups():
    return ChannelGroups.trace(Residual(), IMAGES)


def clusters_of(method, groups, name):
    """Return the clusters of a norm's channels, as lists of their places."""
    leaders = method.leaders[groups.channels.rows[name][1]].tolist()
    return [[i for i, leader in enumerate(leaders) if leader == one] for one in dict.fromkeys(leaders)]


def norm_parameters(norm):
    return [norm.weight, norm.bias]


# --- clusters ---


def test_k_means_finds_what_lies_together():
    torch.manual_seed(0)
    truth = torch.arange(60) % 5
    points = 10 * torch.randn(5, 8)[truth] + 0.1 * torch.randn(60, 8)
    labels = k_means(points, 5)
    assert all(len(labels[truth == one].unique()) == 1 for one in range(5))
    assert len(labels.unique()) == 5


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_no_cluster_is_empty(count):
    points = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [1.0], [1.0], [5.0], [5.0], [9.0], [9.0], [9.0]])
    assert len(k_means(points, count).unique()) == count


def test_each_point_is_nearest_to_the_centre_of_its_cluster():
    points = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    labels = k_means(points, 6)
    centres = torch.stack([points[labels == one].mean(0) for one in range(6)])
    assert torch.equal(torch.cdist(points, centres).argmin(1), labels)


def test_similar_filters_are_a_cluster_and_layers_that_are_added_share_them(groups):
    model, generator = Residual(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, copies in ((model.stem, 2), (model.conv2, 2), (model.conv1, 3)):
            for start in range(0, len(layer.weight), copies):
                layer.weight[start : start + copies] = layer.weight[start]
                layer.weight.add_(1e-3 * torch.randn(layer.weight.shape, generator=generator))
    method = CSGD(sgd(model), 100, model, groups, channels=0.45)
    assert clusters_of(method, groups, "bn0.weight") == clusters_of(method, groups, "bn2.weight")
    together = {tuple(cluster) for cluster in clusters_of(method, groups, "bn0.weight")}
    assert len(together) in (3, 4)
    pairs = {(0, 1), (2, 3), (4, 5), (6, 7)}
    assert all(any(set(pair) <= set(cluster) for cluster in together) for pair in pairs)


def test_there_are_as_many_clusters_as_the_budget_allows(groups):
    for share in (0.8, 0.5, 0.3):
        model = Residual()
        masks = CSGD(sgd(model), 100, model, groups, macs=share).finalize()
        bound = groups.for_budget("macs")
        assert share - 0.15 < bound.cost_of(groups.kept_by(masks)) / bound.total([IMAGES]) <= share


# --- the update ---


def test_lockstep_with_a_naive_twin(groups):
    """G_i <- mean_C(i) G + epsilon (W_i - mean_C(i) W), of what makes a channel; with a tenth of epsilon in norms."""
    model = Residual().double()
    twin = copy.deepcopy(model)
    optimizer, reference = sgd(model), torch.optim.SGD(twin.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-3)
    method = CSGD(optimizer, 100, model, groups, macs=0.4, strength=0.2)
    inner, added = (clusters_of(method, groups, name) for name in ("bn1.weight", "bn0.weight"))
    assert max(map(len, inner)) > 1
    assert max(map(len, added)) > 1
    making = [
        *((weight, inner, 0.2) for weight in [twin.conv1.weight]),
        *((weight, inner, 0.02) for weight in norm_parameters(twin.bn1)),
        *((weight, added, 0.2) for weight in (twin.stem.weight, twin.conv2.weight)),
        *((weight, added, 0.02) for norm in (twin.bn0, twin.bn2) for weight in norm_parameters(norm)),
    ]
    for seed in range(6):
        step(model, optimizer, seed)
        reference.param_groups[0]["lr"] = 0.0
        twin_grads(twin, seed)
        for weight, clusters, epsilon in making:
            for cluster in clusters:
                pull = weight.detach()[cluster] - weight.detach()[cluster].mean(0)
                weight.grad[cluster] = weight.grad[cluster].mean(0) + epsilon * pull
        reference.param_groups[0]["lr"] = 0.05
        reference.step()
        for name, param in twin.named_parameters():
            torch.testing.assert_close(model.get_parameter(name), param, rtol=1e-9, atol=1e-11, msg=name)


def twin_grads(model, seed):
    """Compute the gradients that `step` computes."""
    none = torch.optim.SGD(model.parameters(), lr=0.0)
    step(model, none, seed)


def test_with_a_cluster_for_each_filter_it_is_the_optimizer(groups):
    model, twin = Residual(), Residual()
    optimizer, reference = sgd(model), sgd(twin)
    CSGD(optimizer, 100, model, groups, macs=1.0)
    for seed in range(3):
        step(model, optimizer, seed)
        step(twin, reference, seed)
    for param, its in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(param, its)


# --- the merge ---


def test_filters_become_the_same_and_the_merge_changes_nothing(groups):
    model = Residual()
    optimizer = sgd(model)
    method = CSGD(optimizer, 300, model, groups, macs=0.5, strength=2.0)
    for seed in range(300):
        optimizer.param_groups[0]["lr"] = 0.08 * (1 - seed / 300)
        step(model, optimizer, seed)
    for cluster in clusters_of(method, groups, "bn0.weight"):
        for tensor in (model.stem.weight, model.conv2.weight, model.bn0.weight, model.bn2.bias, model.bn2.running_var):
            torch.testing.assert_close(
                tensor[cluster], tensor[cluster[:1]].expand_as(tensor[cluster]), rtol=0, atol=1e-5
            )
    before = model.eval()(IMAGES).detach()
    masks = method.finalize()  # without a warning
    slim = remove_channels(model, groups, masks, optimizer)
    after = slim.eval()(IMAGES)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    torch.testing.assert_close(after, model(IMAGES), rtol=0, atol=1e-5 * float(before.abs().max()))
    step(slim.train(), optimizer, 0)


@torch.no_grad()
def made_same(model, method):
    """Make the filters of each cluster the same, as long training does."""
    for slot in method._making:
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[slot.name].movedim(slot.dim, 0)
        for one in slot.group.unique():
            tensor[slot.group == one] = tensor[slot.group == one][0].clone()


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("lenet300", "encoder")])
def test_of_the_same_filters_the_merged_net_is_equal(name, tmp_path):
    model, example = small(name)
    model, inputs = shaken(model), example if isinstance(example, tuple) else (example,)
    groups = ChannelGroups.trace(model, example)
    method = CSGD(torch.optim.SGD(model.parameters(), lr=0.1), 10, model, groups, parameters=0.7)
    if method._choose().all():
        pytest.skip("no channel has to go")
    made_same(model, method)
    expected = model.eval()(*inputs)
    slim = remove_channels(model, groups, method.finalize())
    found = slim.eval()(*inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    save_narrow(slim, tmp_path / "narrow.safetensors")
    again = load_narrow(small(name)[0], tmp_path / "narrow.safetensors")
    assert torch.equal(again.eval()(*inputs), found)


def test_the_narrow_net_is_of_the_merged_widths(groups):
    model = Residual()
    method = CSGD(sgd(model), 100, model, groups, macs=0.5)
    masks = method.finalize()
    slim = remove_channels(model, groups, masks)
    assert slim.conv1.out_channels == len(clusters_of(method, groups, "bn1.weight")) == masks["bn1.weight"].sum()
    again = narrow(Residual(), widths(slim))
    again.load_state_dict(slim.state_dict())


def test_a_merge_of_different_filters_warns(groups):
    model = Residual()
    method = CSGD(sgd(model), 100, model, groups, macs=0.5)
    with pytest.warns(CutWarning, match=r"the merge takes \d+\.\d% of the filters' norm, so it costs accuracy"):
        method.finalize()
    state = copy.deepcopy(model.state_dict())
    method.finalize()  # once
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_it_is_merged_when_that_is_planned_and_stays(groups):
    model = Residual()
    optimizer = sgd(model)
    method = CSGD(optimizer, 8, model, groups, macs=0.5, cut=0.5)
    for seed in range(8):
        step(model, optimizer, seed)
        assert bool(model.bn1.weight.all()) == (seed < 4)
    slim = remove_channels(model, groups, method.finalize())
    torch.testing.assert_close(slim.eval()(IMAGES), model.eval()(IMAGES), rtol=0, atol=1e-5)


def test_bad_input(groups):
    model = Residual()
    with pytest.raises(ValueError, match="strength must be finite and at least 0, not -1"):
        CSGD(sgd(model), 100, model, groups, macs=0.5, strength=-1)
    with pytest.raises(ValueError, match="give one of macs"):
        CSGD(sgd(model), 100, model, groups)
    with torch.no_grad():
        model.conv1.weight[0] = torch.nan
    with pytest.raises(ValueError, match="training has diverged"):
        CSGD(sgd(model), 100, model, groups, macs=0.5)


def test_where_a_merge_changes_something_it_is_refused(groups, monkeypatch):
    monkeypatch.setattr("gsm_sgd.structured.centripetal.difference", lambda *_: 1e-3)
    model = Residual()
    optimizer, before = sgd(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="channels that are the same cannot be merged in this model"):
        CSGD(optimizer, 10, model, groups, macs=0.5)
    assert not optimizer._optimizer_step_pre_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_net_that_has_diverged_is_not_merged(groups):
    model = Residual()
    method = CSGD(sgd(model), 100, model, groups, macs=0.5)
    with torch.no_grad():
        model.bn1.weight[0] = torch.inf
    with pytest.raises(ValueError, match="they cannot be merged: training has diverged"):
        method.finalize()
    assert torch.equal(model.conv1.weight, Residual().conv1.weight)
