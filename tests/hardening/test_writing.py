"""Whatever happens to a process that writes, its folder ends with the old files or the new."""

import errno
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from children import REFUSED, at_step, child, contents, die, finished, started
from torch import nn

import normswap
from normswap.cli import main
from normswap.core import atomic, locks
from normswap.core.atomic import check_writable, of_one_file, replacing, staged
from normswap.core.errors import NormswapError
from normswap.core.journal import settle
from normswap.fit import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
OLD = {"a": b"old a", "b": b"old b", "mine": b"not ours"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}
Before = Callable[[Path], None]


def _old(folder: Path) -> None:
    folder.mkdir()
    for name, content in OLD.items():
        (folder / name).write_bytes(content)


def _nothing(folder: Path) -> None:
    pass


def _write(folder: Path) -> None:
    with staged(folder) as scratch:
        for name, content in NEW.items():
            (scratch / name).write_bytes(content)


def _write_one(folder: Path) -> None:
    with replacing(folder / "a") as scratch:
        scratch.write_bytes(NEW["a"])


def _outcomes(before: Before, write: Before, folder: Path) -> tuple[dict, dict]:
    """What is in the parent of `folder` before, and after an undisturbed `write`."""
    folder.parent.mkdir()
    before(folder)
    old = contents(folder.parent)
    write(folder)
    return old, contents(folder.parent)


def _read(folder: Path) -> dict[str, bytes]:
    """What a reader of this program sees in `folder`."""
    found = {}
    for name in {*OLD, *NEW}:
        with suppress(FileNotFoundError):
            found[name] = of_one_file(folder / name, Path.read_bytes)
    return found


def _named(found: dict) -> dict:
    return {name.removeprefix("out/"): each for name, each in found.items() if "/" in name}


CASES = [
    pytest.param(_old, _write, id="over old files"),
    pytest.param(_nothing, _write, id="a new folder"),
    pytest.param(_old, _write_one, id="one file"),
]


@pytest.mark.parametrize(("before", "write"), CASES)
def test_killed_at_any_step_leaves_the_old_or_the_new(
    before: Before, write: Before, tmp_path: Path
) -> None:
    old, new = _outcomes(before, write, tmp_path / "undisturbed" / "out")
    seen, mixed = set(), 0
    for step in range(1, 200):
        folder = tmp_path / str(step) / "out"
        folder.parent.mkdir()
        before(folder)
        status = child(lambda folder=folder, step=step: (at_step(step, die), write(folder)))
        if status == 0:
            break
        found = contents(folder.parent)
        for name in ("out/a", "out/b", "out/c"):  # each by itself is whole, for whoever looks
            assert found.get(name) in (old.get(name), new.get(name)), (step, name)
        visible = {name: each for name, each in found.items() if ".normswap-" not in name}
        mixed += visible not in (old, new)
        read = _read(folder)
        assert read in (_named(old), _named(new)), step
        assert contents(folder.parent) == found  # reading has written nothing
        seen.add(read == _named(new))
        with replacing(folder / "later") as scratch:
            scratch.write_bytes(b"later")
        assert contents(folder) == {**read, "later": b"later"}, step
        left = [each for each in contents(folder.parent) if ".normswap-" in each]
        assert len(left) <= (read == _named(new)), step  # an empty one beside a new folder
    assert step > 5 and seen == {True, False}
    # Without what completes it there would be a mixture, so the above can fail.
    assert (mixed > 0) == (before is _old and write is _write)


@pytest.mark.parametrize(("before", "write"), CASES)
def test_a_disk_that_is_full_at_any_step_leaves_the_old(
    before: Before, write: Before, tmp_path: Path
) -> None:
    old, new = _outcomes(before, write, tmp_path / "undisturbed" / "out")

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    refused = 0
    for step in range(1, 200):
        folder = tmp_path / str(step) / "out"
        folder.parent.mkdir()
        before(folder)
        status = child(lambda folder=folder, step=step: (at_step(step, refuse), write(folder)))
        refused += status == REFUSED
        found = contents(folder.parent)
        if status == REFUSED:
            assert found == old, step
        else:  # only the scratch folder could not be removed
            assert _read(folder) == _named(new), step
            write(folder)
            assert contents(folder) == _named(new), step
        if not any(".normswap-" in name for name in found) and status == 0:
            break
    assert refused >= 4


