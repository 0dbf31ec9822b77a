"""The inputs that an ONNX file is checked with: given or random, and of other sizes."""

from math import prod
from typing import Any

import torch
from torch.utils import _pytree

from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance
from normswap.deploy.diverge import Call
from normswap.deploy.reference import tensors

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
LARGER, LARGER_BY = "larger", 32  # a multiple of what networks reduce height and width by


def draw(entry: Any) -> torch.Tensor:
    """A random input of the declared shape, two samples where the batch is dynamic."""
    dtype = _DTYPES.get(entry.type)
    shape = [2 if i == 0 and not isinstance(n, int) else n for i, n in enumerate(entry.shape)]
    fixed = all(isinstance(n, int) for n in shape)
    most = Allowance.of(entry.name, 0).limit  # a file may declare an input of any size
    if (
        dtype is None
        or not (fixed and dtype.is_floating_point)
        or prod(shape) * dtype.itemsize > most
    ):
        raise NormswapError(
            f"no values can be guessed for input {entry.name!r} ({entry.type} "
            f"{list(entry.shape)}); give inputs"
        )
    return torch.randn(shape, dtype=dtype)


def random_cases(given: Call, declared: Any) -> dict[str, Call]:
    """Random inputs of other sizes, where the file leaves sizes open."""
    shapes = [tuple(tensor.shape) for tensor in tensors(given)]
    opened = {
        (entry.shape[axis], axis == 0): shape[axis]
        for entry, shape in zip(declared, shapes, strict=True)
        for axis in range(len(shape))
        if not isinstance(entry.shape[axis], int)
    }

    def resized(batch: bool, by: int) -> Call:
        return redraw(
            given,
            [
                tuple(
                    size + by
                    if (entry.shape[axis], axis == 0) in opened and (axis == 0) == batch
                    else size
                    for axis, size in enumerate(shape)
                )
                for entry, shape in zip(declared, shapes, strict=True)
            ],
        )

    cases = {}
    batches = [size for (_, batch), size in opened.items() if batch]
    if batches:
        cases[f"batch of {batches[0] + 1}"] = resized(True, 1)
    if len(batches) < len(opened):
        cases[LARGER] = resized(False, LARGER_BY)
    return cases


def redraw(call: Call, shapes: list[tuple[int, ...]]) -> Call:
    """`call` with its tensors in these shapes, and floats drawn anew.

    Integers are those of `call`: what they mean (a length, an index, a class) says which fit.
    """

    def drawn(given: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(given) if given.is_floating_point() else given

    redrawn: Call = _pytree.tree_map_only(torch.Tensor, drawn, resize(call, shapes))
    return redrawn


def resize(call: Call, shapes: list[tuple[int, ...]]) -> Call:
    """`call` with its tensors in these shapes: cut, or the last along an axis repeated."""
    waiting = iter(shapes)

    def resized(given: torch.Tensor) -> torch.Tensor:
        shape = next(waiting)
        if not given.numel():
            return given.new_zeros(shape)
        for axis, size in enumerate(shape):
            if size != given.shape[axis]:
                index = torch.arange(size).clamp(max=given.shape[axis] - 1)
                given = given.index_select(axis, index)
        return given

    changed: Call = _pytree.tree_map_only(torch.Tensor, resized, call)
    return changed


def check_fit(call: Call, declared: Any) -> None:
    """Refuse inputs that the file does not declare so."""
    given = tensors(call)
    if len(given) != len(declared):
        names = ", ".join(entry.name for entry in declared)
        raise NormswapError(
            f"the file takes {len(declared)} inputs ({names}), {len(given)} are given; give "
            "those it was exported with"
        )
    for tensor, entry in zip(given, declared, strict=True):
        fits = len(tensor.shape) == len(entry.shape) and all(
            not isinstance(want, int) or have == want
            for have, want in zip(tensor.shape, entry.shape, strict=True)
        )
        if not fits or _DTYPES.get(entry.type) != tensor.dtype:
            raise NormswapError(
                f"input {entry.name!r} of the file is {entry.type} {list(entry.shape)}, the given "
                f"one is {tensor.dtype} {list(tensor.shape)}; give one that fits"
            )
