"""Local response normalization: each value by the squares in nearby channels of its position.

Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section
3.3, with alpha divided by the size of the window, as in `torch.nn.LocalResponseNorm`:

    y = x * d ** -beta,    d = k + alpha * mean(x^2 over `size` channels, zeros outside).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.channels import check_rank
from normswap.norms.kernels import statistics_dtype
from normswap.norms.recompute import recomputed
from normswap.norms.registry import register

_PAPER_SIZE = 5


class LocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization of (N, C, ...), rank >= 2, saving only its input for backward.

    Args:
        num_features: C; any number of channels is taken.
        size, alpha, beta, k: as in `torch.nn.LocalResponseNorm`.
    """

    norm_kind = "local_response"

    def __init__(
        self,
        num_features: int,
        *,
        size: int = _PAPER_SIZE,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
    ) -> None:
        super().__init__(size, alpha, beta, k)
        self.num_features = num_features

    def forward(self, input: Tensor) -> Tensor:
        check_rank(input)
        return recomputed(self._normalized, input)

    def _normalized(self, input: Tensor) -> Tensor:
        x = input.to(statistics_dtype(input))
        # (N, 1, C, positions): a window of channels is then one of an image. torch's own form needs
        # a rank of 3 and contiguous memory.
        squares = x.square().reshape(x.shape[0], 1, x.shape[1], x.shape[2:].numel())
        padded = F.pad(squares, (0, 0, self.size // 2, (self.size - 1) // 2))
        mean = F.avg_pool2d(padded, (self.size, 1), stride=1).reshape(x.shape)
        return (x * (self.k + self.alpha * mean).pow(-self.beta)).to(input.dtype)


def _local_response_norm(
    num_features: int,
    *,
    size: int = _PAPER_SIZE,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> nn.Module:
    # From 2 C - 1 on every window holds all channels, and the zeros around them take memory.
    if not 1 <= size <= max(2 * num_features, _PAPER_SIZE):
        raise NormswapError(
            f"size must be at least 1 and at most twice the {num_features} channels, not {size}"
        )
    return LocalResponseNorm(num_features, size=size, alpha=alpha, beta=beta, k=k)


register(
    "local_response_norm",
    _local_response_norm,
    keeps="calibrated",
    summary="each value by its neighbours in channels; drops the original's gain and bias",
    source="Krizhevsky et al. 2012, NIPS 25, section 3.3",
    formula="x (k + alpha E_w[x^2])^-beta, w: size channels about each",
    cost="4 passes",
)