def test_files_too_large_for_the_limit_are_refused_in_one_line(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 9), nn.BatchNorm2d(64))
    normswap.save(model, tmp_path / "out")
    checkpoints.write(tmp_path / "out", {"model": model.state_dict()}, _facts(1))
    old = contents(tmp_path)

    def limited(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            return work()

        return run

    for work in (
        lambda: normswap.save(model, tmp_path / "out"),
        lambda: normswap.save(model, tmp_path / "new"),
        lambda: checkpoints.write(tmp_path / "out", {"model": model.state_dict()}, _facts(2)),
    ):
        assert child(limited(work)) == REFUSED
        assert contents(tmp_path) == old


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("may not mount")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_told_in_one_line_and_the_old_files_stay(small_disk: Path) -> None:
    small, large = nn.Sequential(nn.BatchNorm2d(8)), nn.Sequential(nn.Conv2d(3, 64, 16))
    normswap.save(small, small_disk / "out")
    old = contents(small_disk)
    for folder in ("out", "new"):
        with pytest.raises(NormswapError, match="No space left on device; choose another") as error:
            normswap.save(large, small_disk / folder)
        assert "\n" not in str(error.value)
        assert contents(small_disk) == old


def test_an_export_to_a_full_disk_is_told_by_the_path_of_the_user(small_disk: Path) -> None:
    path = small_disk / "model.onnx"
    with pytest.raises(NormswapError) as error:
        normswap.export(nn.Conv2d(3, 64, 16), torch.zeros(1, 3, 16, 16), path)
    assert str(error.value) == (
        f"cannot write to {str(path)!r}: No space left on device; choose another output folder"
    )
    assert not contents(small_disk)


def _facts(step: int) -> dict:
    return {"about": {"steps": 9}, "step": step, "losses": [], "scaler": {}}


def _model(value: float) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(value)
    return model


def test_of_two_writers_one_wins_and_a_reader_sees_either(tmp_path: Path) -> None:
    # Both have tensors of the same names and shapes: only the recipe tells what to compute.
    saved = {
        "group_norm": normswap.convert(_model(2.0), "group_norm", groups=2),
        "layer_norm": normswap.convert(_model(3.0), "layer_norm"),
    }
    generations, outputs = {}, {}
    x = torch.randn(2, 1, 3, 3)
    for name, model in saved.items():
        normswap.save(model, tmp_path / name)
        generations[name] = contents(tmp_path / name)
        outputs[name] = model(x)
    out = tmp_path / "out"
    normswap.save(saved["group_norm"], out)

    def writer(name: str) -> Callable[[], None]:
        def write() -> None:
            while True:
                with staged(out) as scratch:
                    for file, content in generations[name].items():
                        (scratch / file).write_bytes(content)

        return write

    seen = set()
    for turn in range(8):
        pids = [started(writer(name)) for name in saved]
        try:
            end = time.monotonic() + 0.2 + 0.013 * turn
            while time.monotonic() < end:
                y = normswap.load(out, source=lambda: _model(0.0))(x)
                (found,) = [name for name, wanted in outputs.items() if torch.equal(y, wanted)]
                seen.add(found)
        finally:
            for pid in pids:
                os.kill(pid, 9)
            assert [finished(pid) for pid in pids] == [-9, -9]
        settle(out)
        assert contents(out) in generations.values()
    assert seen == set(saved)


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    calls = []

    def reader(path: Path) -> str:
        first = path.read_text()
        calls.append(first)
        if len(calls) < 3:
            with replacing(path) as scratch:
                scratch.write_text(f"new {len(calls)}")
            if len(calls) == 2:
                raise ValueError("its header is of another file")
        return first + path.read_text()

    assert of_one_file(path, reader) == "new 2new 2"
    assert calls == ["old", "new 1", "new 2"]
    with pytest.raises(ValueError, match="none"):
        of_one_file(path, lambda _: int("none"))


def test_what_a_dead_writer_had_begun_does_not_come_over_a_later_one(tmp_path: Path) -> None:
    for step in range(1, 40):
        folder = tmp_path / str(step)
        _old(folder)
        with staged(folder) as scratch:
            status = child(lambda folder=folder, step=step: (at_step(step, die), _write(folder)))
            for name in NEW:
                (scratch / name).write_bytes(b"last")
        settle(folder)
        assert contents(folder) == {**OLD, **dict.fromkeys(NEW, b"last")}, step
        if status == 0:
            break


def test_a_file_that_cannot_be_moved_brings_the_others_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if self.parent.name == "next" and self.name == refused:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    for links in (True, False):
        if not links:  # as on a file system that has none
            monkeypatch.setattr(os, "link", _no_link)
        for refused in NEW:
            folder = tmp_path / f"{links}{refused}"
            _old(folder)
            with pytest.raises(NormswapError, match="not permitted"):
                _write(folder)
            assert contents(folder) == OLD


def _no_link(*_: object, **__: object) -> None:
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


def test_a_folder_in_the_place_of_the_second_file_leaves_the_first_as_it_was(
    tmp_path: Path,
) -> None:
    _old(tmp_path / "out")
    (tmp_path / "out" / "c").mkdir()
    old = contents(tmp_path)
    with pytest.raises(NormswapError, match="c is a folder in it"):
        _write(tmp_path / "out")
    assert contents(tmp_path) == old


def test_what_the_dead_leave_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    _old(tmp_path / "out")

    def killed() -> None:
        with staged(tmp_path / "out") as scratch:
            (scratch / "a").write_bytes(b"half")
            die()

    assert child(killed) == -9
    assert len(list((tmp_path / "out").glob(".normswap-*"))) == 1
    with staged(tmp_path / "out") as scratch:
        assert len(list((tmp_path / "out").glob(".normswap-*"))) == 1
        assert child(lambda: _write(tmp_path / "out")) == 0
        (scratch / "a").write_bytes(b"last")
    assert contents(tmp_path / "out") == {**OLD, **NEW, "a": b"last"}


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    _old(elsewhere)
    out.mkdir()
    (out / "a").symlink_to(elsewhere / "a")
    (out / "b").symlink_to(elsewhere)
    _write(out)
    assert contents(out) == NEW
    assert contents(elsewhere) == OLD


def test_a_folder_that_is_a_link_is_written_where_it_points_to(tmp_path: Path) -> None:
    _old(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    _write(tmp_path / "out" / ".." / "out")
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "real") == {**OLD, **NEW}
    (tmp_path / "loose").symlink_to("nowhere")
    with pytest.raises(NormswapError, match="cannot write"):
        _write(tmp_path / "loose")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("part", ["", "whole"])
def test_a_prepared_scratch_folder_cannot_reach_other_files(part: str, tmp_path: Path) -> None:
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    _old(elsewhere)
    if not part:
        (elsewhere / "whole").mkdir()
        (elsewhere / "whole" / "x").write_bytes(b"x")
    before = contents(elsewhere)
    trap = out / ".normswap-trap" / part
    trap.parent.mkdir(parents=True)
    trap.symlink_to(elsewhere)
    settle(out)
    _write(out)
    assert contents(elsewhere) == before
    assert {name for name in contents(out) if not name.startswith(".")} == set(NEW)


def test_without_locks_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "lock_of", lambda folder, **_: None)
    _old(tmp_path / "out")
    (tmp_path / "out" / ".normswap-other").mkdir()
    _write(tmp_path / "out")
    assert contents(tmp_path / "out") == {**OLD, **NEW, ".normswap-other": "folder"}


