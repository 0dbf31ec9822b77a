"""What the methods cost in training, against torch's own nn.BatchNorm2d in the same process.

    python tools/bench_norms.py [--methods GLOB ...] [--runs 30] [--json]

For each shape: the forward pass, recorded for backward, and the whole step, forward and backward,
as ratios of median times; and how much forward keeps for backward besides its input and the
parameters, in percent of the input. Ratios above the project's limits (0.6 forward, 1.0 a step) are
red.

A method and BatchNorm are called in turn, so that both meet the same state of the machine. glibc's
malloc gives large blocks back and pays for their pages again when they are next asked for, which
for the same code makes a factor of three from one run to the next; it is told to keep them, for
both, unless the environment says otherwise (MALLOC_TRIM_THRESHOLD_).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import normswap

SHAPES = ((16, 64, 56, 56), (16, 256, 14, 14), (32, 128, 28, 28), (2, 64, 112, 112))
FORWARD_LIMIT, STEP_LIMIT = 0.6, 1.0
LIMITED = (
    "batch_norm",
    "mean_only_batch_norm",
    "batch_renorm",
    "batch_instance_norm",
    "switchable_norm",
    "conditional_batch_norm",
    "ghost_batch_norm",
    "group_norm",
    "rms_norm",
    "filter_response_norm",
)
WARMUP = 5
CONDITIONS = 32

Call = Callable[[Tensor], Tensor]


@dataclass
class Cost:
    """Of one method at one shape; times in ms."""

    method: str
    shape: tuple[int, ...]
    forward: float
    step: float
    batch_norm_forward: float
    batch_norm_step: float
    saved: float  # bytes, as a share of the input's

    @property
    def ratios(self) -> tuple[float, float]:
        return self.forward / self.batch_norm_forward, self.step / self.batch_norm_step


def call_of(method: str, shape: tuple[int, ...]) -> Call:
    """The method in training, with a condition or a correction where it can have one."""
    if method == "batch_renorm":  # the paper's schedule starts with plain BatchNorm
        return normswap.create(method, shape[1], schedule=False).train()
    if method == "conditional_batch_norm":
        norm = normswap.create(method, shape[1], num_conditions=CONDITIONS).train()
        condition = torch.randn(shape[0], CONDITIONS)
        return lambda x: norm(x, condition)
    return normswap.create(method, shape[1]).train()


def measure(method: str, shape: tuple[int, ...], runs: int) -> Cost:
    """Time both in turn. The gradient is a tensor of its own, as from the next layer."""
    x, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
    calls = (call_of(method, shape), nn.BatchNorm2d(shape[1]).train())
    times: list[list[tuple[float, float]]] = [[], []]
    for run in range(runs + WARMUP):
        for call, taken in zip(calls, times, strict=True):
            x.grad = None
            start = time.perf_counter()
            y = call(x)
            middle = time.perf_counter()
            y.backward(g)
            end = time.perf_counter()
            if run >= WARMUP:
                taken.append((middle - start, end - start))
    (forward, step), (bn_forward, bn_step) = (
        (1e3 * median(each) for each in zip(*taken, strict=True)) for taken in times
    )
    return Cost(method, shape, forward, step, bn_forward, bn_step, saved(calls[0], x))


def saved(call: Call, x: Tensor) -> float:
    """Bytes kept for backward beside x and what is a leaf, over the bytes of x."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = call(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    del y
    return sum(kept.values()) / x.untyped_storage().nbytes()


def table(costs: list[Cost]) -> Table:
    shapes = list(dict.fromkeys(cost.shape for cost in costs))
    title = f"torch {torch.__version__}, {torch.get_num_threads()} threads: times BatchNorm2d's"
    result = Table(title=title, box=None)
    result.add_column("method", no_wrap=True)
    for shape in shapes:
        label = "x".join(map(str, shape))
        for column in (f"{label}\nforward", "\nstep", "\nsaved, %"):
            result.add_column(column, justify="right", no_wrap=True)
    for method in dict.fromkeys(cost.method for cost in costs):
        cells: list[Text | str] = []
        for cost in (cost for cost in costs if cost.method == method):
            for ratio, limit in zip(cost.ratios, (FORWARD_LIMIT, STEP_LIMIT), strict=True):
                over = method in LIMITED and ratio > limit
                cells.append(Text(f"{ratio:.2f}", style="bold red" if over else ""))
            cells.append(f"{100 * cost.saved:.2g}")
        result.add_row(method, *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    names = [
        name
        for name, method in normswap.methods().items()
        if method.kind == "activation" and any(fnmatchcase(name, glob) for glob in args.methods)
    ]
    costs = [measure(name, shape, args.runs) for name in names for shape in SHAPES]
    if args.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(table(costs))


def keep_memory() -> None:
    """Start again with a malloc that keeps large blocks; it reads its settings at the start."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        kept = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **kept})


if __name__ == "__main__":
    keep_memory()
    main()
