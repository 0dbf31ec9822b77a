"""Batches without end: the same ones again from any place, and nothing else disturbed."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from learners import X, batches, loader, moved_and_mirrored
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from normswap.core.errors import NormswapError
from normswap.fit.stream import Stream, peeked

KINDS: dict[str, Callable[[], Iterable[Any]]] = {
    "a list": batches,
    "cropped and mirrored": moved_and_mirrored,
    "a loader": loader,
    "a loader with workers": lambda: loader(2),
    "a loader with a generator": lambda: loader(generator=torch.Generator().manual_seed(5)),
}


def read(stream: Stream, count: int) -> Tensor:
    return torch.stack([next(stream)[0] for _ in range(count)])


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_from_a_place_come_the_batches_that_came_after_it(
    make: Callable[[], Iterable[Any]],
) -> None:
    stream = Stream(make())
    read(stream, 7)  # five are a pass
    place = {name: tensor.clone() for name, tensor in stream.place().items()}
    expected = read(stream, 6)
    torch.manual_seed(99)
    other = Stream(make())
    other.go_to(place)
    assert torch.equal(read(other, 6), expected)


def test_each_pass_has_another_order() -> None:
    for data in (loader(), DataLoader(TensorDataset(X), 8, sampler=DistributedSampler(X, 1, 0))):
        stream = Stream(data)
        assert not torch.equal(read(stream, 5), read(stream, 5))


def test_reading_draws_nothing_that_others_draw_from() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    stream = Stream(loader())
    read(stream, 6)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_after_a_look_at_the_first_batches_the_data_are_as_if_unread(
    make: Callable[[], Iterable[Any]],
) -> None:
    torch.manual_seed(1)
    expected = read(Stream(make()), 8)
    torch.manual_seed(1)
    first, data = peeked(make(), 9)
    assert [len(x) for x, _ in first] == [8, 8]
    assert torch.equal(read(Stream(data), 8), expected)


def test_a_look_at_an_iterator_loses_no_batch() -> None:
    _, data = peeked(iter(batches()), 9)
    assert torch.equal(torch.cat([x for x, _ in data]), X)


def test_data_that_end_for_good_are_told_of() -> None:
    stream = Stream(iter(batches()))
    read(stream, 5)
    with pytest.raises(NormswapError, match="ended after 5 batches and cannot be read again"):
        next(stream)
    for none in ([], iter([])):
        with pytest.raises(NormswapError, match="there is no batch"):
            next(Stream(none))
        with pytest.raises(NormswapError, match="there is no batch"):
            peeked(none, 1)


@pytest.mark.parametrize("others", [batches()[:2], batches(4)], ids=["fewer", "smaller"])
def test_a_place_in_other_data_is_refused(others: list[Any]) -> None:
    stream = Stream(batches())
    read(stream, 3)
    with pytest.raises(NormswapError, match=r"had read 3 batches with 24 samples, and here are"):
        Stream(others).go_to(stream.place())
