"""What folding BatchNorm saves at inference, against torch's own ways and ONNX Runtime.

    python tools/bench_fold.py [--models GLOB ...] [--batch 1] [--threads 2] [--rounds 30] [--json]
    python tools/bench_fold.py --cost

Every network has random weights and statistics (`zoo_models.load`), float32, images of 224 px. As
ratios to the unfolded model in eager mode:

- again: the unfolded model a second time, which shows how far noise goes;
- fuse: torch.fx.experimental.optimization.fuse;
- fold, channels_last: `normswap.fold`, and with channels_last=True;
- compiled: torch.compile of the unfolded model with torch._inductor.config.freezing;
- onnx_unfolded, onnx: ONNX Runtime on the unfolded model, exported by torch, and on the folded one,
  exported by normswap.

In each round every one has its turn, a burst of calls of which the first does not count: it finds
the caches full of somebody else's weights. A ratio is the median over the rounds of the median call
of the burst over the unfolded model's in the same round. What fold may not be, slower than the
unfolded model or than fuse in three rounds of four, is red. malloc keeps large blocks
(`bench_norms` says why).

--cost: the seconds that folding a ResNet-50 in place takes, the first fold of a process and a
later one, and the most memory it takes at one moment beside the model, over that of its parameters.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import onnxruntime
import torch
import zoo_models
from allocations import allocations
from bench_norms import keep_memory
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.fx.experimental.optimization import fuse

import normswap

MODELS = (
    "classification/resnet18",
    "classification/resnet50",
    "classification/mobilenet_v2",
    "classification/efficientnet_b0",
    "classification/densenet121",
    "classification/regnet_y_400mf",
    "timm/repvgg_a0",
)
UNFOLDED, FUSE, OURS = "unfolded", "fuse", ("fold", "channels_last")
SIDE, BURST, WARMUP = 224, 4, 3
SECONDS_LIMIT, MEMORY_LIMIT = 3.0, 1.2

Call = Callable[[], Any]


def contenders(model: nn.Module, x: Tensor, threads: int, scratch: Path) -> dict[str, Call]:
    """What is compared, each as a call without arguments; the first one compiles."""
    folded = normswap.fold(model, x)
    versions: dict[str, Any] = {
        UNFOLDED: model,
        "again": copy.deepcopy(model),
        FUSE: fuse(model),
        "fold": folded,
        "channels_last": normswap.fold(model, x, channels_last=True),
        "compiled": torch.compile(copy.deepcopy(model)),
    }
    unfolded, path = scratch / "unfolded.onnx", scratch / "folded.onnx"
    torch.onnx.export(model, (x,), unfolded, dynamo=True, verbose=False)
    normswap.export(folded, x, path, validate=False)
    return {
        **{name: partial(each, x) for name, each in versions.items()},
        "onnx_unfolded": session_call(unfolded, x, threads),
        "onnx": session_call(path, x, threads),
    }


def session_call(path: Path, x: Tensor, threads: int) -> Call:
    """A call of ONNX Runtime on a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning while the others have their turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options)
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """The median call of every burst, in ms."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + WARMUP):
        for name, call in calls.items():
            burst = [_milliseconds(call) for _ in range(BURST + 1)][1:]
            if number >= WARMUP:
                times[name].append(median(burst))
    return times


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def table(results: dict[str, dict[str, list[float]]], title: str) -> Table:
    names = list(next(iter(results.values())))
    result = Table(title=title, box=None)
    result.add_column("model", no_wrap=True)
    for name in ("unfolded, ms", *names[1:]):
        result.add_column(name, justify="right", no_wrap=True)
    for model, times in results.items():
        cells = [Text(f"{median(times[UNFOLDED]):.1f}")]
        for name in names[1:]:
            ratios = _ratios(times[name], times[UNFOLDED])
            limits = (ratios, _ratios(times[name], times[FUSE])) if name in OURS else ()
            slower = any(quantiles(each, n=4)[0] > 1 for each in limits)
            cells.append(Text(f"{median(ratios):.2f}", style="bold red" if slower else ""))
        result.add_row(model.partition("/")[2], *cells)
    return result


def _ratios(times: list[float], of: list[float]) -> list[float]:
    return [a / b for a, b in zip(times, of, strict=True)]


# --- what folding itself costs ------------------------------------------------------------------


def fold_cost(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Fold in place: seconds, and the most memory beside the model, in times its parameters."""
    parameters = sum(p.nbytes for p in model.parameters())
    again = copy.deepcopy(model)
    start = time.perf_counter()
    normswap.fold(model, x, inplace=True)
    seconds = time.perf_counter() - start
    with allocations() as most:
        normswap.fold(again, x, inplace=True)
    return seconds, most[0] / parameters


def cost() -> Table:
    result = Table("fold of a ResNet-50 in place", "s", "memory, of the parameters", box=None)
    x = torch.randn(1, 3, SIDE, SIDE)
    for which in ("the first of a process", "a later one"):
        seconds, memory = fold_cost(zoo_models.torchvision.models.resnet50().eval(), x)
        over = seconds > SECONDS_LIMIT, memory > MEMORY_LIMIT
        texts = (Text(f"{seconds:.2f}"), Text(f"{memory:.2f}"))
        for text, beyond in zip(texts, over, strict=True):
            text.stylize("bold red" if beyond else "")
        result.add_row(which, *texts)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", action="store_true", help="ms of every round")
    parser.add_argument("--cost", action="store_true", help="of folding itself")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.cost:
        console.print(cost())
        return
    inductor.freezing = True
    results = {}
    for name in MODELS:
        if any(fnmatchcase(name.partition("/")[2], glob) for glob in args.models):
            model = zoo_models.load(*name.split("/")).model
            x = torch.randn(args.batch, 3, SIDE, SIDE)
            with tempfile.TemporaryDirectory() as scratch:
                calls = contenders(model, x, args.threads, Path(scratch))
                with torch.inference_mode():
                    results[name] = measure(calls, args.rounds)
    if args.json:
        print(json.dumps(results))
    else:
        title = f"batch {args.batch}, torch {torch.__version__}, {args.threads} threads"
        console.print(table(results, title))


if __name__ == "__main__":
    keep_memory()
    main()
