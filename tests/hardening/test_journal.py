"""What is not a journal of this user for this very folder changes nothing, and is not changed."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from children import at_step, child, contents, die

from normswap.core import journal, locks
from normswap.core.atomic import check_writable, of_one_file, replacing, staged
from normswap.core.errors import NormswapError
from normswap.report.onnx_model import OnnxModel

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or sys.platform == "win32", reason="needs fork, owners and modes"
)
as_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs two users")
A, B = 12345, 23456  # two users
OLD = {"a": b"old a", "b": b"old b", "gone": b"old gone"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


def _old(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, content in OLD.items():
        (folder / name).write_bytes(content)
    return folder


def _write(folder: Path, files: dict[str, bytes] = NEW) -> None:
    with staged(folder, gone=("gone",)) as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)


def _killed(
    folder: Path,
    files: dict[str, bytes] = NEW,
    last: str = "b",
    user: int | None = None,
) -> Path:
    """Kill a writer of `folder` before it moves the file `last`; the journal that it leaves."""

    def dies(self: Path, target: Path) -> Path:
        if self.parent.name == "next" and self.name == last:
            die()
        return replace(self, target)

    def work() -> None:
        _write(folder, files)

    replace = Path.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        status = _as(user, work) if user else child(work)
    assert status == -9
    (left,) = folder.glob(".normswap-*.journal")
    return left


def _read(folder: Path) -> dict[str, bytes]:
    """What a reader of this program finds."""
    found = {}
    for name in {*OLD, *NEW}:
        try:
            found[name] = of_one_file(folder / name, Path.read_bytes)
        except FileNotFoundError:
            continue
    return found


def _as(user: int, work: Callable[[], object]) -> int:
    """The status of a child of `user` that does `work`."""
    import fcntl  # noqa: F401 - later the child may not be allowed to read it

    def changed() -> None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
        work()

    return child(changed)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like /tmp, into which all users may write."""
    folder = Path("/tmp") / f"normswap-shared-{os.getpid()}"
    folder.mkdir()
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def test_a_reader_finds_all_that_is_new_and_writes_nothing(tmp_path: Path) -> None:
    folder = _old(tmp_path / "out")
    _killed(folder)
    before = contents(tmp_path)
    assert (folder / "b").read_bytes() == b"old b"  # what somebody else would read
    assert _read(folder) == NEW
    assert contents(tmp_path) == before
    (tmp_path / "link").symlink_to(folder / "b")
    assert of_one_file(tmp_path / "link", Path.read_bytes) == b"new b"
    with replacing(folder / "later") as scratch:
        scratch.write_bytes(b"later")
    assert contents(folder) == {**NEW, "later": b"later"}


def test_an_onnx_file_is_read_with_the_weights_that_were_written_with_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written = {}
    for name, value in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        weight = onnx.numpy_helper.from_array(np.full(2000, value, np.float32), "w")
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
            "added",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2000])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2000])],
            [weight],
        )
        model = onnx.helper.make_model(
            graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]
        )
        path = tmp_path / name / "b.onnx"
        onnx.save(model, path, save_as_external_data=True, location="c.data", size_threshold=0)
        files = {each.name: each.read_bytes() for each in (tmp_path / name).iterdir()}
        written[name] = {"a": b"a", **files}
    _write(folder, written["first"])
    for last in ("b.onnx", "c.data"):  # the first that has not moved
        journal_ = _killed(folder, written["second"], last)
        assert float(OnnxModel(folder / "b.onnx")(torch.zeros(2000))[0]) == 2
        shutil.rmtree(journal_)
        assert float(OnnxModel(folder / "b.onnx")(torch.zeros(2000))[0]) == 1  # it is not enough
        _write(folder, written["first"])


