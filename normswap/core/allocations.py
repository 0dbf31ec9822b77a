"""Hold what torch allocates within an `Allowance`, before it is allocated.

A recipe may ask for a tensor of any size in many ways: by a number of channels, of conditions, of
steps, by the size of an input, by one edit a thousand times, by the name of an enormous model. They
all end in operators of torch that return new memory, and those are counted here.
"""

import weakref
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.core.memory import Allowance

# From so many elements on that a result may have, the meta device says first how many it will have.
_MANY = 2**24
_OF_TENSOR = 4096  # bytes that torch and Python keep beside its numbers, with its part of a module


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, the tensors that this thread makes and keeps may take what `allowance` says together.

    An operator whose result would not fit is not run: NormswapError is raised in its place. What is
    freed does not count any more.
    """

    supports_higher_order_operators = True

    def __init__(self, allowance: Allowance, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._allowance, self._what = allowance, what
        self._taken = self._claimed = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = (*args, *kwargs.values())
        if prod(map(_reach, given)) >= _MANY:
            self._allowance.check(self._taken + _foreseen(func, args, kwargs), self._what)
        made = func(*args, **kwargs)
        results = [each for each in _flat((made,)) if _has_memory(each)]
        if results:
            before = {_address(each) for each in _flat(given) if _has_memory(each)}
            for each in results:
                if _address(each) not in before:
                    self._take(each.untyped_storage())
        elif isinstance(made, Tensor) and not any(isinstance(each, Tensor) for each in given):
            # Of a model that is first built on the meta device, with all that Python keeps of it.
            self._taken += 4 * _OF_TENSOR
            self._allowance.check(self._taken, self._what)
            self._claimed += 1
            self._allowance.check_parts(
                self._claimed, f"{self._claimed:,} tensors or more ({self._what})"
            )
        return made

    def _take(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes() + _OF_TENSOR
        if not storage.nbytes() or address in self._storages:
            return

        def freed(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._storages[address]
            self._taken -= size

        self._storages[address] = weakref.ref(storage, freed)
        self._taken += size
        self._allowance.check(self._taken, self._what)


def _reach(argument: Any) -> int:
    """How many elements an argument of an operator may make its result have, at most."""
    if isinstance(argument, Tensor):
        return max(argument.numel(), 1)
    if isinstance(argument, (list, tuple)):
        return prod(abs(each) or 1 if isinstance(each, int) else _reach(each) for each in argument)
    return max(argument * argument, 1) if isinstance(argument, int) else 1  # n: of n by n


def _foreseen(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The bytes of new memory that the results of an operator take; 0 where it cannot tell."""
    if any(isinstance(each, Tensor) and each.is_meta for each in pytree.tree_leaves(args)):
        return 0
    schema = func._schema
    args, kwargs = pytree.tree_map(_on_meta, (args, kwargs))
    if any(each.name == "device" for each in schema.arguments):
        kwargs = {**kwargs, "device": "meta"}
    try:
        made = func(*args, **kwargs)
    except Exception:  # its result depends on values; it is counted once it is there
        return 0
    results = made if isinstance(made, (tuple, list)) else (made,)
    return sum(
        each.numel() * each.element_size()
        for each, declared in zip(results, schema.returns, strict=False)
        if isinstance(each, Tensor) and declared.alias_info is None
    )


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Generator):  # there are none of meta
        return None
    return value.to("meta") if isinstance(value, Tensor) else value


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """What operators take and return: values, and lists of them."""
    for each in values:
        if isinstance(each, (list, tuple)):
            yield from each
        else:
            yield each


def _has_memory(value: Any) -> bool:
    own = type(value) in (Tensor, nn.Parameter)
    return own and not value.is_meta and value.layout is torch.strided


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
