"""Edits that take the mean over the channels off a weight, or off the output of a module."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from normswap.core.mixins import Mixin, mixed
from normswap.graph.index import join
from normswap.graph.parametrized import in_eval, parametrized_tensors
from normswap.norms.kernels import statistics_dtype
from normswap.norms.weight.standardization import CenteredWeight
from normswap.norms.weight.units import Units
from normswap.passes.edits.base import BaseEdit, set_tensor


class CenterTensor(BaseEdit):
    """Take the mean along one axis off a weight, a bias or a constant, or fill it with a number.

    Attributes:
        axis: that of the channels.
        gain: the module and name of a gain per channel that it is multiplied by first; another edit
            then fills that with 1.
        fill: 0 where the tensor is the same for all channels, so that nothing is left of it; 1 for
            a gain that weights have folded in.
        trainable: center it anew whenever it is used, so that training keeps it centered.
    """

    edit: Literal["center"] = "center"
    tensor: str
    axis: int = 0
    gain: tuple[str, str] | None = None
    fill: Literal[0, 1] | None = None
    trainable: bool = False

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        with in_eval(module), torch.no_grad():
            tensor = getattr(module, self.tensor, None)
        self.require(isinstance(tensor, Tensor) and tensor.dim() > self.axis)
        assert isinstance(tensor, Tensor)
        if self.trainable and self.tensor not in module._buffers:  # those do not train
            self.parametrize(module, self.tensor, CenteredWeight(Units(self.axis)))
            return
        self.require(self.tensor not in parametrized_tensors(module))
        with torch.no_grad():
            set_tensor(module, self.tensor, self._value(model, tensor.double()).to(tensor.dtype))

    def _value(self, model: nn.Module, tensor: Tensor) -> Tensor:
        if self.fill is not None:
            return torch.full_like(tensor, self.fill)
        if self.gain is not None:
            path, name = self.gain
            gain = getattr(model.get_submodule(path), name, None)
            self.require(isinstance(gain, Tensor) and gain.numel() == tensor.shape[self.axis])
            assert isinstance(gain, Tensor)
            tensor = tensor * gain.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - self.axis - 1))
        centered: Tensor = CenteredWeight(Units(self.axis))(tensor)
        return centered

    def __str__(self) -> str:
        name = join(self.path, self.tensor)
        return {None: f"center {name}", 0: f"clear {name}", 1: f"set {name} to 1"}[self.fill]


class CenterOutput(BaseEdit):
    """Let a module take the mean along one axis, counted from the end, off what it returns."""

    edit: Literal["center_output"] = "center_output"
    axis: int

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(not parametrized_tensors(module))
        module.__class__ = mixed(CenteredOutput, type(module))
        module.centered_axis = self.axis  # type: ignore[assignment]

    def __str__(self) -> str:
        return "center its output"


class CenteredOutput(Mixin):
    """Mixed into the class of one module; all else about the module is as before.

    Attributes:
        centered_axis: that of the channels in the output, counted from the end.
    """

    _prefix = "Centered"
    _why_not = "its output is centered"
    centered_axis: int

    def _around(self, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = forward(self, *args, **kwargs)
        mean = y.mean(self.centered_axis, keepdim=True, dtype=statistics_dtype(y))
        return (y - mean).to(y.dtype)
