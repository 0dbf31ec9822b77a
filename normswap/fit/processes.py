"""Several processes, by accelerate: its DDP or FSDP2, as accelerate launch or torchrun asked.

With one process nothing here does anything, and accelerate is not needed.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from normswap.errors import NormswapError
from normswap.fit.ranks import ranks
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

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as the launch asked: wrapped for DDP, or sharded."""
        if self._accelerator is None:
            return objective, optimizer
        wrapped, prepared = self._accelerator.prepare(objective, optimizer)
        return wrapped, prepared.optimizer

    @contextmanager
    def synchronizing(self, objective: nn.Module, now: bool) -> Iterator[None]:
        """Inside, a backward pass sends its gradients to the others, unless not `now`."""
        accelerator = self._accelerator
        with nullcontext() if accelerator is None or now else accelerator.no_sync(objective):
            yield

    def warn(self, model: nn.Module, sizes: list[int]) -> None:
        """Warn of batches that statistics or speed suffer from; `sizes` has one per process."""
        if len(set(sizes)) > 1:
            told = ", ".join(map(str, sizes))
            warnings.warn(
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
            warnings.warn(
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
    return Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
