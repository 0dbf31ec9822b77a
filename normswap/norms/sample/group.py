"""Statistics of one sample over groups of channels: group, layer and instance normalization.

Wu & He 2018 (arXiv 1803.08494), section 3: all three compute y = (x - mu) / sqrt(var + eps) per
sample, then gamma * y + beta per channel; they differ in the set S over which mu and var are taken.
Group: the C / G channels of a group and all positions. Layer (G = 1): all channels and positions.
Instance (G = C; Ulyanov et al. 2016, arXiv 1607.08022): one channel, all positions.

Positional normalization takes mean and variance over the channels of each position. Li et al. 2019
(arXiv 1907.04312), equations 1 and 2. That is LayerNorm over the channels of each position, and the
paper's gives no gain and bias of its own: it carries the mean and deviation it takes away to a
later layer, which a model that has no such layer cannot use.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normswap.core.compat import AnyInstanceNorm
from normswap.core.errors import NormswapError
from normswap.norms.calling import ChannelsLast
from normswap.norms.channels import check_channels, with_affine
from normswap.norms.moments import normalize
from normswap.norms.registry import register, values_over_all

TARGET_GROUPS = 32  # the paper's default, its section 4.1
MIN_CHANNELS = 2  # with one channel a group is InstanceNorm, which is asked for by that name
MIN_VALUES = 16  # below, the variance of a group is mostly noise


class InstanceNorm(AnyInstanceNorm):
    """Instance normalization of (N, C, ...), rank >= 3; arguments as `torch.nn.InstanceNorm2d`.

    With `track_running_stats` eval mode uses the running statistics, as torch's does.
    """

    norm_kind = "instance"

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        if input.shape[2:].numel() < 2 and (self.training or not self.track_running_stats):
            raise ValueError(
                f"InstanceNorm over a single value of {tuple(input.shape)} would erase its input"
            )
        # One operator for an exporter; and torch keeps running statistics.
        if torch.compiler.is_exporting() or self.track_running_stats:
            normalized: Tensor = self._apply_instance_norm(input)  # type: ignore[no-untyped-call]
            return normalized
        return normalize(input, self._mix)

    def _mix(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        return with_affine(self, torch.rsqrt(var + self.eps))


class LayerNormPerPosition(nn.LayerNorm):
    """LayerNorm over the channels of each position of (N, C, ...).

    The form of Ba et al. 2016 (arXiv 1607.06450) carried to feature maps as in ConvNeXt (Liu et al.
    2022, arXiv 2201.03545).
    """

    norm_kind = "layer"
    channel_axis = 1

    def __init__(self, num_features: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(num_features, eps=eps, elementwise_affine=affine)
        self.num_features = num_features

    def forward(self, input: Tensor) -> Tensor:
        check_channels(input, self.num_features)
        y = super().forward(input.movedim(1, -1)).movedim(-1, 1)
        # A model may go on with a view, as it could after a BatchNorm.
        return y.contiguous() if input.is_contiguous() else y


def possible_groups(num_features: int) -> list[int]:
    """The divisors of the channel count: every number of groups there can be."""
    return [g for g in range(1, num_features + 1) if num_features % g == 0]


def sensible_groups(num_features: int, spatial: int | None) -> list[int]:
    """Those that leave enough channels and values in a group; one group where none does.

    Args:
        spatial: positions per channel (H * W), None where unknown.
    """

    def enough(groups: int) -> bool:
        channels = num_features // groups
        return channels >= MIN_CHANNELS and (spatial is None or channels * spatial >= MIN_VALUES)

    return [g for g in possible_groups(num_features) if enough(g)] or [1]


def at_most(text: str) -> Callable[[int], int]:
    """What "at most 32" says: the largest number of groups up to that, for a number of channels.

    Raises:
        NormswapError: `text` says something else.
    """
    found = re.fullmatch(r"at most ([1-9]\d{0,8})", text)
    if found is None:
        raise NormswapError(
            f"groups is {text!r:.40}; it is a number, auto, or at most a number ('at most 32')"
        )
    most = int(found[1])
    return lambda num_features: max(g for g in possible_groups(num_features) if g <= most)


def resolve_groups(
    num_features: int,
    spatial: int | None,
    groups: int | None = None,
    channels_per_group: int | None = None,
) -> int:
    """The number of groups: as given, or the sensible divisor nearest to 32 (the smaller of two).

    Raises:
        NormswapError: the channels cannot be divided so; the message lists the possible numbers.
    """
    possible = possible_groups(num_features)
    if groups is not None and channels_per_group is not None:
        raise NormswapError("give groups or channels_per_group, not both")
    asked = groups if groups is not None else channels_per_group
    if asked is None:
        sensible = sensible_groups(num_features, spatial)
        return min(sensible, key=lambda g: (abs(g - TARGET_GROUPS), g))
    if asked not in possible:
        what = "groups" if groups is not None else "channels_per_group"
        raise NormswapError(
            f"{num_features} channels cannot be divided with {what}={asked}; "
            f"possible: {', '.join(map(str, possible))}"
        )
    return asked if groups is not None else num_features // asked


def _group_norm(
    num_features: int,
    *,
    eps: float = 1e-5,
    affine: bool = True,
    groups: int | None = None,
    channels_per_group: int | None = None,
) -> nn.Module:
    number = resolve_groups(num_features, None, groups, channels_per_group)
    return nn.GroupNorm(number, num_features, eps=eps, affine=affine)


def _layer_norm(
    num_features: int,
    *,
    eps: float = 1e-5,
    affine: bool = True,
    per_position: bool = False,
    channel_axis: int = 1,
) -> nn.Module:
    if not per_position:
        norm = nn.GroupNorm(1, num_features, eps=eps, affine=affine)
        return norm if channel_axis == 1 else ChannelsLast(norm)
    if channel_axis == -1:
        return nn.LayerNorm(num_features, eps=eps, elementwise_affine=affine)
    return LayerNormPerPosition(num_features, eps=eps, affine=affine)


def _instance_norm(
    num_features: int,
    *,
    eps: float = 1e-5,
    affine: bool = True,
    momentum: float | None = 0.1,
    track_running_stats: bool = False,
) -> nn.Module:
    # torch takes None too, and then leaves the running statistics as they are.
    return InstanceNorm(num_features, eps, momentum, affine, track_running_stats)  # type: ignore[arg-type]


register(
    "group_norm",
    _group_norm,
    keeps="calibrated",
    summary="per sample, over groups of channels",
    source="Wu & He 2018, arXiv 1803.08494",
    formula="gamma (x - E_g[x]) / sqrt(Var_g[x] + eps) + beta, g: C / groups channels of a sample",
    cost="2 passes",
    values=lambda channels, positions, options: channels // options["groups"] * positions,
)
register(
    "layer_norm",
    _layer_norm,
    keeps="calibrated",
    summary="per sample, over all channels and positions, or per_position over the channels",
    source="Ba et al. 2016, arXiv 1607.06450",
    formula="gamma (x - E_n[x]) / sqrt(Var_n[x] + eps) + beta, n: a sample, or a position of one",
    cost="2 passes",
    values=values_over_all,
)
register(
    "instance_norm",
    _instance_norm,
    keeps="calibrated",
    summary="per sample and channel",
    source="Ulyanov et al. 2016, arXiv 1607.08022",
    formula="gamma (x - E_nc[x]) / sqrt(Var_nc[x] + eps) + beta",
    cost="2 passes",
    values=lambda channels, positions, options: positions,
)


def _positional_norm(num_features: int, *, eps: float = 1e-5, affine: bool = False) -> nn.Module:
    return LayerNormPerPosition(num_features, eps=eps, affine=affine)


register(
    "positional_norm",
    _positional_norm,
    keeps="calibrated",
    summary="per sample and position, over the channels",
    source="Li et al. 2019, arXiv 1907.04312",
    formula="(x - E_p[x]) / sqrt(Var_p[x] + eps), p: the channels of a position",
    cost="2 passes",
    values=lambda channels, positions, options: channels,
)
