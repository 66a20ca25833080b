"""Re-parameterised training: several branches while a model is trained, and one layer in their place afterwards."""

from .blocks import ACB, CSLA, DBB, Block, LargeKernel, RepVGG
from .partitions import RepMLP
from .swap import fuse, multipliers, widen

__all__ = ["ACB", "CSLA", "DBB", "Block", "LargeKernel", "RepMLP", "RepVGG", "fuse", "multipliers", "widen"]
