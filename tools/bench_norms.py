"""What the methods cost in training, against torch's own nn.BatchNorm2d in the same process.

    python tools/bench_norms.py [--methods GLOB ...] [--runs 20] [--rounds 3] [--json]

The forward pass, recorded for backward, and the whole step, forward and backward, as ratios of
times, from the smallest to the largest of four shapes; and how much forward keeps for backward
besides its input and the parameters, in percent of the input. Ratios above the project's limits
(0.6 forward, 1.0 a step) are red.

Each is measured in four settings, in processes of their own: one thread and all, with glibc's
malloc as it is (`default`) and with one that keeps large blocks (`kept`). As it is, it gives them
back to the system and pays for their pages again when they are next asked for, which for the same
code makes a factor of three from one process to the next, by where its blocks happen to lie.

A method and BatchNorm are called in turn, so that both meet the same state of the machine; a ratio
is the median of those of two calls that follow each other, and then of the rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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

KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}

Call = Callable[[Tensor], Tensor]


@dataclass
class Cost:
    """Of one method at one shape, as ratios to BatchNorm's.

    Attributes:
        saved: bytes, as a share of the input's.
    """

    method: str
    shape: tuple[int, ...]
    forward: float
    step: float
    saved: float


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
    call, batch_norm = call_of(method, shape), nn.BatchNorm2d(shape[1]).train()
    ratios = []
    for run in range(runs + WARMUP):
        (forward, step), (bn_forward, bn_step) = timed(call, x, g), timed(batch_norm, x, g)
        if run >= WARMUP:
            ratios.append((forward / bn_forward, step / bn_step))
    forward, step = (median(each) for each in zip(*ratios, strict=True))
    return Cost(method, shape, forward, step, saved(call, x))


def timed(call: Call, x: Tensor, g: Tensor) -> tuple[float, float]:
    """The seconds of a forward, and of that and a backward."""
    x.grad = None
    start = time.perf_counter()
    y = call(x)
    middle = time.perf_counter()
    y.backward(g)
    return middle - start, time.perf_counter() - start


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


def in_setting(environment: dict[str, str], names: list[str], runs: int) -> list[Cost]:
    """What a process of its own, with this in its environment, measures."""
    command = [sys.executable, __file__, "--here", "--runs", str(runs), "--methods", *names]
    inherited = {name: value for name, value in os.environ.items() if name not in KEPT}
    printed = subprocess.run(
        command, env={**inherited, **environment}, stdout=subprocess.PIPE, check=True
    ).stdout
    return [Cost(**{**cost, "shape": tuple(cost["shape"])}) for cost in json.loads(printed)]


def middle(rounds: list[list[Cost]]) -> list[Cost]:
    """The medians of what several rounds measured of the same."""
    return [
        replace(
            same[0],
            forward=median(cost.forward for cost in same),
            step=median(cost.step for cost in same),
        )
        for same in zip(*rounds, strict=True)
    ]


def table(costs: dict[str, list[Cost]]) -> Table:
    result = Table(title=f"torch {torch.__version__}: times BatchNorm2d's", box=None)
    result.add_column("method", no_wrap=True)
    for setting in costs:
        result.add_column(f"{setting}\nforward", justify="right", no_wrap=True)
        result.add_column("\nstep", justify="right", no_wrap=True)
    result.add_column("\nsaved, %", justify="right", no_wrap=True)
    for method in dict.fromkeys(cost.method for each in costs.values() for cost in each):
        of_method = [[cost for cost in each if cost.method == method] for each in costs.values()]
        cells: list[Text | str] = []
        for each in of_method:
            for ratios, limit in (
                ([cost.forward for cost in each], FORWARD_LIMIT),
                ([cost.step for cost in each], STEP_LIMIT),
            ):
                style = "bold red" if method in LIMITED and max(ratios) > limit else ""
                cells.append(Text(f"{min(ratios):.2f} to {max(ratios):.2f}", style=style))
        largest = max(cost.saved for each in of_method for cost in each)
        result.add_row(method, *cells, f"{100 * largest:.2g}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process, as it is, as JSON")
    args = parser.parse_args()
    torch.manual_seed(0)
    names = [
        name
        for name, method in normswap.methods().items()
        if method.kind == "activation" and any(fnmatchcase(name, glob) for glob in args.methods)
    ]
    if args.here:
        costs = [measure(name, shape, args.runs) for name in names for shape in SHAPES]
        print(json.dumps([asdict(cost) for cost in costs]))
        return
    settings = {
        f"{allocator}, {threads}": {"OMP_NUM_THREADS": str(threads), **kept}
        for allocator, kept in {"default": {}, "kept": KEPT}.items()
        for threads in (1, os.cpu_count() or 1)
    }
    rounds = [
        {name: in_setting(environment, names, args.runs) for name, environment in settings.items()}
        for _ in range(args.rounds)
    ]
    found = {name: middle([each[name] for each in rounds]) for name in settings}
    if args.json:
        rows = {name: [asdict(cost) for cost in costs] for name, costs in found.items()}
        print(json.dumps(rows, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(found))


def keep_memory() -> None:
    """Start again with a malloc that keeps large blocks; it reads its settings at the start."""
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEPT})


if __name__ == "__main__":
    main()
