"""In the place of a normalization, without statistics."""

from normswap.norms.pointwise import channel_affine, dynamic_tanh

__all__ = ["channel_affine", "dynamic_tanh"]
