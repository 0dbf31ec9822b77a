"""Data by name: what comes out is what the files hold, in a fixed and fair order."""

import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from normswap.core.errors import NormswapError
from normswap.demo.digits import digits_data
from normswap.fit.batch import inputs_of, labels_of
from normswap.fit.data import open_data

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 6


def _pixels(seed: int, size: tuple[int, int] = (6, 5)) -> np.ndarray:
    height, width = size
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _members(prefix: str = "") -> dict[str, bytes]:
    """PNG files, lossless, each made from a seed of its own: class number * 100 + index."""
    return {
        f"{prefix}{name}/{index}.png": _png(_pixels(label * 100 + index))
        for label, name in enumerate(CLASSES)
        for index in range(PER_CLASS)
    }


def _write(where: Path, members: dict[str, bytes]) -> Path:
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return where
    for name, content in members.items():
        file = where / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return where


def _error(call: Callable[[], Any]) -> str:
    with pytest.raises(NormswapError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _all(data: Any) -> tuple[Tensor, Tensor]:
    x, y = zip(*data, strict=True)
    return torch.cat(x), torch.cat(y)


@pytest.mark.parametrize("place", ["images", "images.zip"])
@pytest.mark.parametrize("prefix", ["", "wrapper/"])
def test_every_image_comes_once_with_its_label(tmp_path: Path, place: str, prefix: str) -> None:
    data = open_data(str(_write(tmp_path / place, _members(prefix))), batch_size=4)
    assert len(data) == 5  # 18 images
    assert [len(x) for x, _ in data] == [4, 4, 4, 4, 2]
    x, y = _all(data)
    assert x.dtype == torch.float32 and y.dtype == torch.int64
    expected = {
        _pixels(label * 100 + index).tobytes(): label
        for label in range(len(CLASSES))
        for index in range(PER_CLASS)
    }
    for image, label in zip(x, y, strict=True):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        assert expected.pop(pixels.tobytes()) == label
    assert not expected


def test_order_is_shuffled_and_the_same_each_time(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "images.zip", _members()))
    data = open_data(path)
    (x, y), (again, _) = _all(data), _all(data)
    assert torch.equal(x, again)
    assert torch.equal(x, _all(open_data(path))[0])
    assert y.tolist() != sorted(y.tolist())
    assert not torch.equal(x, _all(open_data(path, seed=1))[0])


def test_folder_and_zip_of_it_give_the_same_batches(tmp_path: Path) -> None:
    members = _members()
    folder, archive = _write(tmp_path / "i", members), _write(tmp_path / "i.zip", members)
    for a, b in zip(_all(open_data(str(folder))), _all(open_data(str(archive))), strict=True):
        assert torch.equal(a, b)


def test_limit_keeps_the_first_of_the_same_order(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "images", _members()))
    limited = open_data(path, batch_size=4, limit=7)
    assert len(limited) == 2
    assert torch.equal(_all(limited)[0], _all(open_data(path))[0][:7])


