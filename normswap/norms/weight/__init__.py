"""Parametrizations of weights."""

from normswap.norms.weight import (
    centered,
    frozen_affine,
    spectral_norm,
    standardization,
    weight_norm,
)

__all__ = ["centered", "frozen_affine", "spectral_norm", "standardization", "weight_norm"]
