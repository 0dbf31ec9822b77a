"""A behaviour that is mixed into the class of one module, which can then be pickled and copied."""

import copyreg
from functools import wraps
from typing import Any, ClassVar, cast

from torch import nn


class Mixin:
    """Mixed into the class of one module by `mixed`; the class is made at run time.

    The module stays what it was, with its class among the bases and its parameters, state-dict keys
    and hooks. Names are private here, as the class may have any other.
    """

    _prefix: ClassVar[str]  # of the name of the class that is made
    _why_not: ClassVar[str | None] = None  # why it computes something else than its class does
    _mixin: ClassVar[type["Mixin"]]
    _plain: ClassVar[type[nn.Module]]  # the class without the mixin

    def _around(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """What its forward returns; `forward(self, ...)` is that of the class without the mixin."""
        raise NotImplementedError

    @classmethod
    def _members(cls, plain: type[nn.Module]) -> dict[str, Any]:
        """What a class that is made of `plain` has besides; by default such a forward."""

        @wraps(plain.forward)  # an exporter names the inputs as its signature does
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return cls._around(self, plain.forward, *args, **kwargs)

        return {"forward": forward}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Pickle and deepcopy are told how to make the class again; the one below the mixins may say
        # so itself. Before protocol 2 there is no such way: the class is looked up by its name.
        make, given, *state = cast(tuple[Any, ...], super().__reduce_ex__(max(protocol, 2)))
        mixins, cls = list[type[Mixin]](), cast(Any, type(self))
        while issubclass(cls, Mixin):
            mixins, cls = [cls._mixin, *mixins], cls._plain
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            given = (cls,)
        return _instance, (make, given, mixins), *state


_classes: dict[tuple[type[Mixin], type[nn.Module]], type[nn.Module]] = {}


def mixed(mixin: type[Mixin], cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `mixin` mixed in; always the same class."""
    if (mixin, cls) not in _classes:
        body = {
            "_mixin": mixin,
            "_plain": cls,
            "__module__": cls.__module__,
            "__doc__": mixin.__doc__,
            **mixin._members(cls),
        }
        made = type(f"{mixin._prefix}{cls.__name__}", (mixin, cls), body)
        _classes.setdefault((mixin, cls), made)  # another thread may have been first
    return _classes[mixin, cls]


def without(cls: type[nn.Module], mixin: type[Mixin]) -> type[nn.Module]:
    """`cls` as it is where `mixin` is not mixed in; what else is mixed in stays."""
    if not issubclass(cls, Mixin):
        return cls
    below = without(cls._plain, mixin)
    return below if issubclass(cls._mixin, mixin) else mixed(cls._mixin, below)


def mixed_below(mixin: type[Mixin], cls: type[nn.Module]) -> type[nn.Module]:
    """`cls` with `mixin` mixed in below all others, so that these act on what it makes."""
    if not issubclass(cls, Mixin):
        return mixed(mixin, cls)
    return mixed(cls._mixin, mixed_below(mixin, cls._plain))


def _instance(make: Any, given: tuple[Any, ...], mixins: list[type[Mixin]]) -> nn.Module:
    module: nn.Module = make(*given)
    for mixin in mixins:
        module.__class__ = mixed(mixin, type(module))
    return module
