"""Pretrained models of the Hugging Face hub, or of a local folder that transformers wrote.

The repository's own code is never run, and weights that are pickled are read as tensors alone.
"""

import json
import logging
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from normswap.core.errors import NormswapError, told
from normswap.core.memory import Allowance, Counted
from normswap.core.paths import check_reachable
from normswap.source.libraries import BATCH, library, random
from normswap.source.preprocessing import Preprocessing, of_transformers
from normswap.source.source import Source

# How the numbers of layers and of what else a model has many are called in configurations.
_COUNTS = re.compile(r"^(n|num)_.*(layer|block|stage|expert|label)|(^|_)(layers|depths?)$")
_MOST_NAMED = 3
_USUAL_SIZE = 224, 224  # where neither a processor nor the configuration has one


def transformers_model(reference: str, name: str) -> Source:
    """The model of the architecture that the checkpoint `name` names; and example inputs.

    Raises:
        NormswapError: transformers is missing, or cannot load `name`, or a local folder asks for
            more memory than the limit.
    """
    transformers = library("transformers", "transformers")
    folder = Path(name)
    check_reachable(folder)
    if name.startswith(("/", "./", "../", "~")) and not folder.is_dir():
        raise NormswapError(f"there is no folder {name!r}; check the path")
    with _counted(folder) if folder.is_dir() else nullcontext():
        return _opened(transformers, reference, name)


def _opened(transformers: Any, reference: str, name: str) -> Source:
    with downloading(reference, pretrained=not Path(name).is_dir()):
        configuration = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        named = next(iter(configuration.architectures or ()), None)
        made = getattr(transformers, named or "", None)
        model, loading = (made or transformers.AutoModel).from_pretrained(
            name, trust_remote_code=False, weights_only=True, output_loading_info=True
        )
    weights = f"pretrained: {name}"
    if made is None:
        weights += ", without a head: its configuration names no architecture of this transformers"
    missing = sorted(loading["missing_keys"])
    if missing:
        more = ", ..." if len(missing) > _MOST_NAMED else ""
        weights += (
            f", but {len(missing)} tensors that it lacks have RANDOM WEIGHTS: "
            f"{', '.join(missing[:_MOST_NAMED])}{more}"
        )
    if model.main_input_name != "pixel_values":
        known = dict(model.dummy_inputs)
        inputs = known if model.main_input_name in known else None
        return Source(reference, model, inputs, weights=weights)
    images, size = _preprocessing(transformers, name)
    size = size or _size(model.config)
    channels = getattr(model.config, "num_channels", 3)
    inputs = {"pixel_values": random(BATCH, channels, *size)}
    return Source(reference, model, inputs, weights=weights, images=images)


def _preprocessing(
    transformers: Any, name: str
) -> tuple[Preprocessing | None, tuple[int, int] | None]:
    """What its image processor does, and the height and width it gives; None where it has none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception:  # there is no file of it, or a library that it needs is missing
        return None, None
    return of_transformers(processor)


def _size(configuration: Any) -> tuple[int, int]:
    size = getattr(configuration, "image_size", None)
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return size[0], size[1]
    return (size, size) if isinstance(size, int) else _USUAL_SIZE


@contextmanager
def downloading(reference: str, *, pretrained: bool) -> Iterator[None]:
    """What a library raises inside, as it builds or downloads a model, is told in one line.

    Where the hub cannot be reached its files are looked for in the cache alone, instead of asking
    for a minute.

    Raises:
        NormswapError: the body did, or raised anything else.
    """
    with _only_cached() if pretrained and _unreachable() else nullcontext():
        try:
            with redirect_stdout(sys.stderr):  # torch tells there what it downloads
                yield
        except NormswapError:
            raise
        except Exception as error:
            if not pretrained:
                raise NormswapError(
                    f"cannot build {reference!r}: {told(error)}; check the name and its arguments"
                ) from error
            raise NormswapError(
                f"cannot load the pretrained weights of {reference!r} ({told(error)}); check the "
                "network and the name, or give a file of them with --checkpoint"
            ) from error


def _unreachable() -> bool:
    """Whether the name of the hub leads nowhere from here; a proxy may know more."""
    try:
        endpoint = import_module("huggingface_hub.constants").ENDPOINT
    except ImportError:
        return False
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return True
    return False


@contextmanager
def _only_cached() -> Iterator[None]:
    """No file of the hub is asked for, and nothing is printed of a download that cannot be."""
    constants: Any = import_module("huggingface_hub.constants")
    before, disabled = constants.HF_HUB_OFFLINE, logging.root.manager.disable
    constants.HF_HUB_OFFLINE = True
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.disable(disabled)


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
