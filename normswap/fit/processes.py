"""Several processes, by accelerate: its DDP or FSDP2, as accelerate launch or torchrun asked.

With one process nothing here does anything, and accelerate is not needed.

Several processes of torch.distributed, as accelerate and torchrun start them; or one, alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normswap.core.errors import NormswapError, first_line, warn
from normswap.fit import checkpoints
from normswap.graph.norm_modules import norm_kind, statistics


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


# Below it BatchNorm's error rises with every halving (Wu & He 2018, arXiv 1803.08494, figure 1).
FEW_SAMPLES = 16


class Processes:
    """The processes that train together, this one among them."""

    def __init__(self) -> None:
        self._accelerator = _accelerator() if _launched() else None
        self.count = 1 if self._accelerator is None else self._accelerator.num_processes
        if self.count != ranks():
            raise NormswapError(
                f"there are {ranks()} processes, but accelerate knows of {self.count}; "
                "start them with accelerate launch or torchrun"
            )

    @property
    def device(self) -> torch.device | None:
        """Where this process computes; None, with one process, where the model is."""
        return None if self._accelerator is None else self._accelerator.device

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of every parameter."""
        return self._accelerator is not None and bool(self._accelerator.is_fsdp2)

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as the launch asked: wrapped for DDP, or sharded."""
        if self._accelerator is None:
            return objective, optimizer
        state = checkpoints.whole(checkpoints.optimizer_tensors(optimizer))
        wrapped, prepared = self._accelerator.prepare(objective, optimizer)
        if self.sharded:  # its parameters are others now, which know nothing of their state
            prepared.optimizer.state.clear()
            checkpoints.load_optimizer(prepared.optimizer, state)
        return wrapped, prepared.optimizer

    @contextmanager
    def synchronizing(self, objective: nn.Module, now: bool) -> Iterator[None]:
        """Inside, a backward pass sends its gradients to the others, unless not `now`."""
        accelerator = self._accelerator
        with nullcontext() if accelerator is None or now else accelerator.no_sync(objective):
            yield

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of the first, as DDP does, but before the next forward."""
        if self.count == 1:
            return
        alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        for buffers in alike.values():
            flat = torch.cat([buffer.flatten() for buffer in buffers])
            dist.broadcast(flat, 0)
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, value in zip(buffers, torch.split(flat, sizes), strict=True):
                buffer.copy_(value.view_as(buffer))

    def warn(self, model: nn.Module, sizes: list[int]) -> None:
        """Warn of batches that statistics or speed suffer from; `sizes` has one per process."""
        if not is_first():
            return
        if len(set(sizes)) > 1:
            told = ", ".join(map(str, sizes))
            warn(
                f"the processes have batches of {told} samples; gradients count every sample the "
                "same, but batch statistics do not, and all wait for the largest: give all as many",
                stacklevel=2,
            )
        computing = [
            path
            for path, module in model.named_modules()
            if (kind := norm_kind(module)) is not None
            and module.training
            and statistics(module, kind) in ("running", "batch")
            and not isinstance(module, nn.SyncBatchNorm)
        ]
        if computing and min(sizes) < FEW_SAMPLES:
            warn(
                f"{len(computing)} normalizations such as {computing[0]!r} compute statistics of "
                f"{min(sizes)} samples, which are too few; freeze them, or with several processes "
                "ask for sync_batch_norm",
                stacklevel=2,
            )


def _launched() -> bool:
    return ranks() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator, DistributedDataParallelKwargs
    except ImportError as error:
        raise NormswapError(
            "several processes need accelerate; pip install 'normswap[train]'"
        ) from error
    # A part of the model that the loss does not reach (an auxiliary head) is no error.
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # torchrun does not say so
        mixed_precision="no",  # `precision` says it, for one process as for many
        kwargs_handlers=[wrapping],
    )
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise NormswapError(f"{kind} is not supported; launch with --fsdp_version 2 or without")
    if kind == "FSDP":
        # Every process has read the weights. (accelerate 1.15 fails here on models with buffers.)
        accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return accelerator
