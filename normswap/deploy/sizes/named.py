"""Open sizes by the names of inputs and axes, in the form of torch.export's `dynamic_shapes`."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from normswap.core.errors import NormswapError
from normswap.deploy.diverge import CallArguments
from normswap.deploy.sizes.opened import NAMED, OpenSizes, arguments, dynamic_shapes
from normswap.deploy.sizes.trials import Axis, Trials

_HINTS = (None, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC)


def open_by_name(model: nn.Module, call: CallArguments, given: Any) -> OpenSizes:
    """The axes that `given` names: by argument, or for each argument in order.

    Raises:
        NormswapError: there is no such input or axis, a name stands for two sizes, or the model
            takes no other size there.
    """
    values = arguments(model, call)
    if not isinstance(given, Mapping):
        if not isinstance(given, (tuple, list)) or len(given) != len(values):
            raise NormswapError(
                f"dynamic has not one entry for each of {', '.join(values)}; {NAMED}"
            )
        given = dict(zip(values, given, strict=True))
    axes = list(_axes(values, given, "dynamic"))
    if not any(axes):
        raise NormswapError(f"dynamic opens no axis; {NAMED}, or give False (--static)")
    groups: dict[str, list[Axis]] = {}
    for i, dims in enumerate(axes):
        for axis, dim in dims.items():
            if name := _name(dim):  # of the others torch finds out what changes together
                groups.setdefault(name, []).append((i, axis))
    for name, group in groups.items():
        call = _openable(Trials(model, call), name, tuple(group))
    names = [{axis: name for axis, dim in dims.items() if (name := _name(dim))} for dims in axes]
    return OpenSizes(call, dynamic_shapes(model, call, axes), names)


def _openable(trials: Trials, name: str, group: tuple[Axis, ...]) -> CallArguments:
    """The inputs, with 2 for a size of 1 in `group`, whose sizes the model takes otherwise too."""
    sizes = sorted({trials.size((axis,)) for axis in group})
    if len(sizes) > 1:
        raise NormswapError(
            f"the size {name!r} is {' and '.join(map(str, sizes))} in the inputs; give sizes that "
            "differ names of their own"
        )
    size = sizes[0]
    if size == 0:
        raise NormswapError(f"the size {name!r} is 0 in the inputs; give an example of 1 or more")
    why = trials.refusal(group, [n for n in (size + 1, 2 * size, size // 2) if n > 1])
    if why:
        raise NormswapError(f"the size {name!r} cannot be left open: {why}; leave it out")
    return trials.resized(group, max(2, size))


def _axes(value: Any, given: Any, place: str) -> Iterator[dict[int, Any]]:
    """For each tensor in `value` the axes that `given` opens."""
    if isinstance(value, torch.Tensor):
        yield _axes_of(value, given, place)
        return
    inside = dict(value) if isinstance(value, Mapping) else {}
    if isinstance(value, (tuple, list)):
        inside = dict(enumerate(value))
        given = dict(enumerate(given)) if isinstance(given, (tuple, list)) else given
    if given is not None and not isinstance(given, Mapping):
        raise NormswapError(f"{place} is {given!r}, where no tensor is; {NAMED}")
    for key in given or {}:
        if key not in inside:
            has = f"there are {', '.join(map(repr, inside))}" if inside else "there is no tensor"
            raise NormswapError(f"{place} names {key!r}, but {has}; {NAMED}")
    for key, each in inside.items():
        yield from _axes(each, (given or {}).get(key), f"{place}[{key!r}]")


def _axes_of(tensor: torch.Tensor, given: Any, place: str) -> dict[int, Any]:
    if isinstance(given, (tuple, list)) and len(given) == tensor.ndim:
        given = dict(enumerate(given))
    if given is not None and not isinstance(given, Mapping):
        raise NormswapError(f"{place} is {given!r}, for a tensor of {tensor.ndim} axes; {NAMED}")
    for axis, dim in (given or {}).items():
        if axis not in range(tensor.ndim) or isinstance(axis, bool):
            raise NormswapError(
                f"{place} names axis {axis!r} of a tensor of {tensor.ndim}; count them from 0"
            )
        known = dim.isidentifier() if isinstance(dim, str) else isinstance(dim, Dim)
        if not known and dim not in _HINTS:
            raise NormswapError(f"{place}[{axis}] is {dim!r}; give a name, or a torch.export.Dim")
    return {axis: dim for axis, dim in (given or {}).items() if dim not in (None, Dim.STATIC)}


def _name(dim: Any) -> str:
    """The name that the user gave; a hint of torch has none."""
    return dim if isinstance(dim, str) else str(dim.__name__) if isinstance(dim, Dim) else ""
