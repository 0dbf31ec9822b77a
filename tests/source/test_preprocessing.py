"""Images reach a model as its own library would give them, pixel by pixel.

The judges are timm.data.create_transform, the transforms of torchvision's weights, and
transformers' image processors.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from normswap.core.errors import NormswapError
from normswap.fit.data import Data, open_named
from normswap.source.preprocessing import Preprocessing, of_timm, of_torchvision, of_transformers

Image = pytest.importorskip("PIL.Image")
SIZES = [(101, 73), (64, 64), (90, 151), (260, 195)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several shapes, in blocks, so that each filter gives other pixels.

    None is near black or white, where libraries differ by what they clip between two passes.
    """
    made = tmp_path_factory.mktemp("images")
    numbers = np.random.default_rng(0)
    for index, (width, height) in enumerate(SIZES):
        blocks = numbers.integers(64, 192, (height // 8 + 1, width // 8 + 1, 3))
        pixels = np.kron(blocks, np.ones((8, 8, 1)))[:height, :width]
        Image.fromarray(pixels.astype("uint8")).save(made / f"{index}.png")
    return made


def read(folder: Path, size: tuple[int, int], how: Preprocessing | None) -> list[Tensor]:
    """The images, in the order of their names."""
    data = open_named(str(folder), torch.zeros(1, 3, *size), None, None, preprocessing=how)
    assert isinstance(data, Data)
    images = torch.cat(list(data))  # type: ignore[arg-type]
    return [images[place] for place in data.order.argsort()]


def pillow(folder: Path) -> list[Any]:
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def timm_configurations() -> list[Any]:
    """One of each share, mode and filter, of the smallest size there is."""
    timm = pytest.importorskip("timm")
    found: dict[Any, dict[str, Any]] = {}
    for name in timm.list_models(pretrained=True):
        given = timm.get_pretrained_cfg(name).to_dict()
        config = timm.data.resolve_data_config(pretrained_cfg=given)
        key = config["crop_pct"], config["crop_mode"], config["interpolation"], config["std"][0]
        before = found.get(key)
        if before is None or before["input_size"] > config["input_size"]:
            found[key] = config
    return list(found.values())


def test_every_kind_of_timms_configurations_gives_the_pixels_of_its_transform(folder: Path) -> None:
    configurations = timm_configurations()
    modes = {config["crop_mode"] for config in configurations}
    assert modes == {"center", "squash", "border"}
    transform_of = pytest.importorskip("timm.data").create_transform
    small = [config for config in configurations if max(config["input_size"][1:]) <= 288]
    wide = {"crop_pct": 0.9, "crop_mode": "center", "input_size": (3, 64, 96)}
    for config in [*small[:40], small[0] | wide, small[0] | wide | {"crop_pct": 1.15}]:
        transform = transform_of(**config, is_training=False)
        ours = read(folder, config["input_size"][1:], of_timm(config))
        for image, x in zip(pillow(folder), ours, strict=True):
            torch.testing.assert_close(x, transform(image), rtol=0, atol=1e-6, msg=str(config))


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("resnet50", "IMAGENET1K_V1"),
        ("resnet50", "IMAGENET1K_V2"),
        ("efficientnet_b0", "IMAGENET1K_V1"),
        ("inception_v3", "IMAGENET1K_V1"),
        ("regnet_y_400mf", "IMAGENET1K_V2"),
    ],
)
def test_torchvisions_weights_have_their_own_transforms(
    model: str, weights: str, folder: Path
) -> None:
    models = pytest.importorskip("torchvision.models")
    transforms = models.get_model_weights(model)[weights].transforms()
    (size,) = transforms.crop_size
    ours = read(folder, (size, size), of_torchvision(transforms))
    for image, x in zip(pillow(folder), ours, strict=True):
        torch.testing.assert_close(x, transforms(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("processor", "options"),
    [
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}},
        ),
        (
            "PoolFormerImageProcessor",
            {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}},
        ),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}),
        ("SegformerImageProcessor", {"size": {"height": 64, "width": 64}}),
        ("EfficientNetImageProcessor", {"size": {"height": 64, "width": 64}}),
        (
            "EfficientNetImageProcessor",
            {"size": {"height": 64, "width": 64}, "rescale_factor": 1 / 127.5}
            | {"rescale_offset": True, "include_top": False},
        ),
        ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    ],
)
def test_processors_of_transformers_give_the_same_but_for_the_rounding_of_their_resizing(
    processor: str, options: dict[str, Any], folder: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, processor)(**options)
    how, size = of_transformers(theirs)
    assert size is not None
    level = 1 / 255 / min(how.std or (1.0,))
    for image, x in zip(pillow(folder), read(folder, size, how), strict=True):
        expected = theirs(image, return_tensors="pt")["pixel_values"][0]
        # They resize tensors, which rounds to other levels than Pillow.
        assert (x - expected).abs().max() < 2.1 * level
        assert (x - expected).abs().mean() < 0.3 * level


def test_an_image_of_the_models_size_is_as_it_was_and_none_is_squashed(folder: Path) -> None:
    images = read(folder, (64, 64), None)
    mean, std = (
        torch.tensor(each).view(3, 1, 1) for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    pixels = torch.from_numpy(np.array(pillow(folder)[1])).permute(2, 0, 1) / 255
    torch.testing.assert_close(images[1], (pixels - mean) / std)
    wide = pillow(folder)[2].resize((64, int(64 * 151 / 90)), Image.Resampling.BILINEAR)
    top = round((wide.height - 64) / 2)
    middle = torch.from_numpy(np.array(wide)).permute(2, 0, 1)[:, top : top + 64] / 255
    torch.testing.assert_close(images[2], (middle - mean) / std)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interpolation": "cubic"}, "one of nearest, box, bilinear"),
        ({"crop_mode": "centre"}, "center, squash, border"),
        ({"crop_pct": 0.0}, "not between 0.1 and 10"),
        ({"crop_pct": float("nan")}, "not between 0.1 and 10"),
    ],
)
def test_a_wrong_choice_is_told(options: dict[str, Any], says: str) -> None:
    with pytest.raises(NormswapError, match=says):
        Preprocessing(**options)


def test_what_is_done_is_said_in_words() -> None:
    how = Preprocessing(0.875, interpolation="bicubic", origin="timm's configuration")
    assert how.described((3, 224, 224), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)) == (
        "resized to cover 256x256 (bicubic), center crop 224x224, mean 0.5,0.5,0.5, "
        "std 0.25,0.25,0.25; timm's configuration"
    )
