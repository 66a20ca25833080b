"""C-SGD: filters of a cluster grow identical, so that all but one of them can go, whatever they compute.

Ding et al., "Centripetal SGD for Pruning Very Deep Convolutional Networks with Complicated Structure", 2019. With C(i)
the cluster of filter i, its gradient becomes mean_C(i) G + epsilon (W_i - mean_C(i) W), besides the weight decay.
"""

import copy
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..masks import Masks
from ..names import by_bare_name, tensors_of
from ..optim.checks import CutWarning
from .channels import ChannelGroups, with_noise
from .graph import STAYS
from .labels import along_axis
from .methods import Penalized, Uniform
from .surgery import TOLERANCE, difference

_LOSSLESS = 0.01  # share of the filters' norm that the merge may change without a warning
_ROUNDS = 30  # of k-means


class Slot(NamedTuple):
    """A dimension of a tensor along which channels lie: its entries in groups that are averaged, or summed."""

    name: str
    dim: int
    group: Tensor
    leads: Tensor


class CSGD(Penalized, Uniform):
    """Draw the filters of each cluster together until they are the same, and then merge them into one.

    Clusters are chosen once, by k-means over the filters of all layers that are added to each other, as many as the
    same share of every layer allows within the budget. All that makes a channel is drawn together: filters, biases, and
    the gamma and beta of norms, these with a tenth of the strength. The merge adds up the slices with which followers
    read a cluster, so it changes nothing once the filters are the same.

    Args:
        optimizer, total_steps, model, groups, budget: as of `ChannelMethod`.
        cut: share of the steps after which clusters are merged; 1 leaves it to `finalize()`.
        strength: epsilon. The authors take .003 for 600 epochs of ResNet-56, .05 for ResNet-50; with SGD deviations
            fall by lr epsilon / (1 - momentum) a step.

    Raises:
        ValueError: as `ChannelMethod`; or channels that are the same cannot be merged.

    Warns:
        CutWarning: filters that are merged are not the same yet, so it costs accuracy.

    Example:
        >>> method = CSGD(optimizer, total_steps, model, ChannelGroups.trace(model, images), macs=0.5)
        >>> ...the usual loop...
        >>> masks = method.finalize()  # merged: the model is as wide as it was, and one channel of each cluster counts
        >>> slim = remove_channels(model, method.groups, masks, optimizer)
    """

    name: ClassVar[str] = "c_sgd"
    title: ClassVar[str] = "C-SGD"

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 1.0,
        strength: float = 0.05,
        **budget: float,
    ) -> None:
        super().__init__(optimizer, total_steps, model, groups, cut=cut, strength=strength, **budget)

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Cluster the filters, and try whether clusters of the same filters can be merged."""
        channels = self.groups.channels
        self._tensors = by_bare_name(tensors_of(model))
        layers = {layer.weight: layer for layer in channels.layers if layer.inputs is not None}
        self._read = {(name, self._dim_read(name, layer.inputs, layer.outputs)) for name, layer in layers.items()}
        if not all(self._tensors[name].isfinite().all() for name in layers):
            raise ValueError("weights are not finite, so there are no clusters: training has diverged")
        self._set_leaders(self._clustered(Uniform._choose(self)))
        trial = with_noise(model)
        tensors = by_bare_name(tensors_of(trial))
        self._average_(tensors)
        same = copy.deepcopy(trial)
        self._sum_(tensors)
        if not difference(same, trial, self.groups.example_inputs) <= TOLERANCE:
            raise ValueError("channels that are the same cannot be merged in this model: leave layers out with ignore=")

    def _dim_read(self, weight: str, inputs: Tensor | None, outputs: Tensor) -> int:
        """Return along which dimension a layer's weight has its inputs: the first of transposed convolutions."""
        slots = self.groups.channels.slots
        plain = torch.equal(slots[weight, 0], outputs) and torch.equal(slots[weight, 1], inputs)  # type: ignore[arg-type]
        return 1 if plain else 0

    def _set_leaders(self, leaders: Tensor) -> None:
        """Set which unit each unit is to be merged into."""
        self.leaders = leaders
        sides: tuple[list[Slot], list[Slot]] = [], []
        for (name, dim), units in self.groups.channels.slots.items():
            order = units.argsort(stable=True)
            number = torch.empty_like(units)  # of an entry among those of its unit
            number[order] = torch.arange(len(units)) - torch.searchsorted(units[order], units[order])
            leader = torch.where(units == STAYS, STAYS, leaders[units])
            group = torch.stack([leader, number]).unique(dim=1, return_inverse=True)[1]
            device = self._tensors[name].device
            slot = Slot(name, dim, group.to(device), (leader == units).to(device))
            sides[(name, dim) in self._read].append(slot)
        self._making, self._reading = sides

    def _clustered(self, kept: Tensor) -> Tensor:
        """Return for each unit the first of its cluster; a family has as many clusters as `kept` has of it."""
        families, channels = self.groups.families, self.groups.channels
        leaders = torch.arange(len(kept))
        filters = {layer.weight for layer in channels.layers}
        for family, count in enumerate(families[kept].bincount(minlength=int(families.max()) + 1).tolist()):
            mine = (families == family).nonzero().squeeze(1)
            if not count:
                raise ValueError("the budget leaves nothing of a layer to merge its filters into: give more")
            rows = []
            for (name, dim), units in channels.slots.items():
                if name in filters and (name, dim) not in self._read and torch.isin(mine, units).all():
                    entries = torch.isin(units, mine).nonzero().squeeze(1)
                    entries = entries[units[entries].argsort(stable=True)].to(self._tensors[name].device)
                    rows.append(self._tensors[name].detach().movedim(dim, 0)[entries].reshape(len(mine), -1).cpu())
            labels = k_means(torch.cat(rows, 1), count)
            for label in range(count):
                leaders[mine[labels == label]] = mine[labels == label][0]
        return leaders

    def _choose(self) -> Tensor:
        """Return the units that clusters are merged into."""
        return self.leaders == torch.arange(len(self.leaders))

    def _penalize(self) -> None:
        for slot in self._making:
            param = self._tensors[slot.name]
            if param.grad is not None:
                strength = self.strength if param.ndim > 1 else self.strength / 10
                pull = param - _pooled(param, slot, mean=True)
                param.grad.copy_(_pooled(param.grad, slot, mean=True).add_(pull, alpha=strength))

    def finalize(self) -> Masks:
        """Merge each cluster into one channel and silence the others, unless this has been done; return their masks."""
        if not self._gone:
            self._merge()
        return super().finalize()

    @torch.no_grad()
    def _merge(self) -> None:
        before = {slot.name: self._tensors[slot.name].clone() for slot in self._making}
        if not all(tensor.isfinite().all() for tensor in before.values()):
            raise ValueError("weights are not finite, so they cannot be merged: training has diverged")
        self._average_(self._tensors)
        apart = sum(float((self._tensors[name] - old).norm() ** 2) for name, old in before.items())
        lost = (apart / sum(float(old.norm() ** 2) for old in before.values())) ** 0.5
        if lost > _LOSSLESS:
            text = f"the merge takes {lost:.1%} of the filters' norm, so it costs accuracy: train longer"
            warnings.warn(text, CutWarning, stacklevel=3)
        self._sum_(self._tensors)

    @torch.no_grad()
    def _average_(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the channels of each cluster the same."""
        for slot in self._making:
            tensors[slot.name].copy_(_pooled(tensors[slot.name], slot, mean=True))

    @torch.no_grad()
    def _sum_(self, tensors: Mapping[str, Tensor]) -> None:
        """Let followers read one channel of each cluster for all."""
        for slot in self._reading:
            weight = tensors[slot.name]
            leads = along_axis(slot.leads, slot.dim, weight.ndim)
            weight.copy_(_pooled(weight, slot, mean=False) * leads)

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the training depends on, the clusters too."""
        return {**super().state_dict(), "leaders": self.leaders}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with its clusters; see `ChannelMethod`."""
        super().load_state_dict(state)
        self._set_leaders(state["leaders"].cpu())


def _pooled(tensor: Tensor, slot: Slot, mean: bool) -> Tensor:
    """Return a tensor with the sum or the mean of its group in place of each slice along a slot."""
    rows = tensor.movedim(slot.dim, 0)
    sums = rows.new_zeros(int(slot.group.max()) + 1, *rows.shape[1:]).index_add_(0, slot.group, rows)
    if mean:
        sums /= along_axis(slot.group.bincount(), 0, sums.ndim)
    return sums[slot.group].movedim(0, slot.dim)


def k_means(points: Tensor, count: int) -> Tensor:
    """Return which of so many clusters each point is in; none is empty.

    The library imports nothing that has k-means, and these are Lloyd's dozen lines. The first centres lie as far from
    each other as can be, so nothing is random.
    """
    points = points.double()
    chosen = [int(points.norm(dim=1).argmax())]
    away = torch.full((len(points),), torch.inf, dtype=points.dtype)
    while len(chosen) < count:
        away = torch.minimum(away, (points - points[chosen[-1]]).norm(dim=1))
        chosen.append(int(away.argmax()))
    centres = points[chosen]
    for _ in range(_ROUNDS):
        distances, labels = torch.cdist(points, centres).min(1)
        sizes = labels.bincount(minlength=count)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            far = int(torch.where(sizes[labels] > 1, distances, -1.0).argmax())
            sizes[labels[far]] -= 1
            labels[far], sizes[empty] = empty, 1
        centres = torch.zeros_like(centres).index_add_(0, labels, points) / sizes.unsqueeze(1)
    return labels
