"""Layers before a model that normalize its inputs by statistics of the data."""

from normswap.norms.input import fitted

__all__ = ["fitted"]
