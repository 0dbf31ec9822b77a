"""The share of a forward pass that a model's normalizations take, here and now."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating

SECONDS, MOST = 2.0, 20  # of measuring, and passes


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
    args, kwargs = as_call(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modules = dict(model.named_modules())
    with evaluating(model, contents=False):
        watch = _Watch(device)
        for name in sites:
            if name in modules:
                modules[name].register_forward_pre_hook(watch.enter, prepend=True)
                modules[name].register_forward_hook(watch.leave, always_call=True)
        passes: list[tuple[float, float]] = []
        began = time.perf_counter()
        while len(passes) < MOST and (not passes or time.perf_counter() - began < SECONDS):
            given, named = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            watch.inside = 0.0
            started = watch.now()
            output = model(*given, **named)
            passes.append((watch.now() - started, watch.inside))
    warm = passes[1:] or passes
    seconds = median(whole for whole, _ in warm)
    return Cost(seconds, median(inside / whole for whole, inside in warm), device.type, output)


class _Watch:
    """Adds up the time spent inside modules, once where one is inside another."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.depth, self.inside, self.started = device, 0, 0.0, 0.0

    def now(self) -> float:
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def enter(self, *_: Any) -> None:
        if not self.depth:
            self.started = self.now()
        self.depth += 1

    def leave(self, *_: Any) -> None:
        self.depth -= 1
        if not self.depth:
            self.inside += self.now() - self.started
