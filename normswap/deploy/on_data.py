"""An ONNX file in fewer bits on the user's data: how far it agrees, and where it overflows."""

from collections.abc import Iterable
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import nn

from normswap.core.ambient import alone, generators_kept
from normswap.core.calls import cloned, running_on
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.deploy.agreement import Agreements
from normswap.deploy.diverge import (
    Array,
    CallArguments,
    Deviation,
    arrays,
    compare,
    first_divergence,
    one_line,
    open_faithful,
)
from normswap.deploy.overflow import overflows
from normswap.deploy.reference_run import bind, reference_copy, tensors
from normswap.deploy.validate import Case, ValidationReport, check_fit
from normswap.fit.batch import inputs_for, size_of
from normswap.fit.reading import Reading
from normswap.fit.stream import peeked

_LOOKED_AT = 64  # samples, from which it is told what an output is


def call_of(model: nn.Module, batch: Any) -> CallArguments:
    """The arguments of `model.forward` for a batch of the data."""
    args, kwargs = inputs_for(model, batch)
    return bind(model, kwargs or args)


def check_on_data(
    path: Path, model: nn.Module, data: Iterable[Any], *, tolerance: float | None
) -> ValidationReport:
    """Compare the file at `path` with `model` in eval mode, on all batches of `data`.

    Args:
        data: can be read twice.
        tolerance: how far each value may be off, relative to the largest of its output; None asks
            for agreement instead (`normswap.deploy.agreement`).

    Raises:
        NormswapError: the model or the file does not take a batch.
    """
    session = open_faithful(path)
    declared = session.get_inputs()
    deviations, shapes = list[Deviation](), list[list[int]]()
    divergence: str | None = None
    infinite: tuple[str, ...] = ()
    with alone(), generators_kept(), torch.no_grad():
        torch.manual_seed(0)
        first, _ = peeked(data, _LOOKED_AT)
        reference = reference_copy(model, call_of(model, first[0]))
        gathered = Agreements(reference, first)
        reading = Reading(data)
        for batch in reading:
            with reading.current():
                call = call_of(model, batch)
                check_fit(call, declared)
                feed = {e.name: v for e, v in zip(declared, arrays(call), strict=True)}
                shapes = shapes or [list(value.shape) for value in feed.values()]
                expected, actual = _outputs(reference, call), _run(session, feed)
            wanted = arrays(expected)
            off = _compared(actual, wanted, tolerance)
            deviations += off
            if all(isfinite(each.max_abs) for each in off):
                gathered.add(_as_nested(actual, expected), expected, size_of(batch))
            if divergence is None and not all(each.agrees for each in off):
                infinite = overflows(path, reference, call, feed)
                atol = _atol(wanted, tolerance)
                divergence = next(iter(infinite), None) or first_divergence(
                    path, reference, call, feed, rtol=0, atol=atol
                )
    agreement = gathered.found() if shapes else ()
    agrees = all(each.agrees for each in deviations)
    case = Case(
        name="data",
        shapes=shapes,
        max_abs=max((each.max_abs for each in deviations), default=0.0),
        max_rel=max((each.max_rel for each in deviations), default=0.0),
        passed=agrees,
        detail="" if agrees else "in a batch of the data",
    )
    return ValidationReport(
        passed=agrees and (tolerance is not None or all(each.passed for each in agreement)),
        max_abs=case.max_abs,
        max_rel=case.max_rel,
        cases=[case],
        first_divergence=divergence,
        overflows=infinite,
        agreement=agreement,
    )


def _outputs(model: nn.Module, call: CallArguments) -> Any:
    args, kwargs = cloned(call)
    with running_on(tensors(call), "give data that it takes"):
        return model(*args, **kwargs)


def _run(session: InferenceSession, feed: dict[str, Array]) -> list[Array]:
    try:
        return [np.asarray(each) for each in session.run(None, feed)]
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        raise NormswapError(
            f"ONNX Runtime cannot run the file on it ({one_line(error)}); export in float32"
        ) from error


def _compared(
    actual: list[Array], expected: list[Array], tolerance: float | None
) -> list[Deviation]:
    """How far each output is off; without a tolerance all that can be compared agree."""
    if len(actual) != len(expected):
        return [Deviation(np.inf, np.inf, False)]
    atol = _atol(expected, tolerance)
    found = [compare(a, b, rtol=0, atol=atol) for a, b in zip(actual, expected, strict=True)]
    if tolerance is not None:
        return found
    return [each._replace(agrees=isfinite(each.max_abs)) for each in found]


def _atol(expected: list[Array], tolerance: float | None) -> float:
    """`tolerance` as `compare` takes it, which multiplies it with a largest value above 1."""
    peak = max((float(np.abs(each).max(initial=0)) for each in expected), default=0.0)
    return np.inf if tolerance is None else tolerance * min(1.0, peak)


def _as_nested(actual: list[Array], expected: Any) -> Any:
    """The outputs of the file, nested as those of the model."""
    waiting = iter(actual)
    return pytree.tree_map_only(
        torch.Tensor, lambda _: torch.from_numpy(next(waiting).copy()), expected
    )