@pytest.mark.parametrize("where", ["out", "."])
def test_folders_of_the_user_are_never_touched(where: str, tmp_path: Path) -> None:
    _old(tmp_path / "out")
    folder = tmp_path / where
    names = [".normswap-notes", ".normswap-a", ".normswap-12-abcdefgh", ".normswap-x.journal"]
    names.append(f".normswap-{folder.stat().st_ino}-notes")
    for name in names:
        for part in ("whole", "files", "half"):
            (folder / name / part).mkdir(parents=True)
            (folder / name / part / "run.sh").write_text("mine")
    (folder / "run.sh").write_text("the user's")
    before = contents(folder)
    _read(tmp_path / "out")
    _write(tmp_path / "out")
    _write(tmp_path / "new")
    after = contents(folder)
    assert {name: after[name] for name in before if "normswap" in name or "run" in name} == {
        name: each for name, each in before.items() if "normswap" in name or "run" in name
    }


@as_root
@pytest.mark.parametrize("user", [A, B])
def test_in_a_shared_folder_the_journals_of_others_are_not_looked_at(
    user: int, shared: Path
) -> None:
    assert _as(A, lambda: _write(shared, OLD)) == 0
    _killed(shared, user=A)
    before = contents(shared)

    def work() -> None:
        found = {name: each for name, each in before.items() if "." not in name}
        assert _read(shared) == (NEW if user == A else found)
        assert user != A or contents(shared) == before
        _write_one(shared / "run.sh", b"of the user")
        _write(shared / "new")

    assert _as(user, work) == 0
    after = contents(shared)
    assert after["run.sh"] == b"of the user"
    if user == A:
        assert {name: each for name, each in after.items() if name in {*OLD, *NEW}} == NEW
    else:
        assert {name: after[name] for name in before} == before


def _write_one(path: Path, content: bytes) -> None:
    with replacing(path) as scratch:
        scratch.write_bytes(content)


@as_root
def test_the_journal_of_the_folders_owner_is_read_and_not_completed_by_others(
    tmp_path: Path,
) -> None:
    folder = _old(tmp_path / "out")
    journal_ = _killed(folder)
    for each in (folder, *folder.rglob("*")):
        os.chown(each, A, A, follow_symlinks=False)
    manifest = json.loads((journal_ / "manifest.json").read_text())
    for each in manifest["files"].values():
        each |= {"uid": A, "gid": A}
    (journal_ / "manifest.json").write_text(json.dumps(manifest))
    before = contents(tmp_path)
    assert _read(folder) == NEW
    for refused in (lambda: _write(folder), lambda: check_writable(folder)):
        with pytest.raises(NormswapError, match=f"a writer of user {A} was killed") as raised:
            refused()
        assert "\n" not in str(raised.value)
    assert contents(tmp_path) == before


def _copied(folder: Path, journal: Path) -> None:
    shutil.copytree(journal, folder / "copy", copy_function=shutil.copy2)
    shutil.rmtree(journal)
    (folder / "copy").rename(journal)


def _from_an_archive(folder: Path, journal: Path) -> None:
    with tarfile.open(folder / "it.tar", "w") as archive:
        archive.add(journal, journal.name)
    with tarfile.open(folder / "it.tar") as archive:
        archive.extractall(folder.parent / "unpacked")
    shutil.rmtree(journal)
    (folder.parent / "unpacked" / journal.name).rename(journal)
    (folder / "it.tar").unlink()


def _other_content(folder: Path, journal: Path) -> None:
    (journal / "files" / "b").write_bytes(b"evil!")


def _other_file(folder: Path, journal: Path) -> None:
    other = journal / "other"
    other.write_bytes((journal / "files" / "b").read_bytes())
    other.replace(journal / "files" / "b")


def _link(folder: Path, journal: Path) -> None:
    (folder.parent / "secret").write_bytes((journal / "files" / "b").read_bytes())
    (journal / "files" / "b").unlink()
    (journal / "files" / "b").symlink_to(folder.parent / "secret")


def _hard_link(folder: Path, journal: Path) -> None:
    (folder.parent / "secret").write_bytes((journal / "files" / "b").read_bytes())
    (journal / "files" / "b").unlink()
    os.link(folder.parent / "secret", journal / "files" / "b")


def _linked_folder(folder: Path, journal: Path) -> None:
    (journal / "files").rename(folder.parent / "files")
    (journal / "files").symlink_to(folder.parent / "files")


def _linked_next(folder: Path, journal: Path) -> None:
    shutil.rmtree(journal / "next")
    _old(folder.parent / "elsewhere")
    (journal / "next").symlink_to(folder.parent / "elsewhere")


