"""Output is whole or absent, whatever happens while it is written."""

import os
from pathlib import Path

import pytest

from normswap.core.atomic import replacing, staged
from normswap.core.errors import NormswapError


def _contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_files_replace_those_of_their_name_and_leave_the_others(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    (target / "b").write_text("other")
    with staged(target) as scratch:
        (scratch / "a").write_text("new")
        assert (target / "a").read_text() == "old"
    assert _contents(tmp_path) == {"out/a": "new", "out/b": "other"}


def test_missing_folders_are_made(tmp_path: Path) -> None:
    with staged(tmp_path / "x" / "y") as scratch:
        (scratch / "a").write_text("new")
    assert _contents(tmp_path) == {"x/y/a": "new"}


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_interrupted_run_leaves_everything_as_it_was(
    stop: type[BaseException], exists: bool, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    if exists:
        target.mkdir()
        (target / "a").write_text("old")
    before = _contents(tmp_path)
    with pytest.raises(stop), staged(target) as scratch:
        (scratch / "a").write_text("half")
        raise stop
    assert _contents(tmp_path) == before
    assert target.exists() is exists
    assert len(list(tmp_path.iterdir())) == exists  # no scratch folder is left


def test_relative_paths_survive_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with replacing(Path("model.onnx")) as scratch:
        scratch.write_text("new")
        os.chdir("elsewhere")
    assert _contents(tmp_path) == {"model.onnx": "new"}


def test_a_file_is_replaced_with_those_written_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with replacing(path) as scratch:
        assert scratch.name == path.name
        scratch.write_text("new")
        (scratch.parent / "model.onnx.data").write_text("weights")
    assert _contents(tmp_path) == {"model.onnx": "new", "model.onnx.data": "weights"}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for target in (tmp_path / "out", tmp_path / "out" / "below"):
        with (
            pytest.raises(NormswapError, match="cannot write") as raised,
            staged(target) as scratch,
        ):
            (scratch / "a").write_text("new")
        assert "\n" not in str(raised.value)
    assert _contents(tmp_path) == {"out": "a file"}


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with (
        pytest.raises(NormswapError, match="cannot write"),
        replacing(tmp_path / "model.onnx") as scratch,
    ):
        scratch.write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(NormswapError, match="cannot write"), staged(tmp_path):
        pass


def test_what_cannot_be_written_is_refused_even_for_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(NormswapError, match="Permission denied; choose another"), staged(tmp_path):
        pass


def test_new_files_have_the_permissions_of_ordinary_ones(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        with staged(tmp_path / "out") as scratch:
            (scratch / "a").write_text("new")
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "a").stat().st_mode & 0o777 == 0o644
