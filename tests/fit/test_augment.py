"""Shuffled data: every sample of a process once, moved and mirrored as they may be."""

import pytest
import torch

from normswap.core.errors import NormswapError
from normswap.fit import augment
from normswap.fit.augment import Shuffled, cropped, flipped, shuffled
from normswap.fit.data import Data

X = torch.arange(1, 10.0).view(9, 1, 1, 1) * torch.ones(9, 2, 3, 4)
Y = torch.arange(9)


def data(samples: int = 9, batch_size: int = 4) -> Data:
    return Data(lambda chosen: X[chosen], Y, torch.arange(samples), batch_size)


def test_each_reading_has_another_order_and_whole_batches() -> None:
    one, other = (list(Shuffled(data())) for _ in range(2))
    assert [len(y) for _, y in one] == [4, 4]
    assert all(torch.equal(x, X[y]) for x, y in one)
    assert len({int(label) for _, y in one for label in y}) == 8
    assert not torch.equal(torch.cat([y for _, y in one]), torch.cat([y for _, y in other]))


def test_data_smaller_than_a_batch_are_one() -> None:
    assert [len(y) for _, y in Shuffled(data(3, 64))] == [3]


def test_processes_share_the_samples_and_one_without_has_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(augment, "ranks", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(augment, "rank_of_this", lambda rank=rank: rank)
        seen.append([int(label) for _, y in Shuffled(data(8)) for label in y])
    assert sorted(seen[0] + seen[1]) == list(range(8))
    assert list(Shuffled(data(1))) == []


def test_a_crop_is_a_window_of_the_image_in_zeros() -> None:
    image = torch.arange(1, 25.0).view(1, 2, 3, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    windows = [
        padded[0, :, top : top + 3, left : left + 4] for top in range(3) for left in range(3)
    ]
    hits = [0] * 9
    for found in cropped(image.expand(300, -1, -1, -1), 1):
        (index,) = [i for i, window in enumerate(windows) if torch.equal(found, window)]
        hits[index] += 1
    assert min(hits) > 10


def test_half_of_the_images_are_mirrored() -> None:
    image = torch.arange(24.0).view(1, 2, 3, 4)
    found = flipped(image.expand(300, -1, -1, -1))
    mirrored = [torch.equal(each, image[0].flip(-1)) for each in found]
    assert all(m or torch.equal(each, image[0]) for m, each in zip(mirrored, found, strict=True))
    assert 100 < sum(mirrored) < 200


def test_only_images_that_normswap_reads_are_moved() -> None:
    own = [X]
    assert shuffled(own, crop=0, flip=False) is own
    with pytest.raises(NormswapError, match="let your own loader do it"):
        shuffled(own, crop=1, flip=False)
    flat = Data(lambda chosen: X[chosen].flatten(1), Y, torch.arange(9), 4)
    with pytest.raises(NormswapError, match="for images"):
        shuffled(flat, crop=0, flip=True)
    assert len(list(shuffled(flat, crop=0, flip=False))) == 2
