"""Images of a folder or of a zip, one folder per class, decoded when they are asked for.

A zip is read in place, and never more of it than fits in memory.
"""

import io
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from normswap.core.errors import NormswapError, told
from normswap.core.memory import TIMES, Allowance, given, limited, readable
from normswap.source.preprocessing import Preprocessing

ImageSize = tuple[int, int, int]
_AS_THEY_COME = Preprocessing()

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pillow's names of them. Others it would hand to programs: PostScript, to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Each scan of a JPEG goes over the whole image again; progressive ones have some ten.
_SCAN, _MOST_SCANS = b"\xff\xda", 100
_PPM_HEADER = re.compile(rb"P.(?:(?:\s|#[^\r\n]*[\r\n])+[-+.\d]+){2}")
_LONGEST_PPM_HEADER = 2**16  # bytes, with its comments
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # the tags of TIFF
# Opens an encoded image by its name: what it holds, and what that may cost.
_Read = Callable[[str], tuple[IO[bytes], Allowance]]


def open_images(
    path: Path, size: ImageSize | None, how: Preprocessing = _AS_THEY_COME
) -> tuple[Callable[[Tensor], Tensor], list[str] | None, int]:
    """What reads images (N, C, H, W), float32 in [0, 1], by their indices (N,); classes; how many.

    They are resized and cropped to `size` (C, H, W) as `how` says. Without it they are RGB and keep
    their own size, which must be the same for all in a batch. The classes are the names of the
    folders that the images lie in; they are None where there are not at least two.

    Raises:
        NormswapError: Pillow is missing, or there are no images, or some in a class and some in
            none. Reading raises it for an image that cannot be decoded.
    """
    try:
        pillow = import_module("PIL.Image")
    except ImportError as error:
        raise NormswapError("images need Pillow; run: pip install 'normswap[train]'") from error
    read, names = _zip(path) if path.suffix == ".zip" else _folder(path)
    names = [name for name in names if _is_image(name)]
    if size and size[0] not in (1, 3):
        raise NormswapError(
            f"images have 1 or 3 channels and the model takes {size[0]}; give its data as an .npz"
        )
    if not names:
        raise NormswapError(
            f"there are no images in {str(path)!r}; give a folder or a zip that holds one folder "
            "of images per class"
        )
    classes = _classes(names, path)

    batches = Allowance.of(f"a batch of images in {str(path)!r}", 0)
    limit = given()

    def images(chosen: Tensor) -> Tensor:
        with limited(limit):
            return read_all(chosen)

    def read_all(chosen: Tensor) -> Tensor:
        decoded: list[Tensor] = []
        for name in (names[index] for index in chosen.tolist()):
            try:
                decoded.append(_decode(*read(name), size, how, pillow))
                if not size:  # it is the files that say how large a batch is
                    # They are stacked, and then standardized into another tensor.
                    pixels = 2 * len(chosen) * decoded[0].nbytes
                    batches.check(pixels, f"{len(chosen)} of the size of {name!r}")
            except NormswapError:
                raise
            except Exception as error:
                raise NormswapError(
                    f"cannot read the image {name!r} in {str(path)!r} ({told(error)}); "
                    "replace or remove it"
                ) from error
        if len({image.shape for image in decoded}) > 1:
            raise NormswapError(
                f"the images in {str(path)!r} differ in size; give the model's input size"
            )
        return torch.stack(decoded)

    return images, classes, len(names)


def _folder(path: Path) -> tuple[_Read, list[str]]:
    def read(name: str) -> tuple[IO[bytes], Allowance]:
        allowance = Allowance.of_file(path / name)
        return (path / name).open("rb"), allowance

    return read, sorted(_files(path))


def _files(path: Path) -> Iterator[str]:
    """The regular files below a folder, as posix paths from it; links to folders are not taken."""
    below = [("", str(path))]
    while below:
        within, folder = below.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            reason = error.strerror or "it cannot be listed"
            raise NormswapError(f"cannot read {folder!r}: {reason}; check the folder") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                below.append((f"{within}{entry.name}/", entry.path))
            elif _is_file(entry):
                yield within + entry.name


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link to itself
        return False


def _zip(path: Path) -> tuple[_Read, list[str]]:
    """Members are read into memory and never extracted, so their names can do no harm."""
    archive, size = open_zip(path), path.stat().st_size

    def read(name: str) -> tuple[IO[bytes], Allowance]:
        member = archive.getinfo(name)
        called = f"the image {name!r} in {str(path)!r}"
        allowance = Allowance.of(called, min(member.compress_size, size))
        # Decoded it becomes larger again, and what was packed twice takes time as well.
        encoded = member.file_size
        allowance.check(TIMES * encoded, f"to decode {readable(encoded)}")
        return archive.open(name), allowance

    return read, sorted(member.filename for member in archive.infolist() if not member.is_dir())


def _is_image(name: str) -> bool:
    """By the suffix; what macOS adds to a zip (`__MACOSX`, `._name`) and hidden files are not."""
    file = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in file.parts)
    return file.suffix.lower() in SUFFIXES and not hidden


def _classes(names: list[str], path: Path) -> list[str] | None:
    """The class folder of each image."""
    folders = [PurePosixPath(name).parts[:-1] for name in names]
    # A zip of a folder has that folder in front of every class.
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))
    shared = len(list(same))
    classes = [folder[shared : shared + 1] for folder in folders]
    if not any(classes):
        return None
    if not all(classes):
        raise NormswapError(
            f"in {str(path)!r} some images lie in a class folder and some in none, such as "
            f"{names[classes.index(())]!r}; move them"
        )
    return [name for (name,) in classes]


