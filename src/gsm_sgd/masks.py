"""What is prunable, which weights to keep by magnitude, the cut, and keeping zeros zero.

Masks are bool tensors, True where a weight is kept, in a dict: keyed by parameter name, or by position among
the prunable parameters where names are not known. Of weights that are DTensors they are DTensors, spread alike.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .selection import StoredScores, kept_weights, score_dtype, select_top
from .sharded import Shards, cut_out, here, is_dtensor, spread_as

Masks = dict[str, Tensor] | dict[int, Tensor]
_Key = TypeVar("_Key", str, int)


class LayerSparsity(NamedTuple):
    """One row of a sparsity table: a prunable parameter and how many of its weights are not zero."""

    name: str
    shape: tuple[int, ...]
    params: int
    nonzeros: int


def is_prunable(parameter: Tensor, group: Mapping[str, Any] | None = None) -> bool:
    """Return whether a parameter may be pruned: as its group's `prunable` says, else if `ndim >= 2`."""
    chosen = group.get("prunable") if group else None
    return parameter.ndim >= 2 if chosen is None else bool(chosen)


def is_governed(parameter: Tensor, group: Mapping[str, Any]) -> bool:
    """Return whether the rule governs a parameter of a group now: it is prunable, and not frozen."""
    return parameter.requires_grad and is_prunable(parameter, group)


def prunable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of two or more dimensions by bare name, in model order, tied weights once.

    Raises:
        ValueError: torch.nn.utils.prune holds one of them, and what counts is its product with a mask.
    """
    tensors = _tensors_of(model)
    for name in held_by_prune(tensors):
        module, _, weight = name.rpartition(".")
        raise ValueError(
            f"torch.nn.utils.prune holds {name}: make it a plain weight with "
            f"torch.nn.utils.prune.remove(model.get_submodule({module!r}), {weight!r})"
        )
    names = bare_names(tensors)
    return {names[name]: parameter for name, parameter in model.named_parameters() if is_prunable(parameter)}


def prunable_in(optimizer: Optimizer) -> dict[str, Tensor] | dict[int, Tensor]:
    """Return the prunable parameters of an optimizer by name, or by position where names are missing or not unique."""
    prunable = [p for group in optimizer.param_groups for p in group["params"] if is_prunable(p, group)]
    names = {parameter: name for name, parameter in named_in(optimizer).items()}
    return {names[parameter]: parameter for parameter in prunable} if names else dict(enumerate(prunable))


@torch.no_grad()
def magnitude_masks(parameters: Mapping[_Key, Tensor], compression: float) -> dict[_Key, Tensor]:
    """Keep the floor(N / compression) largest |W| of all parameters together, ties to the earlier weight.

    Args:
        parameters: as `prunable_parameters` returns them. If any is a DTensor, every process has to call.
        compression: C >= 1.

    Returns:
        Bool masks with the keys and shapes of `parameters`, exactly floor(N / C) True in all; DTensors of DTensors.

    Raises:
        ValueError: C is below 1, not finite, or leaves no weight; or a parameter contains NaN.
    """
    kept = kept_weights(sum(parameter.numel() for parameter in parameters.values()), float(compression))
    weights = list(parameters.values())
    nan = [bool(here(weight).isnan().any()) for weight in weights]
    if any(is_dtensor(weight) for weight in weights):
        nan = [total > 0 for total in Shards(weights).totals(nan)]
    if any(nan):
        name = list(parameters)[nan.index(True)]
        raise ValueError(f"parameter {name!r} contains NaN, so nothing can be kept by magnitude: training has diverged")
    if any(is_dtensor(weight) for weight in weights):
        masks = _sharded_masks(weights, kept)
    else:
        masks = select_top([weight.abs() for weight in weights], kept)
    return dict(zip(parameters, masks, strict=True))


def _sharded_masks(weights: list[Tensor], kept: int) -> list[Tensor]:
    """Return masks of the largest |W| of all processes."""
    dtype = score_dtype(weights)
    scores = [here(weight).abs().to(dtype).contiguous() for weight in weights]
    shards = Shards(weights, scores)
    if kept == len(shards):
        return [torch.ones_like(weight, dtype=torch.bool) for weight in weights]
    flat = [score.view(-1) for score in scores]
    cut = shards.find_cut(lambda numbers: StoredScores([flat[number] for number in numbers]), kept, suspect=False)
    masks = [mask.view(score.shape) for mask, score in zip(cut.masks(flat), scores, strict=True)]
    return [spread_as(weight, mask) for weight, mask in zip(weights, masks, strict=True)]


@torch.no_grad()
def apply_masks_(parameters: Mapping[str, Tensor] | Mapping[int, Tensor], masks: Masks) -> None:
    """Set the weights that the masks do not keep to zero, in place.

    Raises:
        ValueError: a mask has no parameter, or another shape; nothing has changed.
    """
    for parameter, mask in _matched(parameters, masks):
        here(parameter).masked_fill_(~mask, 0)


@torch.no_grad()
def residual(parameters: Mapping[Any, Tensor], masks: Mapping[Any, Tensor]) -> float:
    """Return what share of the weights' L2 norm lies outside masks with the same keys: what a cut would take."""
    weights = list(parameters.values())
    outside = [here(weight).masked_fill(here(masks[key]), 0) for key, weight in parameters.items()]
    squares = [
        float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
        for tensor in (*outside, *(here(weight) for weight in weights))
    ]
    lost, whole = squares[: len(weights)], squares[len(weights) :]
    if any(is_dtensor(weight) for weight in weights):
        shards = Shards(weights)
        lost, whole = shards.totals(lost), shards.totals(whole)
    return math.sqrt(sum(lost) / sum(whole)) if sum(whole) else 0.0


