"""Statistics over the batch, with running or fixed ones for inference."""

from normswap.norms.registry import register_family

register_family(__name__, __path__)
