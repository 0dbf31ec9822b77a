"""The types of what a caller hands over, by the names that the reference has for them."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any] | list[Any]
"""Example inputs of a model: a tensor, a tuple of positional inputs, a dict of keyword inputs, or a
list of several such examples (two sizes, with and without a mask), for all of which a rewrite has
to hold.
"""

Batches: TypeAlias = Iterable[Any]
"""Data in batches, such as a `DataLoader`. A batch is a tensor, a tuple whose first item is the
model's input (and whose second item holds the labels, where they are needed), or a dict of keyword
inputs. Batches are read more than once where that is needed.
"""
