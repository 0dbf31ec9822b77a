"""Data for calibration and evaluation: any iterable of batches, and how to open one by name.

`open_split` opens what the command line names, and holds a part of it out to measure on.
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance, limited
from normswap.core.paths import check_reachable
from normswap.fit.images import ImageSize, open_images, open_zip
from normswap.fit.reading import FirstSamples
from normswap.source.factory import call_factory, is_factory, nearest
from normswap.source.preprocessing import Preprocessing

_LONGEST_HEADER = 2**16  # of an array in an .npz; numpy reads none above 10,000 bytes
_MOST_DIGITS = 9  # of a class folder that is called by its number
KINDS = "demo:digits, a folder or a zip of images, an .npz with x and y, or module:factory"


@dataclass(frozen=True)
class Data:
    """Batches of (x, y), or of x alone; as often as wanted, in the same order each time.

    Attributes:
        x: gives the inputs (N, ...), float32, of the samples whose indices (N,) it is called with.
        y: the labels of all samples, (samples,), int64, or None.
        order: the indices of the samples, (samples,), in the order they are read.
        batch_size: how many samples a batch has; the last one has what is left.
        classes_in_order: how many there are, if a label is the place of a name among them: those
            that were given, or the folders by the alphabet.
        images: what became of images, in words; "" of other data.
    """

    x: Callable[[Tensor], Tensor]
    y: Tensor | None
    order: Tensor
    batch_size: int
    classes_in_order: int | None = None
    images: str = ""

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            chosen = self.order[start : start + self.batch_size]
            x = self.x(chosen)
            yield x if self.y is None else (x, self.y[chosen])


def open_data(
    reference: str,
    *,
    batch_size: int = 64,
    image_size: ImageSize | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    limit: int | None = None,
    memory_limit: int | str | None = None,
) -> Iterable[Any]:
    """Open the data that `reference` names.

    - `demo:digits`, the digits the bundled model was trained on; `demo:digits/test`, the others.
    - A folder with one folder of images per class, or with images and no classes; or a zip of one,
      which is read in place. Images become (C, H, W) in [0, 1], grey where C is 1, resized and
      cropped to `image_size` (C, H, W) where it is given, as `preprocessing` says. The label of a
      class folder is its place in `classes`; without them the number that is its name, where all
      names are numbers, or its place in alphabetical order.
    - An .npz with `x` (samples, ...) and, where there are labels, `y` (samples,).
    - `module:factory` or `file.py:factory` of a DataLoader or another iterable of batches, which
      is returned as it is: the options below do not concern it.

    `mean` and `std`, one number or one per channel, are then subtracted and divided by. The
    samples are shuffled once, by `seed`, so that the first batches are a fair sample; `limit` is
    how many are kept. `memory_limit`, in bytes or as "8GiB", is how much memory the file may ask
    for, or one image; by default 16 times what it takes up on the disk, and at least 1 GiB.

    Raises:
        NormswapError: there are no such data, they are empty or unreadable, of another form, or ask
            for more memory than the limit.
    """
    with limited(memory_limit):
        data = _open(reference, batch_size, image_size, preprocessing, classes, seed, limit)
    if not isinstance(data, Data):
        return data
    return replace(data, x=_standardized(data.x, mean, std))


def _open(
    reference: str,
    batch_size: int,
    image_size: ImageSize | None,
    preprocessing: Preprocessing | None,
    classes: Sequence[str] | None,
    seed: int,
    limit: int | None,
) -> Iterable[Any]:
    if batch_size < 1 or (limit is not None and limit < 1):
        raise NormswapError("batch size and limit of the data must be 1 or more")
    check_reachable(reference)
    path = Path(reference)
    ordered: int | None = None
    scheme, _, name = reference.partition(":")
    if scheme == "demo":
        x, y, samples = _in_memory(*_demo(name))
    elif path.suffix == ".npz":
        x, y, samples = _arrays(path, batch_size)
    elif reference and (path.is_dir() or path.suffix == ".zip"):
        x, names, samples = open_images(path, image_size, preprocessing or Preprocessing())
        y, ordered = (None, None) if names is None else _labels(names, classes, path)
    elif is_factory(reference):
        return _made(reference)
    else:
        raise NormswapError(f"there are no data {reference!r}; data are {KINDS}")
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:limit]
    return Data(x, y, order, batch_size, ordered)


def _labels(
    names: list[str], classes: Sequence[str] | None, path: Path
) -> tuple[Tensor, int | None]:
    """A label for each of the class folders `names`, and how many classes there are by their order.

    Raises:
        NormswapError: `classes` lack one, or have one twice.
    """
    own, ordered = sorted(set(names)), None
    if classes is not None:
        numbers, ordered = {name: number for number, name in enumerate(classes)}, len(classes)
        unknown = [name for name in own if name not in numbers]
        if unknown:
            raise NormswapError(
                f"the class folder {unknown[0]!r} in {str(path)!r} is none of the "
                f"{len(classes):,} classes that were given{nearest(unknown[0], list(numbers))}"
            )
        if len(numbers) < len(classes):
            raise NormswapError("a class is named twice; give one name for each output, in order")
    elif all(name.isdecimal() and len(name) <= _MOST_DIGITS for name in own):
        numbers = {name: int(name) for name in own}
    else:
        numbers, ordered = {name: number for number, name in enumerate(own)}, len(own)
    return torch.tensor([numbers[name] for name in names]), ordered


def _in_memory(
    x: Tensor, y: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], Tensor | None, int]:
    return lambda chosen: x[chosen], y, len(x)


def _demo(name: str) -> tuple[Tensor, Tensor]:
    from normswap.demo.digits import digits_data

    splits = {"digits": "train", "digits/test": "test"}
    if name not in splits:
        raise NormswapError(f"there are no demo data {name!r}; use demo:digits or demo:digits/test")
    return digits_data(splits[name])


def _arrays(path: Path, batch_size: int) -> tuple[Callable[[Tensor], Tensor], Tensor | None, int]:
    """What reads x as float32, a batch at a time, the labels, and how many samples there are."""
    with open_zip(path) as archive:
        names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
        if "x" not in names:
            raise NormswapError(
                f"{str(path)!r} has no array x but {', '.join(names) or 'nothing'}; "
                "write one with numpy.savez(path, x=x, y=y)"
            )
        allowance = Allowance.of_file(path)
        found: dict[str, np.ndarray] = {}
        for name in ("x", "y"):
            if name in names:
                try:
                    found[name] = _array(archive, name, allowance, batch_size)
                except NormswapError:
                    raise
                except Exception as error:
                    raise NormswapError(
                        f"{str(path)!r} is damaged or holds Python objects; "
                        "write numbers with numpy.savez(path, x=x, y=y)"
                    ) from error
    x, y = found["x"], found.get("y")
    if x.dtype.kind not in "fiub" or x.ndim < 2 or not x.size:
        raise NormswapError(
            f"x in {str(path)!r} is {x.dtype} of shape {x.shape}; give numbers (samples, ...)"
        )
    if y is not None and (y.dtype.kind not in "iu" or y.shape != x.shape[:1]):
        raise NormswapError(
            f"y in {str(path)!r} is {y.dtype} of shape {y.shape}; "
            f"give one integer label for each of the {len(x)} samples"
        )
    labels = None if y is None else torch.from_numpy(y.astype(np.int64))

    def numbers(chosen: Tensor) -> Tensor:
        return torch.from_numpy(x[chosen.numpy()].astype(np.float32, copy=False))

    return numbers, labels, len(x)


def _array(
    archive: zipfile.ZipFile, name: str, allowance: Allowance, batch_size: int
) -> np.ndarray:
    """An array of an .npz, if it and what is made of it are within what is allowed."""
    unpacked = archive.getinfo(f"{name}.npy").file_size
    allowance.check(unpacked, f"array {name}")
    with archive.open(f"{name}.npy") as file:
        head = io.BytesIO(file.read(_LONGEST_HEADER))
    version = np.lib.format.read_magic(head)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(head)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(head)
    size = max(prod(shape) * dtype.itemsize, unpacked)
    samples = shape[0] if shape else 1
    # A batch becomes float32, and is standardized in two more steps; the order of the samples and
    # the labels are int64.
    batch = 3 * 4 * prod(shape[1:]) * min(samples, batch_size) if name == "x" else 0
    told = f"array {name}, {dtype} of shape {'x'.join(map(str, shape)) or 'none'}"
    allowance.check(size + batch + 8 * samples, told)
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _made(reference: str) -> Iterable[Any]:
    made = call_factory(reference)
    if not isinstance(made, Iterable):
        raise NormswapError(
            f"{reference!r} returned {type(made).__name__}; return an iterable of batches"
        )
    if isinstance(made, Iterator):
        raise NormswapError(
            f"{reference!r} returned an iterator, which can be read once only; "
            "return a DataLoader or a list of batches"
        )
    return made


def _standardized(
    x: Callable[[Tensor], Tensor], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Callable[[Tensor], Tensor]:
    """`x` with (x - mean) / std applied over the channels, axis 1."""
    if mean is None and std is None:
        return x
    shift = torch.tensor([0.0] if mean is None else mean, dtype=torch.float32)
    scale = torch.tensor([1.0] if std is None else std, dtype=torch.float32)
    if not bool((scale > 0).all()):
        raise NormswapError("std must be above 0 in every channel")

    def standardized(chosen: Tensor) -> Tensor:
        values = x(chosen)
        for name, numbers in (("mean", shift), ("std", scale)):
            if len(numbers) not in (1, values.shape[1]):
                raise NormswapError(
                    f"{name} has {len(numbers)} numbers for {values.shape[1]} channels; "
                    "give one, or one per channel"
                )
        axes = (1, -1, *[1] * (values.ndim - 2))
        return (values - shift.view(axes)) / scale.view(axes)

    return standardized


HELD_OUT_PART, HELD_OUT_MOST = 5, 2000


def first_samples(data: Iterable[Any], samples: int | None) -> Iterable[Any]:
    """The first `samples` of `data`, or a few more where the batches are the user's; None: all."""
    if isinstance(data, Data):
        return replace(data, order=data.order[:samples])
    return data if samples is None else FirstSamples(data, samples)


