"""Batches without end, from an iterable that ends, and from any place in it."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from normswap.errors import NormswapError
from normswap.fit.batch import size_of
from normswap.fit.randomness import Apart, Randomness
from normswap.fit.splits import FirstSamples


class Stream:
    """The batches of `data`, read again from the start whenever they end.

    What is drawn while they are read (an order, a crop, a flip) is drawn from random numbers of
    their own, so a place in the data is two things: where these were at the start of the pass, and
    how many batches of it were read. Reading as many again leads to the same place exactly, through
    the workers of a DataLoader too, unless they outlive a pass (`persistent_workers`) and draw.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.passes = self.read = self.samples = 0  # the last two of this pass
        self._random = Apart()
        self._generators = _generators(data)
        # Not begun before it is asked for, as a place to go to may come first.
        self._batches: Iterator[Any] | None = None

    def _begin(self) -> Iterator[Any]:
        for each in _parts(self.data):
            if hasattr(each, "set_epoch"):  # of which a DistributedSampler makes its order
                each.set_epoch(self.passes)
        self._start = self._random.state, [each.get_state() for each in self._generators]
        self.passes += 1
        self.read = self.samples = 0
        with self._random.drawing():
            return iter(self.data)

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._begin()
        for _ in range(2):
            with self._random.drawing():
                try:
                    batch = next(self._batches)
                except StopIteration:
                    pass
                else:
                    self.read += 1
                    self.samples += size_of(batch)
                    return batch
            if not self.read or self._batches is self.data:
                break
            self._batches = self._begin()
        if self.read:
            raise NormswapError(
                f"the data ended after {self.read} batches and cannot be read again; "
                "pass a DataLoader or a list, or take fewer steps"
            )
        raise NormswapError("there is no batch; pass data that yields at least one")

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
            for index, generator in enumerate(self._generators):
                if f"generator{index}" in place:
                    generator.set_state(place[f"generator{index}"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise NormswapError(
                "the place in the data cannot be read; the checkpoint is damaged, remove it and "
                "start again"
            ) from error
        self.passes = passes - 1
        self._batches = self._begin()
        while self.read < read:
            with self._random.drawing():
                batch = next(self._batches, None)
            if batch is None:
                break
            self.read += 1
            self.samples += size_of(batch)
        if (self.read, self.samples) != (read, samples):
            raise NormswapError(
                f"the interrupted run had read {read} batches with {samples} samples, and here "
                f"are {self.read} with {self.samples}; resume with the data it began with"
            )


def peeked(data: Iterable[Any], samples: int) -> tuple[list[Any], Iterable[Any]]:
    """The first batches of `data`, with at least so many samples, and all of them, as if unread.

    Raises:
        NormswapError: there is none.
    """
    generators = _generators(data)
    random, states = Randomness.now(), [each.get_state() for each in generators]
    iterator = iter(data)
    first = list(FirstSamples(iterator, samples))
    if not first:
        raise NormswapError("there is no batch; pass data that yields at least one")
    if iterator is data:  # it can be read once only, and goes on to draw where it is
        return first, chain(first, iterator)
    random.restore()
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    return first, data


def _parts(data: Any) -> list[Any]:
    """A DataLoader and its samplers, which order its samples; of other data, the data alone."""
    batches = getattr(data, "batch_sampler", None)
    return [data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None)]


def _generators(data: Any) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers draw from, if they have their own."""
    found = [getattr(each, "generator", None) for each in _parts(data)]
    own = {id(each): each for each in found if isinstance(each, torch.Generator)}
    return list(own.values())
