"""Parameters and their names: which are prunable, and what they are called with and without wrappers."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from .distributed import to_local


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
    tensors = tensors_of(model)
    for name in held_by_prune(tensors):
        module, _, weight = name.rpartition(".")
        raise ValueError(
            f"torch.nn.utils.prune holds {name}: make it a plain weight with "
            f"torch.nn.utils.prune.remove(model.get_submodule({module!r}), {weight!r})"
        )
    names = bare_names(tensors)
    return {names[name]: parameter for name, parameter in model.named_parameters() if is_prunable(parameter)}


def prunable_in(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the prunable parameters of an optimizer by name, or by position where names are missing or not unique."""
    prunable = [p for group in optimizer.param_groups for p in group["params"] if is_prunable(p, group)]
    names = {parameter: name for name, parameter in named_in(optimizer).items()}
    return {names.get(parameter, str(number)): parameter for number, parameter in enumerate(prunable)}


def named_in(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return all parameters of an optimizer by bare name; none if it was given no names, or a name twice."""
    named: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        names = group.get("param_names", [])
        if len(names) < len(group["params"]):
            return {}
        named.update(zip(names, group["params"], strict=True))
    unique = len(named) == sum(len(group["params"]) for group in optimizer.param_groups)
    return by_bare_name(named) if unique else {}


def bare_name(name: str) -> str:
    """Return a parameter's name without the modules that torch.compile, DDP and DataParallel put into it."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in ("_orig_mod", "module")), last])


def by_bare_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's tensors by the bare names of `bare_names`, in their order."""
    names = bare_names(tensors)
    return {names[name]: tensor for name, tensor in tensors.items()}


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
    values = to_local(mask)
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


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a model, each once, and then its buffers, by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers(remove_duplicate=False))}
