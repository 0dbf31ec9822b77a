"""Parametrizations of weights."""

from normswap.norms.weight import frozen_affine

__all__ = ["frozen_affine"]
