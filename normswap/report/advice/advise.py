"""`advise`: what to do with the normalization of a model, and why."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.core.ambient import usual_settings
from normswap.fit.reading import first_inputs, repeatable
from normswap.graph.inspection import Inspection
from normswap.graph.snapshot import untouched
from normswap.graph.supported import check_supported
from normswap.passes.recipe import recipe_of
from normswap.report.advice.findings import find, not_by_default
from normswap.report.advice.given import Given
from normswap.report.advice.measured import Measured, measure
from normswap.report.advice.rules import advice_for
from normswap.report.advice.suggestion import Advice, Use


@usual_settings()
def advise(
    model: nn.Module,
    inputs: Any = None,
    *,
    batch_size: int | None = None,
    private: bool = False,
    target: str | None = None,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
) -> Advice:
    """Say what to do with the normalizations of `model`, which stays as it is.

    Args:
        inputs: example inputs (a tensor, a tuple of positional ones or a dict of keyword ones); by
            default the first batch of `data`. A forward pass on them is timed for two seconds.
        batch_size: of the training that is to come.
        private: that training is differentially private.
        target: where the model is to run: "onnxruntime", "cuda" or "edge".
        data: batches, a few of which are read to see whether the running statistics fit them and,
            for training in small batches or in private, what a swap to GroupNorm would cost.
        test: batches to measure accuracy on, by default `data`.

    Returns:
        The suggestions, the most urgent first; `print` shows them.

    Raises:
        NormswapError: the model does not run on `inputs`, or there is no such target.
    """
    use = Use.of(batch_size, private, target)
    data = None if data is None else repeatable(data)
    given = Given(model=recipe_of(model).source or "MODEL")
    measured_on = "on the data learned from" if test is None else "on the test data"
    return advised(model, inputs, use, given, data, data if test is None else test, measured_on)


def advised(
    model: nn.Module,
    inputs: Any,
    use: Use,
    given: Given,
    data: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    measured_on: str = "",
) -> Advice:
    """As `advise`, with commands on the model and the data as the user named them."""
    check_supported(model, lazy=True, numbers=data is not None)
    if data is not None and inputs is None:
        inputs = first_inputs(model, data)

    def measuring(model: nn.Module, inspection: Inspection, seconds: float) -> Measured:
        assert data is not None
        assert test is not None
        return measure(
            model,
            inputs,
            inspection,
            data,
            test,
            measured_on,
            include=not_by_default(inspection) or None,
            swap=use.leaves_the_batch,
            seconds=seconds,
        )

    with untouched(model):  # planning draws random numbers
        findings = find(model, inputs, use, measuring if data is not None else None)
    return advice_for(findings, use, given)
