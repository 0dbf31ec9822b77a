"""Calls of a model that is somebody else's: its inputs, what its modules return, why it fails."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, told
from normswap.core.interrupts import at_last

_Key = TypeVar("_Key")
_Kept = TypeVar("_Kept")


def check_module(model: Any) -> None:
    """Refuse what is no model.

    Raises:
        NormswapError: `model` is no module; the message says what to do with what it is.
    """
    if isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    if isinstance(model, type):
        said = f"the class {model.__name__}; pass an object of it"
    elif isinstance(model, Mapping):
        said = f"a state dict ({kind}); load it into the model that it is of, and pass that"
    elif isinstance(model, str):
        said = f"the text {model!r:.60}; build the model and pass that"
    else:
        said = f"{kind}; pass the module"
    raise NormswapError(f"a model is a torch.nn.Module, not {said}")


def cloned(inputs: Any) -> Any:
    """`inputs`, the tensors in them copied: a model may write into what it is called with."""
    return pytree.tree_map_only(Tensor, Tensor.clone, inputs)


def floating(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returned: blocks may return tuples."""
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@contextmanager
def recorded(
    modules: Mapping[_Key, nn.Module], keep: Callable[[Any], Iterable[_Kept]]
) -> Iterator[dict[_Key, list[_Kept]]]:
    """Inside, what `keep` takes from the outputs of `modules`, call by call; no key where no call.

    What comes later in the model may work in place, so that `keep` may have to copy.
    """
    seen: dict[_Key, list[_Kept]] = {}

    def noting(key: _Key) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(key, []).extend(keep(output))

    hooks = ExitStack()
    with at_last(hooks.close):
        for key, module in modules.items():
            hooks.enter_context(module.register_forward_hook(noting(key)))
        yield seen


@contextmanager
def running_on(
    inputs: Any, remedy: str, *, let: tuple[type[Exception], ...] = (NormswapError,)
) -> Iterator[None]:
    """Inside, a model is called on `inputs`; what its code raises becomes a line about that.

    Args:
        inputs: a tensor, a sequence of positional inputs or a dict of keyword inputs.
        remedy: what to do, the end of the line.
        let: errors that are left as they are.

    Raises:
        NormswapError: the model does not run on the inputs.
    """
    try:
        yield
    except let:
        raise
    except Exception as error:  # whatever the user's forward raises
        raise NormswapError(
            f"the model does not run on {described(inputs)}: {told(error)}; "
            f"{_channels_first(inputs) or _all_inputs(error) or remedy}"
        ) from error


def _all_inputs(error: Exception) -> str:
    """What to do where an input is missing."""
    if isinstance(error, TypeError) and "required positional argument" in str(error):
        return "give all inputs; a batch of data holds them in a dict, by name"
    return ""


def _channels_first(inputs: Any) -> str:
    """What to do about an image, or a video, whose channels look to be its last axis."""
    given = inputs[0] if isinstance(inputs, (tuple, list)) and inputs else inputs
    if not isinstance(given, Tensor) or given.ndim not in (4, 5):
        return ""
    last = given.shape[-1]
    if last not in (1, 3, 4) or given.shape[1] in (1, 3, 4):
        return ""
    axes = 0, given.ndim - 1, *range(1, given.ndim - 1)
    shape = "x".join(str(given.shape[axis]) for axis in axes)
    return f"its channels look to be last, and PyTorch takes {shape}: permute{axes}"


def described(inputs: Any) -> str:
    """The shapes of `inputs`, the types where these are unusual, and the names where there are."""
    if isinstance(inputs, Tensor):
        dtype = "" if inputs.dtype is torch.float32 else f" {str(inputs.dtype)[len('torch.') :]}"
        return f"an input of {'x'.join(map(str, inputs.shape)) or 'no axes'}{dtype}"
    if isinstance(inputs, (tuple, list)):
        return ", ".join(map(described, inputs))
    if isinstance(inputs, Mapping):
        return ", ".join(f"{name}: {described(value)}" for name, value in inputs.items())
    return f"an input of type {type(inputs).__name__}"
