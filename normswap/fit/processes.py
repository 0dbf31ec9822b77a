"""Several processes, by accelerate: its DDP or FSDP2, as accelerate launch or torchrun asked.

With one process nothing here does anything, and accelerate is not needed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from normswap.core.errors import NormswapError, warn
from normswap.fit import checkpoints
from normswap.fit.ranks import is_first, ranks
from normswap.graph.norm_modules import norm_kind, statistics

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

    def reshard(self, objective: nn.Module) -> None:
        """Shard what a forward pass left whole for a backward pass that did not come."""
        if self.sharded:
            from torch.distributed.fsdp import FSDPModule

            for module in objective.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

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
