"""Data named on the command line: what to calibrate on, and what is held out to measure on."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from normswap.fit.batch import inputs_of
from normswap.fit.data import Data, open_data
from normswap.fit.images import ImageSize

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
            args, kwargs = inputs_of(batch)
            seen += next((len(t) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), 1)
            if seen >= self.samples:
                return


def open_split(
    reference: str, samples: int, inputs: Any, mean: Sequence[float] | None, std: Any
) -> tuple[Iterable[Any], Iterable[Any], str]:
    """Data to calibrate on, data to measure on, and what the latter are.

    A fifth of the data, at most 2000 samples, is held out; the bundled digits have a test split of
    their own; batches made by the user's own code cannot be split and serve both.

    Args:
        samples: how many to calibrate on, at most.
        inputs, mean, std: as in `open_named`.

    Raises:
        NormswapError: as `normswap.fit.data.open_data`.
    """
    data = open_named(reference, inputs, mean, std)
    if not isinstance(data, Data):
        first = FirstSamples(data, samples)
        return first, first, f"{reference}, the data calibrated on"
    if reference == "demo:digits":
        test = open_named("demo:digits/test", inputs, mean, std)
        return replace(data, order=data.order[:samples]), test, "demo:digits/test"
    held = min(len(data.order) // HELD_OUT_PART, HELD_OUT_MOST)
    training = replace(data, order=data.order[held:][:samples])
    if not held:
        return training, training, f"{reference}, the data calibrated on"
    return (
        training,
        replace(data, order=data.order[:held]),
        f"{held:,} samples of {reference}, held out",
    )


def open_named(
    reference: str, inputs: Any, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Iterable[Any]:
    """The data `reference`, in the shape of the model's example inputs.

    Images of three channels are normalized as for ImageNet unless `mean` and `std` say otherwise.
    """
    size = _image_size(inputs)
    path = Path(reference)
    images = path.suffix == ".zip" or path.is_dir()
    if images and (size is None or size[0] == 3):
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    return open_data(reference, image_size=size, mean=mean, std=std)


def _image_size(inputs: Any) -> ImageSize | None:
    first = inputs[0] if isinstance(inputs, tuple) and inputs else inputs
    if isinstance(first, Tensor) and first.dim() == 4:
        channels, height, width = first.shape[1:]
        return channels, height, width
    return None