def freeze(optimizer: Optimizer, masks: Masks, model: nn.Module | None = None) -> RemovableHandle:
    """Keep the masked weights and their gradients at exactly zero, now and in every step of any torch optimizer.

    Masks with names meet the parameters of these names, in the model if it is given, else in the optimizer if it was
    given named parameters. Otherwise masks meet the optimizer's prunable parameters in order, which needs a single
    parameter group.

    The next step masks dense weights that are loaded later. Freeze LBFGS before its first step: it searches along
    directions of earlier ones. Freeze after anything that replaces parameters, such as `fully_shard`.

    Args:
        optimizer: any of torch's kind, or the wrapper that Accelerate or Lightning has around one.
        masks: True where a weight is kept.
        model: what the optimizer trains, for one whose parameters have no names, as timm's and the Transformers
            Trainer's.

    Returns:
        A handle whose `remove()` lets the weights move again. Copies and checkpoints do not carry it: freeze again
        after building the optimizer anew.

    Raises:
        ValueError: a mask has no parameter, or one that the optimizer does not train, or another shape, or the
            optimizer calls no hooks. Nothing has changed.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    named = named_in(optimizer) if model is None else dict(model.named_parameters())
    by_name = bool(named) and all(isinstance(key, str) for key in masks)
    if not by_name and len(optimizer.param_groups) > 1:
        raise ValueError(
            "freeze cannot tell which mask belongs to which parameter of several groups: give it masks with names "
            "(GSM(model.named_parameters(), ...) returns such) and the model: freeze(optimizer, masks, model)"
        )
    matched = _matched(named if by_name else prunable_in(optimizer), masks)
    _check_trained(optimizer, named, {parameter for parameter, _ in matched})
    cut = [(parameter, _Cut(~mask)) for parameter, mask in matched]

    @torch.no_grad()
    def zero_gradients(*_: object) -> None:
        for parameter, away in cut:
            away.zero_gradient_(parameter)

    @torch.no_grad()
    def zero_weights(*_: object) -> None:
        for parameter, away in cut:
            away.zero_(here(parameter))

    try:
        hooks = [optimizer.register_step_pre_hook(zero_gradients), optimizer.register_step_post_hook(zero_weights)]
    except AttributeError as error:
        raise ValueError(
            f"{type(optimizer).__name__} calls no hooks at its steps: give freeze the torch optimizer in it"
        ) from error
    zero_weights()
    zero_gradients()
    return _Handles([*hooks, mask_gradients((parameter, away.mask) for parameter, away in cut)])


def mask_gradients(cut: Iterable[tuple[Tensor, Tensor]]) -> RemovableHandle:
    """Set the gradients of weights that were cut to zero whenever a backward pass has added to them.

    So neither gradient clipping nor GradScaler nor a logged norm counts them. Copies of the parameters are free.

    Args:
        cut: parameters, and for each a bool tensor, True where a weight was cut; of a DTensor for the part held here.

    Returns:
        A handle whose `remove()` lets the gradients be.
    """
    handles = []
    for parameter, away in cut:
        trained = parameter.requires_grad
        if parameter.is_leaf and (parameter.is_floating_point() or parameter.is_complex()):
            # torch takes a hook only while a gradient is required, but keeps it for when one is again
            parameter.requires_grad_()
            handles.append(parameter.register_post_accumulate_grad_hook(_Cut(away).zero_gradient_))
            parameter.requires_grad_(trained)
    return _Handles(handles)


class _Cut:
    """Which weights of the part held here were cut; it goes where the parameter goes."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def zero_(self, tensor: Tensor) -> None:
        self.mask = self.mask.to(tensor.device)
        tensor.masked_fill_(self.mask, 0)

    def zero_gradient_(self, parameter: Tensor) -> None:
        grad: Any = parameter.grad
        if is_dtensor(grad) and grad.placements != (placements := getattr(parameter, "placements", None)):
            parameter.grad = grad = grad.redistribute(placements=placements)
        if grad is not None and grad.is_sparse:
            _Cut(self.mask.to(grad.device)[tuple(grad._indices())]).zero_(grad._values())
        elif grad is not None:
            self.zero_(here(grad))


