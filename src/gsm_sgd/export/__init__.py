"""Pruned nets as files for others: a sparse file with a certificate, safetensors, ONNX, HDF5, and winning tickets."""

from .sparse import Certificate, largest_size, load_sparse, save_sparse

__all__ = ["Certificate", "largest_size", "load_sparse", "save_sparse"]
