"""Batches without end, from an iterable that ends, and from any place in it."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from normswap.errors import NormswapError
from normswap.fit.randomness import Apart, Randomness


class Stream:
    """The batches of `data`, read again from the start whenever they end.

    What is drawn while they are read (an order, a crop, a flip) is drawn from random numbers of
    their own, so a place in the data is two things: where these were at the start of the pass, and
    how many batches of it were read. Reading as many again leads to the same place exactly, through
    the workers of a DataLoader too.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.read = 0
        self._random = Apart()
        self._generators = _generators(data)
        self._begin()

    def _begin(self) -> None:
        self._start = self._random.state, [each.get_state() for each in self._generators]
        self.read = 0
        with self._random.drawing():
            self._batches: Iterator[Any] = iter(self.data)

    def __next__(self) -> Any:
        for _ in range(2):
            with self._random.drawing():
                try:
                    batch = next(self._batches)
                except StopIteration:
                    pass
                else:
                    self.read += 1
                    return batch
            if not self.read or self._batches is self.data:
                break
            self._begin()
        if self.read:
            raise NormswapError(
                f"the data ended after {self.read} batches and cannot be read again; "
                "pass a DataLoader or a list, or take fewer steps"
            )
        raise NormswapError("there is no batch; pass data that yields at least one")

    def place(self) -> dict[str, Tensor]:
        """Where in the data this is, as tensors."""
        state, generators = self._start
        named = {f"generator{index}": each for index, each in enumerate(generators)}
        return {**state.tensors(), **named, "read": torch.tensor(self.read)}

    def go_to(self, place: dict[str, Tensor]) -> None:
        """Read up to `place`.

        Raises:
            NormswapError: the data end before it, so they are not those it was taken in.
        """
        self._random.state = Randomness.of(place)
        for index, generator in enumerate(self._generators):
            if f"generator{index}" in place:
                generator.set_state(place[f"generator{index}"])
        self._begin()
        for _ in range(int(place["read"])):
            with self._random.drawing():
                try:
                    next(self._batches)
                except StopIteration:
                    raise NormswapError(
                        f"the data have less than the {int(place['read'])} batches that the "
                        "interrupted run read; resume with the data it began with"
                    ) from None
        self.read = int(place["read"])


def _generators(data: Any) -> list[torch.Generator]:
    """Those that a DataLoader and its samplers draw an order from, if they have their own."""
    sampler = getattr(data, "sampler", None)
    inner = getattr(getattr(data, "batch_sampler", None), "sampler", None)
    found = [getattr(each, "generator", None) for each in (data, sampler, inner)]
    own = {id(each): each for each in found if isinstance(each, torch.Generator)}
    return list(own.values())
