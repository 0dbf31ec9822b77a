"""Conditional batch normalization: gain and bias depend on a condition, such as a question.

de Vries et al. 2017 (arXiv 1707.00683): each sample n comes with a condition c_n, from which
changes of gamma and beta are predicted, so that a pretrained network is where it starts:

    y = (gamma + dgamma(c_n)) (x - E_B[x]) / sqrt(Var_B[x] + eps) + beta + dbeta(c_n).

Here dgamma and dbeta are linear in c and start as 0. In the paper a hidden layer comes before; let
c be the output of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.batch.plain import BatchNorm, values_per_channel
from normswap.norms.calling import within
from normswap.norms.kernels import statistics_dtype
from normswap.norms.moments import channel_affine
from normswap.norms.registry import register


class ConditionalBatchNorm(BatchNorm):
    """Conditional batch normalization of (N, C, ...) of any rank >= 2.

    de Vries et al. 2017 (arXiv 1707.00683). Without a condition it is BatchNorm.

    Args:
        num_features, eps, momentum, affine, track_running_stats: as `torch.nn.BatchNorm2d`.
        num_conditions: K, the length of a condition; without one there can be no condition.

    Raises:
        NormswapError: num_conditions < 1.
        ValueError: a condition that is not of shape (N, K).
    """

    norm_kind = "conditional_batch_norm"  # its affine is not the channel's alone
    condition: Tensor | None = None  # of the calls inside `conditioned`

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        num_conditions: int | None = None,
    ) -> None:
        if num_conditions is not None and num_conditions < 1:
            raise NormswapError(f"num_conditions must be at least 1, not {num_conditions}")
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.num_conditions = num_conditions
        self.weight_delta = self._delta()
        self.bias_delta = self._delta()

    def _delta(self) -> nn.Linear | None:
        if self.num_conditions is None:
            return None
        linear = nn.Linear(self.num_conditions, self.num_features, bias=False)
        nn.init.zeros_(linear.weight)
        return linear

    def forward(self, input: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize.

        Args:
            input: (N, C, ...).
            condition: (N, K); by default that of `conditioned`.
        """
        condition = self.condition if condition is None else condition
        if condition is None or not input.numel():
            return super().forward(input)
        weight, bias = self.predict(condition, input.shape[0])
        if self.training or self.running_mean is None:
            values = values_per_channel(input, self.num_features)
            return self.with_batch(input, values, weight, bias)
        assert self.running_var is not None
        wide = statistics_dtype(input)
        scale = torch.rsqrt(self.running_var.to(wide) + self.eps) * weight
        return channel_affine(input, scale, bias - self.running_mean.to(wide) * scale)

    def predict(self, condition: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """Gain and bias of each sample, (N, C)."""
        if self.weight_delta is None or self.bias_delta is None:
            raise ValueError("this ConditionalBatchNorm takes no condition; give num_conditions")
        if condition.dim() != 2 or condition.shape != (samples, self.num_conditions):
            raise ValueError(
                f"a condition of shape {tuple(condition.shape)} does not fit; "
                f"give one of shape ({samples}, {self.num_conditions})"
            )
        weight, bias = self.weight_delta(condition), self.bias_delta(condition)
        weight = weight + (1 if self.weight is None else self.weight)
        return weight, bias if self.bias is None else bias + self.bias

    def extra_repr(self) -> str:
        own = f"num_conditions={self.num_conditions}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]


@contextmanager
def conditioned(model: nn.Module, condition: Tensor) -> Iterator[None]:
    """Give every ConditionalBatchNorm of `model` this condition, for the calls inside.

    Args:
        condition: (N, K).

    Raises:
        NormswapError: `model` has none that takes a condition.
    """
    takers = [
        module
        for module in model.modules()
        if isinstance(module, ConditionalBatchNorm) and module.num_conditions is not None
    ]
    if not takers:
        raise NormswapError(
            "no normalization of this model takes a condition; "
            "convert it to conditional_batch_norm with num_conditions"
        )
    with within(takers, condition=condition):
        yield


register(
    "conditional_batch_norm",
    ConditionalBatchNorm,
    keeps="exact",
    summary="BatchNorm whose gain and bias follow a condition, starting as they are",
    source="de Vries et al. 2017, arXiv 1707.00683",
    formula="(gamma + dgamma(c)) (x - E_B[x]) / sqrt(Var_B[x] + eps) + beta + dbeta(c)",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
    fixed=("track_running_stats",),
)
