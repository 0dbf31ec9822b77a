"""Weights from a file, without running anything that the file holds.

Two formats: safetensors, and what `torch.save` wrote, the latter under `weights_only=True` alone,
where the unpickler builds tensors and containers and refuses every other global.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from normswap.core.ambient import warnings_ignored
from normswap.core.atomic import of_one_file
from normswap.core.errors import NormswapError, first_line
from normswap.core.memory import Allowance
from normswap.source.archive import check_saved
from normswap.source.naming import StateDict, renamed, state_dicts

_COUNT = "num_batches_tracked"
_MOST_CANDIDATES = 64  # of the entries of a file; each is compared with the whole model


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU.

    It may be an entry of the file, at any name: the largest is read, and of several the first that
    holds averages of the weights. "module." is dropped where every name starts with it
    (DataParallel and DistributedDataParallel put it there).

    Raises:
        NormswapError: there is no such file, it is damaged, or it holds more than tensors.
    """
    found = max(_state_dicts(path), key=lambda each: (len(each.tensors), each.averaged)).tensors
    _check_plain(path, found)
    wrapped = all(name.startswith("module.") for name in found)
    return {name.removeprefix("module.") if wrapped else name: v for name, v in found.items()}


def load_checkpoint(model: nn.Module, path: Path) -> str:
    """Load the weights in `path` into `model`, in place; every name and shape must agree.

    They agree also after a wrapper or prefix is taken off (`normswap.source.naming`). Where several
    entries of the file fit, that which says that it holds averages of the weights is taken, for
    these are what one evaluates, and otherwise the first. `num_batches_tracked` alone may be
    absent, as torch allows: BatchNorm before 0.4.1 had none.

    Returns:
        What was done to make the names fit; "" where they did.

    Raises:
        NormswapError: as `read_checkpoint`, or a name or shape differs; `model` is then unchanged.
    """
    wanted = model.state_dict()
    candidates = _large_enough(_state_dicts(path), wanted)
    if len(candidates) > _MOST_CANDIDATES:
        raise NormswapError(
            f"checkpoint {str(path)!r} holds {len(candidates):,} state dicts; "
            "save the one that is meant to a file of its own"
        )
    for each in candidates:
        _check_plain(path, each.tensors)
    fits = [_Fit.of(each, wanted) for each in candidates]
    fewest = min(fit.problems for fit in fits)
    fitting = [fit for fit in fits if fit.problems == fewest]
    chosen = max(fitting, key=lambda fit: fit.saved.averaged)  # the first of them
    if fewest:
        raise NormswapError(
            f"checkpoint {str(path)!r} does not fit the model: {chosen.differences}; "
            "pass the checkpoint of this architecture"
        )
    # Names and shapes are today's, so today's layout version is right; without it some modules
    # (torchvision's MNASNet) refuse to load.
    state = OrderedDict(chosen.state)
    state._metadata = getattr(wanted, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)
    others = [repr(fit.saved.entry) for fit in fitting if fit is not chosen]
    also = f", not {', '.join(others)}, which would fit as well" if others else ""
    entry = f"takes {chosen.saved.entry!r}{also}" if chosen.saved.entry else ""
    return ", ".join(filter(None, (entry, chosen.done)))


@dataclass(frozen=True)
class _Fit:
    """How a state dict of the file fits the model.

    Attributes:
        state: it, by the names of the model.
        done: what was done to the names.
        problems: how many names and shapes differ.
        differences: which.
    """

    saved: StateDict
    state: Mapping[str, Tensor]
    done: str
    problems: int
    differences: str

    @classmethod
    def of(cls, saved: StateDict, wanted: Mapping[str, Tensor]) -> "_Fit":
        names, done = renamed(saved.tensors, wanted)
        state = {names[name]: value for name, value in saved.tensors.items()}
        for name, value in wanted.items():
            if name.endswith(_COUNT):
                state.setdefault(name, torch.zeros_like(value))
        found = _differences(state, wanted)
        told = [f"{len(n)} {what}: {_some(n)}" for what, n in found.items() if n]
        return cls(saved, state, done, sum(map(len, found.values())), "; ".join(told))


def _large_enough(found: list[StateDict], wanted: Mapping[str, Tensor]) -> list[StateDict]:
    """Those that can fit; the largest where none can. An optimizer's has one for each weight."""
    needed = sum(not name.endswith(_COUNT) for name in wanted)
    largest = max(len(each.tensors) for each in found)
    return [each for each in found if len(each.tensors) >= min(needed, largest)]


def _state_dicts(path: Path) -> list[StateDict]:
    content = _read(path)
    found = list(state_dicts(content))
    if found:
        # A tensor may claim any size, all of its elements lying in one place.
        held = {id(value): value for each in found for value in each.tensors.values()}
        allowance = Allowance.of_file(path, f"checkpoint {str(path)!r}")
        size = sum(each.numel() * each.element_size() for each in held.values() if _is_plain(each))
        allowance.check(size, "its tensors")
        return found
    if not isinstance(content, Mapping) or not content:
        raise NormswapError(
            f"checkpoint {str(path)!r} holds no state dict; save one with "
            "torch.save(model.state_dict(), path)"
        )
    name, value = next(
        (name, value)
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    )
    raise NormswapError(
        f"checkpoint {str(path)!r} is not a state dict: entry {name!r} is of type "
        f"{type(value).__name__}; save one with torch.save(model.state_dict(), path)"
    )


def _check_plain(path: Path, state: Mapping[str, Tensor]) -> None:
    for name, value in state.items():
        if not _is_plain(value):
            raise NormswapError(
                f"checkpoint {str(path)!r} holds {name!r} without its numbers, or in a form that "
                "no layer takes (meta, sparse, quantized, nested); save a plain tensor"
            )


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    return {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} ({_shape(found[name])}, the model has {_shape(value)})"
            for name, value in wanted.items()
            if name in found and not _same_shape(found[name], value)
        ],
        "complex, not so in the model": [
            name
            for name, value in wanted.items()
            if name in found and found[name].is_complex() and not value.is_complex()
        ],
    }


def _read(path: Path) -> Any:
    return of_one_file(path, _content)


def _content(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(0, "it is no file but a pipe or a device")  # which may never end
        with path.open("rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:  # the latter for a path with a NUL in it
        reason = getattr(error, "strerror", None) or first_line(error)
        raise NormswapError(
            f"cannot read checkpoint {str(path)!r}: {reason}; check the path"
        ) from error
    allowance = Allowance.of_file(path, f"checkpoint {str(path)!r}")
    try:
        # A safetensors file is the header's length in eight bytes, then the header, which is JSON.
        if head[8:] == b"{" or path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            check_saved(file, allowance.name, allowance)
        with warnings_ignored():  # on pickle protocols; what comes of them is told below
            return torch.load(path, map_location="cpu", weights_only=True)
    except NormswapError:
        raise
    except Exception as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden:
            raise NormswapError(
                f"checkpoint {str(path)!r} holds more than tensors (loading it would run "
                f"{forbidden[1]}), nothing was run; save model.state_dict() instead"
            ) from error
        raise NormswapError(
            f"checkpoint {str(path)!r} is damaged, or neither safetensors nor a state dict "
            f"that torch.save wrote ({type(error).__name__}); save or download it again"
        ) from error


def _is_plain(value: Tensor) -> bool:
    dense = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    return dense and value.device.type == "cpu"


def _same_shape(found: Tensor, wanted: Tensor) -> bool:
    return nn.parameter.is_lazy(wanted) or found.shape == wanted.shape


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
