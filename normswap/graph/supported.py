"""What cannot be seen or rewritten at all, refused before anything is tried."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from normswap.core.calls import check_module

# torch has no public name for the type of its fake tensors.
from normswap.core.compat import FakeTensor, pytree
from normswap.core.errors import NormswapError

SCRIPTED = "it is scripted or traced by torch.jit, its code is fixed"


def python_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` but those of torch.jit, which take no hooks or attributes."""
    return (each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule))


def check_supported(model: nn.Module, *, lazy: bool = False, numbers: bool = False) -> None:
    """Refuse what cannot be rewritten: a scripted, quantized, uninitialised lazy or fake model.

    A scripted child without a normalization can stay what it is, and passes.

    Args:
        lazy: let an uninitialised one pass, which can be looked at.
        numbers: refuse one on the meta device too, for verbs that run it.

    Raises:
        NormswapError: `model` is one of these, or no module.
    """
    check_module(model)
    for name, module in model.named_modules():
        where = f"{name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            if not name or _normalizes(module):
                raise NormswapError(
                    f"{where} is scripted or traced by torch.jit, its code is fixed; "
                    "pass the nn.Module that it was made from"
                )
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not lazy and any(nn.parameter.is_lazy(tensor) for tensor in own):
            raise NormswapError(
                f"{where} is lazy and not initialised; run one batch through the model first"
            )
        if any(isinstance(tensor, FakeTensor) for tensor in own):
            raise NormswapError(
                f"{where} has fake tensors, made under FakeTensorMode, which have no numbers; "
                "pass the model with its weights"
            )
        if numbers and any(tensor.is_meta for tensor in own):
            raise NormswapError(f"{where} has no numbers, it is on the meta device; load weights")
        # torch.ao keeps the packed weights of a quantized module in such an object.
        packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
        if packed or any(tensor.is_quantized for tensor in own):
            raise NormswapError(
                f"{where} is quantized ({type(module).__name__}); pass the float model and "
                "quantize after the conversion"
            )


def check_trainable(model: nn.Module) -> None:
    """Refuse as `check_supported`, and what has no numbers or cannot be written to.

    Raises:
        NormswapError: `model` is one of these.
    """
    check_supported(model, numbers=True)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise NormswapError(
            "the model was made under torch.inference_mode(), so its tensors cannot be changed; "
            "pass copy.deepcopy(model), made outside of it"
        )


def check_runs_on_numbers(model: nn.Module) -> None:
    """Refuse a model, of whatever kind, that cannot be run for numbers.

    Raises:
        NormswapError: it has fake tensors, or is on the meta device.
    """
    check_module(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            kind = "a fake tensor" if isinstance(tensor, FakeTensor) else "on the meta device"
            raise NormswapError(f"the model has no numbers, {name!r} is {kind}; load weights")


def check_numbers(inputs: Any) -> None:
    """Refuse example inputs or data that are fake tensors, or on the meta device.

    Raises:
        NormswapError: `inputs`, in any nesting, has one of these.
    """
    for each in pytree.tree_leaves(inputs):
        if isinstance(each, torch.Tensor) and (isinstance(each, FakeTensor) or each.is_meta):
            kind = "fake tensors" if isinstance(each, FakeTensor) else "on the meta device"
            raise NormswapError(f"the inputs are {kind}, which have no numbers; give real ones")


def _normalizes(module: torch.jit.ScriptModule) -> bool:
    """Whether a scripted or traced module computes a normalization, in a module or a function."""
    code = str(getattr(module, "inlined_graph", ""))  # a container has none
    return re.search(r"aten::\w*(batch|layer|instance|group|rms)_norm", code) is not None
