"""A model reference, as a person writes it, to the module and example inputs for it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import alone, generators_kept
from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance
from normswap.core.paths import check_reachable
from normswap.core.shown import LONGEST_NAME, shown
from normswap.source.checkpoint import load_checkpoint
from normswap.source.factory import call_factory, is_factory
from normswap.source.hub import transformers_model
from normswap.source.libraries import BATCH, random
from normswap.source.program import open_program
from normswap.source.source import Source
from normswap.source.zoo import timm_model, torchvision_model

KINDS = (
    "demo:digits, torchvision:NAME, timm:NAME, hf:NAME, package.module:factory, file.py:factory, "
    "a folder that save wrote, or a .pt2"
)
# What an input of integers is made of: zeros are valid indices everywhere.
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
LARGEST_INPUT = 2**32  # bytes
_MOST_DIGITS = 12  # of a size


def resolve(
    reference: str,
    *,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    pretrained: bool = False,
    input_shapes: Sequence[str] = (),
    folder: Callable[[Path], "Source"] | None = None,
) -> Source:
    """Build the model that `reference` names, in the mode in which its factory leaves it.

    Weights drawn at random are the same at every call, and the caller's random state is as before.

    Args:
        checkpoint_key: the entry of `checkpoint` to load; by default the one that fits.
        pretrained: load the weights that torchvision or timm offers.
        input_shapes: such as "1x3x224x224" or "int64:1x128"; they take the place of the source's
            example inputs.
        folder: opens what `save` wrote; without it folders are refused.

    Raises:
        NormswapError: nothing is of this name, it cannot be built, or `checkpoint` does not fit.
    """
    check_reachable(reference)
    given = tuple(parse_input(shape) for shape in input_shapes)
    if pretrained and checkpoint is not None:
        raise NormswapError("pretrained weights and a checkpoint exclude each other; give one")
    if checkpoint_key is not None and checkpoint is None:
        raise NormswapError("a key names an entry of a checkpoint; give that as well")
    with alone(), generators_kept():
        torch.default_generator.manual_seed(0)
        opened = _build(reference, folder, pretrained)
    if checkpoint is not None:
        renamed = load_checkpoint(opened.model, checkpoint, key=checkpoint_key)
        opened = replace(opened, renamed=renamed, weights=f"checkpoint {checkpoint}")
    if given:
        opened = replace(opened, inputs=given if len(given) > 1 else given[0])
    return opened


def parse_input(text: str) -> Tensor:
    """The tensor that "1x3x224x224" or "int64:1x128" asks for: normal numbers, or zeros.

    Raises:
        NormswapError: `text` has another form.
    """
    match = re.fullmatch(r"(?:(\w+):)?(\d+(?:x\d+)*)", text.strip())
    dtype = _DTYPES.get(match[1] or "float32") if match else None
    if match is None or dtype is None:
        raise NormswapError(
            f"the input {text!r} is no shape; write 1x3x224x224, or with a type int64:1x128 "
            f"(types: {', '.join(_DTYPES)})"
        )
    # The number of digits is looked at before they are read: of thousands Python makes no number.
    sizes = match[2].split("x")
    shape = tuple(int(size) for size in sizes if len(size) <= _MOST_DIGITS)
    if len(shape) < len(sizes) or prod(shape) * dtype.itemsize > LARGEST_INPUT:
        raise NormswapError(
            f"the input {shown(text, LONGEST_NAME)!r} would take more than "
            f"{LARGEST_INPUT >> 30} GiB; an example may be small, such as 1x3x224x224"
        )
    if 0 in shape:
        raise NormswapError(f"the input {text!r} holds nothing; write sizes of 1 and more")
    allowance = Allowance.of(f"the input {text!r}", 0)
    allowance.check(prod(shape) * max(dtype.itemsize, 4), "random numbers are drawn as float32")
    if dtype is torch.uint8:  # the pixels of an image
        return (random(*shape).sigmoid() * 255).to(dtype)
    return random(*shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _build(reference: str, folder: Callable[[Path], Source] | None, pretrained: bool) -> Source:
    scheme, _, name = reference.partition(":")
    if scheme in _LIBRARIES and name:
        return _LIBRARIES[scheme](reference, name, pretrained=pretrained)
    if scheme == "hf" and name:
        return transformers_model(reference, name)
    if pretrained:
        raise NormswapError(
            f"pretrained weights are those of torchvision:NAME and timm:NAME, and {reference!r} "
            "has its own; leave --pretrained out"
        )
    if scheme == "demo" and name:
        return Source(reference, *_demo(name))
    path = Path(reference)
    if reference and folder is not None and path.is_dir():
        return folder(path)
    if path.suffix == ".pt2":
        return Source(reference, *_program(path))
    if path.suffix == ".onnx":
        raise NormswapError(
            f"{reference!r} is an ONNX file, which compare and validate (first FILE, then MODEL) "
            f"read and nothing rewrites; name the model that it was exported from ({KINDS}), "
            "and export that again"
        )
    if is_factory(reference):
        return Source(reference, *_made(reference))
    hint = _libraries(reference) or f"; a model is {KINDS}"
    raise NormswapError(f"unknown model {reference!r}{hint}")


def _libraries(reference: str) -> str:
    """Where a bare name may be meant to come from."""
    if not reference.isidentifier():
        return ""
    return f"; did you mean torchvision:{reference} or timm:{reference}?"


def _hint(scheme: str) -> str:
    close = get_close_matches(scheme, _SCHEMES, n=1)
    return f"; did you mean {close[0]}:NAME?" if close else ""


def _demo(name: str) -> tuple[nn.Module, Any]:
    from normswap.demo.digits import digits

    if name != "digits":
        raise NormswapError(f"there is no demo model {name!r}; did you mean demo:digits?")
    return digits(), random(BATCH, 1, 8, 8)


def _program(path: Path) -> tuple[nn.Module, Any]:
    model, example = open_program(path)
    args, kwargs = example or ((), {})
    if bool(args) == bool(kwargs):  # inputs are positional or keywords, never both
        return model, None
    return model, args or kwargs


def _made(reference: str) -> tuple[nn.Module, Any]:
    try:
        made = call_factory(reference)
    except NormswapError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):  # "torchvison:resnet18"
            raise NormswapError(f"{error}{_hint(reference.partition(':')[0])}") from error
        raise
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise NormswapError(
            f"{reference!r} returned {type(model).__name__}; "
            "return a torch.nn.Module, or (module, inputs)"
        )
    return model, inputs


_LIBRARIES = {"torchvision": torchvision_model, "timm": timm_model}
_SCHEMES = ("demo", *_LIBRARIES, "hf")