def test_opening_leaves_the_random_state(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    next(iter(open_data(str(_write(tmp_path / "images", _members())))))
    assert torch.equal(torch.get_rng_state(), before)


def test_mean_and_std_are_applied_per_channel(tmp_path: Path) -> None:
    path, mean, std = str(_write(tmp_path / "i", _members())), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain, scaled = _all(open_data(path))[0], _all(open_data(path, mean=mean, std=std))[0]
    for channel in range(3):
        expected = (plain[:, channel].double() - mean[channel]) / std[channel]
        torch.testing.assert_close(scaled[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    one = _all(open_data(path, mean=[0.5]))[0]
    torch.testing.assert_close(one, plain - 0.5)


def test_images_are_resized_and_made_grey_as_the_model_wants(tmp_path: Path) -> None:
    _write(tmp_path / "i", {"a/0.png": _png(np.full((20, 30, 3), 51, np.uint8))})
    x = next(iter(open_data(str(tmp_path / "i"), image_size=(1, 8, 9))))
    assert torch.equal(x, torch.full((1, 1, 8, 9), 0.2))
    picture = Image.fromarray(_pixels(1, (20, 30)))
    _write(tmp_path / "j", {"0.png": _png(np.asarray(picture))})
    x = next(iter(open_data(str(tmp_path / "j"), image_size=(3, 8, 9))))
    covering = np.asarray(picture.resize((12, 8), Image.Resampling.BILINEAR)) / 255
    expected = covering[:, 2:11]  # the middle, of which the larger margin comes first
    torch.testing.assert_close(x[0].permute(1, 2, 0).double(), torch.tensor(expected))


@pytest.mark.parametrize("prefix", ["", "only/"])
def test_images_without_classes_have_no_labels(tmp_path: Path, prefix: str) -> None:
    path = _write(tmp_path / "i", {f"{prefix}{n}.png": _png(_pixels(n)) for n in range(3)})
    (batch,) = open_data(str(path))
    assert isinstance(batch, Tensor) and batch.shape == (3, 3, 6, 5)


def test_what_a_desktop_leaves_in_a_zip_is_no_image(tmp_path: Path) -> None:
    extra = {"__MACOSX/ant/._0.png": b"x", "ant/.hidden.png": b"x", "bee/notes.txt": b"x"}
    x, _ = _all(open_data(str(_write(tmp_path / "i.zip", _members() | extra))))
    assert len(x) == len(CLASSES) * PER_CLASS


def test_member_that_points_outside_is_read_and_not_written(tmp_path: Path) -> None:
    _write(tmp_path / "i.zip", {"../../up/a.png": _png(_pixels(0)), "../b/b.png": _png(_pixels(1))})
    before = sorted(tmp_path.parent.rglob("*"))
    assert len(_all(open_data(str(tmp_path / "i.zip")))[0]) == 2
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_bombs_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "i.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(2**20 + 1))
    message = _error(lambda: list(open_data(str(tmp_path / "i.zip"), memory_limit="1MiB")))
    assert "'a/0.png'" in message and "asks for 16.0 MiB of memory (to decode 1.0 MiB)" in message
    _write(tmp_path / "j", {"0.png": _png(_pixels(0))})
    message = _error(lambda: list(open_data(str(tmp_path / "j"), memory_limit=500)))
    assert "(5 x 6 pixels), and the limit is 500 B" in message


@pytest.mark.parametrize("content", [b"", b"no image", _png(_pixels(0))[:60]])
def test_unreadable_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = _write(tmp_path / "i", _members() | {"bee/bad.png": content})
    message = _error(lambda: list(open_data(str(path))))
    assert "cannot read the image 'bee/bad.png'" in message


def test_sixteen_bit_image_is_refused_rather_than_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 5000, np.uint16)).save(tmp_path / "deep.png")
    assert "not 8-bit" in _error(lambda: list(open_data(str(tmp_path))))


def test_data_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    _write(tmp_path / "text", {"a/readme.txt": b"x"})
    _write(tmp_path / "none.zip", {})
    for name in ("empty", "text", "none.zip"):
        path = str(tmp_path / name)
        assert "there are no images" in _error(lambda path=path: open_data(path))


def test_images_in_and_beside_class_folders_are_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "i", _members() | {"stray.png": _png(_pixels(0))})
    assert "'stray.png'" in _error(lambda: open_data(str(path)))


def test_images_of_different_sizes_need_the_models_size(tmp_path: Path) -> None:
    path = _write(tmp_path / "i", {f"{n}.png": _png(_pixels(n, (5 + n, 5))) for n in range(2)})
    assert "differ in size" in _error(lambda: list(open_data(str(path))))
    assert next(iter(open_data(str(path), image_size=(3, 4, 4)))).shape == (2, 3, 4, 4)


def test_damaged_or_missing_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 no zip")
    assert "no zip, or damaged" in _error(lambda: open_data(str(tmp_path / "bad.zip")))
    assert "check the path" in _error(lambda: open_data(str(tmp_path / "gone.zip")))


def test_missing_pillow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "i", _members())
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert "pip install 'normswap[train]'" in _error(lambda: open_data(str(tmp_path / "i")))


