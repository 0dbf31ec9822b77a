"""Models by name from torchvision, timm and transformers, with inputs of the shape they expect.

Nothing is downloaded for torchvision and timm: the architecture comes with fresh weights.
"""

import inspect
import json
import re
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.errors import NormswapError, told
from normswap.core.memory import Allowance, Counted
from normswap.core.paths import check_reachable
from normswap.source.factory import nearest

BATCH = 2
_FAMILIES = ("segmentation", "video", "detection", "quantization", "optical_flow")
# How the numbers of layers and of what else a model has many are called in configurations.
_COUNTS = re.compile(r"^(n|num)_.*(layer|block|stage|expert|label)|(^|_)(layers|depths?)$")


def torchvision_model(name: str) -> tuple[nn.Module, Any]:
    """`resnet50`, or with its family, `segmentation/fcn_resnet50`; and example inputs.

    Raises:
        NormswapError: torchvision cannot be imported, or it has no such model.
    """
    models = _library("torchvision", "torchvision.models")
    family, _, short = name.rpartition("/")
    known = models.list_models()
    found = _family(models.get_model_builder(short)) if short in known else None
    if found is None or (family and family != found):
        raise NormswapError(f"torchvision has no model {name!r}{nearest(short, known)}")
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(short)).parameters:
        options["weights_backbone"] = None
    if "googlenet" in short or "inception" in short:
        options["init_weights"] = False  # their truncated normal takes a minute
    return models.get_model(short, **options), _torchvision_inputs(short, found)


def timm_model(name: str) -> tuple[nn.Module, Any]:
    """A timm model without pretrained weights; and example inputs of its default size.

    Raises:
        NormswapError: timm cannot be imported, or it has no such model.
    """
    timm = _library("timm", "timm")
    if not timm.is_model(name):
        raise NormswapError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    model = timm.create_model(name, pretrained=False)
    return model, random(BATCH, *model.pretrained_cfg["input_size"])


def transformers_model(name: str) -> tuple[nn.Module, Any]:
    """A pretrained model of the Hugging Face hub, or of a local folder; and example inputs.

    The repository's own code is never run, and weights that are pickled are read as tensors alone.

    Raises:
        NormswapError: transformers is missing, or cannot load `name`, or a local folder asks for
            more memory than the limit.
    """
    transformers = _library("transformers", "transformers")
    folder = Path(name)
    check_reachable(folder)
    with _counted(folder) if folder.is_dir() else nullcontext():
        return _transformers_model(transformers, name)


def _counted(folder: Path) -> Counted:
    """What a local folder's configuration asks for is in proportion to its files."""
    files = [file for file in folder.iterdir() if not file.is_dir()]
    for file in files:
        if not file.is_file():  # a pipe, which may never end
            raise NormswapError(f"{str(file)!r} is no regular file; remove it from the model")
    size = sum(file.stat().st_size for file in files)
    allowance = Allowance.of(repr(str(folder)), size)
    _check_configuration(folder / "config.json", allowance)
    return Counted(allowance, "the model of its configuration")


def _check_configuration(path: Path, allowance: Allowance) -> None:
    """transformers makes lists as long as the numbers that count layers, before it makes layers."""
    if not path.is_file():
        return
    text = path.read_bytes()
    allowance.check_json(len(text), "its configuration")
    try:
        open_parts = [json.loads(text)]
    except (ValueError, RecursionError):  # of which transformers tells
        return
    while open_parts:
        for name, value in _items(open_parts.pop()):
            if name.endswith("_config"):  # of the part for texts, or for images
                open_parts.append(value)
            elif _COUNTS.search(name):
                numbers = value if isinstance(value, list) else [value]
                for number in (each for each in numbers if isinstance(each, int)):
                    allowance.check_parts(number, f"{name} = {number}")


def _items(part: Any) -> Any:
    return part.items() if isinstance(part, dict) else ()


def _transformers_model(transformers: Any, name: str) -> tuple[nn.Module, Any]:
    try:
        model = transformers.AutoModel.from_pretrained(
            name, trust_remote_code=False, weights_only=True
        )
    except NormswapError:
        raise
    except Exception as error:
        raise NormswapError(
            f"transformers cannot load {name!r} ({told(error)}); check the name or the folder"
        ) from error
    if model.main_input_name == "pixel_values":
        size, channels = model.config.image_size, model.config.num_channels
        height, width = (size, size) if isinstance(size, int) else size
        return model, {"pixel_values": random(BATCH, channels, height, width)}
    return model, dict(model.dummy_inputs)


def random(*shape: int) -> Tensor:
    """Standard normal numbers, the same at every call, drawn from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _family(builder: Any) -> str:
    parts = builder.__module__.split(".")
    return next((part for part in parts if part in _FAMILIES), "classification")


def _torchvision_inputs(name: str, family: str) -> Any:
    if family == "detection":
        return ([random(3, 224, 224) for _ in range(BATCH)],)
    if family == "optical_flow":
        return random(BATCH, 3, 128, 128), random(BATCH, 3, 128, 128)
    if family == "video":
        # The residual networks were trained at 112, the others do not run below 224.
        size = 224 if name.startswith(("mvit", "swin3d", "s3d")) else 112
        return random(BATCH, 3, 16, size, size)
    size = 299 if "inception_v3" in name else 224
    return random(BATCH, 3, size, size)


def _library(package: str, module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise NormswapError(
            f"{package} is needed for this model and {error.name!r} is missing; "
            f"run: pip install {package}"
        ) from error
    except Exception as error:
        # A torchvision whose compiled operators were built for another torch fails here, and
        # timm imports it.
        raise NormswapError(
            f"{package} does not import with torch {torch.__version__} ({told(error)}); "
            "install the torchvision that was built for this torch"
        ) from error
