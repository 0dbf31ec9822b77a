"""Images of a folder or of a zip, one folder per class, decoded when they are asked for."""

import io
import warnings
import zipfile
from collections.abc import Callable
from importlib import import_module
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normswap.errors import NormswapError
from normswap.source.factory import told

ImageSize = tuple[int, int, int]

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
LARGEST_MEMBER = 64 * 2**20  # bytes, decompressed: a zip can claim far more than it holds


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
        decoded = []
        for name in (names[index] for index in chosen.tolist()):
            try:
                decoded.append(_decode(read(name), size, pillow))
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
    return lambda name: (path / name).read_bytes(), names


def _zip(path: Path) -> tuple[Callable[[str], bytes], list[str]]:
    """Members are read into memory and never extracted, so their names can do no harm."""
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise NormswapError(
            f"cannot read {str(path)!r}: {error.strerror}; check the path"
        ) from error
    except zipfile.BadZipFile as error:
        raise NormswapError(f"{str(path)!r} is no zip, or damaged; make it again") from error

    def read(name: str) -> bytes:
        with archive.open(name) as file:
            content = file.read(LARGEST_MEMBER + 1)
        if len(content) > LARGEST_MEMBER:
            raise ValueError(f"it holds more than {LARGEST_MEMBER >> 20} MiB")
        return content

    return read, sorted(member.filename for member in archive.infolist() if not member.is_dir())


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
        image = pillow.open(io.BytesIO(content))
        if image.mode[0] in "IF":
            raise ValueError(f"its pixels are not 8-bit but of mode {image.mode}")
        image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (width, height):
        image = image.resize((width, height), pillow.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1)
