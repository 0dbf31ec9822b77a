"""Batches that a run is judged by, and that it does not train on.

A tenth of the data, at least one batch, and no more than `MOST` samples. Of images that normswap
reads they are samples that are never trained on. Of a user's own data they are the first batches of
each pass: in a list always the same; of a loader that shuffles, others may come back in a later
pass. Where there is one batch alone it serves for both.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from math import inf, isfinite
from typing import Any

from normswap.core.errors import NormswapError
from normswap.fit.augment import Shuffled
from normswap.fit.batch import size_of
from normswap.fit.ranks import largest
from normswap.fit.reading import Kept, Reading
from normswap.fit.stream import Stream, beginning

MOST = 512  # samples
SHARE = 10  # one of so many batches
MEASURES = 10  # of a run
_PATIENCE = 4  # measures that are each worse than the one before, at the start of a run


@dataclass
class HeldBack:
    """Data in two parts.

    Attributes:
        held: batches to measure on.
        first: batches to calibrate on, of those that are trained on.
        stream: of what is trained on.
    """

    held: Kept
    first: Kept
    stream: Stream


def held_back(data: Iterable[Any], planned: int, place: Any = None) -> HeldBack:
    """Hold back a part of `data`, of which `planned` batches will be read.

    Args:
        place: in the data, of the run that goes on (`Stream.place`).

    Raises:
        NormswapError: there is no batch, or one of them cannot be read.
    """
    random, again = beginning(data, place), beginning(data, place)
    if isinstance(data, Shuffled):
        apart, rest = data.held_back(SHARE, MOST)
        held = Kept(Reading(apart))
        return HeldBack(held, taken(Reading(rest, again), MOST), Stream(rest, random=random))
    reading = Reading(data, again)
    held, seen = Kept(hint=reading.hint), 0
    for batch in reading:
        held.append(batch)
        seen += size_of(batch)
        if len(held) >= max(_count(data, planned) // SHARE, 1) or seen >= MOST:
            break
    if not held:
        raise NormswapError("there is no batch; pass data that yields at least one")
    first = taken(reading, MOST)
    if isinstance(data, Iterator):  # it can be read once only, and goes on to draw where it is
        data = chain(first, reading, held)
        return HeldBack(held, first or held, Stream(data, random=random))
    return HeldBack(
        held, first or held, Stream(data, skip=len(held) if first else 0, random=random)
    )


def _count(data: Iterable[Any], planned: int) -> int:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a dataset of which nobody knows
        return planned


def taken(reading: Reading, samples: int) -> Kept:
    """The next batches, with at least so many samples where there are as many."""
    found, seen = Kept(before=reading.number, hint=reading.hint), 0
    for batch in reading:
        found.append(batch)
        seen += size_of(batch)
        if seen >= samples:
            break
    return found


@dataclass
class Judge:
    """How far a model is from its goal on what was held back, as it trains.

    Attributes:
        measure: gives the distance; every process calls it.
        curve: after which step it was how far.
    """

    measure: Callable[[], float]
    curve: list[tuple[int, float]] = field(default_factory=list)

    @staticmethod
    def is_due(step: int, steps: int) -> bool:
        """Whether to look after so many of all steps."""
        return step == steps or step % -(-steps // MEASURES) == 0

    def look(self, step: int) -> bool:
        """Measure; whether no moment before was better."""
        distance = largest(self.measure())
        distance = distance if isfinite(distance) else inf
        best = min((each for _, each in self.curve), default=inf)
        self.curve.append((step, distance))
        return distance < best or len(self.curve) == 1

    @property
    def last(self) -> float:
        """The distance that was measured last."""
        return self.curve[-1][1]

    @property
    def best(self) -> tuple[int, float]:
        """The step after which the distance was least, and that."""
        return min(self.curve, key=lambda each: each[1])

    @property
    def only_worse(self) -> bool:
        """Whether the run has begun with nothing but steps back."""
        distances = [each for _, each in self.curve]
        pairs = list(pairwise(distances))
        worse = (after > before or after == inf for before, after in pairs)
        return len(pairs) >= _PATIENCE and all(worse)
