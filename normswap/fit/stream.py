"""Batches without end, from an iterable that ends, and from any place in it."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.fit.batch import size_of
from normswap.fit.randomness import Apart, Randomness
from normswap.fit.reading import Reading, generators_of, parts_of


class Stream:
    """The batches of `data`, read again from the start whenever they end.

    What is drawn while they are read (an order, a crop, a flip) is drawn from random numbers of
    their own, so a place in the data is two things: where these were at the start of the pass, and
    how many batches of it were read. Reading as many again leads to the same place exactly, through
    the workers of a DataLoader too, unless they outlive a pass (`persistent_workers`) and draw.

    Args:
        skip: how many batches at the start of each pass are left out.
        random: those with which the first pass begins, by default the numbers of this moment.
    """

    def __init__(self, data: Iterable[Any], *, skip: int = 0, random: Apart | None = None) -> None:
        self.data, self._skip = data, skip
        self.passes = self.samples = 0  # the latter of this pass
        self._random = Apart(generators_of(data)) if random is None else random
        self._first = self._random.state, self._random.states
        # Not begun before it is asked for, as a place to go to may come first.
        self._batches: Reading | None = None

    @property
    def read(self) -> int:
        """How many batches of this pass were read."""
        return 0 if self._batches is None else self._batches.number

    @property
    def hint(self) -> str:
        """As of the `Reading`."""
        return "" if self._batches is None else self._batches.hint

    @property
    def name(self) -> str:
        """Of the batch that was read last."""
        return f"batch {self.read}" + (f" of pass {self.passes}" if self.passes > 1 else "")

    def _begin(self) -> Reading:
        for each in parts_of(self.data):
            if hasattr(each, "set_epoch"):  # of which a DistributedSampler makes its order
                each.set_epoch(self.passes)
        self._start = self._random.state, self._random.states
        self.passes += 1
        self.samples = 0
        self._batches = Reading(self.data, self._random)
        for _ in islice(self._batches, self._skip):
            pass
        return self._batches

    def __next__(self) -> Any:
        batches = self._begin() if self._batches is None else self._batches
        for batch in batches:
            return self._counted(batch)
        read = self.read
        if read and not isinstance(self.data, Iterator):
            for batch in self._begin():
                return self._counted(batch)
        if read:
            raise NormswapError(
                f"the data ended after {read} batches and cannot be read again; "
                "pass a DataLoader or a list, or take fewer steps"
            )
        raise NormswapError("there is no batch; pass data that yields at least one")

    def _counted(self, batch: Any) -> Any:
        self.samples += size_of(batch)
        return batch

    def place(self) -> dict[str, Tensor]:
        """Where in the data this is, as tensors; once a batch was read."""
        counts = torch.tensor([self.passes, self.read, self.samples])
        first = {f"first.{name}": each for name, each in _tensors(*self._first).items()}
        return {**_tensors(*self._start), **first, "counts": counts}

    def go_to(self, place: dict[str, Tensor]) -> None:
        """Read up to `place`.

        Raises:
            NormswapError: the data are not those it was taken in, as far as their number tells.
        """
        try:
            passes, read, samples = place["counts"].tolist()
        except (KeyError, ValueError, TypeError) as error:
            raise _damaged() from error
        _go_to(self._random, place)
        first = Apart(generators_of(self.data))
        _go_to(first, _first_of(place))
        self._first = first.state, first.states
        self.passes = passes - 1
        batches = self._begin()
        while self.read < read:
            batch = next(batches, None)
            if batch is None:
                break
            self._counted(batch)
        if (self.read, self.samples) != (read, samples):
            raise NormswapError(
                f"the interrupted run had read {read} batches with {samples} samples, and here "
                f"are {self.read} with {self.samples}; resume with the data it began with"
            )


def peeked(data: Iterable[Any], samples: int) -> tuple[list[Any], Iterable[Any]]:
    """The first batches of `data`, with at least so many samples, and all of them, as if unread.

    Raises:
        NormswapError: there is none, or one of them cannot be read.
    """
    reading, first, seen = Reading(data), list[Any](), 0
    for batch in reading:
        first.append(batch)
        seen += size_of(batch)
        if seen >= samples:
            break
    if not first:
        raise NormswapError("there is no batch; pass data that yields at least one")
    # An iterator can be read once only, and goes on to draw where it is.
    return first, chain(first, reading) if isinstance(data, Iterator) else data


def beginning(data: Iterable[Any], place: dict[str, Tensor] | None = None) -> Apart:
    """The random numbers with which the first pass over `data` begins.

    Args:
        place: of a run that goes on, as `Stream.place` tells it; None for one that begins.
    """
    random = Apart(generators_of(data))
    if place is not None:
        _go_to(random, _first_of(place))
    return random


def _first_of(place: dict[str, Tensor]) -> dict[str, Tensor]:
    start = "first."
    return {name[len(start) :]: each for name, each in place.items() if name.startswith(start)}


def _tensors(state: Randomness, generators: list[Tensor]) -> dict[str, Tensor]:
    return {
        **state.tensors(),
        **{f"generator{index}": each for index, each in enumerate(generators)},
    }


def _go_to(random: Apart, place: dict[str, Tensor]) -> None:
    """Give `random` the state of which `place` holds the `_tensors`."""
    try:
        random.state = Randomness.of(place)
        random.states = [
            _checked(place.get(f"generator{index}", state))
            for index, state in enumerate(random.states)
        ]
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _damaged() from error


def _damaged() -> NormswapError:
    return NormswapError(
        "the place in the data cannot be read; the checkpoint is damaged, remove it and start again"
    )


def _checked(state: Tensor) -> Tensor:
    """`state`, if it is one of a generator.

    Raises:
        RuntimeError: it is none.
    """
    torch.Generator().set_state(state)
    return state
