"""Modules that compute what one module does, with other numbers, in float64.

A twin has the class and the settings of the module, and stand-ins for its children. It runs where
the module itself neither runs nor changes (`normswap.graph.recognition`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.core.interrupts import entered
from normswap.graph.parametrized import parametrized_tensors

_MOST_TENSORS = 5  # gain, bias, mean, variance, and one that is not used
_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_TO_NARROW = (Tensor.float, Tensor.half, Tensor.bfloat16)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
Numbers = Mapping[str, Tensor]  # the tensors of a module by name


class NotIt(Exception):
    """No formula explains what a module returns."""


class Twins:
    """Modules that compute what one module does, with other numbers."""

    def __init__(self, module: nn.Module, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.settings = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        self._module = module
        self._buffers = module._buffers.keys()
        held = {**module._parameters, **module._buffers}
        held |= {k: v for k, v in self.settings.items() if isinstance(v, Tensor)}
        held |= {name: getattr(module, name) for name in parametrized_tensors(module)}
        self._held = {name: tensor for name, tensor in held.items() if tensor is not None}
        self._children = [name for name in module._modules if name != "parametrizations"]
        numbers = [t for t in self._held.values() if t.is_floating_point()]
        self._lazy = any(nn.parameter.is_lazy(t) for t in numbers)
        self.channels = 0 if self._lazy else max((t.numel() for t in numbers), default=0)

    def may_normalize(self) -> bool:
        """Whether its tensors are of one length, as a gain, a bias and statistics are."""
        if self._lazy or (self._children and not self._held) or "forward" in self.settings:
            return False
        vectors = self.vectors()
        return len(vectors) <= _MOST_TENSORS and all(
            tensor.numel() == max(tensor.shape, default=1) == self.channels
            for tensor in vectors.values()
        )

    def vectors(self) -> dict[str, Tensor]:
        """The tensors that hold a number per channel."""
        constants = self.constants()
        return {name: t for name, t in self._held.items() if name not in constants}

    def constants(self) -> dict[str, Tensor]:
        """The tensors that stay what they are: counters, flags, an eps that is kept as a buffer."""
        return {
            name: tensor
            for name, tensor in self._held.items()
            if not tensor.is_floating_point()
            or (tensor.numel() == 1 < self.channels and name in self._buffers)
        }

    def key(self) -> Any:
        """All that the answer depends on."""
        return (
            self.cls,
            tuple(
                (name, tuple(tensor.shape), tensor.is_floating_point(), name in self._buffers)
                for name, tensor in self._held.items()
            ),
            tuple(
                (name, tensor.item())
                for name, tensor in self.constants().items()
                if tensor.numel() == 1 and not tensor.is_meta and name != "num_batches_tracked"
            ),
            tuple((name, _as_key(value)) for name, value in self.settings.items()),
            tuple(self._children),
        )

    def told(self) -> list[int]:
        """The whole numbers among its settings."""
        return [each for value in self.settings.values() for each in _integers(value)]

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Shapes of inputs to try: channels at axis 1, then channels last."""
        counts: Iterable[int] = (self.channels,)
        if self.channels <= 1:  # nothing per channel: as many as it was told, or any number
            counts = dict.fromkeys((6, *(each for each in self.told() if 1 < each <= 2**14)))
        for c in counts:
            a, b = [each for each in (4, 5, 7) if each != c][:2]
            yield from ((3, c, a, b), (3, a, c), (3, c, a), (3, a, b, c), (3, c, 2, a, b), (3, c))

    def random(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Numbers between 0.5 and 1.5 for each of the `vectors`."""
        return {
            name: torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
            for name, tensor in self.vectors().items()
        }

    def run(
        self,
        numbers: Numbers,
        x: Tensor,
        *,
        training: bool = False,
        child: Callable[[str, Tensor], Tensor] = lambda _, value: value,
    ) -> tuple[Tensor, tuple[str, ...]]:
        """What a twin with `numbers` makes of `x`, and which children it called.

        Args:
            child: (name, value) -> what that child makes of the value.
        """
        called: list[str] = []

        def call(name: str, value: Tensor) -> Tensor:
            called.append(name)
            return child(name, value)

        tensors = {n: t.detach().clone() for n, t in {**self.constants(), **numbers}.items()}
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
        twin = object.__new__(self.cls)
        plain = {k: copy(v) if isinstance(v, (list, dict)) else v for k, v in self.settings.items()}
        vars(twin).update(vars(nn.Module()) | plain)
        for name in self._module._parameters.keys() | tensors.keys():
            place = vars(twin) if name in plain else twin._parameters
            place[name] = tensors.get(name)  # type: ignore[assignment]
        for name in self._buffers:
            twin._parameters.pop(name, None)
            twin._buffers[name] = tensors.get(name)
        for name in self._children:
            twin._modules[name] = _Child(name, call)
        twin.training = training
        with _in_float64():
            y = self.cls.forward(twin, x.clone())
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            raise NotIt
        return y, tuple(called)


class _Child(nn.Module):
    """Stands in a twin for a child of the module."""

    def __init__(self, name: str, call: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self._name, self._call = name, call

    def forward(self, value: Tensor) -> Tensor:
        return self._call(self._name, value)


class _NoNarrowing(TorchFunctionMode):
    """Leave out casts to a narrower type: float64 shows the formula, not the rounding."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        func = Tensor.double if func in _TO_NARROW else func
        given = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **given)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


@contextmanager
def _in_float64() -> Iterator[None]:
    with entered(torch.no_grad(), torch.autocast("cpu", enabled=False), _NoNarrowing()):
        yield


def _integers(value: Any) -> list[int]:
    if isinstance(value, (tuple, list)):
        return [each for item in value for each in _integers(item)]
    return [value] if type(value) is int else []


def _as_key(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_as_key, value))
    if isinstance(value, (str, int, float, type(None), torch.dtype, torch.device)):
        return (type(value), value)
    return id(value)
