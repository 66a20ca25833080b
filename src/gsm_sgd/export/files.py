"""What the layers of a file of any of our formats keep."""

from pathlib import Path

from ..experiments.reading import open_regular
from ..experiments.rundir import read_weights
from ..experiments.states import plain_state
from ..masks import LayerSparsity, sparsity_rows
from ..names import is_prunable
from . import sparse, ticket
from .container import format_of
from .hdf5_file import MAGIC, read_hdf5
from .verify import verify


def layers_in(path: Path) -> list[LayerSparsity]:
    """Return a row for each layer in a safetensors, sparse or HDF5 file, or of the masks of a ticket.

    Of a sparse file these are the layers that were pruned, of others all that have two or more dimensions.

    Raises:
        UsageError: the file is missing, damaged, or none of these.
        CertificateError: a sparse file's certificate says something else.
    """
    match format_of(path):
        case sparse.FORMAT:
            return sparsity_rows(verify(path).pruned)
        case ticket.FORMAT:
            return sparsity_rows(ticket.read_ticket(path).masks)
    tensors = read_hdf5(path) if _is_hdf5(path) else read_weights(path)
    return sparsity_rows({name: tensor for name, tensor in plain_state(tensors).items() if is_prunable(tensor)})


def _is_hdf5(path: Path) -> bool:
    try:
        with open_regular(path) as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
