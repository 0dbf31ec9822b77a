"""Fold a zoo of BatchNorm models, each against the original and torch.fx's own fuse.

    python tools/zoo_sweep.py --jobs 2
    python tools/zoo_sweep.py --jobs 2 --timm 40 --swap --out out/zoo

Every torchvision model with a BatchNorm, and every timm architecture with one below 150 million
parameters (or every N-th), with random affine and statistics (`zoo_models.load`). One row each in
OUT/zoo.csv and a summary in OUT/zoo.md; a model that has a row is skipped, so a run that was
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
from collections import Counter
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

from normswap.atomic import replacing
from normswap.errors import NormswapError, first_line


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


# --- rows and summary ---------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Row.model_validate({k: v for k, v in r.items() if v}) for r in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, so that the file is whole at any moment."""
    with replacing(path) as scratch, scratch.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.model_fields), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = row.model_dump().items()
            writer.writerow({k: f"{v:.2g}" if isinstance(v, float) else v for k, v in cells})


HEADER = (
    "family",
    "pass",
    "batch norms",
    "left by fold",
    "left by fuse",
    "fuse fails",
    "fuse wrong",
    "float64 error",
    "float32 error",
    "of limit",
)
PAGE = """\
# The model zoo

Every torchvision model with a BatchNorm and every timm architecture with one below 150 million
parameters, with random affine and statistics, folded and compared with the original:

    python tools/zoo_sweep.py --jobs 2

"""
NOTE = """\
*pass*: error at most 1e-10 in float64, and in float32 at most 1e-5 or 3 times the original's own
distance from float64; not more left than by fuse; a reason for each that is left. Of detectors the
backbone's outputs are compared. *batch norms*: those that a forward in eval mode executes. *left by
fold*: as one scale and shift per channel, or as they were. *left by fuse*
(`torch.fx.experimental.optimization.fuse`): counts every BatchNorm of a model on which it fails;
*fuse wrong*: its result is another function. *error*: the largest, relative to the original's
largest output; *of limit*: the largest share of what is allowed in float32. Each model is a row of
`zoo.csv`, whose columns `tools/zoo_measure.py` explains."""


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """One line for each family, as in HEADER."""
    groups = {f: [r for r in rows if r.family == f] for f in zoo_models.FAMILIES}
    lines = [_line(family, group) for family, group in groups.items() if group]
    return [*lines, _line("all", rows)]


def _line(family: str, rows: Sequence[Row]) -> list[str]:
    folded = [row for row in rows if row.error is not None]
    fuse_left = (r.fuse_left if r.fuse_left is not None else r.batch_norms for r in folded)
    return [
        family,
        f"{sum(row.status == 'ok' for row in rows)}/{len(rows)}",
        str(sum(row.batch_norms or 0 for row in folded)),
        str(sum(row.left or 0 for row in folded)),
        str(sum(left or 0 for left in fuse_left)),
        str(sum(bool(row.fuse_failed) for row in folded)),
        str(sum(row.fuse_error is not None and not row.fuse_is_right for row in folded)),
        f"{max((row.error64 or 0.0 for row in folded), default=0.0):.1e}",
        f"{max((row.error or 0.0 for row in folded), default=0.0):.1e}",
        f"{max(((row.error or 0.0) / row.allowed for row in folded), default=0.0):.0%}",
    ]


def markdown(lines: Sequence[Sequence[str]], rows: Sequence[Row]) -> str:
    """The page: the summary, why BatchNorms are left, and what did not pass."""
    counts: Counter[str] = Counter()
    for row in rows:
        for item in filter(None, row.left_because.split(" | ")):
            number, _, reason = item.partition(" x ")
            counts[reason] += int(number)
    parts = [_table(HEADER, lines), NOTE]
    if counts:
        reasons = [(reason, str(n)) for reason, n in counts.most_common()]
        parts += ["Why they are left:", _table(("reason", "batch norms"), reasons)]
    failed = [f"- {row.family}/{row.name}: {row.why}" for row in rows if row.status != "ok"]
    if failed:
        parts += ["Not passed:", "\n".join(failed)]
    return PAGE + "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def step(text: str) -> int:
    """Which of a list to take: all is every 1st."""
    return 1 if text == "all" else positive(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of zoo.csv, zoo.md")
    parser.add_argument("--timm", type=step, default=1, metavar="all|N", help="all, or every N-th")
    parser.add_argument("--max-parameters", type=float, default=150e6, help="of a timm model")
    parser.add_argument("--swap", action="store_true", help="convert to group_norm as well")
    parser.add_argument("--jobs", type=positive, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one model")
    arguments = parser.parse_args()
    # The models run in forks of this process, and a pool of threads does not survive a fork.
    torch.set_num_threads(1)
    console, path = Console(), arguments.out / "zoo.csv"
    rows = read(path)
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
    lines = summary(rows)
    with replacing(arguments.out / "zoo.md") as scratch:
        scratch.write_text(markdown(lines, rows))
    table = Table(*(name.replace(" ", "\n") for name in HEADER), box=None, padding=(0, 1, 0, 0))
    for line in lines:
        table.add_row(*line)
    console.print(table)
    if interrupted:
        return 130
    return int(any(row.status != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
