"""How much memory a file may ask for: in proportion to the bytes that it takes up on the disk.

A few bytes can claim terabytes: a header that names a shape, a picture that decompresses, a recipe
with a number of channels, a tensor whose elements all lie in one place. Whoever opens a file makes
an `Allowance` of it, and asks that before memory is taken. The limit is 16 times what lies on the
disk, and at least 1 GiB; `limited` sets another for all that is opened inside.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

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
