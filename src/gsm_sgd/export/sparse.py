"""A pruned net in a sparse file: each weight that is not zero once, where it is in few bits, and a certificate.

What is prunable is stored whole, with a bitmask, or with Rice codes, whichever is smallest; all else whole.
"""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from ..experiments import UsageError
from ..experiments.states import plain_state, tensors_hash
from ..experiments.whole_files import write_output
from ..masks import is_prunable, own_names
from . import container, indices
from .container import NUMBER_BYTES, Container, FormatError
from .indices import Coding
from .table import (
    DTYPES,
    NAMES,
    Row,
    check_rows,
    codings_from_text,
    codings_to_text,
    row_of,
    rows_from_json,
    rows_to_json,
)

Values = Literal["float32", "float16", "bfloat16"]

FORMAT = "gsm-sgd sparse 1"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: to look at bits with
_HASH = re.compile(r"[0-9a-f]{64}")
_LONGEST_TOP1 = 24  # characters of a Python float


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
    recipe: dict[str, Any] | None

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
    names = _prunable_names(tensors, prunable)
    table, whole = _table(tensors, names)
    tensors = rounded({name: tensor.cpu() for name, tensor in tensors.items()}, names, values)
    stored_as = [_stored_as(row, values) for row in table]
    positions, codings = [], []
    for row, kind in zip(table, stored_as, strict=True):
        bits = _flat(tensors[row.name]).view(_BITS[tensors[row.name].element_size()])
        positions.append(bits.nonzero().flatten().numpy())
        codings.append(indices.choose(positions[-1], row.size, 8 * NUMBER_BYTES[kind]))

    numbers: dict[str, list[bytes]] = {kind: [] for kind in (*stored_as, *(row.dtype for row in whole))}
    for row, kind, where, coding in zip(table, stored_as, positions, codings, strict=True):
        flat = _flat(tensors[row.name])
        kept = flat if coding.kind == "whole" else flat[torch.from_numpy(where)]
        numbers[kind].append(_bytes(kept.to(DTYPES[kind])))
    for row in whole:
        numbers[row.dtype].append(_bytes(_flat(tensors[row.name])))
    code = indices.encode(positions, [row.size for row in table], codings)
    sections = {"code": code, **{kind: b"".join(parts) for kind, parts in numbers.items()}}
    metadata = _metadata(certify(tensors, names, top1), codings, values)
    try:
        content = container.to_bytes(Container(metadata, _about(table, whole, recipe), sections))
        file = _decoded(container.from_bytes(content, FORMAT), len(content), sum(t.nbytes for t in tensors.values()))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} would not be readable: {error}") from error
    if tensors_hash(file.tensors) != file.certificate.sha256:
        raise UsageError(f"{path} would not be the same when it is read: this is a bug, please report it")
    write_output(Path(path), content, "path")
    return len(content)


