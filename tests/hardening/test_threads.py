"""Verbs in several threads and processes at once: each model as if it were alone."""

import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import children
import pytest
import torch
from process_state import ambient_state, differences, state_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normswap as ns
from normswap.ambient import alone, warnings_ignored
from normswap.graph.capture import capture

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net(seed: int) -> nn.Module:
    """A network whose width, depth and numbers depend on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    width = 4 + 2 * (seed % 3)
    made: list[nn.Module] = []
    for before in (3, *[width] * (1 + seed % 2)):
        made += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    made += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4), nn.LayerNorm(4)]
    model = nn.Sequential(*made, nn.Linear(4, 3)).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.uniform_(0.1, 0.9, generator=generator)
    return model


class Branching(nn.Module):
    """torch.export fails on it, and prints the graph so far; its parts are captured."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if y.sum() > 0 else -y  # type: ignore[no-any-return]


def _exported(model: nn.Module, folder: Path) -> Any:
    path = folder / f"{threading.get_ident()}.onnx"
    ns.export(model, X, path)
    return path.read_bytes()


VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "fold": lambda model, _: ns.fold(model, X),
    "branching": lambda model, _: ns.fold(Branching(model), X, inplace=True),
    "convert": lambda model, _: ns.convert(model, "group_norm", inputs=X, groups=2),
    "tune": lambda model, _: ns.freeze(model, X, mode="tune"),
    "center": lambda model, _: ns.center(model, X),
    "parametrize": lambda model, _: ns.parametrize(model, "spectral_norm"),
    "inspect": lambda model, _: ns.inspect(model, X).to_dict(),
    "export": lambda model, folder: _exported(model, folder),
}


def told(result: Any) -> Any:
    return state_of(result, itself=False) if isinstance(result, nn.Module) else result


def test_eight_threads_do_what_one_does_and_leave_the_process_as_it_was(tmp_path: Path) -> None:
    verbs = list(VERBS.values())
    nets = [[net(seed) for seed in range(len(verbs))] for _ in range(2)]
    expected = [told(do(model, tmp_path)) for do, model in zip(verbs, nets[0], strict=True)]
    before = ambient_state()
    with ThreadPoolExecutor(len(verbs)) as pool:
        together = [pool.submit(do, model, tmp_path) for do, model in zip(verbs, nets[1], strict=True)]
        found = [told(each.result()) for each in together]
    assert differences(before, ambient_state()) == []
    for name, one, other in zip(VERBS, expected, found, strict=True):
        assert one == other, name
