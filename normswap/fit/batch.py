"""A batch, and how a model is called on it.

A batch is a tensor, a tuple or list whose first item is the model's input (and whose second, where
there is one, holds the labels), or a dict of keyword inputs. A `DataLoader` yields such batches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core import calls
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, told
from normswap.graph.supported import check_numbers

_OUT_OF_MEMORY = torch.OutOfMemoryError, MemoryError


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
    """The labels of `batch`, of shape (N,): a tuple's second item, a dict's "labels", or None.

    A list of whole numbers will do.
    """
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if isinstance(found, (list, tuple)) and found and all(type(each) is int for each in found):
        return torch.tensor(found)
    return found if isinstance(found, Tensor) else None


def size_of(batch: Any) -> int:
    """How many samples `batch` has: the length of its first tensor that holds something.

    It is 0 where all hold nothing, and 1 where there are none with an axis.
    """
    args, kwargs = inputs_of(batch)
    inputs = (*args, *kwargs.values())
    tensors = [each for each in inputs if isinstance(each, Tensor) and each.ndim]
    if not tensors:
        return 0 if isinstance(inputs[0], (list, tuple)) and not inputs[0] else 1
    return next((len(each) for each in tensors if each.numel()), 0)


def is_finite(batch: Any) -> bool:
    """Whether every number in `batch` is."""
    leaves = pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return all(bool(each.isfinite().all()) for each in leaves if isinstance(each, Tensor))


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
    """As `inputs_of`, copied to the device and floating type of the parameters of `model`.

    Copied, as a model may write into its inputs, and the data may be read again.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), None)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if like is None:
            return value.clone()
        dtype = like.dtype if value.is_floating_point() else value.dtype
        return value.to(like.device, dtype, copy=True)

    check_numbers(batch)
    args, kwargs = inputs_of(batch)
    return tuple(moved(value) for value in args), {k: moved(value) for k, value in kwargs.items()}


def run(model: nn.Module, batch: Any) -> Any:
    """What `model` returns for `batch`, of which the inputs are moved to where it is.

    Raises:
        NormswapError: the model rejects it.
    """
    args, kwargs = inputs_for(model, batch)
    remedy = "give data of the shape and type that it takes"
    with calls.running_on(_given(batch), remedy, let=(NormswapError, *_OUT_OF_MEMORY)):
        return model(*args, **kwargs)


def backward(loss: Tensor) -> None:
    """Add the gradient of `loss`, of no axes, to those of the parameters that it depends on.

    Raises:
        NormswapError: it depends on none, or an operator between has no derivative.
    """
    if not loss.requires_grad:
        raise NormswapError(
            "the loss depends on no parameter that requires a gradient: the model runs under "
            "torch.no_grad, or an output is detached, in the model or in loss=; let gradients "
            "through there"
        )
    try:
        torch.autograd.backward(loss)
    except _OUT_OF_MEMORY:
        raise
    except Exception as error:  # whatever a backward or a hook of the user's raises
        raise NormswapError(
            f"the model cannot be differentiated: {told(error)}; replace that operator in it, or "
            "train with a loss of other outputs"
        ) from error


def described(batch: Any) -> str:
    """The shapes of the inputs in `batch`, as `normswap.core.calls.described` tells them."""
    return calls.described(_given(batch))


def _given(batch: Any) -> Any:
    args, kwargs = inputs_of(batch)
    return kwargs or args
