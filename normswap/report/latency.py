"""The time of a call in eval mode: of models side by side, and the share of it in normalizations.

torch's timer waits for an accelerator, whose work is only queued when a call returns.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils.benchmark import timer

from normswap.core.calls import cloned
from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating
from normswap.report.onnx_model import OnnxModel

RUNS, PASSES = 15, 20  # at most, of each model that is compared, and of one that is looked at
FEWEST = 3  # of each that is compared: fewer have no spread
SECONDS = 2.0  # for the runs together


class Latency(BaseModel):
    """The time of one call in eval mode.

    Attributes:
        model: which one of those that the report compares.
        runtime: what ran it.
        milliseconds: the median of the runs.
        lower, upper: the quartiles, between which half of the runs are.
        runs: how many there were.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    runtime: str
    milliseconds: float
    lower: float
    upper: float
    runs: int


def latencies(models: dict[str, nn.Module], inputs: Any) -> tuple[Latency, ...]:
    """The time that each of `models` takes for `inputs`, after one call that is not counted.

    Modules of torch take turns, so that what else the machine does concerns all of them alike; a
    file in ONNX Runtime runs by itself, since its waiting threads would slow torch down. There are
    15 runs, or as many as two seconds allow, but at least 3.
    """
    taken: dict[str, list[float]] = {}
    files = [name for name, model in models.items() if isinstance(model, OnnxModel)]
    turns = [[name for name in models if name not in files], *([name] for name in files)]
    with evaluating(*models.values(), contents=False):
        for names in turns:
            first = sum(_timed(models[name], inputs)[0] for name in names)
            for _ in range(max(FEWEST, min(RUNS, int(SECONDS / max(first, 1e-9))))):
                for name in names:
                    taken.setdefault(name, []).append(_timed(models[name], inputs)[0])
    return tuple(
        _summed_up(name, "ONNX Runtime" if name in files else "torch, eager", taken[name])
        for name in models
    )


def _summed_up(model: str, runtime: str, seconds: list[float]) -> Latency:
    lower, middle, upper = (1000 * each for each in quantiles(seconds, n=4, method="inclusive"))
    return Latency(
        model=model,
        runtime=runtime,
        milliseconds=middle,
        lower=lower,
        upper=upper,
        runs=len(seconds),
    )


def _timed(model: nn.Module, inputs: Any) -> tuple[float, Any]:
    """The seconds that one call takes, and what it returns."""
    args, kwargs = cloned(as_call(inputs))
    device = _device(model)
    accelerator = None if device.type in ("cpu", "meta") else device.index
    with torch.accelerator.device_index(accelerator):  # the one that the timer waits for
        started = timer()
        output = model(*args, **kwargs)
        return timer() - started, output


def _device(model: nn.Module) -> torch.device:
    return next((each.device for each in model.parameters()), torch.device("cpu"))


@dataclass(frozen=True)
class Cost:
    """Of a forward pass in eager mode, without gradients.

    Attributes:
        seconds: of the whole.
        share: that the normalizations take, from 0 to 1, with what their modules do besides.
        device: where.
        output: what the model returned.
    """

    seconds: float
    share: float
    device: str
    output: Any


def cost_of(model: nn.Module, inputs: Any, sites: Iterable[str]) -> Cost:
    """Time `model` on `inputs` for about two seconds; functional `sites` are not seen.

    The model is as before.
    """
    modules = dict(model.named_modules())
    watch = _Watch()
    with evaluating(model, contents=False):
        for name in sites:
            if name in modules:
                modules[name].register_forward_pre_hook(watch.enter, prepend=True)
                modules[name].register_forward_hook(watch.leave, always_call=True)
        passes: list[tuple[float, float]] = []
        began = timer()
        while len(passes) < PASSES and (not passes or timer() - began < SECONDS):
            watch.inside = 0.0
            seconds, output = _timed(model, inputs)
            passes.append((seconds, watch.inside))
    warm = passes[1:] or passes
    seconds = median(whole for whole, _ in warm)
    share = median(inside / whole for whole, inside in warm)
    return Cost(seconds, share, _device(model).type, output)


class _Watch:
    """Adds up the time spent inside modules, once where one is inside another."""

    def __init__(self) -> None:
        self.depth, self.inside, self.started = 0, 0.0, 0.0

    def enter(self, *_: Any) -> None:
        if not self.depth:
            self.started = timer()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.inside += timer() - self.started