class _Handles(RemovableHandle):
    """Several handles as one; a copy of it removes nothing."""

    handles: Sequence[RemovableHandle] = ()

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        super().__init__(OrderedDict())
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _check_trained(optimizer: Optimizer, named: Mapping[str, Tensor], masked: Set[Tensor]) -> None:
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named.items():
        if parameter in masked - trained:
            raise ValueError(f"the optimizer does not train {name}, but a mask is of it: leave it to apply_masks_")


def sparsity_table(model: nn.Module) -> list[LayerSparsity]:
    """Return a row (name, shape, params, nonzeros) for each prunable parameter, in model order, under its bare name.

    A weight that torch.nn.utils.prune holds is counted as its mask leaves it.
    """
    tensors = without_prune(_tensors_of(model))
    names, buffers = bare_names(tensors), dict(model.named_buffers(remove_duplicate=False))
    return sparsity_rows({names[name]: t for name, t in tensors.items() if name not in buffers and is_prunable(t)})


def sparsity_rows(weights: Mapping[str, Tensor]) -> list[LayerSparsity]:
    """Return the rows of a sparsity table for named tensors, in their order.

    If any is a DTensor, every process has to call, and gets the rows of the whole model.
    """
    counts = [_count_nonzero(here(weight.detach())) for weight in weights.values()]
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


def named_in(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all parameters of an optimizer by bare name; none if it was given no names, or a name twice."""
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names", [])
        if len(names) < len(group["params"]):
            return {}
        named.update(zip(names, group["params"], strict=True))
    bare = bare_names(named)
    unique = len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {bare[name]: parameter for name, parameter in named.items()} if unique else {}


def bare_name(name: str) -> str:
    """Return a parameter's name without the modules that torch.compile, DDP and DataParallel put into it."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in ("_orig_mod", "module")), last])


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Return the bare name of each name in a model, for masks and files that other models are to load.

    A `module.` is taken for a wrapper's only where all names begin with it: a model may have a module of that name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part != "_orig_mod") for name in names}
    while bare and all(name.startswith("module.") for name in bare.values()):
        bare = {name: short.removeprefix("module.") for name, short in bare.items()}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in bare}


def own_names(ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    """Map each of their names to ours: the same one, else one with the same bare name, else, to no avail, itself."""
    ours = set(ours)
    by_bare = {bare_name(name): name for name in ours}
    return {name: name if name in ours else by_bare.get(bare_name(name), name) for name in theirs}


def held_by_prune(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the weights that torch.nn.utils.prune keeps as a tensor NAME_orig and its mask NAME_mask."""
    names = [name.removesuffix("_orig") for name in tensors if name.endswith("_orig")]
    pairs = {name: (tensors[f"{name}_orig"], tensors.get(f"{name}_mask")) for name in names if name not in tensors}
    return [name for name, (weight, mask) in pairs.items() if mask is not None and _is_mask(mask, weight)]


def _is_mask(mask: Tensor, weight: Tensor) -> bool:
    values = here(mask)
    return mask.shape == weight.shape and (mask.is_meta or bool(((values == 0) | (values == 1)).all()))


def without_prune(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with each weight that torch.nn.utils.prune holds in one piece, as the net computes with it."""
    joined = {}
    held = {f"{name}_orig": name for name in held_by_prune(tensors)}
    masks = {f"{name}_mask" for name in held.values()}
    for name, tensor in tensors.items():
        if name in held:
            joined[held[name]] = tensor.detach() * tensors[f"{held[name]}_mask"].to(tensor.dtype)
        elif name not in masks:
            joined[name] = tensor
    return joined


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, each once, and then its buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}


def _matched(parameters: Mapping[str, Tensor] | Mapping[int, Tensor], masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """Pair parameters with the parts of masks that lie here, by name where both have names, else in order.

    All is checked beforehand.
    """
    by_key: dict[Any, Tensor] = dict(parameters)
    pairs: list[tuple[Any, Tensor, Tensor]]
    if {type(key) for key in (*parameters, *masks)} == {str}:
        names = own_names(by_key, map(str, masks))
        if unknown := [key for key, name in names.items() if name not in by_key]:
            raise ValueError(f"no prunable parameter is named {unknown[0]!r}, but a mask is")
        if len(set(names.values())) < len(names):
            raise ValueError("two masks are for one parameter: their names differ only in what a wrapper adds")
        pairs = [(name, by_key[name], mask) for name, mask in zip(names.values(), masks.values(), strict=True)]
    elif set(masks) <= set(by_key):
        pairs = [(key, by_key[key], mask) for key, mask in masks.items()]
    elif len(parameters) == len(masks):
        pairs = list(zip(masks, by_key.values(), masks.values(), strict=True))
    else:
        raise ValueError(f"{len(masks)} masks for {len(parameters)} prunable parameters")
    for key, parameter, mask in pairs:
        if parameter.shape != mask.shape:
            raise ValueError(f"mask {key!r} has shape {tuple(mask.shape)}, its parameter {tuple(parameter.shape)}")
    return [(param, cut_out(param, mask).to(here(param).device, torch.bool)) for _, param, mask in pairs]
