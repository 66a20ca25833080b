"""ResRep: compactors behind batch norms forget rows, and fold into the layers in front of them.

Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting", 2021. Symbols as there: Q is a
compactor, a matrix of D x D whose row j makes channel j; m_j is 0 where row j is to forget, else 1.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.optim import Optimizer

from ..names import by_bare_name
from ..optim.checks import CutWarning
from ..schedules import real_number, whole_number
from .channels import ChannelGroups
from .graph import STAYS
from .labels import along_axis
from .methods import Penalized
from .remove import remove_channels
from .surgery import replace

_VANISHED = 1e-5  # the norm of a row that is nothing
_LOSSLESS = 0.01  # share of the rows' norm that the cut may take without a warning
_LAYERS: dict[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Compacted(nn.Sequential):
    """A batch norm and the compactor behind it.

    Attributes:
        layer: the path of the layer whose outputs it normalizes.
    """

    norm: Any
    compactor: Any

    def __init__(self, layer: str, norm: nn.Module, dims: int) -> None:
        super().__init__()
        self.layer, weight = layer, norm.get_parameter("weight")
        size = len(weight)
        self.norm, kernel = norm, [1] if dims > 2 else []
        self.compactor = _LAYERS[dims](size, size, *kernel, bias=False).to(weight)
        with torch.no_grad():
            self.compactor.get_parameter("weight").copy_(torch.eye(size).view(size, size, *[1] * (dims - 2)))


def insert_compactors(model: nn.Module, groups: ChannelGroups) -> nn.Module:
    """Return a copy of a model with a compactor, so far an identity, behind the batch norm of each inner layer.

    A layer is inner if no other layer makes the same channels, as one does whose outputs are added. The norm `NAME`
    becomes `NAME.norm`, and the compactor is `NAME.compactor`.

    Args:
        model: what was traced, trained since or not.
        groups: its channels.

    Raises:
        ValueError: the model is not what was traced, or has no inner layer with a batch norm.
    """
    groups.check_model(dict(model.named_parameters()))
    compacted = copy.deepcopy(model)
    inner = list(_inner_layers(compacted, groups))
    if not inner:
        raise ValueError("no layer of this model has channels and a batch norm of its own, so no compactor fits")
    for layer, norm, dims in inner:
        replace(compacted, norm, Compacted(layer, compacted.get_submodule(norm), dims))
    return compacted


def _inner_layers(model: nn.Module, groups: ChannelGroups) -> Iterator[tuple[str, str, int]]:
    """Yield inner layers: path, path of the norm, and dimensions of the weight."""
    channels = groups.channels
    calls, users = Counter(layer.weight for layer in channels.layers), Counter(channels.norms.values())
    for layer in channels.layers:
        norm, units = channels.norms.get(layer.weight, ""), layer.outputs
        path = norm.rpartition(".")[0]
        alone = calls[layer.weight] == users[norm] == 1 and len(units.unique()) == len(units)
        rows = {name for name, (_, theirs) in channels.rows.items() if torch.isin(theirs, units[units != STAYS]).any()}
        if layer.inputs is None or not alone or rows != {f"{path}.weight", f"{path}.bias"} or (units == STAYS).any():
            continue
        module = model.get_submodule(path)
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            yield layer.weight.rpartition(".")[0], path, model.get_parameter(layer.weight).ndim


def compactors(model: nn.Module) -> dict[str, Compacted]:
    """Return the batch norms with compactors by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Compacted)}


