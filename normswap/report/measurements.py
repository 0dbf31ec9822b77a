"""What a report measures of models side by side: their accuracy, their outputs, the time of a call
and their size. A model that takes raw pixels is compared with the original on normalized ones.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, warn
from normswap.core.journal import located
from normswap.fit.batch import inputs_for
from normswap.fit.evaluate import OtherLabels, accuracy, is_classified
from normswap.fit.reading import Reading
from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating
from normswap.passes.absorb_input import AbsorbInput
from normswap.report.onnx_model import OnnxModel
from normswap.report.outputs import SiteOutput, signal_to_noise


class Normalized(nn.Module):
    """`model`, and before it the normalization that `folded` would move into it."""

    def __init__(self, model: nn.Module, folded: AbsorbInput) -> None:
        super().__init__()
        self.model = model
        self.scale = folded.scale
        like = next(model.parameters())
        for name, numbers in (("mean", folded.mean), ("std", folded.std)):
            values = torch.tensor(numbers, dtype=torch.float64).to(like)
            self.register_buffer(name, values, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _first(lambda x: x.dtype == torch.uint8, self._normalize, (args, kwargs))
        return self.model(*args, **kwargs)

    def _normalize(self, raw: Tensor) -> Tensor:
        mean, std = (self.get_buffer(name) for name in ("mean", "std"))
        shape = (-1, *[1] * (raw.dim() - 2))
        return (raw.to(mean.dtype) / self.scale - mean.view(shape)) / std.view(shape)


def pixels(inputs: Any, folded: AbsorbInput) -> Any:
    """`inputs`, with integers from 0 to 255 for the first floating-point tensor."""

    def drawn(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        largest = int(min(folded.scale, 255)) + 1
        return torch.randint(largest, x.shape, dtype=torch.uint8, generator=generator).to(x.device)

    return _first(torch.is_floating_point, drawn, inputs)


def _first(fits: Callable[[Tensor], bool], change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """`inputs` with the first tensor that fits changed."""
    leaves, structure = pytree.tree_flatten(inputs)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and fits(leaf):
            leaves[index] = change(leaf)
            break
    return pytree.tree_unflatten(leaves, structure)


RUNS = 15
SECONDS = 2.0  # for the runs of models that are compared, together


class Latency(BaseModel):
    """The time of one call in eval mode.

    Attributes:
        model: which one of those that the report compares.
        runtime: what ran it.
        milliseconds: the median of the runs.
        runs: how many there were.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    runtime: str
    milliseconds: float
    runs: int


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


def latencies(models: dict[str, nn.Module], inputs: Any) -> tuple[Latency, ...]:
    """The time that each of `models` takes for `inputs`, after one call that is not counted.

    Modules of torch take turns, so that what else the machine does concerns all of them alike; a
    file in ONNX Runtime runs by itself, since its waiting threads would slow torch down. There are
    15 runs, or as many as two seconds allow.
    """
    taken: dict[str, list[float]] = {}
    files = [name for name, model in models.items() if isinstance(model, OnnxModel)]
    turns = [[name for name in models if name not in files], *([name] for name in files)]
    with evaluating(*models.values(), contents=False):
        for names in turns:
            timed = {name: _timer(models[name], inputs) for name in names}
            first = sum(run() for run in timed.values())
            for _ in range(max(1, min(RUNS, int(SECONDS / max(first, 1e-9))))):
                for name, run in timed.items():
                    taken.setdefault(name, []).append(run())
    return tuple(
        Latency(
            model=name,
            runtime="ONNX Runtime" if name in files else "torch, eager",
            milliseconds=1000 * statistics.median(taken[name]),
            runs=len(taken[name]),
        )
        for name in models
    )


def _timer(model: nn.Module, inputs: Any) -> Callable[[], float]:
    def seconds() -> float:
        # A model may write into its inputs.
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
        started = time.perf_counter()
        model(*args, **kwargs)
        return time.perf_counter() - started

    return seconds


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


def accuracies(
    models: dict[str, nn.Module], test: Iterable[Any] | None, *, learning: bool = False
) -> dict[str, float]:
    """The accuracy of each; none without labels, or where the task is another one.

    Labels of other classes than the model's are another task, of which a warning tells; or an
    error, where the model is `learning` from such labels.
    """
    if test is None or not is_classified(next(iter(models.values())), test):
        return {}
    try:
        return {state: accuracy(model, test) for state, model in models.items()}
    except NormswapError as error:
        if learning or not isinstance(error.__cause__, OtherLabels):
            raise
        warn(f"no accuracy is measured: {error}", stacklevel=2)
        return {}
