"""Data from elsewhere: nothing runs or is written, and a few bytes do not fill the memory."""

import io
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import REFUSED, child, contents, short_of_memory
from PIL import Image

from normswap.core.errors import NormswapError
from normswap.fit import images
from normswap.fit.data import open_data

MEGABYTES = 400  # what reading may take beside the interpreter and torch


def png(width: int = 6, height: int = 5) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    """A PNG whose header claims another size than it has."""
    content = bytearray(png())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def packed(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(NormswapError) as error:
        list(open_data(str(path), **options))
    assert "\n" not in str(error.value)
    return str(error.value)


def refused_with_little_memory(path: Path) -> bool:
    def read() -> None:
        short_of_memory(MEGABYTES)
        for _ in open_data(str(path)):
            pass

    return child(read) == REFUSED


def test_bombs_do_not_fill_the_memory(tmp_path: Path) -> None:
    large = png(4000, 2000)
    bombs = {
        "deflate.zip": packed(tmp_path / "deflate.zip", {"a.png": bytes(500_000_000)}),
        "nested.zip": packed(
            tmp_path / "nested.zip", {"a.png": (tmp_path / "deflate.zip").read_bytes()}
        ),
        "pixels.zip": packed(tmp_path / "pixels.zip", {"a.png": claiming(60_000, 60_000)}),
        "batch.zip": packed(tmp_path / "batch.zip", {f"{n}.png": large for n in range(64)}),
    }
    for name, path in bombs.items():
        assert path.stat().st_size < 6_000_000, name
        assert refused_with_little_memory(path), name
    good = packed(tmp_path / "good.zip", {"a.png": png()})
    assert not refused_with_little_memory(good)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("name", ["i.zip", "d.npz"])
def test_packings_that_are_undone_all_at_once_are_refused(
    name: str, how: int, tmp_path: Path
) -> None:
    path = packed(tmp_path / name, {"a.png": png(), "x.npy": b""}, how)
    assert "is packed in an uncommon way" in refused(path)


def test_files_of_a_folder_are_bounded_like_those_of_a_zip(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(10 * 2**30)  # which takes no space on the disk
    assert refused_with_little_memory(tmp_path)
    assert "asks for 10.0 GiB of memory (its length)" in refused(tmp_path)


def arrays(path: Path, header: dict[str, Any], body: bytes) -> Path:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return packed(path, {"x.npy": buffer.getvalue() + body})


@pytest.mark.parametrize(
    ("descr", "shape", "told"),
    [
        ("<f4", (10**7, 10**5), "asks for 3.6 TiB of memory"),
        ("<f4", (2, 2**62), "of memory (array x, float32 of shape 2x4611686018427387904)"),
        ("|O", (2, 2), "damaged or holds Python objects"),
    ],
)
def test_arrays_that_claim_more_than_there_is_are_refused(
    descr: str, shape: tuple[int, ...], told: str, tmp_path: Path
) -> None:
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    path = arrays(tmp_path / "d.npz", header, b"few")
    assert refused_with_little_memory(path)
    assert told in refused(path)


def test_arrays_of_a_gigabyte_of_zeros_are_told_of(tmp_path: Path) -> None:
    # zipfile reads no more of a member than its entry says, so the entry is what counts.
    path = arrays(
        tmp_path / "d.npz", {"descr": "<f4", "fortran_order": False, "shape": (9, 9)}, b""
    )
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)
    path.write_bytes(content)
    assert "asks for 4.0 GiB of memory (array x)" in refused(path)


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "i.zip", {"a.png": png()})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 3)
    path.write_bytes(content)
    assert "cannot read the image 'a.png'" in refused(path)


def test_many_entries_take_memory_in_proportion(tmp_path: Path) -> None:
    path = packed(tmp_path / "i.zip", {f"{n}.txt": b"" for n in range(10_000)}, 0)
    assert refused_with_little_memory(path)  # there are no images, that is all
    assert "there are no images" in refused(path)


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 9 9
%%EndComments
(ran) (w) file closefile
showpage
%%EOF
"""


def test_postscript_is_not_handed_to_an_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreter = tmp_path / "bin" / "gs"
    interpreter.parent.mkdir()
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", f"{interpreter.parent}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "a.png").write_bytes(POSTSCRIPT)
    assert "UnidentifiedImageError" in refused(tmp_path / "i")
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr(images, "_FORMATS", ("EPS",))  # among those that Pillow would try
    refused(tmp_path / "i")
    assert (tmp_path / "ran").exists()


def test_every_suffix_of_an_image_is_still_read(tmp_path: Path) -> None:
    picture = Image.new("RGB", (6, 5), (255, 0, 0))
    for suffix in images.SUFFIXES:
        (picture.convert("L") if suffix == ".pgm" else picture).save(tmp_path / f"a{suffix}")
    (x,) = open_data(str(tmp_path))
    assert x.shape == (len(images.SUFFIXES), 3, 5, 6)


def test_names_that_lead_outside_write_nothing(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    names = ("../../up.png", "/etc/normswap.png", "..\\..\\up.png", "a/../../../b.png")
    path = packed(inside / "i.zip", {name: png() for name in names})
    before = contents(tmp_path)
    (batch,) = open_data(str(path), limit=2)
    assert len(batch if isinstance(batch, torch.Tensor) else batch[0]) == 2
    assert contents(tmp_path) == before
    assert not Path("/etc/normswap.png").exists()


def test_a_link_in_a_zip_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png())
    link = zipfile.ZipInfo("a.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "i.zip", "w") as archive:
        archive.writestr(link, str(tmp_path / "secret.png"))
    assert "cannot read the image 'a.png'" in refused(tmp_path / "i.zip")


def test_links_in_a_folder_do_not_lead_in_circles(tmp_path: Path) -> None:
    folder, other = tmp_path / "i", tmp_path / "other"
    for each in (folder, other):
        (each / "a").mkdir(parents=True)
        (each / "a" / "0.png").write_bytes(png())
    (folder / "a" / "up").symlink_to("..")
    (folder / "a" / "self.png").symlink_to("self.png")
    (folder / "a" / "gone.png").symlink_to("gone-for-good.png")
    (folder / "a" / "all").symlink_to("/")
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "zero.png").symlink_to("/dev/zero")
    assert child(lambda: list(open_data(str(folder))), seconds=20) == 0
    (x,) = open_data(str(folder))
    assert len(x if isinstance(x, torch.Tensor) else x[0]) == 1


def test_reading_writes_nothing(tmp_path: Path) -> None:
    packed(tmp_path / "i.zip", {"a/0.png": png(), "b/0.png": png()})
    np.savez(tmp_path / "d.npz", x=np.zeros((3, 2)), y=np.arange(3))
    (tmp_path / "i").mkdir()
    shutil.unpack_archive(tmp_path / "i.zip", tmp_path / "i")
    before = contents(tmp_path)
    for name in ("i.zip", "d.npz", "i"):
        assert list(open_data(str(tmp_path / name)))
    assert contents(tmp_path) == before