def test_arrays_come_as_they_are_with_their_labels(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(10, 3, 4)), np.arange(10, dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    got_x, got_y = _all(open_data(str(tmp_path / "d.npz"), batch_size=4))
    assert got_x.dtype == torch.float32 and got_y.dtype == torch.int64
    assert torch.equal(got_x, torch.tensor(x, dtype=torch.float32)[got_y])
    assert sorted(got_y.tolist()) == list(range(10))
    np.savez(tmp_path / "unlabelled.npz", x=x)
    assert all(isinstance(batch, Tensor) for batch in open_data(str(tmp_path / "unlabelled.npz")))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.ones((2, 3))}, "has no array x but images"),
        ({"x": np.ones(3)}, "of shape (3,)"),
        ({"x": np.ones((0, 3))}, "of shape (0, 3)"),
        ({"x": np.array([["a", "b"]])}, "x in"),
        ({"x": np.ones((2, 3)), "y": np.ones(3, int)}, "for each of the 2 samples"),
        ({"x": np.ones((2, 3)), "y": np.ones(2)}, "y in"),
    ],
)
def test_wrong_arrays_are_told(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    assert words in _error(lambda: open_data(str(tmp_path / "d.npz")))


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_arrays_that_are_pickles_are_refused_and_do_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    np.savez(tmp_path / "d.npz", x=np.array([[_Runs(ran)]], dtype=object))
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(_Runs(ran)))
    assert "Python objects" in _error(lambda: open_data(str(tmp_path / "d.npz")))
    assert "is no zip" in _error(lambda: open_data(str(tmp_path / "plain.npz")))
    assert not ran.exists()
    np.load(tmp_path / "plain.npz", allow_pickle=True)
    assert ran.exists()  # the file was dangerous indeed


def test_missing_or_damaged_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no zip")
    assert "damaged" in _error(lambda: open_data(str(tmp_path / "bad.npz")))
    assert "check the path" in _error(lambda: open_data(str(tmp_path / "gone.npz")))


def test_demo_data_are_the_training_split_unless_the_test_split_is_named() -> None:
    for reference, split in (("demo:digits", "train"), ("demo:digits/test", "test")):
        x, y = digits_data(split)
        data = open_data(reference)
        got_x, got_y = _all(data)
        assert torch.equal(got_x[data.order.argsort()], x)
        assert torch.equal(got_y[data.order.argsort()], y)
    assert "demo:digits/test" in _error(lambda: open_data("demo:digit"))


def test_factory_of_batches_is_returned_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "def loader(): return DataLoader(TensorDataset(torch.ones(5, 2)), batch_size=2)\n"
        "def number(): return 3\n"
        "def once(): return iter([torch.ones(1)])\n"
    )
    assert isinstance(open_data(f"{tmp_path}/mine.py:loader"), DataLoader)
    assert "an iterable" in _error(lambda: open_data(f"{tmp_path}/mine.py:number"))
    assert "once only" in _error(lambda: open_data(f"{tmp_path}/mine.py:once"))


@pytest.mark.parametrize("reference", ["", "nowhere", "pictures.tar"])
def test_unknown_data_are_told_with_what_data_can_be(reference: str) -> None:
    assert "a folder or a zip of images" in _error(lambda: open_data(reference))


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "i", _members()))
    assert "batch size" in _error(lambda: open_data(path, batch_size=0))
    assert "limit" in _error(lambda: open_data(path, limit=0))
    assert "2 numbers for 3 channels" in _error(lambda: list(open_data(path, mean=[0, 0])))
    assert "above 0" in _error(lambda: open_data(path, std=[0, 1, 1]))
    assert "takes 4" in _error(lambda: open_data(path, image_size=(4, 8, 8)))


def test_inputs_and_labels_of_each_form_of_batch() -> None:
    x, y = torch.ones(2, 3), torch.tensor([1, 2])
    assert inputs_of(x) == ((x,), {}) and labels_of(x) is None
    for batch in ((x, y), [x, y], (x, y, "name")):
        assert inputs_of(batch) == ((x,), {}) and labels_of(batch) is y
    assert inputs_of((x,)) == ((x,), {}) and labels_of((x,)) is None
    words = {"input_ids": x, "labels": y}
    assert inputs_of(words) == ((), words) and labels_of(words) is y
    (batch,) = DataLoader(TensorDataset(x, y), batch_size=2)
    assert torch.equal(inputs_of(batch)[0][0], x) and torch.equal(labels_of(batch), y)


@pytest.mark.parametrize("batch", [None, (), {}, [], "text", 3])
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    assert "yield tensors, tuples" in _error(lambda: inputs_of(batch))
