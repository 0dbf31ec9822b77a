"""What the sources of models share: libraries that may be missing, and example inputs."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from normswap.core.errors import NormswapError, told

BATCH = 2


def random(*shape: int) -> Tensor:
    """Standard normal numbers, the same at every call, drawn from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def library(package: str, module: str) -> Any:
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
