"""Adaptive batch normalization: running statistics for each domain, everything else shared.

Li et al. 2016 (arXiv 1603.04779): a network is taken to another domain (night, sketches, another
scanner) by giving every BatchNorm the statistics of that domain. Chang et al. 2019
(arXiv 1906.03950) train with statistics per domain from the start; their gamma and beta are the
domain's too, here they are shared, as in the former.

    with domain(model, "night"):
        model(x)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.errors import NormswapError
from normswap.norms.batch.plain import BatchNorm, track, values_per_channel
from normswap.norms.batch.standardize import standardize
from normswap.norms.calling import within
from normswap.norms.channels import check_channels, gain_and_offset
from normswap.norms.registry import register


class DomainStatistics(nn.Module):
    """The running statistics of one domain, named as those of a BatchNorm."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        super().__init__()
        self.register_buffer("running_mean", mean.detach().clone())
        self.register_buffer("running_var", var.detach().clone())
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=mean.device))


class AdaptiveBatchNorm(BatchNorm):
    """BatchNorm of (N, C, ...) of any rank >= 2 with running statistics for each domain.

    Li et al. 2016 (arXiv 1603.04779); Chang et al. 2019 (arXiv 1906.03950). In training the batch
    is normalized by its own statistics, and those of the domain follow it. The first domain's are
    the module's own buffers, so that checkpoints of a BatchNorm fit.

    Args:
        num_features, eps, momentum, affine: as `torch.nn.BatchNorm2d`.
        domains: their names, the first one being where calls go unless told otherwise.

    Attributes:
        current: the domain of calls that name none.

    Raises:
        NormswapError: no domain, or a name that cannot be one.
        ValueError: a call for an unknown domain.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        *,
        domains: Sequence[str] = ("source",),
    ) -> None:
        if isinstance(domains, str) or not domains:
            raise NormswapError(f"domains is {domains!r}; give a sequence of one name or more")
        # Before torch's, which calls `reset_running_stats`.
        self.first, *others = domains
        self.current = self.first
        super().__init__(num_features, eps, momentum, affine)
        self.others = nn.ModuleDict()
        for name in others:
            self.add_domain(name)

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of all domains."""
        return self.first, *self.others

    def add_domain(self, name: str, like: str | None = None) -> None:
        """Add a domain whose statistics start as those of `like`, by default the first.

        Raises:
            NormswapError: the name is taken or cannot be one, or `like` is unknown.
        """
        if name == self.first or name in self.others:
            raise NormswapError(f"there is a domain {name!r} already; choose another name")
        start = self.statistics(self.first if like is None else like)
        try:
            self.others[name] = DomainStatistics(start.running_mean, start.running_var)
        except (KeyError, TypeError) as error:
            raise NormswapError(
                f"{name!r} cannot be the name of a domain; use letters, digits and _"
            ) from error

    def statistics(self, name: str) -> DomainStatistics:
        """What holds the running statistics of a domain.

        Raises:
            NormswapError: it is unknown.
        """
        if name == self.first:
            return cast(DomainStatistics, self)  # which has the same buffers
        if name not in self.others:
            raise NormswapError(f"unknown domain {name!r}; known: {', '.join(self.domains)}")
        return cast(DomainStatistics, self.others[name])

    def reset_running_stats(self) -> None:
        """Start the statistics of the current domain anew, as torch's `update_bn` asks for."""
        held = self.statistics(self.current)
        held.running_mean.zero_()
        held.running_var.fill_(1)
        held.num_batches_tracked.zero_()

    def forward(self, input: Tensor, domain: str | None = None) -> Tensor:
        """Normalize.

        Args:
            input: (N, C, ...).
            domain: by default `current`.
        """
        held = self.statistics(self.current if domain is None else domain)
        if not self.training or not input.numel():
            check_channels(input, self.num_features)
            return F.batch_norm(
                input, held.running_mean, held.running_var, self.weight, self.bias, eps=self.eps
            )
        values = values_per_channel(input, self.num_features)
        y, center, spread = standardize(input, *gain_and_offset(self, input), self.eps)
        if self.track_running_stats:
            unbiased = spread * (values / (values - 1))
            track(held, self.momentum, running_mean=center, running_var=unbiased)
        return y

    def eval_affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift of eval mode in the current domain, each (C,)."""
        held = self.statistics(self.current)
        gain, offset = gain_and_offset(self, held.running_mean.to(dtype))
        scale = gain.to(dtype) * torch.rsqrt(held.running_var.to(dtype) + self.eps)
        return scale, offset - held.running_mean.to(dtype) * scale

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, domains={self.domains}"  # type: ignore[no-untyped-call]


@contextmanager
def domain(model: nn.Module, name: str) -> Iterator[None]:
    """Let every AdaptiveBatchNorm of `model` use this domain, for the calls inside.

    Raises:
        NormswapError: `model` has no AdaptiveBatchNorm, or one that does not know the domain.
    """
    norms = [module for module in model.modules() if isinstance(module, AdaptiveBatchNorm)]
    if not norms:
        raise NormswapError("this model has no domains; convert it to adaptive_batch_norm")
    for norm in norms:
        norm.statistics(name)
    with within(norms, current=name):
        yield


def _adopt(new: nn.Module, old: nn.Module) -> None:
    """Let every domain start with the statistics of the BatchNorm."""
    assert isinstance(new, AdaptiveBatchNorm)
    names = new.domains[1:]
    new.others.clear()
    for name in names:
        new.add_domain(name)


register(
    "adaptive_batch_norm",
    AdaptiveBatchNorm,
    keeps="exact",
    summary="BatchNorm with running statistics for each domain, chosen at each call",
    source="Li et al. 2016, arXiv 1603.04779; Chang et al. 2019, arXiv 1906.03950",
    formula="gamma (x - E_B[x]) / sqrt(Var_B[x] + eps) + beta, B of one domain",
    statistics="batch",
    cost="2 passes",
    needs_running=True,
    adopt=_adopt,
)