def open_split(
    reference: str,
    samples: int | None,
    inputs: Any,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int = 64,
    **options: Any,
) -> tuple[Iterable[Any], Iterable[Any], str]:
    """Data to learn from, data to measure on, and what the latter are.

    A fifth of the data, at most 2000 samples, is held out; the bundled digits have a test split of
    their own; batches made by the user's own code cannot be split and serve both.

    Args:
        samples: how many to learn from, at most; None for all.
        inputs, mean, std, batch_size, options: as in `open_named`.

    Raises:
        NormswapError: as `normswap.fit.data.open_data`.
    """
    data = open_named(reference, inputs, mean, std, batch_size, **options)
    if not isinstance(data, Data):
        first = first_samples(data, samples)
        return first, first, f"{reference}, the data learned from"
    if reference == "demo:digits":
        test = open_named("demo:digits/test", inputs, mean, std, **options)
        return first_samples(data, samples), test, "demo:digits/test"
    held = min(len(data.order) // HELD_OUT_PART, HELD_OUT_MOST)
    training = replace(data, order=data.order[held:][:samples])
    if not held:
        return training, training, f"{reference}, the data learned from"
    return (
        training,
        replace(data, order=data.order[:held]),
        f"{held:,} samples of {reference}, held out",
    )


def open_named(
    reference: str,
    inputs: Any,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    batch_size: int = 64,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[str] | None = None,
    labelled: bool = True,
) -> Iterable[Any]:
    """The data `reference`, in the shape of the model's example inputs.

    Images are prepared as `preprocessing` says, but for a `mean` and `std` that are given. Where
    nobody says so, those of three channels are normalized as for ImageNet.

    Args:
        labelled: whether the labels are read.
        classes: the names of the outputs of a classifier, in order.
    """
    size = _image_size(inputs)
    path = Path(reference)
    images = path.suffix == ".zip" or path.is_dir()
    said = ""
    if classes is not None and not images:
        raise NormswapError(
            f"classes are the names of folders of images, and {reference!r} has none; leave them "
            "out"
        )
    if images:
        preprocessing = preprocessing or Preprocessing()
        usual = preprocessing.normalization(size[0] if size else 3)
        mean, std = mean or usual[0], std or usual[1]
        preprocessing = replace(preprocessing, mean=None if mean is None else tuple(mean))
        said = preprocessing.described(size, mean, std)
    data = open_data(
        reference,
        image_size=size,
        mean=mean,
        std=std,
        preprocessing=preprocessing,
        classes=classes,
        batch_size=batch_size,
    )
    if not isinstance(data, Data):
        return data
    return replace(data, images=said, y=data.y if labelled else None)


def _image_size(inputs: Any) -> ImageSize | None:
    held = tuple(inputs.values()) if isinstance(inputs, Mapping) else inputs
    first = held[0] if isinstance(held, tuple) and held else held
    if isinstance(first, Tensor) and first.dim() == 4:
        channels, height, width = first.shape[1:]
        return channels, height, width
    return None
