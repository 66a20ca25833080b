"""A pruned net in a sparse file: each weight that is not zero once, where it is in few bits, and a certificate."""

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..experiments import UsageError
from ..experiments.reading import open_regular
from ..experiments.states import plain_state, tensors_hash
from ..experiments.whole_files import write_output
from ..names import is_prunable, own_names
from .container import DTYPES, FormatError, as_bits, from_bytes, most_bytes, to_bytes

Values = Literal["float32", "float16", "bfloat16"]

_LONGEST_TOP1 = 2.2250738585072014e-300


class Certificate(NamedTuple):
    """What a file says of its net: N, Q, what each prunable tensor keeps, the hash of all, and accuracy in percent."""

    prunable: int
    nonzeros: int
    kept: tuple[int, ...]
    sha256: str
    top1: float | None = None


class SparseFile(NamedTuple):
    """What a sparse file holds: dense tensors, prunable ones first, the certificate, and the recipe if there is one."""

    tensors: dict[str, Tensor]
    prunable: tuple[str, ...]
    certificate: Certificate
    recipe: Any

    @property
    def pruned(self) -> dict[str, Tensor]:
        """The prunable tensors."""
        return {name: self.tensors[name] for name in self.prunable}


def save_sparse(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    prunable: Iterable[str] | None = None,
    values: Values = "float32",
    recipe: Mapping[str, Any] | None = None,
    top1: float | None = None,
) -> int:
    """Write tensors to a sparse file, whole or not at all, and return its size in bytes.

    The file is read back before it is written to the disk, so that what is saved can be loaded.

    Args:
        path: the file.
        tensors: a net's state. A -0 of a pruned tensor, as multiplying by a mask leaves them, becomes 0; tensors that
            share memory are stored each. Names lose what torch.compile, DDP and DataParallel add to them, and a weight
            that torch.nn.utils.prune holds is stored as its mask leaves it, under its own name.
        prunable: names of what was pruned; all floating-point tensors of two or more dimensions if None.
        values: what prunable float32 tensors are rounded to; they are float32 again when they are read.
        recipe: of the training, in JSON's types.
        top1: the accuracy, in percent, of these tensors with these values.

    Raises:
        UsageError: an entry is no dense tensor or of a type that has no place in the format, rounding makes a weight
            zero or infinite, there is no tensor of a name, recipe or accuracy are not what a file can hold, or it
            cannot be written.
    """
    tensors = plain_state(tensors)
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise UsageError(f"the state's entry {empty[0]!r} is on the device meta, without numbers: load them before")
    stored_as = _stored_as(tensors, prunable, values)
    tensors = rounded({name: tensor.cpu() for name, tensor in tensors.items()}, stored_as, values)
    try:
        content = to_bytes(tensors, stored_as, _about(certify(tensors, stored_as, top1), recipe))
        _decoded(content, sum(tensor.nbytes for tensor in tensors.values()))
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{path} would not be readable: {error}") from error
    write_output(Path(path), content, "path")
    return len(content)