def _linked_manifest(folder: Path, journal: Path) -> None:
    os.link(journal / "manifest.json", folder.parent / "manifest")


def _upwards(folder: Path, journal: Path) -> None:
    manifest = json.loads((journal / "manifest.json").read_text())
    manifest["gone"] = ["../victim"]
    (journal / "manifest.json").write_text(json.dumps(manifest))
    (folder.parent / "victim").write_text("not theirs")


def _no_manifest(folder: Path, journal: Path) -> None:
    (journal / "manifest.json").unlink()


def _damaged(folder: Path, journal: Path) -> None:
    (journal / "manifest.json").write_text("{}")


def _of_all(folder: Path, journal: Path) -> None:
    journal.chmod(0o777)


def _files_of_all(folder: Path, journal: Path) -> None:
    (journal / "files" / "b").chmod(0o666)


def _elsewhere(folder: Path, journal: Path) -> None:
    other = folder.parent / "other"
    _old(other)
    journal.rename(other / journal.name)
    folder.rename(folder.parent / "first")
    other.rename(folder)


@pytest.mark.parametrize(
    "change",
    [
        _copied,
        _from_an_archive,
        _other_content,
        _other_file,
        _link,
        _hard_link,
        _linked_folder,
        _linked_next,
        _linked_manifest,
        _upwards,
        _no_manifest,
        _damaged,
        _of_all,
        _files_of_all,
        _elsewhere,
    ],
)
def test_a_journal_that_is_not_as_its_writer_left_it_is_refused_in_one_line(
    change: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    folder = _old(tmp_path / "out")
    change(folder, _killed(folder))
    before = contents(tmp_path)
    for refused in (lambda: _read(folder), lambda: _write(folder)):
        with pytest.raises(NormswapError, match=r"\.journal', which .* remove it") as raised:
            refused()
        assert "\n" not in str(raised.value)
        assert contents(tmp_path) == before
    shutil.rmtree(next(folder.glob(".normswap-*")))  # as the message says
    _write(folder)
    assert contents(folder) == NEW


@pytest.mark.parametrize("made", ["a link", "a file", "a pipe"])
def test_something_else_under_the_name_of_a_journal_is_left_alone(
    made: str, tmp_path: Path
) -> None:
    folder = _old(tmp_path / "out")
    elsewhere = _old(tmp_path / "elsewhere")
    for name in (f".normswap-{folder.stat().st_ino}-abcdefgh{end}" for end in ("", ".journal")):
        if made == "a link":
            (folder / name).symlink_to(elsewhere)
        elif made == "a file":
            (folder / name).write_text("mine")
        else:
            os.mkfifo(folder / name)
    kept = {each.name for each in folder.iterdir() if each.name[0] == "."}
    _write(folder)
    assert _read(folder) == NEW
    assert contents(elsewhere) == OLD
    assert kept == {each.name for each in folder.iterdir() if each.name[0] == "."}


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
@pytest.mark.parametrize("files", [NEW, {"a": b"new a"}], ids=["several", "one"])
def test_a_file_that_is_replaced_keeps_its_mode_also_while_it_is_written(
    mode: int, files: dict[str, bytes], tmp_path: Path
) -> None:
    folder = _old(tmp_path / "out")
    (folder / "a").chmod(mode)
    before = os.umask(0o027)
    try:
        with staged(folder) as scratch:
            for name, content in files.items():
                (scratch / name).write_bytes(content)
            assert stat.S_IMODE(scratch.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "a").stat().st_mode) == mode
    assert (folder / "a").read_bytes() == b"new a"
    if "c" in files:
        assert stat.S_IMODE((folder / "c").stat().st_mode) == 0o640  # by the umask


def test_a_private_file_is_never_readable_by_others_at_any_step(tmp_path: Path) -> None:
    folder = _old(tmp_path / "out")
    (folder / "a").chmod(0o600)
    seen = []

    def look() -> None:
        for each in tmp_path.rglob("*"):
            private = any(part.stat().st_mode & 0o077 == 0 for part in (each, *each.parents[:3]))
            if each.name == "a":
                seen.append(private)

    def watched() -> None:
        for step in range(1, 60):
            at_step(step, look)
        _write(folder)
        assert len(seen) > 40 and all(seen)

    assert child(watched) == 0


