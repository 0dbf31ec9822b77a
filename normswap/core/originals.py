"""What tensors held before they were overwritten, kept on disk until it is sure that they may be.

A rewrite is carried out whole or not at all, so that what it changes has to be kept. In memory that
is a second model, which one of several gigabytes has no room for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import torch
from torch import Tensor

from normswap.core.interrupts import at_last

_SMALL = 2**20  # bytes, below which a tensor is kept in memory
_PIECE = 2**24  # bytes that are read or written at a time


class Originals:
    """The contents of tensors from before they were overwritten; `restore` puts them back."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._kept: dict[int, tuple[Tensor, Tensor | int]] = {}  # a copy, or where in the file

    def keep(self, tensor: Tensor) -> None:
        """Keep what `tensor` holds, unless that was kept before."""
        if id(tensor) in self._kept:
            return
        held: Tensor | int = -1
        if tensor.nbytes > _SMALL and tensor.is_contiguous():
            held = self._written(tensor)
        if isinstance(held, int) and held < 0:  # small, or the disk is full
            held = tensor.detach().clone()
        self._kept[id(tensor)] = tensor, held

    def restore(self) -> None:
        """Give every tensor what it held."""
        for tensor, held in self._kept.values():
            if isinstance(held, Tensor):
                tensor.detach().copy_(held)
                continue
            assert self._file is not None
            self._file.seek(held)
            for piece in _pieces(tensor):
                read = np.frombuffer(self._file.read(piece.nbytes), dtype=np.uint8)
                piece.copy_(torch.from_numpy(read.copy()))

    def close(self) -> None:
        """Forget all of it."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def _written(self, tensor: Tensor) -> int:
        """Where in the file the contents are; -1 where they do not fit there."""
        try:
            if self._file is None:
                self._file = TemporaryFile(prefix="normswap-")  # noqa: SIM115
            start = self._file.seek(0, 2)
            for piece in _pieces(tensor):
                self._file.write(piece.cpu().numpy().tobytes())
            self._file.flush()
        except OSError:
            return -1
        return start


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a contiguous tensor, in pieces that share its memory."""
    yield from torch.split(tensor.detach().view(-1).view(torch.uint8), _PIECE)


_OVERWRITING: ContextVar[Originals | None] = ContextVar("overwriting", default=None)


@contextmanager
def overwriting() -> Iterator[None]:
    """Inside, what is `kept_on_disk` may be overwritten; if the body raises, all is back."""
    originals, done = Originals(), False
    before = _OVERWRITING.get()

    def end() -> None:
        _OVERWRITING.set(before)
        if not done:
            originals.restore()
        originals.close()

    with at_last(end):
        _OVERWRITING.set(originals)
        yield
        done = True


def kept_on_disk(tensor: Tensor) -> bool:
    """Keep what `tensor` holds, so that it may be overwritten; False outside `overwriting`."""
    originals = _OVERWRITING.get()
    if originals is None or tensor.is_meta:
        return False
    originals.keep(tensor)
    return True
