"""A training run written down: one safetensors file that is whole or absent.

It holds the model, the optimizer and, for each process, the random numbers and the place in the
data. The numbers about the run are JSON in its metadata. Nothing is pickled.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from json import dumps
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from normswap.core.atomic import of_one_file, replacing, staged
from normswap.core.errors import NormswapError
from normswap.core.journal import located
from normswap.core.memory import Allowance
from normswap.core.paths import check_reachable
from normswap.fit.ranks import gathered_parts

FILE = "training.safetensors"
_KEY = "normswap.training"
Tensors = dict[str, Tensor]


class _About(BaseModel, extra="allow"):
    steps: int


class _Facts(BaseModel):
    about: _About
    step: int
    losses: list[float]
    scaler: dict[str, int | float]
    curve: list[tuple[int, float]] = []


def model_tensors(model: nn.Module) -> Tensors:
    """Every parameter and buffer of `model` by its name, not copied; one that is shared, once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of `optimizer`, by the place of the parameter and the name of the state."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, each in state.items()
        for name, value in each.items()
        if value is not None
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Give `optimizer` the state of `optimizer_tensors`, laid out as its parameters are.

    Raises:
        ValueError, IndexError: it is no state of this optimizer.
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        like = parameter.shape == value.shape
        if not like and value.numel() != 1:
            raise ValueError(f"{key} is of another shape than its parameter")
        optimizer.state[parameter][name] = (
            assign(torch.empty_like(parameter), value.to(parameter.dtype)) if like else value
        )


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> Tensor:
    """Write `value`, whole, into `target`, of which this process may hold a shard."""
    if isinstance(target, DTensor):
        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    return target.copy_(value)


def whole(tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` on the CPU, of sharded ones all shards; every process must call it."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        .detach()
        .cpu()
        .contiguous()
        .clone()
        for name, tensor in tensors.items()
    }


def of_every_rank(tensors: Tensors) -> list[Tensors]:
    """`tensors` of each process, in order of rank; they have the same shapes everywhere."""
    as_bytes = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()]
    return [
        {
            name: part.clone().view(like.dtype).view(like.shape)
            for (name, like), part in zip(tensors.items(), parts, strict=True)
        }
        for parts in gathered_parts(as_bytes)
    ]


def write(folder: Path, parts: Mapping[str, Tensors], facts: Mapping[str, Any]) -> None:
    """Write the tensors of each part, and `facts`, in the place of what was there.

    Raises:
        NormswapError: the folder cannot be written.
    """
    flat = {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
    with replacing(folder / FILE) as scratch:
        save_file(flat, scratch, {_KEY: dumps(facts)})


def remove(folder: Path) -> None:
    """Remove what `write` wrote to `folder`, and the folder if nothing else is in it.

    Raises:
        NormswapError: the folder cannot be written.
    """
    if folder.is_dir():
        with staged(folder, gone=(FILE,)):
            pass
        with suppress(OSError):  # there is more in it
            folder.rmdir()


def facts_in(folder: Path) -> dict[str, Any] | None:
    """The facts that `write` wrote to `folder`, or None where there is no such file.

    Raises:
        NormswapError: the file is damaged, or of something else.
    """
    check_reachable(folder / FILE)
    if not located(folder / FILE).is_file():
        return None
    with _opened(folder / FILE) as (_, facts):
        return facts


def read(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """The parts and facts that `write` wrote to `folder`.

    Raises:
        NormswapError: the file is not there, damaged, or of something else.
    """
    parts: dict[str, Tensors] = {}
    with _opened(folder / FILE) as (file, facts):
        for key in file.keys():  # noqa: SIM118 - it is no dict
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = file.get_tensor(key)
    return parts, facts


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    try:
        opened, allowance = of_one_file(path, _open)
        with opened as file:
            text = (file.metadata() or {})[_KEY]
            allowance.check_json(len(text), "its facts")
            facts = _Facts.model_validate_json(text).model_dump()
            yield file, facts
    except (SafetensorError, OSError, KeyError, ValidationError) as error:
        raise damaged(path) from error


def _open(path: Path) -> tuple[Any, Allowance]:
    if not path.is_file():  # a pipe may never end
        raise FileNotFoundError(path)
    return safe_open(path, framework="pt"), Allowance.of_file(path)


def damaged(path: Path) -> NormswapError:
    """What to say of a checkpoint whose content cannot be used."""
    return NormswapError(
        f"{str(path)!r} is damaged or no checkpoint of normswap; remove it and start again"
    )
