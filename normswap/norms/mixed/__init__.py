"""Statistics of the batch and of the sample, mixed."""

from normswap.norms.registry import register_family

register_family(__name__, __path__)
