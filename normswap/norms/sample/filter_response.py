"""Filter response normalization: each sample's channel by its root mean square, then a threshold.

Singh & Krishnan 2020 (arXiv 1911.09737), equations 1 to 4. With nu2 the mean of x^2 over the
positions of a sample and channel,

    y = weight * x / sqrt(nu2 + eps) + bias,    z = max(y, tau).

The threshold (TLU) takes the place of the ReLU. A model that is converted keeps its own
activations, so a swap leaves the threshold out unless `tlu=True` is asked for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.norms.channels import AffineNorm, check_channels, with_affine
from normswap.norms.registry import register
from normswap.norms.sample.mean_square import rescale

LEARNED_EPS = 1e-4  # where the paper starts it, section 3.3


class FilterResponseNorm(AffineNorm):
    """Filter response normalization of (N, C, ...), rank >= 2, with its threshold.

    Args:
        num_features: C.
        eps: added to the mean square.
        affine: have `weight` and `bias`, (C,).
        tlu: end with max(y, tau), with `tau` of shape (C,).
        learnable_eps: add |eps_l| to eps, with `eps_l` one number that is learned. For inputs of
            one position, of which otherwise little more than the sign is left.
    """

    norm_kind = "filter_response"
    tau: nn.Parameter | None
    eps_l: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        *,
        tlu: bool = True,
        learnable_eps: bool = False,
    ) -> None:
        super().__init__(num_features)
        self.eps = eps
        self.add_affine(affine)
        self.register_parameter("tau", nn.Parameter(torch.zeros(num_features)) if tlu else None)
        learned = nn.Parameter(torch.tensor(LEARNED_EPS)) if learnable_eps else None
        self.register_parameter("eps_l", learned)

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        return rescale(input, self._mix, self.tau)

    def _mix(self, square: Tensor) -> tuple[Tensor, Tensor]:
        eps = self.eps if self.eps_l is None else self.eps + self.eps_l.abs()
        return with_affine(self, torch.rsqrt(square + eps))

    def extra_repr(self) -> str:
        own = f"tlu={self.tau is not None}, learnable_eps={self.eps_l is not None}"
        return f"{super().extra_repr()}, {own}"


def _values(channels: int, positions: int, options: Mapping[str, Any]) -> int:
    # With an eps to learn, a single value is not erased.
    return max(positions, 2) if options.get("learnable_eps") else positions


register(
    "filter_response_norm",
    FilterResponseNorm,
    keeps="calibrated",
    summary="per sample and channel, a scale without centering; a swap leaves its threshold out",
    source="Singh & Krishnan 2020, arXiv 1911.09737",
    formula="max(gamma x / sqrt(E_nc[x^2] + eps) + beta, tau)",
    cost="3 passes",
    values=_values,
    swap={"tlu": False},
)
