"""The model as the reference that an ONNX file is held against: its arguments and its outputs."""

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from normswap.deploy.diverge import Array, Call, arrays, one_line
from normswap.errors import NormswapError
from normswap.graph.copies import copied
from normswap.graph.snapshot import untouched
from normswap.graph.supported import check_numbers, check_supported


def bind(model: nn.Module, inputs: Any) -> Call:
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
    call: Call = _pytree.tree_map_only(
        torch.Tensor, lambda t: t.detach().cpu(), (bound.args, bound.kwargs)
    )
    if not tensors(call):
        raise NormswapError("there is no tensor among the inputs; give at least one")
    return call


def tensors(call: Call) -> list[torch.Tensor]:
    """The tensors of a call, in the order of an exported file's inputs."""
    return [leaf for leaf in _pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]


def reference_copy(model: nn.Module, call: Call) -> nn.Module:
    """A copy of `model` on the CPU in eval mode, so that the caller's is never touched.

    It has no memory of its own for parameters that are on the CPU, unless `call` writes into some
    (an embedding with max_norm does).

    Raises:
        NormswapError: it cannot be copied.
    """
    duplicate = _copy(model, share_parameters=True)
    if _writes_into_parameters(duplicate, call):
        duplicate = _copy(model, share_parameters=False)
    return duplicate


def _copy(model: nn.Module, *, share_parameters: bool) -> nn.Module:
    try:
        duplicate = copied(model, share_parameters=share_parameters).cpu()
    except Exception as error:  # whatever a user's __deepcopy__ or an attribute of theirs raises
        raise NormswapError(
            f"the model cannot be copied ({one_line(error)}); remove what cannot be, such as a "
            "torch.nn.utils.weight_norm (parametrizations.weight_norm can)"
        ) from error
    # A .pt2 program refuses eval(): its mode was fixed when it was exported.
    with contextlib.suppress(NotImplementedError):
        duplicate.eval()
    return duplicate


class _Written(Exception):
    pass


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops an operator before it writes into the memory of `tensors`."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = {_memory(tensor) for tensor in tensors if tensor.numel()}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False))
        given |= kwargs or {}
        for each in func._schema.arguments:
            if each.alias_info is not None and each.alias_info.is_write:
                leaves = _pytree.tree_leaves(given.get(each.name))
                if any(isinstance(t, torch.Tensor) and _memory(t) in self._memory for t in leaves):
                    raise _Written
        return func(*args, **(kwargs or {}))


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _writes_into_parameters(model: nn.Module, call: Call) -> bool:
    """Whether a forward writes into parameters, or cannot be watched; `model` is as before."""
    args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.clone, call)
    try:
        with untouched(model), torch.no_grad(), _Guard(model.parameters()):
            model(*args, **kwargs)
    except Exception:  # also the user's own, which the next forward raises again
        return True
    return False


def run_reference(model: nn.Module, call: Call) -> list[Array]:
    """The model's output tensors, nested ones in pytree order.

    Raises:
        NormswapError: the model rejects the inputs.
    """
    # A model may write into its inputs.
    args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.clone, call)
    try:
        with torch.no_grad():
            return arrays(model(*args, **kwargs))
    except Exception as error:  # whatever the user's forward raises
        shapes = ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors(call))
        raise NormswapError(
            f"the model rejects inputs of shape {shapes}: {one_line(error)}; give others"
        ) from error
