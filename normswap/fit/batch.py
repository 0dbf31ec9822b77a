"""A batch, and how a model is called on it.

A batch is a tensor, a tuple or list whose first item is the model's input (and whose second, where
there is one, holds the labels), or a dict of keyword inputs. A `DataLoader` yields such batches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError, first_line
from normswap.graph.supported import check_numbers


def inputs_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which a model is called on `batch`.

    Raises:
        NormswapError: `batch` is not a tensor, a non-empty tuple or list, or a dict.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping) and batch:
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and batch:
        return (batch[0],), {}
    raise NormswapError(
        f"a batch is {batch!r:.40} of type {type(batch).__name__}; "
        "yield tensors, tuples whose first item is the input, or dicts of keyword inputs"
    )


def labels_of(batch: Any) -> Tensor | None:
    """The labels of `batch`, of shape (N,): a tuple's second item, a dict's "labels", or None."""
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    return found if isinstance(found, Tensor) else None


def size_of(batch: Any) -> int:
    """How many samples `batch` has: the length of its first tensor, or 1 where it has none."""
    args, kwargs = inputs_of(batch)
    tensors = (each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    return next((len(each) for each in tensors), 1)


def logits_of(output: Any) -> Tensor | None:
    """The logits that a classifier returns, (N, K) or (N, K, ...): its output, or its `logits`."""
    if isinstance(output, Mapping):
        output = output.get("logits", output.get("out"))
    output = getattr(output, "logits", output)
    return output if isinstance(output, Tensor) and output.ndim > 1 else None


def wide(value: Tensor) -> Tensor:
    """`value` in float32, or in its own type where that has more digits, as a loss needs them."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def inputs_for(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As `inputs_of`, moved to the device and floating type of the parameters of `model`."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if like is None or not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype if value.is_floating_point() else None)

    check_numbers(batch)
    args, kwargs = inputs_of(batch)
    return tuple(moved(value) for value in args), {k: moved(value) for k, value in kwargs.items()}


def run(model: nn.Module, batch: Any) -> Any:
    """What `model` returns for `batch`, of which the inputs are moved to where it is.

    Raises:
        NormswapError: the model rejects it.
    """
    args, kwargs = inputs_for(model, batch)
    try:
        return model(*args, **kwargs)
    except NormswapError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        raise NormswapError(
            f"the model rejects a batch of shape {', '.join(map(str, shapes))}: "
            f"{first_line(error)}; give data of the shape that it takes"
        ) from error
