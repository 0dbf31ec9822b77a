"""Attributes of modules that are other than usual for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from normswap.core.interrupts import at_last


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
