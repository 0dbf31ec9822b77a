"""Fit all normalizations of a model as the data go by, sweep after sweep, until nothing moves.

What a normalization sees depends on those before it. To fit one after the other takes a pass over
the data for each. Here every sweep fits all of them as it goes, each batch running into a site on
the output that those before it were just fitted to give. In the first sweep a fit knows only the
batches so far; in the next ones the moments of each batch take the place of those it had before.
After k sweeps the first k sites in dataflow order are exact, so that the depth bounds their number,
and the error falls by 3 to 6 with each.

Several processes read each its own share of the data, and know of the others' moments up to the
batch before. Where nothing moves any more, that is no difference.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
from rich.progress import TimeElapsedColumn
from torch import distributed, nn

from normswap.core.errors import NormswapError, warn
from normswap.core.terminal import Words, progress
from normswap.fit.ranks import gathered_parts, largest, ranks, together
from normswap.fit.reading import Reading, repeatable
from normswap.fit.site_moments import Moments
from normswap.graph.snapshot import evaluating

# By so much, in units of the site's typical standard deviation, a sweep may still move a mean or a
# standard deviation where all are to be as exact as the type of the activations resolves.
EXACT = 1e-7
# One that is called on what it gave has no last place in the dataflow: it needs more.
MORE_SWEEPS = 30
_DONE, _RAN, _FAILED = 0.0, 1.0, 2.0


class SweptSite(Protocol):
    """A normalization that is fitted.

    Attributes:
        rounding: what the type of its activations resolves.
        moments: of what it sees.
    """

    rounding: float
    moments: tuple[Moments, ...]

    def end_sweep(self) -> float:
        """Fit it; how far that moved its output, in units of its typical standard deviation."""
        ...


def settle(
    sites: Sequence[SweptSite],
    data: Iterable[Any],
    batches: int | None,
    models: Sequence[nn.Module],
    run: Callable[[Any, bool], None],
    title: str,
    tolerance: float = EXACT,
    most: int | None = None,
) -> None:
    """Call `run` with every batch, and whether it is the first sweep, until no site moves.

    Each sweep leaves the random state as it found it, so that all of them see the same shuffles.

    Args:
        models: what `run` runs; in eval mode inside, and as before after it.
        data: read once per sweep; the batches of an iterator, which ends, are kept in memory.
        batches: how many of them to read, by default all.
        tolerance: what counts as no move, in units of a site's typical standard deviation.
        most: how many sweeps at most, by default as many as the sites may need.

    Raises:
        NormswapError: no process has a batch, or one of them failed.
    """
    with together():
        data = repeatable(data, batches)
    moments = [each for site in sites for each in site.moments]
    with _progress(title) as show:
        for sweep in range(most or len(sites) + MORE_SWEEPS):
            with evaluating(*models):
                count = _sweep(data, batches, moments, run, sweep, show)
            if sweep == 0 and batches is not None and count < batches:
                warn(
                    f"the data have {count} batches, fewer than the {batches} that were asked for",
                    stacklevel=3,
                )
            for each in moments:
                each.end_sweep()
            if ranks() > 1:
                _exchange(_DONE, moments)
            moved = largest(max([site.end_sweep() for site in sites]))
            if moved <= max(tolerance, *(site.rounding for site in sites)):
                break


def _sweep(
    data: Iterable[Any],
    batches: int | None,
    moments: list[Moments],
    run: Callable[[Any, bool], None],
    sweep: int,
    show: Callable[[str], None],
) -> int:
    """Run this process's batches; one that has fewer than the others goes on listening to them.

    Returns:
        How many there were.
    """
    read, reading = 0.0, Reading(data)
    waiting = islice(reading, batches)
    while True:
        state, problem = _DONE, None
        try:
            for batch in islice(waiting, 1):
                show(f"sweep {sweep + 1}, batch {reading.number}")
                with reading.current():
                    run(batch, sweep == 0)
                state = _RAN
        except Exception as error:
            state, problem = _FAILED, error
        states = [state] if ranks() == 1 else _exchange(state, moments)
        if problem is not None:
            raise problem
        if _FAILED in states:
            raise NormswapError(f"process {states.index(_FAILED)} failed; its message says why")
        if not any(states):
            break
        read += sum(states)
    if not read:
        raise NormswapError("there is no batch; pass data that yields at least one")
    return reading.number


def _exchange(state: float, moments: list[Moments]) -> list[float]:
    """Tell the other processes, and note what they tell; the state of each."""
    own = distributed.get_rank()
    parts = [torch.tensor([state], dtype=torch.float64), *(each.own for each in moments)]
    every = gathered_parts(parts)
    for index, each in enumerate(moments, 1):
        each.ranks = [None if rank == own else told[index] for rank, told in enumerate(every)]
    return [float(told[0]) for told in every]


@contextmanager
def _progress(title: str) -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that goes away at the end; nothing elsewhere."""
    with progress(Words("{task.description}"), TimeElapsedColumn(), quiet=False) as bar:
        task = bar.add_task(title, total=None)
        yield lambda line: bar.update(task, description=f"{title}: {line}")
