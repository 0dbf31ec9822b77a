"""What a report measures of models side by side: their outputs, their latency and their size."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.core.journal import located
from normswap.fit.batch import inputs_for
from normswap.fit.reading import Reading
from normswap.report.latency import Latency, latencies
from normswap.report.onnx_model import OnnxModel
from normswap.report.outputs import SiteOutput, signal_to_noise
from normswap.report.raw_pixels import Normalized


class Size(BaseModel):
    """How large a model is.

    Attributes:
        model: which one of those that the report compares.
        parameters: trainable or not; a tensor used twice counts once.
        bytes: of parameters and buffers in memory, or of an ONNX file with its external data.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    parameters: int | None
    bytes: int


def size_of(name: str, model: nn.Module) -> Size:
    """The size of `model`, called `name`."""
    if isinstance(model, OnnxModel):
        return Size(model=name, parameters=None, bytes=_bytes_on_disk(model.path))
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return Size(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
    )


def _bytes_on_disk(path: Path) -> int:
    data = path.with_name(path.name + ".data")  # where torch's exporter puts large weights
    return sum(file.stat().st_size for file in map(located, (path, data)) if file.is_file())


def environment() -> dict[str, str]:
    """What figures of this process depend on: versions, and how many threads compute."""
    import platform

    import onnxruntime

    import normswap

    return {
        "normswap": normswap.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ONNX Runtime": onnxruntime.__version__,
        "processor": platform.machine(),
        "threads of torch": str(torch.get_num_threads()),
    }


SAMPLES = 8  # the outputs of every site are held in memory, so not a whole batch


class Measurements(BaseModel):
    """What was measured of two models, or of one.

    Attributes:
        compared_on: what the outputs were compared on.
        sites: for each site the signal-to-noise ratio of its output, the model's own output last.
        timed_on: what the models were called with for the latency.
        latency: of each.
        sizes: of each.
        environment: versions and threads.
    """

    model_config = ConfigDict(frozen=True)

    compared_on: str = ""
    sites: tuple[SiteOutput, ...] = ()
    timed_on: str = ""
    latency: tuple[Latency, ...] = ()
    sizes: tuple[Size, ...] = ()
    environment: dict[str, str] = {}


def measure(
    models: dict[str, nn.Module],
    sites: Iterable[str],
    inputs: Any,
    data: Iterable[Any] | None = None,
    named: str = "",
) -> Measurements:
    """Measure `models`, of which the second is compared with the first.

    Args:
        models: each by the name that the report has for it.
        sites: module paths whose outputs are compared.
        inputs: example inputs, for the latency; None takes the first samples of `data`.
        data: batches, of whose first one the first samples are compared; without it the inputs.
        named: what the data are called.
    """
    first, *others = models.values()
    samples = inputs if data is None else first_few(first, data)
    measured = Measurements(
        sizes=tuple(size_of(name, model) for name, model in models.items()),
        environment=environment(),
    )
    if samples is None:
        return measured
    of_data = f"the first samples of {named or 'the data'}"
    of_inputs = "the example inputs"
    example = samples if inputs is None else inputs
    update: dict[str, Any] = {
        "timed_on": f"{of_data if inputs is None else of_inputs}, {shapes(example)}",
        "latency": latencies(models, example),
    }
    if others:
        inside = "model" if isinstance(first, Normalized) else ""
        update["compared_on"] = f"{of_inputs if data is None else of_data}, {shapes(samples)}"
        update["sites"] = signal_to_noise(first, others[0], samples, sites, inside=inside)
    return measured.model_copy(update=update)


def first_few(model: nn.Module, data: Iterable[Any]) -> Any:
    """Inputs of `model`: the first samples of the first batch of `data`; None if there is none."""
    reading = Reading(data)
    for batch in reading:
        with reading.current():
            args, kwargs = inputs_for(model, batch)
        given = {**kwargs} or args[0]
        sizes = {len(v) for v in kwargs.values() if isinstance(v, Tensor) and v.ndim}
        if isinstance(given, dict):
            return {k: _cut(v) for k, v in given.items()} if len(sizes) == 1 else given
        return (_cut(given),)
    return None


def _cut(value: Any) -> Any:
    sliceable = isinstance(value, list) or (isinstance(value, Tensor) and value.ndim)
    return value[:SAMPLES] if sliceable else value


def shapes(inputs: Any) -> str:
    """The shapes of the tensors in `inputs`."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return ", ".join(
        "\N{MULTIPLICATION SIGN}".join(map(str, leaf.shape)) or "a number" for leaf in leaves
    )
