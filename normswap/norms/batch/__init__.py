"""Statistics over the batch, with running or fixed ones for inference."""

from normswap.norms.batch import (
    adaptive,
    conditional,
    conversion,
    frozen,
    ghost,
    l1,
    mean_only,
    plain,
    renorm,
    whitening,
)

__all__ = [
    "adaptive",
    "conditional",
    "conversion",
    "frozen",
    "ghost",
    "l1",
    "mean_only",
    "plain",
    "renorm",
    "whitening",
]
