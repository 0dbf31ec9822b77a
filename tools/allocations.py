"""How much memory torch asked for, by its profiler's record of every allocation on the CPU.

Exact and the same in every run, unlike the resident set, which has the allocator's gaps in it.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile


@contextmanager
def allocations() -> Iterator[list[int]]:
    """Yield a list; after it, its one item is the most bytes held at one moment inside.

    What was held before does not count, nor that it is given back.
    """
    most = [0]
    # The profiler tells stderr of each block that it did not see being allocated.
    stderr, nowhere = os.dup(sys.stderr.fileno()), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            yield most
    finally:
        os.dup2(stderr, sys.stderr.fileno())
        os.close(stderr)
        os.close(nowhere)
    events = record.profiler.kineto_results.events()
    held = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += change
        most[0] = max(most[0], held)
