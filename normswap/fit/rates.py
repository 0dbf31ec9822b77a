"""How the learning rate changes over a run: the factor of each step."""

from collections.abc import Callable
from math import cos, pi

Rate = Callable[[int], float]


def cosine(steps: int, warmup: int = 0) -> Rate:
    """From 1 to 0 in half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5).

    The first `warmup` steps rise to it, linearly.
    """
    return lambda step: min(1.0, (step + 1) / (warmup + 1)) * (1 + cos(pi * step / steps)) / 2


def exponential(gamma: float) -> Rate:
    """gamma^step, as of `normswap.exponential_lr`."""
    return lambda step: gamma**step
