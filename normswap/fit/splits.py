"""Data named on the command line: what to learn from, and what is held out to measure on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.fit.batch import size_of
from normswap.fit.data import Data, open_data
from normswap.fit.images import ImageSize
from normswap.fit.reading import as_tensors

# What nearly every pretrained vision model expects (torchvision's documentation of its weights).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT_PART, HELD_OUT_MOST = 5, 2000


@dataclass(frozen=True)
class FirstSamples:
    """The first batches of `data` that together hold at least `samples` samples."""

    data: Iterable[Any]
    samples: int

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.data:
            yield batch
            seen += size_of(as_tensors(batch))
            if seen >= self.samples:
                return


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
    std: Any,
    batch_size: int = 64,
) -> tuple[Iterable[Any], Iterable[Any], str]:
    """Data to learn from, data to measure on, and what the latter are.

    A fifth of the data, at most 2000 samples, is held out; the bundled digits have a test split of
    their own; batches made by the user's own code cannot be split and serve both.

    Args:
        samples: how many to learn from, at most; None for all.
        inputs, mean, std, batch_size: as in `open_named`.

    Raises:
        NormswapError: as `normswap.fit.data.open_data`.
    """
    data = open_named(reference, inputs, mean, std, batch_size)
    if not isinstance(data, Data):
        first = first_samples(data, samples)
        return first, first, f"{reference}, the data learned from"
    if reference == "demo:digits":
        test = open_named("demo:digits/test", inputs, mean, std)
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
) -> Iterable[Any]:
    """The data `reference`, in the shape of the model's example inputs.

    Images of three channels are normalized as for ImageNet unless `mean` and `std` say otherwise.
    """
    size = _image_size(inputs)
    path = Path(reference)
    images = path.suffix == ".zip" or path.is_dir()
    if images and (size is None or size[0] == 3):
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    return open_data(reference, image_size=size, mean=mean, std=std, batch_size=batch_size)


def _image_size(inputs: Any) -> ImageSize | None:
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if isinstance(first, Tensor) and first.dim() == 4:
        channels, height, width = first.shape[1:]
        return channels, height, width
    return None
