"""Pruned nets as files for others, winning tickets in a few KB, and nets that compute with what is left of them."""

try:
    from .csr import sparse_layers, sparse_linear
    from .sparse import Certificate, largest_size, load_sparse, save_sparse
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gsm_sgd.export needs {error.name}: pip install {error.name}", name=error.name
    ) from error

__all__ = ["Certificate", "largest_size", "load_sparse", "save_sparse", "sparse_layers", "sparse_linear"]
