"""The model as the reference that an ONNX file is held against: its arguments and its outputs."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normswap.core.calls import cloned, running_on
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.core.modes import set_modes
from normswap.deploy.diverge import Array, CallArguments, arrays, one_line
from normswap.graph.copies import copied
from normswap.graph.snapshot import contents_kept, untouched
from normswap.graph.supported import check_numbers, check_supported


def bind(model: nn.Module, inputs: Any) -> CallArguments:
    """`inputs` as the arguments of `model.forward`, in the order of its signature.

    That is also the order of an exported file's inputs, however the caller ordered a dict's keys.

    Raises:
        NormswapError: forward takes other arguments, there is no tensor among them, or the model
            is a scripted, quantized or uninitialised lazy one.
    """
    check_supported(model, numbers=True)
    check_numbers(inputs)
    try:
        signature = inspect.signature(model.forward)
        if isinstance(inputs, Mapping):
            bound = signature.bind(**inputs)
        else:
            bound = signature.bind(*inputs if isinstance(inputs, tuple) else (inputs,))
    except TypeError as error:
        raise NormswapError(
            f"the model's forward{signature} does not take these inputs: {error}; give a tensor, "
            "a tuple of positional or a dict of keyword inputs"
        ) from error
    call: CallArguments = pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().cpu(), (bound.args, bound.kwargs)
    )
    if not tensors(call):
        raise NormswapError("there is no tensor among the inputs; give at least one")
    return call


def tensors(call: CallArguments) -> list[torch.Tensor]:
    """The tensors of a call, in the order of an exported file's inputs."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def reference_copy(model: nn.Module, call: CallArguments) -> nn.Module:
    """A copy of `model` on the CPU in eval mode, so that the caller's is never touched.

    It has no memory of its own for parameters that are on the CPU, unless `call` writes into some
    (an embedding with max_norm does).

    Raises:
        NormswapError: it cannot be copied.
    """
    duplicate = _copy(model, share_parameters=True)
    if _writes_into_memory(duplicate, call):
        duplicate = _copy(model, share_parameters=False)
        _evaluate(duplicate)
    return duplicate


def _copy(model: nn.Module, *, share_parameters: bool) -> nn.Module:
    try:
        return copied(model, share_parameters=share_parameters).cpu()
    except NormswapError:
        raise
    except Exception as error:  # whatever a user's __deepcopy__ or an attribute of theirs raises
        raise NormswapError(
            f"the model cannot be copied ({one_line(error)}); remove what cannot be, such as a "
            "torch.nn.utils.weight_norm (parametrizations.weight_norm can)"
        ) from error


def _evaluate(model: nn.Module) -> None:
    set_modes((module, False) for module in model.modules())


def _writes_into_memory(model: nn.Module, call: CallArguments) -> bool:
    """Put `model` in eval mode; whether that or a forward writes its weights, or fails."""
    args, kwargs = cloned(call)
    with contents_kept(model) as watch:
        _evaluate(model)
        try:
            with untouched(model), torch.no_grad():
                model(*args, **kwargs)
        except Exception:  # also the user's own, which the next forward raises again
            return True
    return watch.written


def run_reference(model: nn.Module, call: CallArguments) -> list[Array]:
    """The model's output tensors, nested ones in pytree order.

    Raises:
        NormswapError: the model rejects the inputs.
    """
    args, kwargs = cloned(call)
    with running_on(tensors(call), "give others"), torch.no_grad():
        return arrays(model(*args, **kwargs))