def load_sparse(path: str | Path, max_bytes: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a sparse file, prunable ones first; they are dense, and have the bits that were saved.

    Args:
        path: the file.
        max_bytes: how large they may be in all; None means 64 MiB, or 1,024 times the file if that is more.

    Raises:
        UsageError: the file is missing, damaged, larger than that, or its weights are not those that were saved.
    """
    file = read_sparse(path, max_bytes)
    if tensors_hash(file.tensors) != file.certificate.sha256:
        raise UsageError(f"{path} is damaged: its weights are not those that were saved")
    return file.tensors


def read_sparse(path: str | Path, max_bytes: int | None = None) -> SparseFile:
    """Return all of a sparse file, as `load_sparse` does, but without holding its certificate against it."""
    path = Path(path)
    try:
        return _decoded(container.read(path, FORMAT), path.stat().st_size, max_bytes)
    except FormatError as error:
        raise UsageError(f"{path} is not a sparse file, or damaged: {error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


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
    table, whole = _table(tensors, _prunable_names(tensors, prunable))
    stored_as = [_stored_as(row, values) for row in table]
    size = sum(row.size for row in table)
    bits = indices.most_bits(size, nonzeros, 8 * max((NUMBER_BYTES[kind] for kind in stored_as), default=1))
    about = container.compressed(_about(table, whole, recipe))
    content = math.ceil(bits / 8) + sum(row.size * NUMBER_BYTES[row.dtype] for row in whole) + len(about)

    counts = tuple(10 ** len(str(min(row.size, nonzeros))) - 1 for row in table)  # the longest numbers
    widest = [Coding("rice", count, indices.LARGEST_PARAMETER) for count in counts]
    metadata = _metadata(Certificate(size, nonzeros, counts, 64 * "f"), widest, values)
    metadata["top1"] = "9" * _LONGEST_TOP1
    lengths = dict.fromkeys([*stored_as, *(row.dtype for row in whole), "code", "about"], 8 * content)
    return len(container.header(metadata, lengths)) + content


def certify(tensors: Mapping[str, Tensor], prunable: Iterable[str], top1: float | None = None) -> Certificate:
    """Return what is true of tensors."""
    weights = [tensors[name] for name in prunable]
    kept = tuple(int(weight.count_nonzero()) for weight in weights)
    return Certificate(sum(weight.numel() for weight in weights), sum(kept), kept, tensors_hash(tensors), top1)


def rounded(tensors: Mapping[str, Tensor], prunable: Iterable[str], values: Values) -> dict[str, Tensor]:
    """Return the tensors with the prunable float32 ones rounded to what `values` can hold, still float32, and no -0.

    Raises:
        UsageError: a weight becomes zero or infinite.
    """
    if values not in get_args(Values):
        raise UsageError(f"values must be one of {', '.join(get_args(Values))}, not {values!r}")
    result = dict(tensors)
    for name in prunable:
        weight = result[name] = tensors[name].where(tensors[name] != 0, 0)
        if values == "float32" or weight.dtype != torch.float32:
            continue
        result[name] = weight.to(getattr(torch, values)).float()
        if result[name].count_nonzero() != weight.count_nonzero() or (result[name].isinf() & weight.isfinite()).any():
            raise UsageError(f"a weight of {name} is too small or too large for {values}: choose other --values")
    return result


def _decoded(content: Container, file_bytes: int, max_bytes: int | None) -> SparseFile:
    """Return the tensors of a container, every size checked before anything is allocated by it."""
    metadata, about, sections = content
    table, whole = rows_from_json(about.get("prunable")), rows_from_json(about.get("whole"))
    check_rows([*table, *whole], file_bytes, max_bytes)
    codings = codings_from_text(metadata.get("codes"), table)
    values = metadata.get("values", "float32")
    if values not in get_args(Values):
        raise FormatError(f"its values are {values[:40]!r}")
    kinds = [_stored_as(row, values) for row in table] + [row.dtype for row in whole]
    stored = [coding.stored for coding in codings] + [row.size for row in whole]
    numbers = _numbers({name: section for name, section in sections.items() if name != "code"}, kinds, stored)
    positions = indices.decode(sections.get("code", b""), [row.size for row in table], codings)

    tensors = {}
    for place, (row, values_of) in enumerate(zip([*table, *whole], numbers, strict=True)):
        numbers_of = values_of.to(DTYPES[row.dtype])
        if place < len(table) and codings[place].kind != "whole":
            flat = torch.zeros(row.size, dtype=numbers_of.dtype)
            flat[torch.from_numpy(positions[place])] = numbers_of
            numbers_of = flat
        tensors[row.name] = numbers_of.reshape(row.shape)
    recipe = about.get("recipe")
    if not (recipe is None or isinstance(recipe, dict)):
        raise FormatError("its recipe is none")
    return SparseFile(tensors, tuple(row.name for row in table), _certificate(metadata), recipe)


def _numbers(sections: Mapping[str, bytes], kinds: list[str], counts: list[int]) -> Iterator[Tensor]:
    """Return an iterator over the next so many numbers of each kind, after a look at whether all are there."""
    needed = dict.fromkeys(sections, 0)
    for kind, count in zip(kinds, counts, strict=True):
        needed[kind] = needed.get(kind, 0) + count
    for kind, count in needed.items():
        if count * NUMBER_BYTES[kind] != len(sections.get(kind, b"")):
            raise FormatError(f"its section {kind} has not as many numbers as its table needs")
    if sections.get("BOOL", b"").translate(None, b"\0\1"):
        raise FormatError("a truth value that is neither 0 nor 1")

    def taken() -> Iterator[Tensor]:
        at = dict.fromkeys(needed, 0)
        for kind, count in zip(kinds, counts, strict=True):
            size = count * NUMBER_BYTES[kind]
            numbers = torch.empty(count, dtype=DTYPES[kind])
            numbers.view(torch.uint8).numpy()[:] = np.frombuffer(sections.get(kind, b""), np.uint8, size, at[kind])
            at[kind] += size
            yield numbers

    return taken()


def _metadata(certificate: Certificate, codings: Iterable[Coding], values: str) -> dict[str, str]:
    metadata = {
        "format": FORMAT,
        "prunable": str(certificate.prunable),
        "nonzeros": str(certificate.nonzeros),
        "kept": " ".join(map(str, certificate.kept)),
        "codes": codings_to_text(codings),
        "sha256": certificate.sha256,
    }
    if values != "float32":
        metadata["values"] = values
    if certificate.top1 is not None:
        metadata["top1"] = repr(float(certificate.top1))
    return metadata


def _certificate(metadata: Mapping[str, str]) -> Certificate:
    try:
        kept = tuple(int(word) for word in metadata["kept"].split())
        top1 = float(metadata["top1"]) if "top1" in metadata else None
        if top1 is not None and not 0 <= top1 <= 100:
            raise ValueError("no percentage")
        if not _HASH.fullmatch(metadata["sha256"]):
            raise ValueError("no hash")
        return Certificate(int(metadata["prunable"]), int(metadata["nonzeros"]), kept, metadata["sha256"], top1)
    except (KeyError, ValueError) as error:
        raise FormatError("its certificate is damaged") from error


def _about(table: Iterable[Row], whole: Iterable[Row], recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    about: dict[str, Any] = {"prunable": rows_to_json(table), "whole": rows_to_json(whole)}
    return about if recipe is None else {**about, "recipe": dict(recipe)}


def _table(tensors: Mapping[str, Tensor], names: list[str]) -> tuple[list[Row], list[Row]]:
    """Return the rows of what is prunable, and those of all else."""
    table = [row_of(name, tensors[name]) for name in names]
    return table, [row_of(name, tensor) for name, tensor in tensors.items() if name not in names]


def _prunable_names(tensors: Mapping[str, Tensor], prunable: Iterable[str] | None) -> list[str]:
    """Return which tensors are prunable: those given, whatever a wrapper made of their names, else all matrices."""
    if prunable is None:
        return [name for name, tensor in tensors.items() if is_prunable(tensor) and tensor.is_floating_point()]
    names = own_names(tensors, prunable)
    if missing := [name for name in names.values() if name not in tensors]:
        raise UsageError(f"there is no tensor {missing[0]!r} to be prunable: there are {', '.join(tensors)}")
    return list(dict.fromkeys(names.values()))


def _stored_as(row: Row, values: str) -> str:
    """Return the type in which a prunable tensor's values are stored."""
    return NAMES[getattr(torch, values)] if row.dtype == "F32" else row.dtype


def _flat(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers as a row on the CPU, the last dimension running fastest."""
    return tensor.detach().cpu().contiguous().reshape(-1)


def _bytes(row: Tensor) -> bytes:
    return row.contiguous().view(torch.uint8).numpy().tobytes()
