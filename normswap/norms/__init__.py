"""The methods: a registry, the moments core, and one folder per family. Nothing knows of graphs.

To add a method, write its module in a file of its family's folder, and register it there.
"""

from normswap.norms import batch, input_norm, mixed, pointwise, recurrent, sample, weight

__all__ = ["batch", "input_norm", "mixed", "pointwise", "recurrent", "sample", "weight"]
