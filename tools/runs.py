"""Runs of a benchmark, each in a process of its own; what is done is in a log, and not done again.

A run is a frozen dataclass of what JSON can hold. The script that lists the runs carries one out
where it is called with `--run` and that as JSON, and prints what it found as its last line.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

_Run = TypeVar("_Run")


def carried_out(
    wanted: Sequence[_Run], script: str, folder: Path, log: Path, jobs: int
) -> dict[_Run, dict[str, Any]]:
    """What each of the `wanted` runs found, those of the log included.

    Args:
        script: the file that carries one out, given `folder` as well.
        jobs: how many at a time.
    """
    done: dict[_Run, dict[str, Any]] = {}
    if log.exists():
        for line in log.read_text(encoding="utf-8").splitlines():
            facts, found = json.loads(line)
            done[type(wanted[0])(**facts)] = found
    log.parent.mkdir(parents=True, exist_ok=True)

    def carry_out(run: _Run) -> None:
        facts = asdict(run)  # type: ignore[call-overload]
        command = [sys.executable, script, str(folder), "--run", json.dumps(facts)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            print(run, ended.stderr[-500:], file=sys.stderr)
            return
        done[run] = json.loads(ended.stdout.splitlines()[-1])
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps([facts, done[run]]) + "\n")
        print(run, done[run], file=sys.stderr)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(carry_out, [run for run in wanted if run not in done]))
    return {run: done[run] for run in wanted if run in done}


def spread(values: Sequence[float]) -> str:
    """The mean of what several seeds gave, and the standard deviation; nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"
