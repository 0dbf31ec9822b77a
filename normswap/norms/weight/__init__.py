"""Parametrizations of weights."""

from normswap.norms.weight import (
    frozen_affine,
    spectral_norm,
    standardization,
    weight_norm,
)

__all__ = ["frozen_affine", "spectral_norm", "standardization", "weight_norm"]
