"""What a model costs: the time of a call, and its size."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.core.journal import located
from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating
from normswap.report.onnx_model import OnnxModel

RUNS = 15
SECONDS = 2.0  # for the runs of models that are compared, together


class Latency(BaseModel):
    """The time of one call in eval mode.

    Attributes:
        model: which one of those that the report compares.
        runtime: what ran it.
        milliseconds: the median of the runs.
        runs: how many there were.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    runtime: str
    milliseconds: float
    runs: int


class Size(BaseModel):
    """How large a model is.

    Attributes:
        model: which one of those that the report compares.
        parameters: trainable or not; a tensor used twice counts once.
        bytes: of parameters and buffers in memory, or of an ONNX file with its external data.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    parameters: int | None
    bytes: int


def latencies(models: dict[str, nn.Module], inputs: Any) -> tuple[Latency, ...]:
    """The time that each of `models` takes for `inputs`, after one call that is not counted.

    Modules of torch take turns, so that what else the machine does concerns all of them alike; a
    file in ONNX Runtime runs by itself, since its waiting threads would slow torch down. There are
    15 runs, or as many as two seconds allow.
    """
    taken: dict[str, list[float]] = {}
    files = [name for name, model in models.items() if isinstance(model, OnnxModel)]
    turns = [[name for name in models if name not in files], *([name] for name in files)]
    with evaluating(*models.values(), contents=False):
        for names in turns:
            timed = {name: _timer(models[name], inputs) for name in names}
            first = sum(run() for run in timed.values())
            for _ in range(max(1, min(RUNS, int(SECONDS / max(first, 1e-9))))):
                for name, run in timed.items():
                    taken.setdefault(name, []).append(run())
    return tuple(
        Latency(
            model=name,
            runtime="ONNX Runtime" if name in files else "torch, eager",
            milliseconds=1000 * statistics.median(taken[name]),
            runs=len(taken[name]),
        )
        for name in models
    )


def _timer(model: nn.Module, inputs: Any) -> Callable[[], float]:
    def seconds() -> float:
        # A model may write into its inputs.
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
        started = time.perf_counter()
        model(*args, **kwargs)
        return time.perf_counter() - started

    return seconds


def size_of(name: str, model: nn.Module) -> Size:
    """The size of `model`, called `name`."""
    if isinstance(model, OnnxModel):
        return Size(model=name, parameters=None, bytes=_bytes_on_disk(model.path))
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Size(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
    )


def _bytes_on_disk(path: Path) -> int:
    data = path.with_name(path.name + ".data")  # where torch's exporter puts large weights
    return sum(file.stat().st_size for file in map(located, (path, data)) if file.is_file())


def environment() -> dict[str, str]:
    """What figures of this process depend on: versions, and how many threads compute."""
    import platform

    import onnxruntime

    import normswap

    return {
        "normswap": normswap.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ONNX Runtime": onnxruntime.__version__,
        "processor": platform.machine(),
        "threads of torch": str(torch.get_num_threads()),
    }
