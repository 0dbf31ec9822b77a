"""Images of a folder or of a zip, one folder per class, decoded when they are asked for."""

import io
import warnings
from collections.abc import Callable
from importlib import import_module
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from normswap.errors import NormswapError, told
from normswap.fit.archive import open_zip

ImageSize = tuple[int, int, int]

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pillow's names of them. Others it would hand to programs: PostScript, to Ghostscript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_FILE = 64 * 2**20  # bytes, decompressed: a file can be far longer than what it takes up
LARGEST_BATCH = 2**30  # bytes of pixels that keep their own size


def open_images(
    path: Path, size: ImageSize | None
) -> tuple[Callable[[Tensor], Tensor], Tensor | None, int]:
    """What reads images (N, C, H, W), float32 in [0, 1], by their indices (N,); labels; how many.

    Without `size` (C, H, W) they are RGB and keep their own size, which must be the same for all in
    a batch. Labels, (samples,), int64, number the class folders in alphabetical order; they are
    None where there are not at least two.

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
    labels = _labels(names, path)

    def images(chosen: Tensor) -> Tensor:
        decoded: list[Tensor] = []
        for name in (names[index] for index in chosen.tolist()):
            try:
                decoded.append(_decode(read(name), size, pillow))
                if not size and len(chosen) * decoded[0].nbytes > LARGEST_BATCH:
                    raise ValueError(f"{len(chosen)} of its size are too many for a batch")
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

    return images, labels, len(names)


def _folder(path: Path) -> tuple[Callable[[str], bytes], list[str]]:
    files = (file for file in path.rglob("*") if file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in files)

    def read(name: str) -> bytes:
        with (path / name).open("rb") as file:
            return _content(file)

    return read, names


def _zip(path: Path) -> tuple[Callable[[str], bytes], list[str]]:
    """Members are read into memory and never extracted, so their names can do no harm."""
    archive = open_zip(path)

    def read(name: str) -> bytes:
        with archive.open(name) as file:
            return _content(file)

    return read, sorted(member.filename for member in archive.infolist() if not member.is_dir())


def _content(file: IO[bytes]) -> bytes:
    content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it holds more than {LARGEST_FILE >> 20} MiB")
    return content


def _is_image(name: str) -> bool:
    """By the suffix; what macOS adds to a zip (`__MACOSX`, `._name`) and hidden files are not."""
    file = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) and part != ".." for part in file.parts)
    return file.suffix.lower() in SUFFIXES and not hidden


def _labels(names: list[str], path: Path) -> Tensor | None:
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
    numbers = {name: number for number, name in enumerate(sorted(set(classes)))}
    return torch.tensor([numbers[name] for name in classes])


def _decode(content: bytes, size: ImageSize | None, pillow: Any) -> Tensor:
    """An encoded image to (C, H, W), float32 in [0, 1]."""
    channels, height, width = size or (3, 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pillow.DecompressionBombWarning)
        image = pillow.open(io.BytesIO(content), formats=_FORMATS)
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are not 8-bit but of mode {image.mode}")
        image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)
