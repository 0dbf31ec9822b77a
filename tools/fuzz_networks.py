"""Random networks through every verb, in float64, against the unmodified network.

    python tools/fuzz_networks.py --count 2000 --jobs 2
    python tools/fuzz_networks.py --count 200 --feature norm_read --feature again --verb fold
    python tools/fuzz_networks.py --show 17

The network of a seed is drawn by `tests/networks_as_source.py`, and `tests/checked_verbs.py` says
what must hold of it. Each seed is a line of OUT (JSON); a seed that stands there is skipped, so a
run that was interrupted goes on where it stopped. At the end one fault of each kind is shrunk, and
its network printed as a module that runs by itself. Exit status 1 if there is any fault.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import checked_verbs
import networks_as_source
from checked_verbs import Fault

console = Console(highlight=False, markup=False, soft_wrap=True)


def check(seed: int, features: tuple[str, ...], verbs: list[str], seconds: int) -> dict[str, Any]:
    """The row of a seed: its faults, and what kept it from being checked."""
    found: list[Fault] = []
    lines = 0
    signal.signal(signal.SIGALRM, _too_slow)
    signal.alarm(seconds)
    try:
        network = networks_as_source.network(seed, features)
        lines = len(network.lines)
        found.extend(checked_verbs.faults(network, verbs or checked_verbs.drawn_verbs(seed)))
    except BaseException as error:  # of the check itself; the other seeds go on
        found.append(Fault("any", f"not checked: {type(error).__name__}", str(error)[:300]))
    finally:
        signal.alarm(0)
    return {"seed": seed, "lines": lines, "faults": list(dict.fromkeys(found))}


class TooSlow(BaseException):
    """No part of what is checked takes it for an error of its own."""


def _too_slow(*_: object) -> None:
    raise TooSlow


def _quiet() -> None:
    """In a worker: one thread, and no output; torch.export prints graphs where it gives up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Those of an earlier run."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        yield {**row, "faults": [Fault(*each) for each in row["faults"]]}


def smallest(found: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[int, Fault]]:
    """Of each kind of fault the seed of the shortest network, and the fault."""
    kinds: dict[tuple[str, str], tuple[int, Fault]] = {}
    for row in sorted(found, key=lambda row: row["lines"]):
        for fault in row["faults"]:
            kinds.setdefault((fault.verb, fault.kind), (row["seed"], fault))
    return dict(sorted(kinds.items()))


def show(seed: int, features: tuple[str, ...], fault: Fault, tries: int) -> None:
    network = networks_as_source.network(seed, features)
    network, fault = checked_verbs.shrunk(network, fault, tries)
    shapes = {name: tuple(each.shape) for name, each in network.tensors().items()}
    console.print(f"\n# seed {seed}: {fault.verb}: {fault.kind}: {fault.detail}")
    console.print(f"# inputs {shapes} as {network.example}, weights of seed {network.seed}")
    console.print(network.source())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=200, help="networks")
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    parser.add_argument("--feature", action="append", default=[], choices=networks_as_source.KINDS)
    parser.add_argument("--verb", action="append", default=[], choices=checked_verbs.VERBS)
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--seconds", type=int, default=120, help="for one network")
    parser.add_argument("--tries", type=int, default=150, help="steps of shrinking a network")
    parser.add_argument("--out", type=Path, help="file of one line per seed; by default none")
    parser.add_argument("--show", type=int, metavar="SEED", help="print the network of a seed")
    arguments = parser.parse_args()
    features = tuple(arguments.feature)
    if arguments.show is not None:
        console.print(networks_as_source.network(arguments.show, features).source())
        return 0
    wanted = range(arguments.seed, arguments.seed + arguments.count)
    found = [row for row in rows(arguments.out) if row["seed"] in wanted] if arguments.out else []
    left = sorted(set(wanted) - {row["seed"] for row in found})
    work = partial(check, features=features, verbs=arguments.verb, seconds=arguments.seconds)
    # Forked, so that torch is imported once; a pool of threads does not survive a fork.
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    try:
        with context.Pool(arguments.jobs, _quiet, maxtasksperchild=100) as pool:
            results = pool.imap_unordered(work, left)
            for row in track(results, "networks", len(left), console=console):
                found.append(row)
                for fault in row["faults"]:
                    console.print(f"seed {row['seed']}: {fault.verb}: {fault.kind}: {fault.detail}")
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
        kinds = smallest(found)
        for seed, fault in kinds.values():
            show(seed, features, fault, arguments.tries)
    except KeyboardInterrupt:
        console.print("interrupted; the same command with --out goes on where this stopped")
        return 130
    table = Table("verb", "fault", "networks", "seed of the shortest", box=None)
    counts = Counter((f.verb, f.kind) for row in found for f in row["faults"])
    for kind, (seed, _) in kinds.items():
        table.add_row(*kind, str(counts[kind]), str(seed))
    console.print(table)
    bad = sum(bool(row["faults"]) for row in found)
    console.print(f"{bad} of {len(found)} networks have a fault")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
