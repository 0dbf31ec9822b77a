"""Batches without end, from an iterable that ends, and from any place in it."""

from collections.abc import Iterable, Iterator
from itertools import chain
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
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.passes = self.samples = 0  # the latter of this pass
        self._random = Apart(generators_of(data))
        # Not begun before it is asked for, as a place to go to may come first.
        self._batches: Reading | None = None

    @property
    def read(self) -> int:
        """How many batches of this pass were read."""
        return 0 if self._batches is None else self._batches.number

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
        state, generators = self._start
        named = {f"generator{index}": each for index, each in enumerate(generators)}
        counts = torch.tensor([self.passes, self.read, self.samples])
        return {**state.tensors(), **named, "counts": counts}

    def go_to(self, place: dict[str, Tensor]) -> None:
        """Read up to `place`.

        Raises:
            NormswapError: the data are not those it was taken in, as far as their number tells.
        """
        try:
            passes, read, samples = place["counts"].tolist()
            self._random.state = Randomness.of(place)
            self._random.states = [
                _checked(place.get(f"generator{index}", state))
                for index, state in enumerate(self._random.states)
            ]
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise NormswapError(
                "the place in the data cannot be read; the checkpoint is damaged, remove it and "
                "start again"
            ) from error
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


def _checked(state: Tensor) -> Tensor:
    """`state`, if it is one of a generator.

    Raises:
        RuntimeError: it is none.
    """
    torch.Generator().set_state(state)
    return state
