"""What cannot be seen or rewritten at all, refused before anything is tried."""

import re
from collections.abc import Iterator

import torch
from torch import nn

from normswap.errors import NormswapError

SCRIPTED = "it is scripted or traced by torch.jit, its code is fixed"


def python_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of `model` but those of torch.jit, which take no hooks or attributes."""
    return (each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule))


def check_supported(model: nn.Module, *, lazy: bool = False) -> None:
    """Refuse what cannot be rewritten: a scripted, a quantized or an uninitialised lazy model.

    A scripted child without a normalization can stay what it is, and passes.

    Args:
        lazy: let an uninitialised one pass, which can be looked at.

    Raises:
        NormswapError: `model` is one of these.
    """
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
        # torch.ao keeps the packed weights of a quantized module in such an object.
        packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
        if packed or any(tensor.is_quantized for tensor in own):
            raise NormswapError(
                f"{where} is quantized ({type(module).__name__}); pass the float model and "
                "quantize after the conversion"
            )


def _normalizes(module: torch.jit.ScriptModule) -> bool:
    """Whether a scripted or traced module computes a normalization, in a module or a function."""
    code = str(getattr(module, "inlined_graph", ""))  # a container has none
    return re.search(r"aten::\w*(batch|layer|instance|group|rms)_norm", code) is not None
