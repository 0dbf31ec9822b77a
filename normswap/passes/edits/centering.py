"""Edits that take the mean over the channels off a weight, or off the output of a module."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.graph.index import join
from normswap.graph.parametrized import in_eval, own_class, parametrized_tensors
from normswap.norms.kernels import statistics_dtype
from normswap.norms.weight.standardization import CenteredWeight
from normswap.norms.weight.units import Units
from normswap.passes.edits.base import BaseEdit


class CenterTensor(BaseEdit):
    """Take the mean along one axis off a weight, a bias or a constant.

    Attributes:
        axis: that of the channels.
        gain: the module and name of a gain per channel that it is multiplied by first; `SetOnes`
            then takes that away.
        vanishes: the tensor is the same for all channels; nothing is left of it.
        trainable: center it anew whenever it is used, so that training keeps it centered.
    """

    edit: Literal["center"] = "center"
    tensor: str
    axis: int = 0
    gain: tuple[str, str] | None = None
    vanishes: bool = False
    trainable: bool = False

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require_room(module, self.tensor)
        with in_eval(module), torch.no_grad():
            tensor = getattr(module, self.tensor, None)
        self.require(isinstance(tensor, Tensor) and tensor.dim() > self.axis)
        assert isinstance(tensor, Tensor)
        if self.trainable and self.tensor not in module._buffers:  # those do not train
            self._parametrize(module)
            return
        self.require(self.tensor not in parametrized_tensors(module))
        with torch.no_grad():
            _replace(module, self.tensor, self._value(model, tensor.double()).to(tensor.dtype))

    def _value(self, model: nn.Module, tensor: Tensor) -> Tensor:
        if self.vanishes:
            return torch.zeros_like(tensor)
        if self.gain is not None:
            path, name = self.gain
            gain = getattr(model.get_submodule(path), name, None)
            self.require(isinstance(gain, Tensor) and gain.numel() == tensor.shape[self.axis])
            assert isinstance(gain, Tensor)
            tensor = tensor * gain.to(tensor.dtype).view(-1, *[1] * (tensor.dim() - self.axis - 1))
        centered: Tensor = CenteredWeight(Units(self.axis))(tensor)
        return centered

    def _parametrize(self, module: nn.Module) -> None:
        share = CenteredWeight(Units(self.axis))
        own_class(module)
        with in_eval(module):
            parametrize.register_parametrization(module, self.tensor, share)
        share.train(module.training)

    def __str__(self) -> str:
        if self.vanishes:
            return f"clear {join(self.path, self.tensor)}"
        return f"center {join(self.path, self.tensor)}"


class SetOnes(BaseEdit):
    """Make a gain 1, once weights have taken it up."""

    edit: Literal["set_ones"] = "set_ones"
    tensor: str

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        gain = getattr(module, self.tensor, None)
        self.require(isinstance(gain, Tensor))
        assert isinstance(gain, Tensor)
        _replace(module, self.tensor, torch.ones_like(gain))

    def __str__(self) -> str:
        return f"set {join(self.path, self.tensor)} to 1"


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    # A new tensor, because the model may have to be put back.
    old = module._parameters.get(name)
    if old is None:
        module._buffers[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)


class CenterOutput(BaseEdit):
    """Let a module take the mean along one axis, counted from the end, off what it returns."""

    edit: Literal["center_output"] = "center_output"
    axis: int

    def apply(self, model: nn.Module) -> None:
        module = self.module(model)
        self.require(not parametrized_tensors(module))
        module.__class__ = _centering_class(type(module), self.axis)

    def __str__(self) -> str:
        return "center its output"


class CenteredOutput:
    """Mixed into the class of one module; all else about the module is as before.

    Attributes:
        uncentered: the class without it.
        axis: that of the channels in the output, counted from the end.
    """

    uncentered: type[nn.Module]
    axis: int

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.uncentered.forward(self, *args, **kwargs)
        mean = y.mean(self.axis, keepdim=True, dtype=statistics_dtype(y))
        return (y - mean).to(y.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy are told how to make it again.
        state = super().__reduce_ex__(protocol)[2:]
        return _centering_instance, (self.uncentered, self.axis), *state


_classes: dict[tuple[type[nn.Module], int], type[nn.Module]] = {}


def _centering_class(cls: type[nn.Module], axis: int) -> type[nn.Module]:
    """`cls` with `CenteredOutput` mixed in; always the same."""
    if (cls, axis) not in _classes:
        body = {
            "uncentered": cls,
            "axis": axis,
            "__module__": cls.__module__,
            "__doc__": CenteredOutput.__doc__,
        }
        made = type(f"Centered{cls.__name__}", (CenteredOutput, cls), body)
        _classes.setdefault((cls, axis), made)  # another thread may have been first
    return _classes[cls, axis]


def _centering_instance(cls: type[nn.Module], axis: int) -> nn.Module:
    return object.__new__(_centering_class(cls, axis))
