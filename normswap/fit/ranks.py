"""Several processes of torch.distributed, as accelerate and torchrun start them; or one, alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from normswap.core.errors import NormswapError, first_line

_T = TypeVar("_T")


def ranks() -> int:
    """How many processes there are; 1 where torch.distributed was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank_of_this() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that shows and writes for all."""
    return rank_of_this() == 0


def gathered(value: Tensor) -> list[Tensor]:
    """`value` of every process, in order of rank; all have the same shape. It is on the CPU.

    Raises:
        NormswapError: another process is no more.
    """
    if ranks() == 1:
        return [value]
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    own = value.to(device)
    every = [torch.empty_like(own) for _ in range(ranks())]
    try:
        dist.all_gather(every, own)
    except RuntimeError as error:
        raise NormswapError(
            f"another of the {ranks()} processes was interrupted or has ended "
            f"({first_line(error)}); see what it said, and start all of them again"
        ) from error
    return [each.cpu() for each in every]


def largest(value: float) -> float:
    """The largest `value` of all processes, so that they decide alike."""
    return max(float(each) for each in gathered(torch.tensor(value, dtype=torch.float64)))


def of_the_first(value: _T) -> _T:
    """`value` of the first process, pickled to the others, so that all go on alike."""
    if ranks() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


@contextmanager
def together() -> Iterator[None]:
    """What fails inside in one process fails in all, so that none of them waits for it for ever.

    The body may not communicate itself.

    Raises:
        NormswapError: another process failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    failed = [bool(each) for each in gathered(torch.tensor(float(problem is not None)))]
    if problem is not None:
        raise problem
    if any(failed):
        raise NormswapError(f"process {failed.index(True)} failed; its message says why")


def gathered_parts(parts: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each process its `parts`, sent as one tensor; they have the same shapes everywhere."""
    sizes = [part.numel() for part in parts]
    return [
        [flat.view(part.shape) for flat, part in zip(torch.split(each, sizes), parts, strict=True)]
        for each in gathered(torch.cat([part.flatten() for part in parts]))
    ]
