"""How a pretrained model takes its images, as the configuration says that comes with its weights.

The terms are timm's: an image is resized, a crop is taken from its centre, and its pixels in [0, 1]
are normalized by a mean and a standard deviation per channel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from normswap.core.errors import NormswapError

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
CROP_MODES = ("center", "squash", "border")
# What nearly every pretrained vision model expects (torchvision's documentation of its weights).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BELOW = 1e-9  # by which a quotient of two sizes may miss a whole number
_PIXEL = 255


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before a model sees it.

    Attributes:
        crop_pct: height and width of the crop, as a share of those that the image is resized to.
        crop_mode: "center" keeps the aspect ratio and lets the image cover what it is resized to,
            "border" lets it fit in and fills the rest with the mean, "squash" changes the ratio.
        interpolation: Pillow's name of the filter that resizes.
        mean, std: per channel of pixels in [0, 1]; None: those of ImageNet for three channels,
            none for one.
        origin: who says so; "" where nobody does.
        rounds_down: whether a crop whose margins differ by a pixel has the smaller one first, as
            transformers has it; timm and torchvision round to even.
    """

    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    origin: str = ""
    rounds_down: bool = False

    def __post_init__(self) -> None:
        """Check the choices.

        Raises:
            NormswapError: an interpolation or a mode is unknown, or the share is not above 0.
        """
        if self.interpolation not in INTERPOLATIONS:
            raise NormswapError(
                f"the interpolation {self.interpolation!r} is unknown; it is one of "
                f"{', '.join(INTERPOLATIONS)}"
            )
        if self.crop_mode not in CROP_MODES:
            raise NormswapError(
                f"the crop mode {self.crop_mode!r} is unknown; it is one of {', '.join(CROP_MODES)}"
            )
        if not 0.1 <= self.crop_pct <= 10:
            raise NormswapError(f"the crop share {self.crop_pct:g} is not between 0.1 and 10")

    def frame(self, size: tuple[int, int]) -> tuple[int, int]:
        """The height and width to which an image is resized so that `size` can be cut out."""
        height, width = (math.floor(edge / self.crop_pct + _BELOW) for edge in size)
        return max(height, 1), max(width, 1)

    def resized(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """What an image (height, width) is resized to, before a crop of `size` (height, width)."""
        (high, wide), frame = image, self.frame(size)
        if self.crop_mode == "squash":
            return frame
        if self.crop_mode == "center" and frame[0] == frame[1]:  # as torchvision's Resize rounds
            short = frame[0]
            if wide <= high:
                return int(short * high / wide), short
            return short, int(short * wide / high)
        ratios = high / frame[0], wide / frame[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return max(round(high / ratio), 1), max(round(wide / ratio), 1)

    def offset(self, edge: int, crop: int) -> int:
        """Where a crop of `crop` pixels begins in an edge of `edge`; below 0 it has a border."""
        if edge < crop:
            return -((crop - edge) // 2)
        margin = (edge - crop) / 2
        return int(margin) if self.rounds_down else round(margin)

    def normalization(self, channels: int) -> tuple[Sequence[float] | None, Sequence[float] | None]:
        """Mean and standard deviation for images of so many channels."""
        if channels != len(IMAGENET_MEAN):
            return self.mean, self.std
        return self.mean or IMAGENET_MEAN, self.std or IMAGENET_STD

    def described(
        self, size: tuple[int, int, int] | None, mean: Any = None, std: Any = None
    ) -> str:
        """One line for a person; `mean` and `std` are those that are applied in the end."""
        parts = []
        if size is not None:
            height, width = self.frame(size[1:])
            how = {"center": "resized to cover", "border": "resized into", "squash": "squashed to"}
            parts.append(f"{how[self.crop_mode]} {height}x{width} ({self.interpolation})")
            if self.crop_pct != 1 or self.crop_mode != "squash":
                parts.append(f"center crop {size[1]}x{size[2]}")
        parts += [f"{name} {_numbers(n)}" for name, n in (("mean", mean), ("std", std)) if n]
        said = ", ".join(parts) or "as they are"
        return f"{said}; {self.origin or 'no configuration of the model says so'}"


def of_timm(config: dict[str, Any]) -> Preprocessing:
    """What `timm.data.resolve_model_data_config` says."""
    return Preprocessing(
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        origin="timm's configuration",
    )


def of_torchvision(transforms: Any) -> Preprocessing | None:
    """What the transforms of torchvision's weights do; None where they resize and crop no image."""
    if not hasattr(transforms, "interpolation") or len(transforms.resize_size) != 1:
        return None
    (resized,) = transforms.resize_size
    (crop,) = getattr(transforms, "crop_size", [resized])
    return Preprocessing(
        crop_pct=crop / resized,
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        origin="torchvision's transforms",
    )


def of_transformers(processor: Any) -> tuple[Preprocessing, tuple[int, int] | None]:
    """What an image processor of transformers does, and the height and width that it gives."""
    options = processor.to_dict()
    named = dict(options.get("size") or {})
    size, crop, share = _sizes(named), None, options.get("crop_pct")
    if options.get("do_center_crop"):
        crop = _sizes(options.get("crop_size"))
    pct, mode = 1.0, "center"
    if size is not None and "shortest_edge" not in named:
        pct, mode = (crop[0] / size[0] if crop else 1.0), "squash"
    elif size is not None and crop is not None:
        pct = crop[0] / (math.floor(size[0] / share) if share else size[0])
    elif size is not None and share:  # ConvNext's
        pct, mode = (share, "center") if size[0] < _WARPED else (1.0, "squash")
    elif size is not None:  # of a detector, which takes the whole image
        mode = "border"
    made = Preprocessing(
        crop_pct=pct,
        crop_mode=mode,
        interpolation=_PILLOW[int(options.get("resample") or 0)],
        **_normalization(options),
        origin="transformers' image processor",
        rounds_down=True,
    )
    return made, crop or size


_WARPED = 384  # from which on ConvNext's processor neither keeps the ratio nor crops
_PILLOW = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by number


def _sizes(given: Any) -> tuple[int, int] | None:
    """Height and width, of a number or of what transformers calls a size."""
    if isinstance(given, int):
        return given, given
    found = {name: value for name, value in dict(given or {}).items() if value}
    edge = found.get("shortest_edge")
    height, width = found.get("height", edge), found.get("width", edge)
    return (height, width) if height and width else None


def _normalization(options: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean and std of pixels in [0, 1], whatever the processor multiplies pixels by."""
    scale = _PIXEL * (options.get("rescale_factor") or 1 / _PIXEL)
    if not options.get("do_rescale", True):
        scale = float(_PIXEL)
    offset = 1.0 if options.get("rescale_offset") else 0.0
    mean, std = [0.0], [1.0]
    if options.get("do_normalize", True):
        mean = list(options.get("image_mean") or mean)
        std = list(options.get("image_std") or std)
    if options.get("include_top"):  # EfficientNet's divides again
        std = [each * each for each in std]
    return {
        "mean": tuple((each + offset) / scale for each in mean),
        "std": tuple(each / scale for each in std),
    }


def _numbers(values: Sequence[float]) -> str:
    return ",".join(f"{value:.4g}" for value in values)
