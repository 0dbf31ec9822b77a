"""What fine-tuning ResNet-50 with frozen statistics costs in tune mode, against eval mode.

    python tools/bench_tune.py [--batch 16] [--side 224] [--steps 20] [--threads 2] [--command]

A step is forward, backward and SGD, in float32. Each mode has a process of its own, so that its
peak memory can be read from the operating system; the two take their steps in turn, the other one
sleeping, so that both meet the same state of the machine. malloc is told to keep large blocks
(`bench_norms` says why): without that one mode took 0.9 to 1.3 times the other's time from one run
to the next. Ratios beyond the project's limits (1.0 times the time, 35% less memory) are red.

- ms: the median step, with the quartiles; *of eval*: the median ratio of neighbouring steps.
- resident: the largest resident set of the process over all steps, less what it was before the
  model was built. It has the allocator's gaps in it, which differ from run to run.
- allocated: the most that torch held at one moment of a step, parameters included.

With `--command` the whole of `normswap finetune --statistics MODE` runs, a process for each mode,
and what counts is its largest resident set, less that of the same command on a tiny model. It holds
momentum and a copy of the last good weights besides.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from allocations import allocations
from bench_norms import keep_memory
from rich.console import Console
from rich.table import Table
from rich.text import Text
from zoo_models import torchvision

import normswap

MODES = ("eval", "tune")
TIME_LIMIT, MEMORY_LIMIT = 1.0, 0.65
WARMUP = 2
MIB = 2**20


def train(mode: Any, batch: int, side: int, threads: int, pipe: Connection) -> None:
    """Take one step for every message and answer with its seconds; at None, with the memory."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = _resident("VmRSS")
    model = torchvision.models.resnet50()
    images, labels = torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))
    normswap.freeze(model, images[:1], mode=mode, inplace=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    pipe.send(None)
    while pipe.recv() is not None:
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    resident = _resident("VmHWM") - before
    held = sum(p.nbytes for p in model.parameters()) + images.nbytes
    with allocations() as most:
        step()
    pipe.send((resident, held + most[0]))


def _resident(field: str) -> int:
    """Bytes of the resident set now ("VmRSS") or at most ("VmHWM")."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:  # not Linux: the peak serves as both
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return 1024 * next(int(x.split()[1]) for x in status.splitlines() if x.startswith(field))


def resnet50() -> torch.nn.Module:
    """What `--command` trains."""
    return torchvision.models.resnet50()


def resident_of_command(model: str, data: str, mode: str, batch: int, steps: int, out: str) -> int:
    """The bytes of `normswap finetune` at its peak."""
    own = [sys.executable, "-m", "normswap", "finetune", model, "--data", data, "--out", out]
    options = [f"--statistics={mode}", f"--batch-size={batch}", f"--steps={steps}", "--lr=1e-4"]
    ran = subprocess.Popen([*own, *options], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(ran.pid, 0)
    if status:
        raise SystemExit(f"{' '.join([*own, *options])} failed")
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def through_command(batch: int, side: int, steps: int) -> None:
    """Print the memory of each mode through the command."""
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/images.npz"
        images = np.random.default_rng(0).random((2 * batch, 3, side, side), dtype=np.float32)
        np.savez(data, x=images, y=np.arange(2 * batch))
        tiny = resident_of_command("demo:digits", "demo:digits", "eval", 2, 2, f"{folder}/tiny")
        model = f"{__file__}:resnet50"
        found = {
            mode: resident_of_command(model, data, mode, batch, steps, f"{folder}/{mode}") - tiny
            for mode in MODES
        }
    for mode, size in found.items():
        print(f"{mode}: {size / MIB:.0f} MiB, {size / found['eval']:.2f} of eval")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=224, help="pixels of the square images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--command", action="store_true", help="through normswap finetune")
    args = parser.parse_args()
    if args.command:
        through_command(args.batch, args.side, args.steps)
        return
    context = get_context("spawn")
    pipes: dict[str, Connection] = {}
    for mode in MODES:
        pipes[mode], end = context.Pipe()
        job = (mode, args.batch, args.side, args.threads, end)
        context.Process(target=train, args=job, daemon=True).start()
        end.close()
        pipes[mode].recv()  # built
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(args.steps + WARMUP):
        for mode in MODES if number % 2 else reversed(MODES):
            pipes[mode].send(number)
            taken = pipes[mode].recv()
            if number >= WARMUP:
                seconds[mode].append(taken)
    memory: dict[str, tuple[int, int]] = {}
    for mode in MODES:
        pipes[mode].send(None)
        memory[mode] = pipes[mode].recv()
    title = (
        f"ResNet-50, batch {args.batch} at {args.side} px, {args.steps} steps, "
        f"torch {torch.__version__}, {args.threads} threads"
    )
    table = Table("mode", "ms", "quartiles", "of eval", "resident, MiB", "of eval", box=None)
    table.title = title
    table.add_column("allocated, MiB")
    table.add_column("of eval")
    for mode in MODES:
        low, _, high = quantiles(seconds[mode], n=4)
        ratio = median(a / b for a, b in zip(seconds[mode], seconds["eval"], strict=True))
        cells = [mode, f"{1e3 * median(seconds[mode]):.0f}", f"{1e3 * low:.0f}-{1e3 * high:.0f}"]
        texts = [_ratio(ratio, TIME_LIMIT)]
        for amount, reference in zip(memory[mode], memory["eval"], strict=True):
            limit = 1.0 if mode == "eval" else MEMORY_LIMIT
            texts += [Text(f"{amount / MIB:.0f}"), _ratio(amount / reference, limit)]
        table.add_row(*cells, *texts)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _ratio(value: float, limit: float) -> Text:
    return Text(f"{value:.2f}", style="bold red" if value > limit else "")


if __name__ == "__main__":
    keep_memory()
    main()
