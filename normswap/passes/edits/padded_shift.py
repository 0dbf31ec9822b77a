"""The edit by which a padded convolution folds in a shift of its input.

With y = W (s x + t) and zeros around s x + t, not around x, the convolution of a shift that is the
same at every position is not the same at every position: at the border fewer taps meet it,

    y = (W s) x + W t,    (W t)[o, i] = sum over the taps k that lie inside at i of V[o, k],
    V[o, k] = sum over c of W[o, c, k] t[c].

So W t is a convolution of ones, as many as x has positions, with V, and like a bias it does not
depend on the values of x. It is computed once for each size of the input and then added in place,
which reads and writes the output; an affine in front reads the input and writes a tensor of its
own. Padding x with -t / s instead gives the same, and copies x: that takes as long as the affine.
"""

from math import prod
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from normswap.core.mixins import Mixin, mixed
from normswap.graph.operators.rule import ChannelIndex
from normswap.graph.propagation.rounding import Taking
from normswap.graph.propagation.scale_shift import ScaleShift
from normswap.norms.batch.frozen import FixedStatistics
from normswap.norms.kernels import recording, without_autocast
from normswap.norms.weight.frozen_affine import AffineParametrization
from normswap.passes.edits.base import BaseEdit
from normswap.passes.edits.statistics import affine_of
from normswap.passes.edits.traced_forward import below_parametrizations

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SIZES_KEPT = 8


class PaddedShift(Mixin):
    """Mixed into the class of a convolution: it adds what a shift of its input makes of its output.

    The layer stays what it was, with its class among the bases and its parameters and hooks.

    Attributes:
        shift_taps: V, (out_channels, *kernel_size), a buffer.
        zeros_around: how many zeros the forward put around the input before, as `F.pad` takes it.
    """

    _prefix = "Padded"
    shift_taps: Tensor
    zeros_around: tuple[int, ...]
    _kept: tuple[Tensor | None, int, dict[Any, Tensor]] = (None, 0, {})

    def _around(self, forward: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """y + W t, in y itself where nobody records; y is the output of the layer."""
        (x,) = (*args, *kwargs.values())
        y: Tensor = forward(self, x)
        size, taps = tuple(x.shape[1 - self.shift_taps.dim() :]), self.shift_taps
        batched = x.dim() > len(size) + 1
        if recording() or taps.is_inference():
            shift = self._convolved(size).to(y.dtype)
            return y + (shift if batched else shift.squeeze(0))
        of, version, kept = self._kept
        if of is not taps or version != taps._version:
            kept = {}
            self._kept = taps, taps._version, kept
        key = size, batched and y.stride(1) == 1  # laid out as y is, an addition is much faster
        if key not in kept:
            if len(kept) == _SIZES_KEPT:
                del kept[next(iter(kept))]
            shift = self._convolved(size)
            like = y[:1] if batched else y
            kept[key] = torch.empty_like(like, dtype=shift.dtype).copy_(shift.reshape(like.shape))
        return y.add_(kept[key])

    @torch.no_grad()
    def _convolved(self, size: tuple[int, ...]) -> Tensor:
        conv: Any = self
        around = [sum(self.zeros_around[i : i + 2]) for i in range(0, len(self.zeros_around), 2)]
        around = [*around, *[0] * (len(size) - len(around))][::-1]
        inside = [n - zeros for n, zeros in zip(size, around, strict=True)]
        ones = F.pad(self.shift_taps.new_ones(1, 1, *inside), self.zeros_around)
        with without_autocast(ones.device.type):
            convolved: Tensor = _CONVOLVE[len(size)](
                ones,
                self.shift_taps.unsqueeze(1),
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
            )
        return convolved

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, given, state, *_ = super().__reduce_ex__(protocol)
        return make, given, {name: value for name, value in state.items() if name != "_kept"}


class AddPaddedShift(BaseEdit):
    """Let a padded convolution add what the shift of a BatchNorm before it makes of its output.

    Its weight folds in the scale after that.

    Attributes:
        norm: the BatchNorm.
        channel_index: where its channels lie in the weight.
        times: how often the shift comes in.
        inverse: the affine is taken back.
        around: how many zeros the forward puts around the input before, as `F.pad` takes it.
    """

    edit: Literal["add_padded_shift"] = "add_padded_shift"
    norm: str
    channel_index: ChannelIndex
    times: float = 1.0
    inverse: bool = False
    around: Annotated[tuple[int, ...], Field(max_length=6)] = ()

    def check_numbers(self, model: nn.Module) -> None:
        _, weight, norm = self._parts(model)
        self.require_none(self.why_not(weight, affine_of(norm)))

    def _parts(self, model: nn.Module) -> tuple[nn.Module, Tensor, nn.Module]:
        """The convolution, its weight, and the BatchNorm."""
        conv, norm = self.module(model), model.get_submodule(self.norm)
        self.require(isinstance(norm, FixedStatistics) or hasattr(norm, "eval_affine"))
        self.require(isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
        assert isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        with torch.no_grad():
            weight = conv.weight.detach()
        self.require(self.channel_index.fit(weight) and bool(self.channel_index.over))
        return conv, weight, norm

    def apply(self, model: nn.Module) -> None:
        conv, weight, norm = self._parts(model)
        with torch.no_grad():
            taps = self._taps(weight, norm)
        with below_parametrizations(conv):
            if isinstance(conv, PaddedShift):
                self.require(conv.zeros_around == self.around)
                conv.shift_taps = conv.shift_taps + taps
                return
            conv.__class__ = mixed(PaddedShift, type(conv))
        conv.register_buffer("shift_taps", taps)
        conv.zeros_around = self.around  # type: ignore[assignment]

    def why_not(self, weight: Tensor, affine: ScaleShift) -> str | None:
        """Why the convolution cannot add the shift in its dtype, if so."""
        bias = weight.new_zeros(
            prod(self.channel_index.view[:2]) if self.channel_index.view else len(weight)
        )
        taking = Taking(affine, "input_bias", self.channel_index, self.times, self.inverse)
        return taking.why_not(bias, weight)

    def _taps(self, weight: Tensor, norm: nn.Module) -> Tensor:
        channel_index = self.channel_index
        share = AffineParametrization(
            norm,
            channel_index.shape,
            channel_index.channels,
            channel_index.view,
            inverse=self.inverse,
        )
        _, shift = share.to(weight.device).affine(weight)
        seen = share.seen(weight, shift.dtype) * (self.times * shift)
        taps = seen.sum(channel_index.over[0])  # the input channels, and not the kernel
        return taps.reshape(len(weight), *weight.shape[2:]).to(weight.dtype)

    def __str__(self) -> str:
        return f"its shift is added to the output of {self.path}"
