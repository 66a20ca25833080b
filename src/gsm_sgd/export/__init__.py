"""Pruned nets as files for others, winning tickets in a few KB, and nets that compute with what is left of them."""

from .csr import sparse_linear
from .sparse import Certificate, largest_size, load_sparse, save_sparse

__all__ = ["Certificate", "largest_size", "load_sparse", "save_sparse", "sparse_linear"]
