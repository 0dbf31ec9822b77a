"""Data as a model is trained on them: in another order each time, moved and mirrored on request."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.fit.data import Data
from normswap.fit.ranks import rank_of_this, ranks


@dataclass(frozen=True)
class Shuffled:
    """The batches of `data` in a new order each time they are read, whole batches only.

    Of several processes each has every n-th sample.

    Attributes:
        crop: by how many pixels, at most, each image is moved each way; zeros come in.
        flip: whether half of the images are mirrored, left to right.
    """

    data: Data
    crop: int = 0
    flip: bool = False

    def __iter__(self) -> Iterator[Any]:
        own = self.data.order[rank_of_this() :: ranks()]
        if not len(own):
            return
        order = own[torch.randperm(len(own))]
        size = min(self.data.batch_size, len(order))
        for batch in replace(self.data, order=order[: len(order) // size * size]):
            x, *labels = batch if isinstance(batch, tuple) else (batch,)
            x = cropped(x, self.crop) if self.crop else x
            x = flipped(x) if self.flip else x
            yield (x, *labels) if labels else x

    def held_back(self, share: int, most: int) -> tuple[Data, "Shuffled"]:
        """One of `share` samples, at most `most`, as they are; and the others, moved and mirrored.

        Each process has its own. Of one sample alone both parts have it.
        """
        order = self.data.order
        count = min(max(len(order) // share, ranks()), most * ranks())
        held = replace(self.data, order=order[:count][rank_of_this() :: ranks()])
        rest = self.data if count >= len(order) else replace(self.data, order=order[count:])
        return held, replace(self, data=rest)


def shuffled(data: Iterable[Any], *, crop: int, flip: bool) -> Iterable[Any]:
    """`data` in another order each time; batches made by the user's own code as they are.

    Raises:
        NormswapError: those are to be cropped or flipped, or the inputs are no images.
    """
    if not isinstance(data, Data):
        if crop or flip:
            raise NormswapError(
                "--crop and --flip are for images that normswap reads; let your own loader do it"
            )
        return data
    if crop or flip:
        first = data.x(data.order[:1])
        if first.ndim != 4:
            raise NormswapError("--crop and --flip are for images (N, C, H, W); leave them out")
        if crop >= min(first.shape[2:]):
            height, width = first.shape[2:]
            raise NormswapError(
                f"--crop {crop} would move images of {height} by {width} pixels out of sight; "
                "give a few pixels"
            )
    return Shuffled(data, crop, flip)


def cropped(x: Tensor, padding: int) -> Tensor:
    """A random H x W window of each image of x, (N, C, H, W), in `padding` zeros on every side.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """
    samples, channels, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, samples, 1))
    rows = (top + torch.arange(height)).view(samples, 1, height, 1)
    columns = (left + torch.arange(width)).view(samples, 1, 1, width)
    image = torch.arange(samples).view(-1, 1, 1, 1)
    return padded[image, torch.arange(channels).view(1, -1, 1, 1), rows, columns]


def flipped(x: Tensor) -> Tensor:
    """Each image of x, (N, C, H, W), mirrored left to right with probability one half."""
    mirrored = torch.rand(len(x)) < 0.5
    return torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
