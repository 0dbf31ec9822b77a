"""Normalization inside recurrent networks."""

from normswap.norms.recurrent import batch_norm, layer_norm

__all__ = ["batch_norm", "layer_norm"]
