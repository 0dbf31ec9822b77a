"""What a normalization is called with, by position or by name.

torch's modules name that argument `input`, and so do those of `normswap.norms`. Others have names
of their own (`x` in timm, `hidden_states` in transformers), by which their callers may go on to
call what takes their place.

`ChannelsLast` puts a normalization of channels at axis 1 where they lie last; `within` gives
modules other attributes for a while.
"""

import copyreg
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from normswap.core.interrupts import at_last

INPUT = "input"  # torch's name


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The value that `module` was called with, as its hooks get `args` and `kwargs`."""
    if args:
        value: Tensor = args[0]
    elif len(kwargs) == 1:
        (value,) = kwargs.values()
    else:
        value = kwargs[input_name(type(module))]
    return value


def input_name(cls: type[nn.Module]) -> str:
    """The name of the first argument of the forward of `cls`; torch's where it names none."""
    if issubclass(cls, NamedInput):
        return cls.input_name
    for each in cls.__mro__:
        # One that takes (*args, **kwargs) hands them on to the forward of a class below it.
        if inspect.isfunction(forward := vars(each).get("forward")):
            first = list(inspect.signature(forward).parameters.values())[1:2]
            if first and first[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                return first[0].name
    return INPUT


class NamedInput:
    """Mixed into the class of a module that took the place of one with another name for its input.

    It takes its input by that name as well. It is called so, and its forward is the one of its
    class: what reads, traces or scripts that sees no difference.

    Attributes:
        input_name: the other name.
        unnamed: the class without this mixin.
    """

    input_name: str
    unnamed: type[nn.Module]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.input_name in kwargs:
            args = (kwargs.pop(self.input_name), *args)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy are told how to make it again, and
        # the one below it may say so itself.
        make, given, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(protocol, 2)))
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            given = (self.unnamed,)
        return _named_instance, (self.input_name, make, given), *state


def name_input(module: nn.Module, name: str) -> None:
    """Let `module` take its input under `name` too, in place."""
    if name != input_name(type(module)):
        module.__class__ = _named_class(getattr(type(module), "unnamed", type(module)), name)


@contextmanager
def below_name(module: nn.Module) -> Iterator[None]:
    """Inside, the class of `module` is the one below `NamedInput`, and may be changed."""
    cls = type(module)
    module.__class__ = getattr(cls, "unnamed", cls)
    yield
    if issubclass(cls, NamedInput):
        name_input(module, cls.input_name)


_named_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _named_class(cls: type[nn.Module], name: str) -> type[nn.Module]:
    """`cls` with `NamedInput` mixed in; always the same."""
    if (cls, name) not in _named_classes:
        body = {
            "input_name": name,
            "unnamed": cls,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        made = type(cls.__name__, (NamedInput, cls), body)
        _named_classes.setdefault((cls, name), made)  # another thread may have been first
    return _named_classes[cls, name]


def _named_instance(name: str, make: Any, given: tuple[Any, ...]) -> nn.Module:
    module: nn.Module = make(*given)
    name_input(module, name)
    return module


class ChannelsLast(nn.Module):
    """Apply `norm`, which takes (N, C, ...), to a value of shape (N, ..., C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.norm, nn.Identity):  # folded into a weight, as a BatchNorm may be
            return input
        y: Tensor = self.norm(input.movedim(-1, 1)).movedim(1, -1)
        # What comes after a LayerNorm may ask for a view of its output.
        return y.contiguous() if input.is_contiguous() else y


@contextmanager
def within(modules: Iterable[nn.Module], **values: Any) -> Iterator[None]:
    """Inside, every one of `modules` has these attributes; after it, whatever happens, its own."""
    before = [(module, {name: getattr(module, name) for name in values}) for module in modules]

    def restore() -> None:
        for module, own in before:
            for name, value in own.items():
                setattr(module, name, value)

    with at_last(restore):
        for module, _ in before:
            for name, value in values.items():
                setattr(module, name, value)
        yield
