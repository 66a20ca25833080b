"""Masks: which weights are kept, and how the others are cut and stay at zero in any optimizer."""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Self
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .budget import Budget
from .distributed import is_dtensor, like_dtensor, local_slice, offsets, placed_like, to_local
from .names import (
    bare_names,
    is_prunable,
    named_in,
    own_names,
    prunable_in,
    prunable_parameters,
    tensors_of,
    without_prune,
)
from .patterns import Pattern, Unstructured
from .scores import score_dtype
from .selection.sharded import Sharded, Shards
from .selection.stored import StoredScores, select_top
from .selection.threshold import find_threshold

_NAMES = "gsm_sgd.masks"  # in the metadata of a file: the names in model order, as safetensors sorts them


class LayerSparsity(NamedTuple):
    """One row of a sparsity table: a prunable parameter and how many of its weights are not zero."""

    name: str
    shape: tuple[int, ...]
    params: int
    nonzeros: int


class Masks(dict[str, Tensor]):
    """Bool tensors by parameter name, True where a weight is kept; DTensors of parameters that are DTensors.

    The keys of parameters without names are their positions among the prunable ones: "0", "1", ... Every method
    returns one of these, and whatever works with masks takes it.

    Example:
        >>> masks = optimizer.finalize()
        >>> masks.save("masks.safetensors")
        >>> Masks.load("masks.safetensors").apply_(model)
    """

    @property
    def num_kept(self) -> int:
        """How many weights are kept, of all processes."""
        return sum(row.nonzeros for row in self.table())

    def density(self) -> float:
        """Return the share of the masked parameters' weights that is kept."""
        return self.num_kept / max(1, sum(mask.numel() for mask in self.values()))

    def table(self) -> list[LayerSparsity]:
        """Return a row for each parameter: name, shape, number of weights, and how many are kept."""
        return sparsity_rows(self)

    @torch.no_grad()
    def apply_(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Set the weights of a model, or of parameters by name, that are not kept to zero, in place.

        Raises:
            ValueError: a mask has no parameter, or another shape; nothing has changed.
        """
        parameters = prunable_parameters(target) if isinstance(target, nn.Module) else target
        for parameter, mask in match(parameters, self):
            to_local(parameter).masked_fill_(~mask, 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to a safetensors file, whole or not at all; of DTensors every process has to call."""
        write_whole(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of such a file."""
        from safetensors.torch import save

        masks: dict[str, Any] = dict(self)
        whole = {key: mask.full_tensor() if is_dtensor(mask) else mask for key, mask in masks.items()}
        return save({key: mask.cpu().contiguous() for key, mask in whole.items()}, {_NAMES: json.dumps([*self])})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the masks of a safetensors file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no safetensors file, or holds something else than masks.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                names = json.loads((file.metadata() or {}).get(_NAMES, "[]"))
                masks = cls({key: file.get_tensor(key) for key in (names if sorted(names) == sorted(keys) else keys)})
        except (SafetensorError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)} is not a safetensors file, or damaged") from error
        if not masks or any(mask.dtype != torch.bool for mask in masks.values()):
            raise ValueError(f"{os.fspath(path)} holds something else than masks: Masks.save writes them")
        return masks


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all."""
    partial = Path(f"{os.fspath(path)}.{uuid4().hex}.partial")  # one of its own: all processes may write at once
    try:
        with partial.open("xb") as stream:  # which follows no link that somebody has put there
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def magnitude_masks(
    parameters: Mapping[str, Tensor],
    *,
    compression: float | None = None,
    density: float | None = None,
    sparsity: float | None = None,
    num_kept: int | None = None,
) -> Masks:
    """Keep the Q largest |w| of all parameters together, ties to the earlier weight.

    Args:
        parameters: as `prunable_parameters` returns them. If any is a DTensor, every process has to call.
        compression, density, sparsity, num_kept: the budget, one of them, as of `GSM`.

    Raises:
        ValueError: the budget is out of range, or a parameter contains NaN.
    """
    budget = Budget.of(compression, density, sparsity, num_kept)
    return largest(parameters, budget.num_kept(sum(parameter.numel() for parameter in parameters.values())))


@torch.no_grad()
def largest(parameters: Mapping[str, Tensor], num_kept: int, pattern: Pattern | None = None) -> Masks:
    """Return masks of the `num_kept` largest |w|, or of the units of a pattern with the largest."""
    weights = list(parameters.values())
    nan = [bool(to_local(weight).isnan().any()) for weight in weights]
    sharded = any(is_dtensor(weight) for weight in weights)
    if sharded:
        nan = [total > 0 for total in Shards(weights).totals(nan)]
    if any(nan):
        name = list(parameters)[nan.index(True)]
        raise ValueError(f"parameter {name!r} contains NaN, so nothing can be kept by magnitude: training has diverged")
    pattern, dtype = pattern or Unstructured(), score_dtype(weights)
    if not sharded:
        masks = choose([weight.abs() for weight in weights], num_kept, pattern.over(list(parameters)))
    else:
        scores = [to_local(weight).abs().to(dtype).contiguous() for weight in weights]
        shards = Shards(weights, scores)
        check_spread(pattern, dict(parameters), shards)
        parts = choose(scores, num_kept, pattern, shards=shards)
        masks = [like_dtensor(weight, mask) for weight, mask in zip(weights, parts, strict=True)]
    return Masks(zip(parameters, masks, strict=True))


def choose(
    scores: Sequence[Tensor],
    num_kept: int,
    pattern: Pattern,
    positive: bool = False,
    averaged: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda units: units,
    shards: Shards | None = None,
) -> list[Tensor]:
    """Pool, select, expand: return bool masks of the weights that a pattern keeps by their scores.

    Args:
        scores: of all weights, or of the parts that lie here.
        num_kept: the budget: how many weights are kept, in all processes together, or what they may cost.
        pattern: what is kept or dropped together.
        positive: whether only scores above zero count.
        averaged: what becomes of the units' scores before they are compared.
        shards: where the parts lie, if they are parts.
    """
    units = averaged(pattern.pool(scores))
    top = _TopHere(positive) if shards is None else _TopOfAll(positive, shards.params, pattern)
    kept = pattern.select(units, num_kept, top)
    masks = list(pattern.expand(kept, scores))
    if isinstance(pattern, Unstructured):
        return masks
    if [(mask.shape, mask.dtype) for mask in masks] != [(score.shape, torch.bool) for score in scores]:
        raise ValueError(f"the pattern {type(pattern).__name__} must expand to a bool mask of each weight's shape")
    found = pattern.cost(masks)
    if shards is not None:
        found = int(sum(shards.totals([int(mask.sum()) for mask in masks])))
    if found > num_kept:
        raise ValueError(f"the pattern {type(pattern).__name__} keeps {found} weights of {num_kept}")
    return masks


def check_spread(pattern: Pattern, weights: Mapping[str, Tensor], shards: Shards) -> None:
    """Raise ValueError on every process if a unit does not lie in the part of one, naming the parameter."""
    reaches = [pattern.reach(weight) for weight in weights.values()]
    if any(reach is None for reach in reaches):
        raise ValueError(f"the pattern {pattern!r} does not take DTensors yet: use single weights")
    if all(step == 1 for reach in reaches for step in reach or ()):
        return
    whole = [
        all(start % step == 0 for start, step in zip(offsets(weight), reach or (), strict=True))
        for weight, reach in zip(weights.values(), reaches, strict=True)
    ]
    everywhere = shards.everywhere(whole)
    if not all(everywhere):
        name = list(weights)[everywhere.index(False)]
        raise ValueError(
            f"parameter {name!r} is sharded within units of {pattern!r}: shard it along another axis, or over a number "
            'of processes that leaves units whole, or put it into a group with "prunable": False'
        )


class _TopHere:
    """The best units of this process."""

    def __init__(self, positive: bool) -> None:
        self._positive = positive

    def __call__(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        return select_top(scores, k, self._positive)

    def total(self, scores: Sequence[Tensor]) -> int:
        return sum(score.numel() for score in scores)


class _TopOfAll:
    """The best units of all processes, each of which has the same share of a weight's units as of the weight."""

    def __init__(self, positive: bool, weights: Sequence[Tensor], pattern: Pattern) -> None:
        self._positive, self._weights = positive, weights
        shapes = pattern.pool([torch.empty(weight.shape, device="meta") for weight in weights])
        self._shapes = [unit.shape for unit in shapes]

    def __call__(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        """Search among those above zero, if only these count: no other sign is exchanged."""
        if k == self.total(scores):
            return [score > 0 if self._positive else torch.ones_like(score, dtype=torch.bool) for score in scores]
        dtype = score_dtype(scores)
        parts = [score.to(dtype).contiguous() for score in scores]
        if self._positive:
            parts = [torch.where(part > 0, part, -1) for part in parts]
        units = [like_dtensor(*rest) for rest in zip(self._weights, parts, self._shapes, strict=True)]
        flat = [part.view(-1) for part in parts]
        search = Sharded(Shards(units, parts), lambda numbers: StoredScores([flat[number] for number in numbers]))
        masks = find_threshold(search, k, self._positive).masks(flat)
        return [mask.view(part.shape) for mask, part in zip(masks, parts, strict=True)]

    def total(self, scores: Sequence[Tensor]) -> int:
        return sum(math.prod(shape) for shape in self._shapes)


@torch.no_grad()
def residual(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> float:
    """Return what share of the weights' L2 norm lies outside masks with the same keys: what a cut would take."""
    weights = list(parameters.values())
    outside = [to_local(weight).masked_fill(to_local(masks[key]), 0) for key, weight in parameters.items()]
    squares = [
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        for tensor in (*outside, *(to_local(weight) for weight in weights))
    ]
    lost, whole = squares[: len(weights)], squares[len(weights) :]
    if any(is_dtensor(weight) for weight in weights):
        shards = Shards(weights)
        lost, whole = shards.totals(lost), shards.totals(whole)
    return math.sqrt(sum(lost) / sum(whole)) if sum(whole) else 0.0


def keep_masked(optimizer: Optimizer, masks: Mapping[str, Tensor], model: nn.Module | None = None) -> RemovableHandle:
    """Keep the weights that the masks cut, and their gradients, at zero in every step of any torch optimizer.

    Masks with names meet the parameters of these names, in the model if it is given, else in the optimizer if it was
    given named parameters. Otherwise masks meet the optimizer's prunable parameters in order, which needs a single
    parameter group.

    The next step masks dense weights that are loaded later. Call this before the first step of LBFGS: it searches along
    directions of earlier ones. Call it after anything that replaces parameters, such as `fully_shard`.

    Args:
        optimizer: any of torch's kind, or the wrapper that Accelerate or Lightning has around one.
        masks: True where a weight is kept.
        model: what the optimizer trains, for one whose parameters have no names, as timm's and the Transformers
            Trainer's.

    Returns:
        A handle whose `remove()` lets the weights move again. Copies and checkpoints do not carry it: call again after
        rebuilding the optimizer.

    Raises:
        ValueError: a mask has no parameter, or one that the optimizer does not train, or another shape, or the
            optimizer calls no hooks. Nothing has changed.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    named = named_in(optimizer) if model is None else dict(model.named_parameters())
    by_name = bool(named) and not _positional(masks)
    if not by_name and len(optimizer.param_groups) > 1:
        raise ValueError(
            "keep_masked cannot tell which mask belongs to which parameter of several groups: give it masks with names "
            "(GSM(model.named_parameters(), ...) returns such) and the model: keep_masked(optimizer, masks, model)"
        )
    matched = match(named if by_name else prunable_in(optimizer), masks)
    _check_trained(optimizer, named, {parameter for parameter, _ in matched})
    cut = [(parameter, Cut(~mask)) for parameter, mask in matched]

    @torch.no_grad()
    def zero_gradients(*_: object) -> None:
        for parameter, away in cut:
            away.zero_gradient_(parameter)

    @torch.no_grad()
    def zero_weights(*_: object) -> None:
        for parameter, away in cut:
            away.zero_(to_local(parameter))

    try:
        hooks = [optimizer.register_step_pre_hook(zero_gradients), optimizer.register_step_post_hook(zero_weights)]
    except AttributeError as error:
        raise ValueError(
            f"{type(optimizer).__name__} calls no hooks at its steps: give keep_masked the torch optimizer in it"
        ) from error
    zero_weights()
    zero_gradients()
    return Handles([*hooks, mask_gradients((parameter, away.mask) for parameter, away in cut)])


def mask_gradients(cut: Iterable[tuple[Tensor, Tensor]]) -> RemovableHandle:
    """Set the gradients of weights that were cut to zero whenever a backward pass has added to them.

    So neither gradient clipping nor GradScaler nor a logged norm counts them. Copies of the parameters are free.

    Args:
        cut: parameters, and for each a bool tensor, True where a weight was cut; of a DTensor for the local part.

    Returns:
        A handle whose `remove()` lets the gradients be.
    """
    handles = []
    for parameter, away in cut:
        trained = parameter.requires_grad
        if parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex()):
            # torch takes a hook only while a gradient is required, but keeps it for when one is again
            parameter.requires_grad_()
            handles.append(parameter.register_post_accumulate_grad_hook(Cut(away).zero_gradient_))
            parameter.requires_grad_(trained)
    return Handles(handles)


class Cut:
    """Which weights of the local part were cut; it goes where the parameter goes."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def zero_(self, tensor: Tensor) -> None:
        """Set what was cut to zero."""
        self.mask = self.mask.to(tensor.device)
        tensor.masked_fill_(self.mask, 0)

    def zero_gradient_(self, parameter: Tensor) -> None:
        """Set the gradient of what was cut to zero, if there is a gradient."""
        if parameter.grad is None:
            return
        grad = placed_like(parameter, parameter.grad)
        if grad is not parameter.grad:
            parameter.grad = grad
        if grad.is_sparse:
            Cut(self.mask.to(grad.device)[tuple(grad._indices())]).zero_(grad._values())
        else:
            self.zero_(to_local(grad))


class Handles(RemovableHandle):
    """Several handles as one; a copy of it removes nothing."""

    handles: Sequence[RemovableHandle] = ()

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        super().__init__(OrderedDict())
        self.handles = handles

    def remove(self) -> None:
        """Remove all of them."""
        for handle in self.handles:
            handle.remove()


def _check_trained(optimizer: Optimizer, named: Mapping[str, Tensor], masked: Set[Tensor]) -> None:
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named.items():
        if parameter in masked - trained:
            raise ValueError(f"the optimizer does not train {name}, but a mask is of it: leave it to Masks.apply_")


def sparsity_table(model: nn.Module) -> list[LayerSparsity]:
    """Return a row (name, shape, params, nonzeros) for each prunable parameter, in model order, under its bare name.

    A weight that torch.nn.utils.prune holds is counted as its mask leaves it.
    """
    tensors = without_prune(tensors_of(model))
    names, buffers = bare_names(tensors), dict(model.named_buffers(remove_duplicate=False))
    return sparsity_rows({names[name]: t for name, t in tensors.items() if name not in buffers and is_prunable(t)})


def sparsity_rows(weights: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """Return the rows of a sparsity table for named tensors, in their order.

    If any is a DTensor, every process has to call, and gets the rows of the whole model.
    """
    counts = [_count_nonzero(to_local(weight.detach())) for weight in weights.values()]
    if any(is_dtensor(weight) for weight in weights.values()):
        counts = [int(total) for total in Shards(list(weights.values())).totals(counts)]
    return [
        LayerSparsity(name, tuple(weight.shape), weight.numel(), count)
        for (name, weight), count in zip(weights.items(), counts, strict=True)
    ]


def _count_nonzero(weight: Tensor) -> int:
    try:
        return int(weight.count_nonzero())
    except NotImplementedError:  # of float8 and large unsigned integers
        return int(weight.double().count_nonzero())


def _positional(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the keys of tensors are positions, not names; in any order, as a file has "10" before "2"."""
    return set(tensors) == {str(number) for number in range(len(tensors))}


def match(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pair parameters with the local parts of masks, in order where one side alone has names, else by key.

    Raises:
        ValueError: a mask has no parameter, or another shape.
    """
    if _positional(masks) == _positional(parameters):
        names = own_names(parameters, masks)
        if unknown := [key for key, name in names.items() if name not in parameters]:
            raise ValueError(f"no prunable parameter is named {unknown[0]!r}, but a mask is")
        if len(set(names.values())) < len(names):
            raise ValueError("two masks are for one parameter: their names differ only in what a wrapper adds")
        pairs = list(zip(names.values(), masks.values(), strict=True))
    elif len(parameters) != len(masks):
        raise ValueError(f"{len(masks)} masks for {len(parameters)} prunable parameters")
    else:
        in_order = [masks[str(number)] for number in range(len(masks))] if _positional(masks) else masks.values()
        pairs = list(zip(parameters, in_order, strict=True))
    for key, mask in pairs:
        if parameters[key].shape != mask.shape:
            shape = tuple(parameters[key].shape)
            raise ValueError(f"the mask of {key!r} has shape {tuple(mask.shape)}, its parameter {shape}")
    return [
        (parameters[key], local_slice(parameters[key], mask).to(to_local(parameters[key]).device, torch.bool))
        for key, mask in pairs
    ]
