"""`advise`: what to do with the normalization of a model, and why.

Every rule is a function of the findings and the use, and says which suggestions they call for. A
note is good to know, and asks for no command.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from normswap.core.ambient import usual_settings
from normswap.core.calls import check_module
from normswap.core.types import Batches, Inputs
from normswap.fit.reading import first_inputs, repeatable
from normswap.graph.snapshot import untouched
from normswap.graph.supported import check_supported
from normswap.passes.inspection import Inspection
from normswap.passes.recipe import recipe_of
from normswap.report.advice.findings import Findings, find, freed, not_by_default
from normswap.report.advice.for_deployment import deployment
from normswap.report.advice.for_training import (
    always_of_the_batch,
    private,
    small_batches,
    statistics,
)
from normswap.report.advice.measured import Measured, measure
from normswap.report.advice.suggestion import (
    ENOUGH,
    Advice,
    Given,
    Suggestion,
    Use,
    count,
    of,
    some,
)


def notes(findings: Findings, use: Use) -> Iterator[str]:
    """Why there is nothing to do, what could not be seen, and what to beware of."""
    if not findings.sites:
        yield "The model has no normalization that normswap knows: nothing to do."
    elif use.trains and not findings.live:
        yield (
            "No normalization depends on the batch"
            + (": nothing to do for private training." if use.private else ", whatever its size.")
        )
    if use.batch_size is not None and use.batch_size >= ENOUGH and findings.live:
        yield f"{use.batch_size} samples are enough for a batch's statistics: train it as it is."
    if use.private and findings.live:
        yield (
            "Running statistics were computed from the data of the pretraining; if those are "
            "private, they are not protected."
        )
    mixed = [s.name for s in findings.sites if s.kind == "instance" and s.statistics == "running"]
    if mixed:
        yield (
            f"{some(mixed)}: an InstanceNorm with running statistics computes one function in "
            "training and another in eval mode."
        )
    yield from _deployment(findings, use)
    if findings.untrained:
        yield (
            "The running statistics are those of an untrained model at "
            f"{of(findings.untrained, len(findings.batch), 'BatchNorm')}; give its weights with "
            "--checkpoint."
        )
    if not findings.with_inputs:
        yield (
            "Without example inputs dataflow, shapes and time stay unknown; give a shape with "
            "--input, such as 1x3x224x224."
        )
    for path, why in findings.inspection.unseen.items():
        yield f"Not captured: {path or 'the whole model'}: {why}"
    yield from (f"{name} is not possible: {why}" for name, why in findings.refused.items())


def _deployment(findings: Findings, use: Use) -> Iterator[str]:
    if use.trains and use.target is None:
        return
    run_time = findings.at_run_time
    if run_time and use.target in (None, "edge", "cuda"):
        kinds = some(list(dict.fromkeys(site.cls for site in run_time)))
        compiled = "; torch.compile fuses each into few kernels" if use.target == "cuda" else ""
        yield (
            f"{count(len(run_time), 'normalization')} ({kinds}) compute statistics of each input, "
            f"so that nothing can fold them{compiled}."
        )
    if use.target == "onnxruntime" and findings.center is not None and freed(findings.center):
        yield (
            f"{of(len(freed(findings.center)), len(run_time), 'normalization')} could be RMSNorms "
            "exactly (normswap center); in ONNX Runtime on a CPU that was no faster."
        )
    if use == Use() and findings.sites:
        yield "For other uses: --batch-size, --private, --target onnxruntime, cuda or edge."


_URGENCIES = ("must", "should", "could")


def advice_for(findings: Findings, use: Use, given: Given) -> Advice:
    """What `findings` suggest for `use`, the most urgent first, none of it twice."""
    found: dict[str, Suggestion] = {}
    for each in _suggestions(findings, use, given):
        known = found.setdefault(each.name, each)
        if _URGENCIES.index(each.urgency) < _URGENCIES.index(known.urgency):
            found[each.name] = each
    in_order = sorted(found.values(), key=lambda each: _URGENCIES.index(each.urgency))
    return Advice(
        use=use,
        found=findings.to_dict(),
        suggestions=_after_their_sources(in_order),
        notes=tuple(notes(findings, use)),
    )


def _suggestions(findings: Findings, use: Use, given: Given) -> Iterator[Suggestion]:
    yield from statistics(findings)
    if use.private:
        yield from private(findings, given)
    elif findings.always and findings.groups:
        yield from always_of_the_batch(findings, use, given)
        return
    elif use.batch_size is not None:
        yield from small_batches(findings, use.batch_size, given)
    if use.target is not None or not use.trains:
        yield from deployment(findings, use.target, given)


def _after_their_sources(suggestions: Sequence[Suggestion]) -> tuple[Suggestion, ...]:
    """The same, each behind the one whose result it takes."""
    placed: list[Suggestion] = []
    waiting = list(suggestions)
    while waiting:
        names = {each.name for each in placed}
        behind = {each.name for each in waiting}
        ready = next((e for e in waiting if e.after in names or e.after not in behind), waiting[0])
        waiting.remove(ready)
        placed.append(ready)
    return tuple(placed)


@usual_settings()
def advise(
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    batch_size: int | None = None,
    private: bool = False,
    target: str | None = None,
    data: Batches | None = None,
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
    check_module(model)
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
