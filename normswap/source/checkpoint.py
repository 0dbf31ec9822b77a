"""Weights from a file, without running anything that the file holds.

Two formats: safetensors, and what `torch.save` wrote, the latter under `weights_only=True` alone,
where the unpickler builds tensors and containers and refuses every other global.
"""

import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.source.archive import check_saved


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU.

    It may be nested under "state_dict" or "model"; "module." is dropped where every name starts
    with it (DataParallel and DistributedDataParallel put it there).

    Raises:
        NormswapError: there is no such file, it is damaged, or it holds more than tensors.
    """
    state = _read(path)
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise NormswapError(
            f"checkpoint {str(path)!r} holds no state dict; save one with "
            "torch.save(model.state_dict(), path)"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise NormswapError(
                f"checkpoint {str(path)!r} is not a state dict: entry {name!r} is of type "
                f"{type(value).__name__}; save one with torch.save(model.state_dict(), path)"
            )
        if not _is_plain(value):
            raise NormswapError(
                f"checkpoint {str(path)!r} holds {name!r} without its numbers, or in a form that "
                "no layer takes (meta, sparse, quantized, nested); save a plain tensor"
            )
    wrapped = all(name.startswith("module.") for name in state)
    return {name.removeprefix("module.") if wrapped else name: v for name, v in state.items()}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load the weights in `path` into `model`, in place; every name and shape must agree.

    `num_batches_tracked` alone may be absent, as torch allows: BatchNorm before 0.4.1 had none.

    Raises:
        NormswapError: as `read_checkpoint`, or a name or shape differs; `model` is then unchanged.
    """
    found = read_checkpoint(path)
    wanted = model.state_dict()
    if wanted and all(name.startswith("module.") for name in wanted):
        found = {f"module.{name}": value for name, value in found.items()}
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.zeros_like(value))
    differences = {
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
    told = [f"{len(n)} {what}: {_some(n)}" for what, n in differences.items() if n]
    if told:
        raise NormswapError(
            f"checkpoint {str(path)!r} does not fit the model: {'; '.join(told)}; "
            "pass the checkpoint of this architecture"
        )
    # Names and shapes are today's, so today's layout version is right; without it some modules
    # (torchvision's MNASNet) refuse to load.
    state = OrderedDict(found)
    state._metadata = getattr(wanted, "_metadata", None)  # type: ignore[attr-defined]
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise OSError(0, "it is no file but a pipe or a device")  # which may never end
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise NormswapError(
            f"cannot read checkpoint {str(path)!r}: {error.strerror}; check the path"
        ) from error
    try:
        # A safetensors file is the header's length in eight bytes, then the header, which is JSON.
        if head[8:] == b"{" or path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with path.open("rb") as file:
            check_saved(file, f"checkpoint {str(path)!r}")
        with warnings.catch_warnings():  # on pickle protocols; what comes of them is told below
            warnings.simplefilter("ignore")
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
