"""Train a model in one process or in several, and hand it back as it came, but for its values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from normswap.core.compat import AnyBatchNorm
from normswap.core.errors import NormswapError
from normswap.core.interrupts import StopRequested
from normswap.core.modes import flags_kept
from normswap.fit import checkpoints
from normswap.fit.distill import BlewUp
from normswap.fit.held_back import Judge
from normswap.fit.processes import Processes
from normswap.fit.schedules import Rate
from normswap.fit.stream import Stream
from normswap.fit.training import Settings, Training
from normswap.graph.copies import copied
from normswap.graph.norm_modules import statistics
from normswap.graph.snapshot import Snapshot
from normswap.norms.batch.plain import BatchNorm

_PLAIN = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNorm}


def learn(
    model: nn.Module,
    objective: Callable[[nn.Module], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rate: Rate,
    stream: Stream,
    settings: Settings,
    processes: Processes,
    *,
    title: str,
    about: dict[str, Any],
    sync_batch_norm: bool = False,
    judged: Callable[[nn.Module], Judge] | None = None,
) -> Judge | None:
    """Train the parameters of `model`, in place, each process on a `stream` of its own.

    What several processes wrap or shard is a copy: what is left of that would be left in the model.

    Args:
        objective: makes of the model a module that gives a batch's loss and how many are right.
        optimizer: makes the optimizer of the model's parameters.
        about: what a checkpoint to resume from must agree on, beside `settings`.
        judged: makes of that module, as it is trained, what judges it; the model has its best
            weights at the end, and not its last.

    Returns:
        What judged it.

    Raises:
        KeyboardInterrupt, NormswapError: as `Training.go`; the model has the last good weights.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise NormswapError("no parameter of the model requires a gradient, so none can be trained")
    alone = processes.count == 1
    worker = model if alone else copied(model).to(processes.device)
    if processes.sharded and settings.precision == "float16":
        raise NormswapError("float16 does not work with FSDP here; use bfloat16")
    if sync_batch_norm and not alone:
        _synchronize(worker)
    with flags_kept(worker), gradients_kept(model):
        wrapped, stepping = processes.prepare(objective(worker), optimizer(worker))
        judge = None if judged is None else judged(wrapped)
        training = Training(
            wrapped, worker, stepping, rate, stream, settings, processes, about, judge
        )
        try:
            training.go(title)
        finally:
            # A process that failed alone is not to wait for the shards of the others.
            if not alone and (training.agreed or not processes.sharded):
                trained = checkpoints.whole(checkpoints.model_tensors(worker))
                for name, tensor in checkpoints.model_tensors(model).items():
                    checkpoints.assign(tensor, trained[name])
    return judge


@contextmanager
def unless_it_fails(model: nn.Module) -> Iterator[None]:
    """If the body fails, `model` is as before: its weights, buffers, flags and all it holds.

    Not so where the training itself blew up, or was stopped between two steps: it then has weights
    that are worth keeping, which is what `learn` says of it. The copy of the weights is on the CPU.
    """
    structure = Snapshot(model, contents=True)
    weights = [(each, each.detach().to("cpu", copy=True)) for each in model.parameters()]
    try:
        yield
    except (BlewUp, StopRequested):
        raise
    except BaseException:
        structure.restore()
        with torch.no_grad():
            for parameter, before in weights:
                parameter.copy_(before)
        raise


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter has a gradient; after it each has the one it had."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _synchronize(model: nn.Module) -> None:
    """Make the BatchNorms of `model` that compute statistics torch's SyncBatchNorm, in place.

    Raises:
        NormswapError: the model is on the CPU, or one is of a class that has no such form.
    """
    computing = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, AnyBatchNorm) and statistics(module, "batch") != "frozen"
    }
    if computing and next(model.parameters()).device.type == "cpu":
        raise NormswapError(
            "sync_batch_norm is torch's SyncBatchNorm, which needs GPUs; leave it out, or freeze "
            "the statistics"
        )
    for path, module in computing.items():
        if type(module) not in _PLAIN:
            raise NormswapError(
                f"{path!r} is a {type(module).__name__}, of which torch has no synchronized form; "
                "leave sync_batch_norm out"
            )
        module.__class__ = nn.SyncBatchNorm
        module.process_group = None  # type: ignore[assignment]