def _decode(
    file: IO[bytes],
    allowance: Allowance,
    size: ImageSize | None,
    how: Preprocessing,
    pillow: Any,
) -> Tensor:
    """An encoded image to (C, H, W), float32 in [0, 1].

    Raises:
        NormswapError: its pixels would take more memory than is allowed.
    """
    channels = size[0] if size else 3
    with file:
        content = file.read(allowance.limit)
    mode = "L" if channels == 1 else "RGB"
    image = _opened(content, pillow)
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels are not 8-bit but of mode {image.mode}")
    held, asked = len(content) + _held(image, content), f"{image.width} x {image.height} pixels"
    if size and held + _cost(image, mode, size, how) > allowance.limit:
        high, wide = _resized(image, size, how)
        image.draft(mode, (wide, high))  # a JPEG, to 1/2, 1/4 or 1/8 of its size
    allowance.check(held + _cost(image, mode, size, how), asked)
    high, wide = _resized(image, size, how)
    image = image.convert(mode)
    if image.size != (wide, high):
        image = image.resize((wide, high), pillow.Resampling[how.interpolation.upper()])
    if size and (high, wide) != size[1:]:
        image = _cropped(image, size, how, pillow)
    pixels = torch.from_numpy(np.array(image)).float().div_(255)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)


def _resized(image: Any, size: ImageSize | None, how: Preprocessing) -> tuple[int, int]:
    """The height and width that `image` gets before it is cropped."""
    own = image.height, image.width
    return how.resized(own, size[1:]) if size else own


def _cropped(image: Any, size: ImageSize, how: Preprocessing, pillow: Any) -> Any:
    """The centre of `image`; where that is smaller, in a border."""
    channels, high, wide = size
    fill = [0] * channels
    if how.crop_mode == "border":
        mean = how.normalization(channels)[0] or (0.0,)
        fill = [
            round(255 * each) for each in (mean if len(mean) == channels else [*mean] * channels)
        ]
    left, top = how.offset(image.width, wide), how.offset(image.height, high)
    cropped = pillow.new(image.mode, (wide, high), tuple(fill) if channels > 1 else fill[0])
    cropped.paste(image, (-left, -top))
    return cropped


def _opened(content: bytes, pillow: Any) -> Any:
    """The header of an image, without its pixels.

    Not by `PIL.Image.open`, whose limit of pixels is one for all threads, and not to be raised.
    """
    pillow.init()
    for name in _FORMATS:
        factory, accepts = pillow.OPEN[name]
        if accepts(content[:16]) is True:
            if name == "JPEG" and content.count(_SCAN) > _MOST_SCANS:
                raise ValueError(f"it has more than {_MOST_SCANS} scans")
            if name == "PPM" and not _PPM_HEADER.match(content[:_LONGEST_PPM_HEADER]):
                raise ValueError("its header is damaged or too long")  # read byte by byte
            return factory(io.BytesIO(content), "")
    raise pillow.UnidentifiedImageError(f"it is none of {', '.join(_FORMATS)}")


def _held(image: Any, content: bytes) -> int:
    """The bytes that the decoder of a format takes beside the pixels that it gives."""
    pixels: int = image.width * image.height
    channels = len(image.getbands())
    if image.format == "WEBP":  # two canvases, and one frame
        return 12 * pixels
    if image.format == "TIFF":  # one tile or strip, and a tile may be larger than the image
        width, length = (image.tag_v2.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
        return 4 * max(pixels, int(width) * int(length))
    if image.format == "JPEG" and content.count(_SCAN) > 1:
        return 2 * channels * pixels  # the coefficients of all scans
    return channels * pixels if image.format == "BMP" else 0


def _cost(image: Any, mode: str, size: ImageSize | None, how: Preprocessing) -> int:
    """The bytes of the pixels of `image`, as they are, in `mode`, and resized or in float32.

    Pillow keeps one byte for a pixel of one channel, and four for others.
    """
    kept = sum(1 if len(each) == 1 else 4 for each in {image.mode, mode})
    pixels: int = image.width * image.height
    if size is None:
        return pixels * (kept + 6 * len(mode))
    high, wide = _resized(image, size, how)
    between = max(high * wide - size[1] * size[2], 0)  # the model's own size is the user's
    return pixels * kept + between * (1 if len(mode) == 1 else 4)


# Of others zipfile unpacks whatever a few bytes claim, all at once.
_BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def open_zip(path: Path) -> zipfile.ZipFile:
    """The zip `path`, whose members are stored or deflated.

    Raises:
        NormswapError: it is missing, no regular file, no zip or damaged, or packed otherwise.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is no file")  # a pipe may never end
        archive = zipfile.ZipFile(path)
    except OSError as error:
        reason = error.strerror or "it is damaged"
        raise NormswapError(f"cannot read {str(path)!r}: {reason}; check the path") from error
    except Exception as error:  # zipfile has many for what is damaged
        raise NormswapError(f"{str(path)!r} is no zip, or damaged; make it again") from error
    for member in archive.infolist():
        if member.compress_type not in _BOUNDED:
            raise NormswapError(
                f"{member.filename!r} in {str(path)!r} is packed in an uncommon way; "
                "make the zip with deflate"
            )
    return archive
