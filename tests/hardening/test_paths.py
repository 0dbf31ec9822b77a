"""Paths that the system refuses: the Python API tells of them in one line, as the commands do."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import REFUSED, child, contents
from torch import nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.core.paths import check_reachable
from normswap.fit.data import open_data
from normswap.report.onnx_model import OnnxModel
from normswap.store import resolve

X = torch.ones(2, 1, 4, 4)
DATA = [(X, torch.tensor([0, 1]))]


def net() -> nn.Module:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*first, nn.Linear(16, 3)).eval()


READ: dict[str, Callable[[str], object]] = {
    "load": lambda path: ns.load(path, source=net),
    "validate": lambda path: ns.validate(path, net(), X),
    "resume": lambda path: ns.finetune(net(), DATA, steps=1, checkpoint=path, resume=True),
    "a model": resolve,
    "a program": lambda path: resolve(f"{path}.pt2"),
    "a factory": lambda path: resolve(f"{path}.py:net"),
    "a checkpoint": lambda path: resolve("demo:digits", checkpoint=Path(path)),
    "arrays": lambda path: open_data(f"{path}.npz"),
    "a zip": lambda path: open_data(f"{path}.zip"),
    "images": open_data,
    "an ONNX file": lambda path: OnnxModel(Path(path)),
}
WRITTEN: dict[str, Callable[[str], object]] = {
    "save": lambda path: ns.save(net(), path),
    "export": lambda path: ns.export(net(), X, f"{path}/model.onnx"),
    "finetune": lambda path: ns.finetune(net(), DATA, steps=1, checkpoint=path),
    "a report": lambda path: ns.compare(net(), net(), inputs=X).write(Path(path)),
}
LONG = {
    "a long name": "n" * 300,
    "a long path": "folder/" * 800,
    "below a long name": "n" * 300 + "/x",
}
BAD = {
    **LONG,
    "below a file": "file/below",
    "far below a file": "file/below/it",
    "a loop of links": "loop",
    "below a loop": "loop/below",
    "two links in a loop": "one/x",
    "a NUL": "a\0b",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", [*READ, *WRITTEN])
def test_a_path_that_cannot_be_is_refused_in_one_line(verb: str, folder: Path) -> None:
    before = contents(folder)
    for path in BAD.values():
        with pytest.raises(NormswapError) as refused:
            (READ | WRITTEN)[verb](path)
        assert str(refused.value).isprintable() and len(str(refused.value)) < 900
        assert contents(folder) == before


def test_what_is_read_says_that_the_name_is_too_long_and_not_that_there_is_no_such_file(
    folder: Path,
) -> None:
    for verb in READ.values():
        for path in LONG.values():
            with pytest.raises(NormswapError, match="File name too long; "):
                verb(path)
    with pytest.raises(NormswapError, match="File name too long"):
        ns.export(net(), X, "n" * 300)


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs another user")
def test_a_folder_into_which_the_user_may_not_look_is_told_of(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)

    def work() -> None:
        os.setgid(12345)
        os.setuid(12345)
        check_reachable(locked / "model.onnx")

    assert child(work) == REFUSED
