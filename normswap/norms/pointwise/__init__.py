"""In the place of a normalization, without statistics."""

from normswap.norms.pointwise import identity

__all__ = ["identity"]
