"""The tensors of a file of any of our formats."""

from pathlib import Path

from torch import Tensor

from ..experiments.rundir import read_weights
from . import sparse, ticket
from .container import format_of
from .hdf5_file import MAGIC, read_hdf5


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors, sparse or HDF5 file, or the masks of a ticket.

    Raises:
        UsageError: the file is missing, damaged, or none of these.
    """
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) == MAGIC:
                return read_hdf5(path)
    match format_of(path):
        case sparse.FORMAT:
            return sparse.load_sparse(path)
        case ticket.FORMAT:
            return dict(ticket.read_ticket(path).masks)
    return read_weights(path)
