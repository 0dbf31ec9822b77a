"""Statistics of the batch and of the sample, mixed."""

from normswap.norms.mixed import batch_instance, evonorm, switchable

__all__ = ["batch_instance", "evonorm", "switchable"]
