"""What the layers of a file of any of our formats keep."""

from pathlib import Path

from ..experiments.rundir import read_weights
from ..experiments.states import plain_state
from ..masks import LayerSparsity, sparsity_rows
from ..names import is_prunable
from .container import is_sparse
from .hdf5_file import is_hdf5, read_hdf5
from .sparse import read_sparse


def layers_in(path: Path) -> list[LayerSparsity]:
    """Return a row for each layer in a safetensors, sparse or HDF5 file, or of the masks of a ticket.

    Of a sparse file these are the layers that were pruned, of others all that have two or more dimensions.

    Raises:
        UsageError: the file is missing, damaged, or none of these.
    """
    if is_sparse(path):
        return sparsity_rows(read_sparse(path).pruned)
    tensors = read_hdf5(path) if is_hdf5(path) else read_weights(path)
    return sparsity_rows({name: tensor for name, tensor in plain_state(tensors).items() if is_prunable(tensor)})