LONG = {
    "convert": ["convert", "demo:digits", "--to", "group_norm", "--recover", "9", "--data", "x"],
    "fold": ["fold", "demo:digits"],
    "center": ["center", "demo:digits"],
    "fold-gains": ["fold-gains", "demo:digits"],
    "rotate": ["rotate", "demo:digits"],
    "rescale": ["rescale", "demo:digits", "--data", "x"],
    "absorb-input": ["absorb-input", "demo:digits"],
    "freeze": ["freeze", "demo:digits"],
    "parametrize": ["parametrize", "demo:digits", "--method", "weight_norm"],
    "bake": ["bake", "demo:digits"],
    "calibrate": ["calibrate", "demo:digits", "--teacher", "demo:digits", "--data", "x"],
    "recover": ["recover", "demo:digits", "--teacher", "demo:digits", "--data", "x"],
    "finetune": ["finetune", "demo:digits", "--data", "x"],
    "export": ["export", "demo:digits"],
    "compare": ["compare", "demo:digits", "demo:digits"],
}


@pytest.mark.parametrize("arguments", LONG.values(), ids=LONG)
def test_every_command_looks_first_whether_it_can_write(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_bytes(b"a file")
    (tmp_path / "normswap-out").write_bytes(b"a file")
    (tmp_path / "taken" / "report.json").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("normswap.source.resolve", _worked)
    monkeypatch.setattr("normswap.fit.data.open_data", _worked)
    before = contents(tmp_path)
    by_default = [] if "--teacher" in arguments else [[]]  # theirs is the folder that they read
    for out in (["--out", "file"], ["--out", "file/below"], ["--out", "taken"], *by_default):
        monkeypatch.setattr("sys.argv", ["normswap", *arguments, *out])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr().err
        assert ended.value.code == 2
        assert told.startswith("normswap: cannot write to '") and told.count("\n") == 1
        assert contents(tmp_path) == before


def _worked(*_: object, **__: object) -> None:
    raise AssertionError("it has begun to work")


@pytest.mark.parametrize("verb", ["finetune", "recover", "export"])
def test_every_verb_looks_first_whether_it_can_write(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"a file")
    model, x = _model(1.0), torch.zeros(2, 1, 2, 2)
    model.forward = _worked
    with pytest.raises(NormswapError, match=r"cannot write to .*file"):
        if verb == "export":
            normswap.export(model, x, tmp_path / "file" / "model.onnx")
        elif verb == "finetune":
            normswap.finetune(model, [(x, x)], steps=1, checkpoint=tmp_path / "file")
        else:
            normswap.recover(model, model, [(x, x)], steps=1, checkpoint=tmp_path / "file")


def test_looking_changes_nothing(tmp_path: Path) -> None:
    _old(tmp_path / "out")
    before = contents(tmp_path)
    for folder in (tmp_path / "out", tmp_path / "new" / "below"):
        check_writable(folder, ("a", "d"))
        assert contents(tmp_path) == before


def test_a_line_about_a_file_that_is_being_written_names_the_place_it_is_for(
    tmp_path: Path,
) -> None:
    for folder in (tmp_path / "out", tmp_path):
        with pytest.raises(NormswapError) as raised, staged(folder) as scratch:
            raise NormswapError(f"{str(scratch / 'model.onnx')!r} is no good; export it again")
        assert str(raised.value) == f"{str(folder / 'model.onnx')!r} is no good; export it again"
        with pytest.raises(NormswapError) as raised, replacing(folder / "a" / "b") as scratch:
            (scratch / "below").write_bytes(b"there is no such folder")
        assert str(raised.value).startswith(f"cannot write to {str(folder / 'a' / 'b')!r}: No such")


@pytest.mark.parametrize("name", ["out", "normswap-out/of-a-model"])
def test_a_writer_killed_when_it_has_just_made_its_folder_leaves_nothing_above_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        monkeypatch.setattr(atomic, "_remove", lambda *_: die())
        with staged(tmp_path / name) as scratch:
            (scratch / "a").write_text("new")

    assert child(work) == -9
    assert (tmp_path / name / "a").read_text() == "new"
    assert list(tmp_path.glob(".normswap-*"))
    with staged(tmp_path / name) as scratch:
        (scratch / "a").write_text("newer")
    assert not list(tmp_path.glob(".normswap-*"))
