"""Text is UTF-8 in every locale, and a path that is not works or is refused in one line."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.core.atomic import of_one_file
from normswap.core.errors import NormswapError
from normswap.fit.data import open_data
from normswap.source.checkpoint import read_checkpoint
from normswap.store import resolve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there paths are any bytes")
BAD = os.fsdecode(b"b\xff")  # no UTF-8; Python puts a surrogate there


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of a saved model, and all else that a command reads, under names of any bytes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as made:
        os.chdir(made)
        try:
            normswap.save(resolve("demo:digits").model, "model")
            torch.save(resolve("demo:digits").model.state_dict(), "weights.pt")
            Path("code.py").write_text("from normswap.demo.digits import digits", encoding="utf-8")
            np.savez("data.npz", x=np.zeros((2, 1, 8, 8)), y=np.zeros(2, int))
            for name in ("model", "weights.pt", "code.py", "data.npz"):
                Path(f"{BAD}.{name}").symlink_to(name)
            yield Path(made)
        finally:
            os.chdir(before)


COMMANDS = {
    "a model": ["inspect", f"{BAD}.model"],
    "code": ["inspect", f"{BAD}.code.py:digits"],
    "a program": ["inspect", f"{BAD}.pt2"],
    "a checkpoint": ["inspect", "demo:digits", "--checkpoint", f"{BAD}.weights.pt"],
    "a source": ["inspect", "model", "--source", f"{BAD}.code.py:digits"],
    "data": ["convert", "demo:digits", "--to", "group_norm", "--data", f"{BAD}.data.npz"],
    "an output": ["convert", "demo:digits", "--to", "group_norm", "--out", BAD],
    "an output below": ["fold", "demo:digits", "--out", f"{BAD}/out"],
    "a comparison": ["compare", "demo:digits", "demo:digits", "--out", BAD],
    "an export": ["export", "demo:digits", "--out", BAD],
    "an ONNX file": ["validate", f"{BAD}.onnx", "demo:digits"],
    "two ONNX files": ["compare", f"{BAD}.onnx", f"{BAD}.onnx"],
    "a teacher": ["recover", "model", "--teacher", BAD, "--data", "demo:digits"],
    "a run": ["finetune", "demo:digits", "--data", "demo:digits", "--out", BAD],
    "a glob": ["fold", "demo:digits", "--include", BAD, "--out", "out"],
    "no command": [BAD],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_it_in_one_line(
    arguments: list[str], folder: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    before = sorted(folder.iterdir())
    status, out, err = run(*arguments)
    assert status == 2
    assert err.count("\n") == 1 and "is not UTF-8; rename it" in err
    assert "\\udcff" in err and out == ""
    assert sorted(folder.iterdir()) == before


CALLS: dict[str, Callable[[], object]] = {
    "save": lambda: normswap.save(_model(), BAD),
    "load": lambda: normswap.load(f"{BAD}.model"),
    "export": lambda: normswap.export(_model(), torch.zeros(1, 1, 2, 2), f"{BAD}.onnx"),
    "validate": lambda: normswap.validate(f"{BAD}.onnx", _model()),
    "compare": lambda: normswap.compare(f"{BAD}.onnx", f"{BAD}.onnx"),
    "checkpoint": lambda: read_checkpoint(Path(f"{BAD}.weights.pt")),
    "model": lambda: resolve(f"{BAD}.model"),
    "data": lambda: open_data(f"{BAD}.data.npz"),
    "run": lambda: normswap.finetune(_model(), [], steps=1, checkpoint=BAD),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_function_refuses_it_in_one_line(call: Callable[[], object], folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(NormswapError, match="not UTF-8; rename it") as raised:
        call()
    assert "\n" not in str(raised.value)
    assert sorted(folder.iterdir()) == before


def test_a_null_byte_is_refused_in_one_line() -> None:
    for call in (lambda: normswap.save(_model(), "a\0b"), lambda: normswap.load("a\0b")):
        with pytest.raises(NormswapError, match="a null byte"):
            call()


def test_a_folder_of_such_a_name_around_is_refused_for_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / BAD).mkdir()
    monkeypatch.chdir(tmp_path / BAD)
    with pytest.raises(NormswapError, match="not UTF-8; rename it"):
        normswap.save(_model(), "out")
    assert not list(Path.cwd().iterdir())


def test_images_of_such_names_are_read(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for name in ("a", BAD):
        (tmp_path / "images" / name).mkdir(parents=True)
        image.new("L", (4, 4)).save(tmp_path / "images" / name / f"{BAD}.png")
    (batch,) = open_data(str(tmp_path / "images"))
    assert batch[0].shape == (2, 3, 4, 4)


def test_a_path_that_the_locale_encodes_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with latin-1: safetensors would write another file than Python means."""
    monkeypatch.setattr(os, "fsencode", lambda path: os.fspath(path).encode("latin-1"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    for name in ("größe", "\N{EURO SIGN}"):
        for refused in (
            lambda name=name: normswap.save(_model(), tmp_path / name),
            lambda name=name: of_one_file(tmp_path / name, Path.read_bytes),
        ):
            with pytest.raises(NormswapError, match="encoding is iso8859-1; set PYTHONUTF8=1"):
                refused()
    normswap.save(_model(), tmp_path / "plain")
    assert [each.name for each in tmp_path.iterdir()] == ["plain"]


IN_ASCII = r"""
import json, os, sys
from pathlib import Path
assert sys.stdout.encoding.lower() in ("ascii", "us-ascii", "ansi_x3.4-1968"), sys.stdout.encoding
from normswap.cli import main

def run(*arguments):
    sys.argv = ["normswap", *arguments]
    try:
        main()
    except SystemExit as ended:
        return ended.code

made = "from torch import nn\nimport torch\n\ndef model():\n    it = nn.Sequential()\n"
made += "    it.add_module('gr\u00f6\u00dfe\u221e', nn.BatchNorm2d(3))\n"
made += "    return it, torch.zeros(2, 3, 4, 4)\n"
Path("code.py").write_bytes(made.encode())
assert run("inspect", "code.py:model") == 0
assert run("convert", "code.py:model", "--to", "layer_norm", "--out", "out") == 0
for name in ("out/recipe.json", "out/report.json", "out/report.html"):
    text = Path(name).read_bytes().decode("utf-8")
    text = json.dumps(json.loads(text), ensure_ascii=False) if name.endswith(".json") else text
    assert "gr\u00f6\u00dfe\u221e" in text, name
refused = os.fsdecode("\u00e9".encode())
assert run("inspect", "code.py:model", "--checkpoint", refused) == 2
assert run("fold", "demo:digits", "--out", refused) == 2
print("all")
"""


def test_in_a_locale_of_ascii_files_are_utf_8_and_nothing_breaks(tmp_path: Path) -> None:
    settings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    root = str(Path(normswap.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", IN_ASCII],
        cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": root},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.rstrip().endswith(b"all")
    assert b"gr\\xf6\\xdfe\\u221e" in done.stdout  # what the terminal cannot show
    told = [line for line in done.stderr.splitlines() if line.startswith(b"normswap:")]
    assert len(told) == 2 and all(b"set PYTHONUTF8=1" in line for line in told)
    assert b"Traceback" not in done.stderr
