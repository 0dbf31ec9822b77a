"""Statistics of each sample alone: no sample sees another."""

from normswap.norms.sample import group, rms

__all__ = ["group", "rms"]
