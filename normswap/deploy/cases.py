"""The inputs on which a file is validated beside the given ones: other values, other sizes."""

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance
from normswap.deploy.diverge import CallArguments
from normswap.deploy.reference_run import tensors
from normswap.deploy.sizes.trials import resize

DTYPES = {
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
BLANK = 2.1  # a white pixel, in the scale of networks for ImageNet
SCALES = {"large": 1e4, "tiny": 1e-20, "denormal": 1e-40}  # of the given values
_MULTIPLE = 32  # what networks reduce height and width by, at most


class CaseInputs(NamedTuple):
    """A case to validate.

    Attributes:
        ways: the same in several ways; the first that the model takes is used.
        required: that the model takes one of them. It may take fewer sizes than the file declares.
        extreme: of values that the model may not have been made for. Where its own outputs are not
            finite, nothing is compared, and where they hang on the last digit of the inputs, no
            more digits than that leaves.
    """

    name: str
    ways: list[CallArguments]
    required: bool = False
    extreme: bool = False


def draw(entry: Any) -> torch.Tensor:
    """A random input of the declared shape, two samples where the batch is dynamic."""
    dtype = DTYPES.get(entry.type)
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


def other_sizes(given: CallArguments, declared: Any) -> Iterator[CaseInputs]:
    """Random inputs of larger and of smaller sizes, where the file leaves sizes open."""
    shapes = [tuple(tensor.shape) for tensor in tensors(given)]
    symbols = [
        {axis: n or (i, axis) for axis, n in enumerate(entry.shape) if not isinstance(n, int)}
        for i, entry in enumerate(declared)
    ]
    opened = {
        name: shape[axis]
        for names, shape in zip(symbols, shapes, strict=True)
        for axis, name in names.items()
    }

    def resized(sizes: dict[Any, int]) -> CallArguments:
        return redraw(
            given,
            [
                tuple(sizes.get(names.get(axis), size) for axis, size in enumerate(shape))
                for names, shape in zip(symbols, shapes, strict=True)
            ],
        )

    batches = {name: n for name, n in opened.items() if str(name).startswith("batch")}
    if not batches:  # a file of another exporter, or names of the user's own
        batches = {
            name: opened[name] for names in symbols for axis, name in names.items() if not axis
        }
    if batches:
        size = next(iter(batches.values()))
        more = [1, -1] if size > 1 else [1]
        for by in more:
            sizes = {name: max(1, n + by) for name, n in batches.items()}
            yield CaseInputs(f"batch of {size + by}", [resized(sizes)], required=by == more[0])
    others = {name: n for name, n in opened.items() if name not in batches}
    if others:
        # By different numbers, so that no two sizes can be taken for each other.
        apart = {name: n + _MULTIPLE * i for i, (name, n) in enumerate(others.items(), start=1)}
        alike = [{name: n + by for name, n in others.items()} for by in (_MULTIPLE, 1)]
        yield CaseInputs("larger", [resized(sizes) for sizes in (apart, *alike)])
        smaller = [{name: max(1, n // 2) for name, n in others.items()}]
        smaller.append({name: max(1, n - 1) for name, n in others.items()})
        yield CaseInputs("smaller", [resized(sizes) for sizes in smaller if sizes != others])


def extremes(given: CallArguments) -> Iterator[CaseInputs]:
    """Inputs of the given shapes whose floats are all one number, large, tiny or denormal."""
    if not any(t.dtype in (torch.float32, torch.float64) for t in tensors(given)):
        return
    yield CaseInputs(
        "constant", [_floats(given, lambda t: torch.full_like(t, BLANK))], extreme=True
    )
    for name, factor in SCALES.items():
        yield CaseInputs(name, [_floats(given, partial(torch.mul, other=factor))], extreme=True)


def nearby(call: CallArguments) -> CallArguments:
    """`call` with about half of its floats one rounding larger."""

    def rounded(t: torch.Tensor) -> torch.Tensor:
        return t * (1 + torch.finfo(t.dtype).eps * torch.randint_like(t, 2))

    return _floats(call, rounded)


def _floats(call: CallArguments, change: Callable[[torch.Tensor], torch.Tensor]) -> CallArguments:
    changed: CallArguments = pytree.tree_map_only(
        torch.Tensor, lambda t: change(t) if t.is_floating_point() else t, call
    )
    return changed


def redraw(call: CallArguments, shapes: list[tuple[int, ...]]) -> CallArguments:
    """`call` with its tensors in these shapes, and floats drawn anew.

    Integers are those of `call`: what they mean (a length, an index, a class) says which fit.
    """

    return _floats(resize(call, shapes), torch.randn_like)
