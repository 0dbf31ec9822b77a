"""What calibration costs and gives on four networks with their own weights, by where it stops.

    python tools/bench_calibrate.py FOLDER [--networks resnet20 crepe ...] [--methods layer_norm]
        [--tolerances 0.1 0.01 1e-7]

A method is `layer_norm`, or `group_norm:8` for at most 8 groups. FOLDER is as
`tools/real_networks.py` says. As many samples as it has for that are read once by the
original and once per sweep by the new model, until the last sweep moved no mean and no deviation by
more than the tolerance, in units of a standard deviation. Seconds are of processor time, one
thread; the measure is that of the network's task, on its test images.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_real import swapped
from real_networks import TASKS
from rich.console import Console
from rich.table import Table

import normswap


class Counted(list[Any]):
    """Batches that know how often they were read."""

    passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return super().__iter__()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--networks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=["layer_norm"])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.1, 1e-2, 1e-7])
    parser.add_argument("--part", default="test", choices=["test", "validation"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("network", "method", "tolerance", "passes", "seconds", "measure", "agreement")
    for name in arguments.networks:
        torch.manual_seed(0)
        task = TASKS[name](arguments.folder)
        first = next(iter(task.training))
        count = -(-task.calibrating // len(first))
        data = Counted(islice(iter(task.training), count))
        for method in arguments.methods:
            student = swapped(task.model, method, first)
            for tolerance in arguments.tolerances:
                fitted = copy.deepcopy(student)
                data.passes, start = 1, time.process_time()  # that of the original
                normswap.calibrate(fitted, task.model, data, tolerance=tolerance)
                seconds = time.process_time() - start
                score, agreed = task.measured(fitted, getattr(task, arguments.part))
                found = str(data.passes), f"{seconds:.0f}", f"{score:.2f} {task.unit}"
                table.add_row(name, method, f"{tolerance:g}", *found, f"{agreed:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
