"""What a swap costs, and what comes back, on four networks with their own weights.

    python tools/bench_real.py FOLDER [--networks resnet20 crepe ...] [--methods layer_norm ...]
        [--steps 200 800] [--seeds 0 1 2] [--part test]

FOLDER is as `tools/real_networks.py` says. For each network, method and number of steps: the
measure of the task (top-1 accuracy, peak signal-to-noise ratio, share of pitches within 50 cents)
and the agreement with the original, plain, calibrated and recovered without labels, and the seconds
of processor time that the last two took. A recipe is chosen with `--part validation`.

Every run is a process of one thread; what is done is kept in `--log`, and not done again.
"""

import argparse
import copy
import json
import statistics
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from real_networks import TASKS, Batches, Task
from rich.console import Console
from rich.table import Table
from runs import carried_out
from torch import Tensor, nn

import normswap
from normswap.fit.recover import recovery
from normswap.fit.training import Settings

METHODS = (
    "layer_norm",
    "group_norm",  # by the data
    "group_norm:4",  # at most so many groups
    "group_norm:32",
    "rms_norm",
    "filter_response_norm",
    "frozen_batch_norm",
    "batch_norm",  # as it is, trained as long with what is right, its statistics too
)
RATE = 1e-3  # of the original's training by SGD with momentum


@dataclass(frozen=True)
class Run:
    """One network, one method, so many steps; none are calibration alone.

    `lr` is the rate at the start; None has it found.
    """

    network: str
    method: str
    steps: int
    seed: int
    part: str = "test"
    lr: float | None = None


def swapped(model: nn.Module, method: str, first: Tensor, data: Any = None) -> nn.Module:
    """`model` with another normalization; `data` choose the number of groups, and calibrate it."""
    to, _, groups = method.partition(":")
    options = {"groups": f"at most {groups}"} if groups else {}
    return normswap.convert(model, to, inputs=first[:1], data=data, **options)


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """The figures of one run."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    task = TASKS[run.network](folder)
    batches = getattr(task, run.part)
    first = next(iter(task.training))
    count = -(-task.calibrating // len(first))
    data = list(islice(iter(task.training), count))
    found: dict[str, Any] = {"original": task.measured(task.model, batches)}
    if run.method == "batch_norm":
        return found | fine_tuned(task, run, batches)
    plain = swapped(task.model, run.method, first)
    found["plain"] = task.measured(plain, batches)
    start = time.process_time()
    student = swapped(task.model, run.method, first, data)
    found["calibrating"] = time.process_time() - start
    found["calibrated"] = task.measured(student, batches)
    if run.steps and run.method != "frozen_batch_norm":
        start = time.process_time()
        done = recovery(student, task.model, task.training, Settings(steps=run.steps), lr=run.lr)
        found["recovering"] = time.process_time() - start
        found["recovered"] = task.measured(student, batches)
        found |= {"lr": done.lr, "compared": done.loss, "curve": done.curve, "kept": done.step}
    return found


def fine_tuned(task: Task, run: Run, batches: Batches) -> dict[str, Any]:
    """The figures of the original, trained on with labels at RATE, or the rate of the run."""
    model, rate = copy.deepcopy(task.model), run.lr or RATE
    start = time.process_time()
    normswap.finetune(
        model,
        task.labelled,
        steps=run.steps,
        statistics="update",
        loss=lambda output, batch: task.loss(output, batch[1]),
        lr=rate,
    )
    seconds = time.process_time() - start
    return {"recovering": seconds, "recovered": task.measured(model, batches), "lr": rate}


def table(results: dict[Run, dict[str, Any]]) -> Table:
    """One row for each network, method and number of steps: measure (agreement)."""
    shown = Table("network", "method", "steps", "original", "plain", "calibrated", "recovered")
    for column in ("rate", "calibrating, s", "recovering, s"):
        shown.add_column(column)
    for key in dict.fromkeys((run.network, run.method, run.steps) for run in results):
        found = [
            each for run, each in results.items() if (run.network, run.method, run.steps) == key
        ]
        states = [_spread(found, name) for name in ("original", "plain", "calibrated", "recovered")]
        rates = ", ".join(sorted({f"{each['lr']:.2g}" for each in found if "lr" in each}))
        seconds = [
            f"{statistics.mean([each[name] for each in found]):.0f}" if name in found[0] else ""
            for name in ("calibrating", "recovering")
        ]
        shown.add_row(key[0], key[1], str(key[2]), *states, rates, *seconds)
    return shown


def _spread(found: list[dict[str, Any]], state: str) -> str:
    values = [each[state] for each in found if state in each]
    if not values:
        return ""
    scores = [score for score, _ in values]
    deviation = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    agreement = statistics.mean([each for _, each in values])
    return f"{statistics.mean(scores):.2f}{deviation} ({agreement:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int, nargs="+", default=[200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[None])
    parser.add_argument("--part", default="test", choices=["test", "validation"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("normswap-out/bench_real.jsonl"))
    parser.add_argument("--run", help="one run, as JSON; used by the others")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(arguments.folder, Run(**json.loads(arguments.run)))))
        return
    wanted = [
        Run(network, method, steps, seed, arguments.part, rate)
        for network in arguments.networks
        for method in arguments.methods
        for steps in arguments.steps
        for seed in arguments.seeds
        for rate in arguments.rates
    ]
    found = carried_out(wanted, __file__, arguments.folder, arguments.log, arguments.jobs)
    Console(width=140).print(table(found))


if __name__ == "__main__":
    main()
