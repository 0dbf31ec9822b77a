"""What recovering gives on a real network: ResNet-20 on CIFAR-10, beside its alternatives.

    python tools/bench_recover.py FOLDER [--steps 200 800] [--seeds 0 1 2] [--jobs 2]

FOLDER is as `tools/cifar.py` says. Batch 64, random crop with padding 4 and flip, a rate that falls
in half a cosine. Accuracy is top-1 on all test images, its mean and standard deviation, of

- the plain swap, fine-tuned with cross-entropy at the better of RATES, one seed,
- the calibrated model, before any step,
- the recovered one (`normswap.recover`, as it is without options),
- and the original with its BatchNorms, fine-tuned with cross-entropy as long.

Every run is a process of one thread; what is done is kept in `--log`, and not done again.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from cifar import augmented, pretrained, test_batches
from rich.console import Console
from rich.table import Table
from runs import carried_out, spread

import normswap
from normswap.fit.evaluate import accuracy
from normswap.fit.held_back import MOST

METHODS = {
    "layer_norm": {},
    "group_norm:4": {"groups": 4},
    "group_norm:8": {"groups": 8},
    "rms_norm": {},
    "filter_response_norm": {},
    "instance_norm": {},
}
RATES = (0.02, 0.05)  # of the plain swap
BATCH_NORM_RATE = 0.01  # the best for the original
CLIP = 1.0  # without it the plain swap diverges at rates that it needs


@dataclass(frozen=True)
class Run:
    """One fine-tune: of the original ("batch_norm"), or of a swap, plain or recovered."""

    method: str
    how: str
    steps: int
    seed: int
    rate: float | None = None


def runs(methods: list[str], budgets: list[int], seeds: list[int], rates: list[float]) -> list[Run]:
    """All runs; the plain swap takes the first seed alone, at every rate."""
    found = [
        Run("batch_norm", "fine-tuned", steps, seed, BATCH_NORM_RATE)
        for steps in budgets
        for seed in seeds
    ]
    for method in methods:
        for steps in budgets:
            found += [Run(method, "recovered", steps, seed) for seed in seeds]
            found += [Run(method, "plain", steps, seeds[0], rate) for rate in rates]
    return found


def measure(folder: Path, run: Run) -> dict[str, float]:
    """The accuracies of one run, in percent."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    teacher, test, train = pretrained(folder), test_batches(folder), augmented(folder, 64)
    model, found = teacher, {}
    if run.how != "fine-tuned":
        model = normswap.convert(
            teacher, run.method.partition(":")[0], inputs=test[0][0][:2], **METHODS[run.method]
        )
    if run.how == "recovered":
        normswap.calibrate(model, teacher, islice(train, MOST // 64))
        found["calibrated"] = 100 * accuracy(model, test)
        normswap.recover(model, teacher, train, steps=run.steps)
    else:
        normswap.finetune(
            model, train, steps=run.steps, lr=run.rate, clip=CLIP, statistics="update"
        )
    return {**found, "accuracy": 100 * accuracy(model, test)}


def table(results: dict[Run, dict[str, float]]) -> Table:
    """One row for each method and budget."""
    shown = Table("method", "steps", "plain swap (rate)", "calibrated", "recovered", "BatchNorm")
    for method, steps in dict.fromkeys((run.method, run.steps) for run in results):
        if method == "batch_norm":
            continue

        def of(how: str, name: str, method: str = method, steps: int = steps) -> list[float]:
            return [
                each[name]
                for run, each in results.items()
                if (run.method, run.how, run.steps) == (method, how, steps)
            ]

        plain = {
            each["accuracy"]: run.rate
            for run, each in results.items()
            if (run.method, run.how, run.steps) == (method, "plain", steps)
        }
        best = max(plain, default=float("nan"))
        shown.add_row(
            method,
            str(steps),
            f"{best:.1f} ({plain.get(best)})",
            spread(of("recovered", "calibrated")),
            spread(of("recovered", "accuracy")),
            spread(of("fine-tuned", "accuracy", "batch_norm")),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 800])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="*", default=list(RATES))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--log", type=Path, default=Path("normswap-out/bench_recover.jsonl"))
    parser.add_argument("--run", help="one run, as JSON; used by the others")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(arguments.folder, Run(**json.loads(arguments.run)))))
        return
    wanted = runs(arguments.methods, arguments.steps, arguments.seeds, arguments.rates)
    found = carried_out(wanted, __file__, arguments.folder, arguments.log, arguments.jobs)
    Console(width=110).print(table(found))


if __name__ == "__main__":
    main()
