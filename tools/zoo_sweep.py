"""Fold a zoo of BatchNorm models, each against the original and torch.fx's own fuse.

    python tools/zoo_sweep.py --jobs 2
    python tools/zoo_sweep.py --jobs 2 --timm 40 --swap --out out/zoo

Every torchvision model with a BatchNorm, and every timm architecture with one below 150 million
parameters (or every N-th), with random affine and statistics (`zoo_models.load`). One row each in
OUT/zoo.csv and a summary in OUT/zoo.md; a model whose row says ok is skipped, so a run that was
interrupted goes on where it stopped. Each model runs in a process of its own: one that crashes or
hangs is a row that says so.

`zoo_measure` defines the columns and when a model passes.
"""

import argparse
import csv
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import zoo_models
from rich.console import Console
from rich.table import Table
from zoo_measure import Row, measure
from zoo_page import HEADER, markdown, summary

from normswap.core.atomic import replacing
from normswap.core.errors import NormswapError, first_line


class Job:
    """A model being measured in a process of its own; `row` is what is known of it so far."""

    def __init__(self, family: str, name: str, threads: int, swap: bool) -> None:
        self.row, self.finished, self.start = Row(family=family, name=name), False, time.monotonic()
        # Forked, so that torch and timm are imported once; see main for what that takes.
        context = multiprocessing.get_context("fork")
        self.pipe, end = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work, args=(self.row, end, threads, swap), daemon=True
        )
        self.process.start()
        end.close()

    def is_over(self, timeout: float) -> bool:
        """Take in what the process has sent; whether it has ended, or was ended as too slow."""
        try:
            while self.pipe.poll():
                self.row, self.finished = self.pipe.recv()
        except EOFError:
            self.process.join()
            if not self.finished:
                self.row.why += f": the process ended with status {self.process.exitcode}"
            return True
        if time.monotonic() - self.start > timeout:
            self.process.kill()
            self.row.why += f": not done after {timeout:.0f} s"
            return True
        return False


def _work(row: Row, pipe: Any, threads: int, swap: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    # torch.export prints the whole graph where it gives up, and the models their warnings.
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    torch.set_num_threads(threads)
    start = time.monotonic()

    def send(*, finished: bool) -> None:
        row.seconds = time.monotonic() - start
        pipe.send((row, finished))

    def stage(name: str) -> None:
        row.why = name
        send(finished=False)

    try:
        measure(row, stage, swap=swap)
        row.why = "; ".join(row.broken_rules())
        row.status = "failed" if row.why else "ok"
    except Exception as error:
        row.why += f": {type(error).__name__}: {first_line(error)}"
    send(finished=True)


def sweep(
    models: Iterator[tuple[str, str]], jobs: int, timeout: float, *, swap: bool
) -> Iterator[Row]:
    """Measure `models`, `jobs` at a time; the rows come as they are done."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    running: list[Job] = []
    try:
        while True:
            running += [Job(*model, threads, swap) for model in islice(models, jobs - len(running))]
            if not running:
                return
            connection.wait([job.pipe for job in running], timeout=1.0)
            for job in list(running):
                if job.is_over(timeout):
                    running.remove(job)
                    yield job.row
    finally:
        for job in running:
            job.process.kill()


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [Row.model_validate({k: v for k, v in r.items() if v}) for r in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, so that the file is whole at any moment."""
    rows = sorted(rows, key=lambda row: (zoo_models.FAMILIES.index(row.family), row.name))
    with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.model_fields), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = row.model_dump().items()
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in cells})


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of zoo.csv, zoo.md")
    parser.add_argument("--timm", type=positive, default=1, metavar="N", help="every N-th of timm")
    parser.add_argument("--max-parameters", type=float, default=150e6, help="of a timm model")
    parser.add_argument("--swap", action="store_true", help="convert to group_norm as well")
    parser.add_argument("--jobs", type=positive, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one model")
    arguments = parser.parse_args()
    # The models run in forks of this process, and a pool of threads does not survive a fork.
    torch.set_num_threads(1)
    console, path = Console(), arguments.out / "zoo.csv"
    rows = [row for row in read(path) if row.status == "ok"]
    try:
        write(path, rows)  # before the work rather than after it, should the folder not allow it
    except NormswapError as error:
        parser.error(str(error))
    known = {(row.family, row.name) for row in rows}

    def models() -> Iterator[tuple[str, str]]:
        for family in zoo_models.TORCHVISION:
            for name in zoo_models.batch_norm_models(family):
                yield family, name
        names = zoo_models.batch_norm_models("timm", arguments.max_parameters)
        for name in islice(names, 0, None, arguments.timm):
            yield "timm", name

    interrupted = False
    new = (model for model in models() if model not in known)
    try:
        for row in sweep(new, arguments.jobs, arguments.timeout, swap=arguments.swap):
            rows.append(row)
            write(path, rows)
            console.print(
                f"{row.status:6} {row.family}/{row.name} {row.seconds:.0f} s {row.why}",
                markup=False,
                highlight=False,
            )
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted; the same command goes on where this stopped")
    with replacing(arguments.out / "zoo.md") as scratch:
        scratch.write_text(markdown(rows))
    table = Table(*(name.replace(" ", "\n") for name in HEADER), box=None, padding=(0, 1, 0, 0))
    for line in summary(rows):
        table.add_row(*line)
    console.print(table)
    if interrupted:
        return 130
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