@as_root
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path: Path) -> None:
    folder = _old(tmp_path / "out")
    os.chown(folder / "a", A, B)
    (folder / "a").chmod(0o600)
    _write(folder)
    status = (folder / "a").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (A, B, 0o600)
    assert (folder / "c").stat().st_uid == 0
    assert contents(folder) == NEW
    os.chown(folder / "b", A, B)
    _killed(folder)
    _write(folder)
    assert (folder / "b").stat().st_uid == A


@as_root
def test_a_file_of_another_user_is_not_made_ones_own(shared: Path) -> None:
    folder = _old(shared / "out")
    folder.chmod(0o777)
    before = contents(folder)

    def refused() -> None:
        for write in (lambda: _write(folder), lambda: check_writable(folder, ("a",))):
            with pytest.raises(NormswapError, match="a in it belongs to another user"):
                write()

    assert _as(A, refused) == 0
    assert contents(folder) == before


@as_root
def test_a_link_that_another_user_laid_in_a_shared_folder_is_not_followed(shared: Path) -> None:
    target = shared / "target"
    target.mkdir()
    target.chmod(0o777)
    assert _as(B, lambda: (shared / "out").symlink_to(target)) == 0
    (shared / "own").symlink_to("target")
    for path in (shared / "out", shared / "out" / "below", shared / "own" / ".." / "out"):
        for refused in (lambda path=path: _write(path), lambda path=path: check_writable(path)):
            with pytest.raises(NormswapError, match="a link that another user made") as raised:
                refused()
            assert "\n" not in str(raised.value)
    assert not contents(target)
    _write(shared / "own")
    assert contents(target) == NEW


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_what_a_writer_leaves_is_good_with_any_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        folder = _old(tmp_path / "out")
        left = _killed(folder)
    finally:
        os.umask(before)
    assert not any(each.stat().st_mode & 0o022 for each in (left, *left.rglob("*/")))
    (folder / "a").chmod(0o600)  # the user may, meanwhile
    assert _read(folder) == NEW
    _write(folder)
    assert contents(folder) == NEW
    usual = 0o666 & ~mask
    assert stat.S_IMODE((folder / "c").stat().st_mode) == usual
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600


def test_hard_links_and_links_in_the_place_of_files_are_replaced(tmp_path: Path) -> None:
    elsewhere, folder = _old(tmp_path / "elsewhere"), _old(tmp_path / "out")
    (folder / "a").unlink()
    (folder / "b").unlink()
    os.link(elsewhere / "a", folder / "a")
    (folder / "b").symlink_to(elsewhere / "b")
    (folder / "c").symlink_to(elsewhere / "made")
    _write(folder)
    assert contents(folder) == NEW
    assert contents(elsewhere) == OLD


def test_who_holds_the_lock_of_the_folder_is_waited_for_and_then_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _old(tmp_path / "out")
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    with (
        locks.locked(folder),
        pytest.raises(NormswapError, match=r"held the lock of .*out.* choose another"),
    ):
        _write(folder)
    assert contents(folder) == OLD
    _write(folder)
    assert contents(folder) == NEW


def test_a_file_system_without_modes_gets_no_journal_and_still_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_check_private", _refuse)
    folder = _old(tmp_path / "out")
    _write(folder)
    assert contents(folder) == NEW


def _refuse(_: Path) -> None:
    raise journal._Unfit


@as_root
def test_a_read_only_disk_is_told_by_the_path_of_the_user(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        _old(disk / "out")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for folder in (disk / "out", disk / "new"):
            for work in (lambda f=folder: _write(f), lambda f=folder: check_writable(f)):
                with pytest.raises(NormswapError) as raised:
                    work()
                assert str(raised.value) == (
                    f"cannot write to {str(folder)!r}: Read-only file system; "
                    "choose another output folder"
                )
        assert contents(disk / "out") == OLD
    finally:
        subprocess.run(["umount", disk], check=True)
