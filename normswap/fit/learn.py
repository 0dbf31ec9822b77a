"""Train a model in one process or in several, and hand it back as it came, but for its values."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normswap.errors import NormswapError
from normswap.fit import checkpoints
from normswap.fit.processes import Processes
from normswap.fit.rates import Rate
from normswap.fit.training import Settings, Training
from normswap.graph.copies import copied
from normswap.graph.snapshot import flags_kept


def learn(
    model: nn.Module,
    objective: Callable[[nn.Module], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rate: Rate,
    data: Iterable[Any],
    settings: Settings,
    processes: Processes,
    *,
    title: str,
    about: dict[str, Any],
    sync_batch_norm: bool = False,
) -> None:
    """Train the parameters of `model`, in place, each process on its own `data`.

    What several processes wrap or shard is a copy: what is left of that would be left in the model.

    Args:
        objective: makes of the model a module that gives a batch's loss and how many are right.
        optimizer: makes the optimizer of the model's parameters.
        about: what a checkpoint to resume from must agree on, beside `settings`.

    Raises:
        KeyboardInterrupt, NormswapError: as `Training.go`; the model has the last good weights.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NormswapError("no parameter of the model requires a gradient, so none can be trained")
    alone = processes.count == 1
    worker = model if alone else copied(model).to(processes.device)
    with ExitStack() as kept:
        kept.enter_context(flags_kept(worker))
        if sync_batch_norm and not alone:
            kept.enter_context(_synchronized(worker))
        wrapped, stepping = processes.prepare(objective(worker), optimizer(worker))
        training = Training(wrapped, worker, stepping, rate, data, settings, processes, about)
        try:
            training.go(title)
        finally:
            model.zero_grad(set_to_none=True)
            if not alone:
                trained = checkpoints.whole(checkpoints.model_tensors(worker))
                for name, tensor in checkpoints.model_tensors(model).items():
                    checkpoints.assign(tensor, trained[name])


@contextmanager
def _synchronized(model: nn.Module) -> Iterator[None]:
    """Inside, the BatchNorms of `model` are torch's SyncBatchNorm; their tensors are the same."""
    before = {module: dict(module.named_children()) for module in model.modules()}
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for module, children in before.items():
            for name, child in children.items():
                setattr(module, name, child)
