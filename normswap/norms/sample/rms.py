"""Root mean square normalization: a scale per sample, no centering."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.norms.registry import register, values_over_all


class RMSNorm(nn.Module):
    """RMSNorm of (N, C, ...): y = x / sqrt(mean(x^2) + eps) * weight + bias.

    Zhang & Sennrich 2019 (arXiv 1910.07467), equation 4. The mean is over all channels and
    positions of a sample, or with `per_position` over the channels of each position. The paper has
    no bias; `bias=True` adds one, for a RMSNorm in the place of a normalization that had one.

    Args:
        channel_axis: 1 for (N, C, ...), -1 for (N, ..., C).
    """

    norm_kind = "rms"
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = False,
        per_position: bool = False,
        channel_axis: int = 1,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.per_position = per_position
        self.channel_axis = channel_axis
        self.register_parameter(
            "weight", nn.Parameter(torch.ones(num_features)) if affine else None
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(num_features)) if affine and bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.per_position:
            last = x.movedim(self.channel_axis, -1)
            x = F.rms_norm(last, last.shape[-1:], eps=self.eps).movedim(-1, self.channel_axis)
        else:
            x = F.rms_norm(x, x.shape[1:], eps=self.eps)
        if self.weight is not None:
            x = x * self._along_channels(self.weight, x)
        if self.bias is not None:
            x = x + self._along_channels(self.bias, x)
        return x

    def _along_channels(self, parameter: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.channel_axis] = -1
        return parameter.view(shape)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, bias={self.bias is not None}, "
            f"per_position={self.per_position}"
        )


register(
    "rms_norm",
    RMSNorm,
    keeps="calibrated",
    summary="per sample, a scale without centering",
    source="Zhang & Sennrich 2019, arXiv 1910.07467",
    formula="gamma x / sqrt(E_n[x^2] + eps)",
    cost="2 passes",
    values=values_over_all,
)
