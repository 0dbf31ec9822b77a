"""What the methods cost in training, against torch's own nn.BatchNorm2d in the same process.

    python tools/bench_norms.py [--methods GLOB ...] [--runs 30] [--quantile 0.5] [--json]

For each shape: the forward pass, recorded for backward, and the whole step, forward and backward,
as ratios of median times; and how much forward keeps for backward besides its input and the
parameters, in percent of the input. Ratios above the project's limits (0.6 forward, 1.0 a step) are
red.

A method and BatchNorm are called in turn, so that both meet the same state of the machine and of
malloc, which gives large blocks back and pays for their pages again later: times measured one after
the other differ by a factor of two for that alone. Where others use the machine as well, medians
count the scheduler's slices instead (ratios such as 1.25 and 0.67 again and again); a --quantile of
0.1 sees past them.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

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
    """The method in training, with a condition where it takes one."""
    if method == "conditional_batch_norm":
        norm = normswap.create(method, shape[1], num_conditions=CONDITIONS).train()
        condition = torch.randn(shape[0], CONDITIONS)
        return lambda x: norm(x, condition)
    return normswap.create(method, shape[1]).train()


def measure(method: str, shape: tuple[int, ...], runs: int, quantile: float) -> Cost:
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
        (1e3 * sorted(each)[int(quantile * (runs - 1))] for each in zip(*taken, strict=True))
        for taken in times
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
    result = Table("method", title=title)
    for shape in shapes:
        label = "x".join(map(str, shape))
        for column in (f"{label}\nforward", "\nstep", "\nsaved, %"):
            result.add_column(column, justify="right")
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
    parser.add_argument("--quantile", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    names = [
        name
        for name, method in normswap.methods().items()
        if method.kind == "activation" and any(fnmatchcase(name, glob) for glob in args.methods)
    ]
    costs = [measure(name, shape, args.runs, args.quantile) for name in names for shape in SHAPES]
    if args.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
    else:
        Console().print(table(costs))


if __name__ == "__main__":
    main()
