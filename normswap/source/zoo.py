"""Models by name from torchvision and timm, with inputs of the shape they expect.

Nothing is downloaded unless pretrained weights are asked for: the architecture comes with fresh
ones.
"""

import inspect
import json
import re
from importlib import import_module
from typing import Any

from normswap.core.errors import NormswapError
from normswap.source.factory import nearest
from normswap.source.hub import downloading
from normswap.source.libraries import BATCH, library, random
from normswap.source.preprocessing import of_timm, of_torchvision
from normswap.source.source import RANDOM, Source

_FAMILIES = ("segmentation", "video", "detection", "quantization", "optical_flow")
# A name may be in a file from elsewhere, which shall not choose what is read or loaded.
_NO_OPTION = re.compile(r"pretrained|weights|checkpoint|cache|progress|model|path|file|url|hub")


def torchvision_model(reference: str, name: str, *, pretrained: bool) -> Source:
    """`resnet50`, or with its family, `segmentation/fcn_resnet50`; and example inputs.

    `resnet50.IMAGENET1K_V1` names weights other than the default ones, and
    `resnet50?num_classes=10` an argument of the builder.

    Raises:
        NormswapError: torchvision cannot be imported, has no such model or weights, takes no such
            argument, or the weights cannot be downloaded.
    """
    models = library("torchvision", "torchvision.models")
    plain, given = _with_options(name)
    family, _, short = plain.rpartition("/")
    short, _, tag = short.partition(".")
    known = models.list_models()
    found = _family(models.get_model_builder(short)) if short in known else None
    if found is None or (family and family != found):
        raise NormswapError(f"torchvision has no model {plain!r}{nearest(short, known)}")
    every = models.get_model_weights(short)
    if tag and tag not in every.__members__:
        raise NormswapError(
            f"torchvision has no weights {tag!r} of {short}{nearest(tag, [*every.__members__])}"
        )
    weights = every[tag or "DEFAULT"] if len(every) else None
    if pretrained and weights is None:
        raise NormswapError(f"torchvision has no pretrained weights of {short}; leave that out")
    options: dict[str, Any] = {"weights": weights if pretrained else None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(short)).parameters:
        options["weights_backbone"] = None
    if "googlenet" in short or "inception" in short:
        options["init_weights"] = False  # their truncated normal takes a minute
    transforms = None if weights is None else weights.transforms()
    (size,) = getattr(transforms, "crop_size", [224])[:1]
    if short.startswith("vit_"):
        size = options["image_size"] = given.get("image_size", size)
    with downloading(reference, pretrained=pretrained):
        model = models.get_model(short, **(options | given))
    return Source(
        reference,
        model,
        _torchvision_inputs(short, found, size),
        weights=f"pretrained: {weights}" if pretrained else RANDOM,
        images=None if transforms is None else of_torchvision(transforms),
    )


def timm_model(reference: str, name: str, *, pretrained: bool) -> Source:
    """A timm model, `resnet18` or `resnet18.a1_in1k`; and example inputs of its default size.

    `resnet18?num_classes=10` gives an argument of `timm.create_model`.

    Raises:
        NormswapError: timm cannot be imported, has no such model or weights, takes no such
            argument, or the weights cannot be downloaded.
    """
    timm = library("timm", "timm")
    plain, given = _with_options(name)
    architecture, _, tag = plain.partition(".")
    if not timm.is_model(architecture):
        raise NormswapError(
            f"timm has no model {plain!r}{nearest(architecture, timm.list_models())}"
        )
    tags = [
        each.partition(".")[2] for each in timm.list_models(f"{architecture}.*", pretrained=True)
    ]
    if tag and tag not in tags:
        raise NormswapError(f"timm has no weights {tag!r} of {architecture}{nearest(tag, tags)}")
    if pretrained and not tags:
        raise NormswapError(f"timm has no pretrained weights of {architecture}; leave that out")
    with downloading(reference, pretrained=pretrained):
        model = timm.create_model(plain, pretrained=pretrained, **given)
    config = import_module("timm.data").resolve_model_data_config(model)
    channels, *size = config["input_size"]
    if "img_size" in given:
        size = given["img_size"] if isinstance(given["img_size"], list) else [given["img_size"]] * 2
    told_of = model.pretrained_cfg
    weights = f"pretrained: {told_of['architecture']}.{told_of['tag']}" if pretrained else RANDOM
    if pretrained and given.get("num_classes", told_of["num_classes"]) != told_of["num_classes"]:
        weights += f", but a head of {given['num_classes']} classes with RANDOM WEIGHTS"
    return Source(
        reference,
        model,
        random(BATCH, given.get("in_chans", channels), *size),
        weights=weights,
        images=of_timm(config),
    )


def _with_options(name: str) -> tuple[str, dict[str, Any]]:
    """`NAME?key=value&key=value` as the name and the arguments.

    Raises:
        NormswapError: it has another form, or an argument chooses what is loaded.
    """
    plain, _, text = name.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, text.split("&")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier():
            raise NormswapError(
                f"{part!r} is no argument of a model; write NAME?key=value, as in "
                "timm:resnet18?num_classes=10"
            )
        if _NO_OPTION.search(key):
            raise NormswapError(
                f"{key} cannot be given in the name of a model; use --pretrained, or --checkpoint"
            )
        try:
            options[key] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            options[key] = value
    return plain, options


def _family(builder: Any) -> str:
    parts = builder.__module__.split(".")
    return next((part for part in parts if part in _FAMILIES), "classification")


def _torchvision_inputs(name: str, family: str, size: int) -> Any:
    if family == "detection":
        return ([random(3, 224, 224) for _ in range(BATCH)],)
    if family == "optical_flow":
        return random(BATCH, 3, 128, 128), random(BATCH, 3, 128, 128)
    if family == "video":
        # The residual networks were trained at 112, the others do not run below 224.
        size = 224 if name.startswith(("mvit", "swin3d", "s3d")) else 112
        return random(BATCH, 3, 16, size, size)
    return random(BATCH, 3, size, size)
