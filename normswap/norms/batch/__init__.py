"""Statistics over the batch, with running or fixed ones for inference."""

from normswap.norms.batch import frozen, plain

__all__ = ["frozen", "plain"]
