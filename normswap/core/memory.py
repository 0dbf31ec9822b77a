"""How much memory a file may ask for: in proportion to the bytes that it takes up on the disk.

A few bytes can claim terabytes: a header that names a shape, a picture that decompresses, a recipe
with a number of channels, a tensor whose elements all lie in one place. Whoever opens a file makes
an `Allowance` of it, and asks that before memory is taken. The limit is 16 times what lies on the
disk, and at least 1 GiB; `limited` sets another for all that is opened inside.

`Counted` holds what torch allocates within an `Allowance`, before it is allocated. A recipe may ask
for a tensor of any size in many ways: by a number of channels, of conditions, of steps, by the size
of an input, by one edit a thousand times, by the name of an enormous model. They all end in
operators of torch that return new memory, and those are counted here.
"""

import errno
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize, TypeAdapter, ValidationError
from torch import Tensor, nn

from normswap.core.compat import TorchDispatchMode, pytree
from normswap.core.errors import NormswapError

TIMES, FLOOR = 16, 2**30
# What Python makes of JSON at most, in bytes for each byte of the text: of "[],[],[]" empty lists.
_OF_JSON = 24
_OF_PART = 2**17  # so that what may be claimed at least, some 8,000 parts, is made in seconds
_given: ContextVar[int | None] = ContextVar("memory limit", default=None)


@contextmanager
def limited(limit: int | str | None) -> Iterator[None]:
    """Let files that are opened inside ask for this much memory each, whatever their size is.

    Args:
        limit: in bytes, or as "8GiB"; None changes nothing.

    Raises:
        NormswapError: `limit` is no size.
    """
    if limit is None:
        yield
        return
    token = _given.set(_size(limit))
    try:
        yield
    finally:
        _given.reset(token)


def given() -> int | None:
    """The limit that `limited` has set, for what opens more files later."""
    return _given.get()


@dataclass(frozen=True)
class Allowance:
    """How much memory may be taken for one thing that is opened.

    Attributes:
        name: what it is called in a message.
        limit: in bytes.
        why: how the limit came to be.
    """

    name: str
    limit: int
    why: str

    @classmethod
    def of(cls, name: str, on_disk: int) -> "Allowance":
        """The allowance of what takes up `on_disk` bytes."""
        limit = given()
        if limit is not None:
            return cls(name, limit, "as given")
        why = f"{TIMES} times its size on the disk, and at least {readable(FLOOR)}"
        return cls(name, max(FLOOR, TIMES * on_disk), why)

    @classmethod
    def of_file(cls, path: Path, name: str | None = None) -> "Allowance":
        """The allowance of a file, whose own length is within it.

        Raises:
            NormswapError: the file is far longer than what it takes up, being full of holes.
            OSError: it cannot be read.
        """
        allowance = cls.of(repr(str(path)) if name is None else name, _stored(path))
        allowance.check(path.stat().st_size, "its length")
        return allowance

    def check(self, asked: int, what: str) -> None:
        """Raise unless `asked` bytes, for `what`, are within the limit.

        Raises:
            NormswapError: they are not.
        """
        if asked > self.limit:
            self._refuse(f"{readable(asked)} of memory ({what})", "")

    def check_parts(self, count: int, what: str) -> None:
        """As `check`, of so many layers or tensors, be they empty: each takes time to make.

        Raises:
            NormswapError: there are too many for what lies on the disk.
        """
        if count > self.limit // _OF_PART:
            self._refuse(what, f"one for each {readable(_OF_PART)} of ")

    def _refuse(self, what: str, of: str) -> None:
        raise NormswapError(
            f"{self.name} asks for {what}, and the limit is {of}{readable(self.limit)}: "
            f"{self.why}; if you trust it, raise the limit with --memory-limit, or memory_limit in "
            "Python"
        )

    def check_json(self, length: int, what: str) -> None:
        """As `check`, of what JSON of so many bytes may become in Python."""
        self.check(_OF_JSON * length, what)


def readable(size: int) -> str:
    """A number of bytes, for people."""
    return ByteSize(size).human_readable(separator=" ")


def _size(limit: int | str) -> int:
    try:
        size = int(TypeAdapter(ByteSize).validate_python(limit))
    except (ValidationError, OverflowError):
        size = 0
    if size < 1:
        raise NormswapError(f"the memory limit {limit!r} is no size; write it as 8GiB or 500MB")
    return size


def _stored(path: Path) -> int:
    """How many bytes of a file lie on the disk: its holes, which read as zeros, do not."""
    size = path.stat().st_size
    if not hasattr(os, "SEEK_DATA"):
        return size
    stored = end = 0
    with path.open("rb") as file:
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                # Either only a hole is left, or the file system does not tell of holes.
                return stored if error.errno == errno.ENXIO else size
            stored += end - start
    return stored


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
        results = [each for each in _flat((made,)) if has_memory(each)]
        if results:
            before = {address_of(each) for each in _flat(given) if has_memory(each)}
            for each in results:
                if address_of(each) not in before:
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


def has_memory(value: Any) -> bool:
    """Whether `value` is a tensor of torch's own kind, with contents that may be written."""
    own = type(value) in (Tensor, nn.Parameter)
    return own and not value.is_meta and value.layout is torch.strided


def address_of(tensor: Tensor) -> int:
    """Where its memory begins, all of it: the same for its views."""
    return tensor.untyped_storage().data_ptr()