def resrep_parameters(
    model: nn.Module, momentum: float = 0.99, groups: Sequence[Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer: compactors, with a momentum of their own and no decay, and the rest.

    Args:
        model: what `insert_compactors` has returned.
        momentum: of the compactors.
        groups: of all named parameters, where they are in several groups; None is one.
    """
    own = {module.compactor.weight for module in compactors(model).values()}
    named = list(model.named_parameters())
    groups = [{"params": named}] if groups is None else groups
    return [
        *(
            {**group, "params": [(name, param) for name, param in group["params"] if param not in own]}
            for group in groups
        ),
        {"params": [(name, param) for name, param in named if param in own], "momentum": momentum, "weight_decay": 0.0},
    ]


class ResRep(Penalized):
    """Let rows of compactors forget until the budget is met.

    In each step the gradient of row j becomes m_j dL/dQ_j + lambda Q_j / ||Q_j||. Every few steps the masks m are
    chosen again: the smallest rows of all, until the budget is met or `at_once` more are masked than before. A layer
    keeps one row at least; `floor` and `round_to` of the groups do not count here.

    Args:
        optimizer: trains `resrep_parameters(model)`.
        total_steps, groups, budget: as of `ChannelMethod`.
        model: what `insert_compactors` has returned.
        cut: share of the steps after which rows are set to zero that are masked for the budget, or have vanished.
        begin: share of the steps before the first masks.
        every: steps between two choices of masks.
        at_once: how many more rows a choice may mask.
        strength: lambda.

    Raises:
        ValueError: as `ChannelMethod`, or inner layers alone cannot meet the budget.

    Warns:
        CutWarning: the rows that are cut have not vanished, so it costs accuracy.

    Example:
        >>> groups = ChannelGroups.trace(model, images)
        >>> wide = insert_compactors(model, groups)
        >>> optimizer = torch.optim.SGD(resrep_parameters(wide), lr=0.01, momentum=0.9, weight_decay=1e-4)
        >>> method = ResRep(optimizer, total_steps, wide, groups, macs=0.5)
        >>> ...the usual loop...
        >>> slim = fold(wide, groups, method.finalize())
    """

    name: ClassVar[str] = "resrep"
    title: ClassVar[str] = "ResRep"

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        model: nn.Module,
        groups: ChannelGroups,
        *,
        cut: float = 1.0,
        begin: float = 0.01,
        every: int = 200,
        at_once: int = 4,
        strength: float = 1e-4,
        **budget: float,
    ) -> None:
        self.every, self.at_once = whole_number("every", every), whole_number("at_once", at_once)
        self.begin = real_number("begin", begin)
        if min(self.every, self.at_once) < 1:
            raise ValueError(f"every and at_once must be at least 1, not {every} and {at_once}")
        if not 0 <= self.begin <= 1:
            raise ValueError(f"begin is a share, from 0 to 1, not {self.begin:g}")
        super().__init__(optimizer, total_steps, model, groups, cut=cut, strength=strength, **budget)

    @staticmethod
    def _parameters_of(model: nn.Module) -> dict[str, Tensor]:
        """Return the parameters but for the compactors, by the names that they had without."""
        own = {module.compactor.weight for module in compactors(model).values()}
        plain: dict[str, Tensor] = {name: param for name, param in model.named_parameters() if param not in own}
        for path, module in compactors(model).items():
            plain |= {f"{path}.{key}": plain.pop(f"{path}.norm.{key}") for key, _ in module.norm.named_parameters()}
        return by_bare_name(plain)

    def _prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        paths = compactors(model)
        if not paths:
            raise ValueError("the model has no compactors: call insert_compactors first")
        self._check_trained({path: module.compactor.weight for path, module in paths.items()}, optimizer)
        names = {param: name for name, param in self.parameters.items()}
        rows = self.groups.channels.rows
        self._compactors = [(module.compactor.weight, rows[names[module.norm.weight]][1]) for module in paths.values()]
        self._layer_of = {int(unit): place for place, (_, units) in enumerate(self._compactors) for unit in units}
        self._check_inner(self._forget(-torch.ones(self.groups.channels.count), most=0))

    def scores(self) -> Tensor:
        """Return ||Q_j|| of each unit that has a row."""
        return self._totals((matrix.square(), 0, units) for matrix, units in self._compactors).sqrt()

    def _forget(self, scores: Tensor, most: float, at_most: int | None = None, below: float = 0.0) -> Tensor:
        """Return which units to keep: all but the smallest rows, until the cost is met; all `below` a score go too."""
        kept = torch.ones(len(scores), dtype=torch.bool)
        left = [len(units) for _, units in self._compactors]
        rows = torch.tensor([*self._layer_of])
        for unit in rows[scores.cpu()[rows].argsort(stable=True)].tolist():
            masked = len(kept) - int(kept.sum())
            met = self.groups.cost_of(kept) <= most and not scores[unit] < below
            if met or masked == at_most:
                break
            if left[self._layer_of[unit]] > 1:
                left[self._layer_of[unit]] -= 1
                kept[unit] = False
        return kept

    def _choose(self) -> Tensor:
        scores = self._checked_scores()
        kept = self._forget(scores, self._most, below=_VANISHED)
        lost = float(scores[~kept].norm() / scores.norm())
        if lost > _LOSSLESS:
            text = f"the cut takes {lost:.1%} of the compactors' norm, so it costs accuracy: train longer"
            warnings.warn(text, CutWarning, stacklevel=3)
        return kept

    def _penalize(self) -> None:
        since = self.step - round(self.begin * self.total_steps)
        if since >= 0 and since % self.every == 0:
            masked = 0 if self.kept is None else int((~self.kept).sum())
            self.kept = self._forget(self.scores(), self._most, masked + self.at_once)
        for matrix, units in self._compactors:
            if matrix.grad is None:
                continue
            if self.kept is not None:
                matrix.grad.mul_(along_axis(self.kept[units].to(matrix), 0, matrix.ndim))
            lengths = matrix.flatten(1).norm(dim=1)
            inverse = torch.where(lengths > 0, 1 / lengths, 0)
            matrix.grad.add_(matrix * along_axis(inverse, 0, matrix.ndim), alpha=self.strength)

    def _cut(self, kept: Tensor) -> list[tuple[Tensor, Tensor]]:
        gone = [~kept[units].to(matrix.device) for matrix, units in self._compactors]
        return [
            (matrix, along_axis(rows, 0, matrix.ndim).expand_as(matrix))
            for (matrix, _), rows in zip(self._compactors, gone, strict=True)
        ]


def fold(model: nn.Module, groups: ChannelGroups, masks: Mapping[str, Tensor]) -> nn.Module:
    """Return a narrow model of the original class, without compactors and without the channels that masks do not keep.

    Args:
        model: what `insert_compactors` has returned, trained since.
        groups: the channels of the original model.
        masks: what `ResRep.finalize()` has returned.

    Raises:
        ValueError: as `remove_channels`.
    """
    return remove_channels(merge(model), groups, masks)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Return a model of the original class, as wide, that computes in evaluation what the one with compactors does.

    With K' = gamma / sigma K and b' = beta - mu gamma / sigma of a layer and its norm, K'' = Q K' and b'' = Q b'. The
    layer gets K''; the norm stays, so that the model can be trained further: it gets the mean of K'' x, the variance
    that K'' x has if channels in front of Q are uncorrelated, and such a scale and bias that it adds b'' alone.
    """
    plain = copy.deepcopy(model)
    for path, module in compactors(plain).items():
        layer: Any = plain.get_submodule(module.layer)
        norm = module.norm
        transposed = isinstance(layer, _ConvTransposeNd)
        weight = layer.weight.transpose(0, 1) if transposed else layer.weight
        matrix = module.compactor.weight.flatten(1).double()
        scale = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
        mean = norm.running_mean.double()
        if layer.bias is not None:
            mean = mean - layer.bias.double()
            layer.bias.zero_()
        weight.copy_(torch.einsum("rj,j,j...->r...", matrix, scale, weight.double()))
        norm.running_mean.copy_(matrix @ (scale * mean))
        norm.running_var.copy_(matrix.square() @ (scale.square() * norm.running_var.double()))
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(matrix @ norm.bias.double())
        replace(plain, path, norm)
    return plain
