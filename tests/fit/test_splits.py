"""Data named on the command line: held apart where they can be, and no more than asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from normswap.demo.digits import digits_data
from normswap.fit.data import open_named, open_split
from normswap.fit.reading import FirstSamples

CODE = """
import torch

def batches():
    return [(torch.full((4, 2), float(i)), torch.zeros(4).long()) for i in range(5)]
"""


@pytest.fixture
def arrays(tmp_path: Path) -> str:
    np.savez(tmp_path / "data.npz", x=np.arange(50.0).reshape(50, 1), y=np.zeros(50, int))
    return str(tmp_path / "data.npz")


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "code.py").write_text(CODE)
    return str(tmp_path / "code.py")


def values(data) -> list[float]:
    return [value for x, *_ in data for value in x.flatten().tolist()]


def test_a_fifth_is_held_out_and_shared_with_nothing(arrays):
    training, test, said = open_split(arrays, 2000, None, None, None)
    assert len(values(test)) == 10 and said.startswith("10 samples")
    assert sorted(values(training) + values(test)) == list(range(50))


def test_no_more_samples_than_asked_for(arrays, code):
    training, _, _ = open_split(arrays, 7, None, None, None)
    assert len(values(training)) == 7
    training, _, _ = open_split(f"{code}:batches", 7, None, None, None)
    assert sum(len(x) for x, _ in training) == 8  # whole batches of the user's own


def test_the_digits_are_measured_on_their_test_split():
    training, test, said = open_split("demo:digits", 100, None, None, None)
    assert said == "demo:digits/test"
    assert sum(len(x) for x, _ in training) == 100
    held_out = torch.cat([x for x, _ in test])
    assert len(held_out) == len(digits_data("test")[0])


def test_images_get_the_mean_and_deviation_of_imagenet_unless_told_otherwise(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.new("RGB", (4, 4), (255, 0, 51)).save(tmp_path / "a" / "one.png")
    x = next(iter(open_named(str(tmp_path), None, None, None)))
    x = x[0] if isinstance(x, tuple) else x
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor(expected))
    x = next(iter(open_named(str(tmp_path), None, [0.0], [1.0])))
    x = x[0] if isinstance(x, tuple) else x
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_first_samples_counts_keyword_batches():
    batches = [{"x": torch.zeros(3, 2)}] * 4
    assert len(list(FirstSamples(batches, 5))) == 2