def load_sparse(path: str | Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a sparse file, prunable ones first; they are dense, and have the bits that were saved.

    Args:
        path: the file.
        max_bytes: how large they may be in all; None means 64 MiB, or 1,024 times the file if that is more.

    Raises:
        UsageError: the file is missing, damaged, larger than that, or not what its certificate says.
    """
    return read_sparse(path, max_bytes).tensors


def read_sparse(path: str | Path, max_bytes: int | None = None) -> SparseFile:
    """Return all of a sparse file, as `load_sparse` does, its certificate computed again from its tensors."""
    try:
        with open_regular(Path(path)) as stream:
            return _decoded(stream.read(), max_bytes)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except FormatError as error:
        raise UsageError(f"{path} is not a sparse file, or damaged: {error}") from error


def largest_size(
    tensors: Mapping[str, Tensor],
    nonzeros: int,
    *,
    prunable: Iterable[str] | None = None,
    values: Values = "float32",
    recipe: Mapping[str, Any] | None = None,
) -> int:
    """Return the most bytes that `save_sparse` makes of such tensors, wherever the `nonzeros` prunable weights are.

    Only names, types and shapes of the tensors count, so they may be on the device meta.
    """
    tensors, nonzeros = plain_state(tensors), operator.index(nonzeros)
    stored_as = _stored_as(tensors, prunable, values)
    sizes = [tensors[name].numel() for name in stored_as]
    kept = tuple(10 ** len(str(min(size, nonzeros))) - 1 for size in sizes)  # the longest numbers
    longest = Certificate(sum(sizes), nonzeros, kept, 64 * "f", _LONGEST_TOP1)
    return most_bytes(tensors, stored_as, _about(longest, recipe), nonzeros)


def certify(tensors: Mapping[str, Tensor], prunable: Iterable[str], top1: float | None = None) -> Certificate:
    """Return what is true of tensors."""
    weights = [tensors[name] for name in prunable]
    kept = tuple(int(weight.count_nonzero()) for weight in weights)
    return Certificate(sum(weight.numel() for weight in weights), sum(kept), kept, tensors_hash(tensors), top1)


def rounded(tensors: Mapping[str, Tensor], prunable: Iterable[str], values: Values) -> dict[str, Tensor]:
    """Return the tensors with prunable float32 ones rounded to `values`, still float32, and no -0.

    Raises:
        UsageError: a weight becomes zero or infinite.
    """
    result = dict(tensors)
    for name in prunable:
        weight = result[name] = tensors[name].clone()
        as_bits(weight).masked_fill_(weight == 0, 0)
        if values == "float32" or weight.dtype != torch.float32:
            continue
        result[name] = weight.to(DTYPES[values]).float()
        if result[name].count_nonzero() != weight.count_nonzero() or (result[name].isinf() & weight.isfinite()).any():
            raise UsageError(f"a weight of {name} is too small or too large for {values}: choose other --values")
    return result


def _decoded(content: bytes, max_bytes: int | None) -> SparseFile:
    """Return what a file's bytes hold; FormatError if its certificate is not true."""
    about, tensors = from_bytes(content, max_bytes)
    names = tuple(dict.fromkeys(row[0] for row in about["pruned"]))
    stated: Any = about.get("certificate")
    match stated:
        case {"top1": None | int() | float() as top1} if top1 is None or 0 <= top1 <= 100:
            certificate = certify(tensors, names, top1)
        case _:
            raise FormatError("its certificate is damaged")
    for field, found in {**certificate._asdict(), "kept": list(certificate.kept)}.items():
        if stated.get(field) != found:
            raise FormatError(f"it states {field} {stated.get(field)!r:.80}, but has {found!r:.80}")
    return SparseFile(tensors, names, certificate, about.get("recipe"))


def _about(certificate: Certificate, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"certificate": certificate._asdict(), "recipe": recipe and dict(recipe)}


def _stored_as(tensors: Mapping[str, Tensor], prunable: Iterable[str] | None, values: Values) -> dict[str, torch.dtype]:
    """Return the prunable tensors, all matrices if None are named, and the type of number that each is stored as."""
    if values not in get_args(Values):
        raise UsageError(f"values must be one of {', '.join(get_args(Values))}, not {values!r}")
    if other := [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES.values()]:
        dtype = tensors[other[0]].dtype
        raise UsageError(f"{other[0]} is {dtype}, which the format does not have: convert it, or leave it out")
    if prunable is None:
        prunable = [name for name, tensor in tensors.items() if is_prunable(tensor) and tensor.is_floating_point()]
    names = own_names(tensors, prunable).values()
    if missing := [name for name in names if name not in tensors]:
        raise UsageError(f"there is no tensor {missing[0]!r} to be prunable: there are {', '.join(tensors)}")
    dtypes = {name: tensors[name].dtype for name in names}
    return {name: DTYPES[values] if dtype == torch.float32 else dtype for name, dtype in dtypes.items()}
