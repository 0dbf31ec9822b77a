"""Prove that an ONNX file computes what a model computes: ONNX Runtime on the CPU against torch.

The inputs are given or random, and of other sizes as well.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession
from pydantic import BaseModel, ConfigDict
from torch import nn

from normswap.core.ambient import alone, generators_kept, usual_settings
from normswap.core.atomic import of_one_file
from normswap.core.errors import NormswapError
from normswap.core.results import Lines, Result
from normswap.core.shown import shown
from normswap.core.types import Inputs
from normswap.deploy.agreement import Agreement
from normswap.deploy.cases import DTYPES, CaseInputs, draw, extremes, nearby, other_sizes, redraw
from normswap.deploy.diverge import (
    ROUNDINGS,
    Array,
    CallArguments,
    arrays,
    compare,
    failing_node,
    first_divergence,
    one_line,
    open_faithful,
)
from normswap.deploy.float16_values import has_float16
from normswap.deploy.overflow import REMEDY, overflows
from normswap.deploy.reference_run import bind, reference_copy, run_reference, tensors
from normswap.deploy.sizes.trials import resize
from normswap.graph.copies import copied
from normswap.passes.runs import in_double


def check_fit(call: CallArguments, declared: Any) -> None:
    """Refuse inputs that the file does not declare so."""
    given = tensors(call)
    if len(given) != len(declared):
        names = ", ".join(entry.name for entry in declared)
        raise NormswapError(
            f"the file takes {len(declared)} inputs ({names}), {len(given)} are given; give "
            "those it was exported with"
        )
    for tensor, entry in zip(given, declared, strict=True):
        fits = len(tensor.shape) == len(entry.shape) and all(
            not isinstance(want, int) or have == want
            for have, want in zip(tensor.shape, entry.shape, strict=True)
        )
        if not fits or DTYPES.get(entry.type) != tensor.dtype:
            raise NormswapError(
                f"input {entry.name!r} of the file is {entry.type} {list(entry.shape)}, the given "
                f"one is {tensor.dtype} {list(tensor.shape)}; give one that fits"
            )


_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike"}
_RANDOM |= {"RandomUniform", "RandomUniformLike"}


class Case(BaseModel):
    """One set of inputs: how far the file's outputs are from the model's."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    shapes: list[list[int]]
    max_abs: float
    max_rel: float
    passed: bool
    detail: str = ""


class ValidationReport(Lines, Result, BaseModel):
    """What `validate` found.

    `max_abs` is the largest absolute difference over all cases and outputs; `max_rel` the largest
    ratio of an output's absolute difference to the largest absolute value the model gave there.
    A constant and other extremes that passed do not count: what is 0 but for rounding has no ratio.
    Both are infinite where outputs cannot be compared. `first_divergence` names the first layer
    that differs: module path, ONNX node, operator. `overflows` names the layers whose values are
    infinite in float16, and were finite before. `agreement` says how far the outputs of a file in
    fewer bits agree on data, output by output.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    passed: bool
    max_abs: float
    max_rel: float
    cases: list[Case]
    first_divergence: str | None = None
    overflows: tuple[str, ...] = ()
    agreement: tuple[Agreement, ...] = ()

    def entries(self) -> list[Case]:
        """What was run."""
        return self.cases

    def summary(self) -> str:
        """Whether it passed, and how far it is off."""
        verdict = "passed" if self.passed else "FAILED"
        return f"validation {verdict}: max_abs {self.max_abs:.2e}, max_rel {self.max_rel:.2e}"

    def __str__(self) -> str:
        lines = [self.summary()]
        for case in self.cases:
            shapes = ", ".join("x".join(map(str, shape)) for shape in case.shapes)
            outcome = f"{'ok' if case.passed else 'MISMATCH'} {case.detail}".rstrip()
            numbers = f"max_abs {case.max_abs:.2e}  max_rel {case.max_rel:.2e}"
            lines.append(f"  {case.name:<12} {shapes}  {numbers}  {outcome}")
        lines += [f"  agreement    {each}" for each in self.agreement]
        if self.first_divergence:
            lines.append(f"  first divergence: {self.first_divergence}")
        if self.overflows:
            lines.append(f"  overflow: {'; '.join(self.overflows)}. {REMEDY}")
        return "\n".join(map(shown, lines))


@usual_settings()
def validate(
    path: str | Path,
    model: nn.Module,
    inputs: Inputs | None = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> ValidationReport:
    """Compare an ONNX file with `model` in eval mode on the CPU; `model` itself is not touched.

    The cases: the given inputs; random inputs of one sample more and of one less, if the file
    leaves the batch open, and larger and smaller ones, if it leaves other sizes open; random inputs
    of the given shapes; a constant, and the given values as large, tiny and denormal numbers, where
    the model's outputs for these are finite. Random floats are normal; integers and booleans
    (lengths, indices, masks) are the given ones, the last of them repeated where there are more,
    and so are floats where the model rejects random ones.

    Every output must satisfy `|file - model| <= atol * peak + rtol * |model|`, with `peak` its
    largest absolute value, or 1 if that is less, and `atol * peak` never below a few roundings of
    the output's dtype (see `diverge.compare`), the same shape and dtype, and NaN and infinities in
    the same places; integers must be equal. For a constant and the other extremes outputs may also
    be apart by 32 times what a rounding of the inputs changes, where that is more; the report says
    so.

    Args:
        path: The ONNX file, with its external data beside it.
        inputs: A tensor, a tuple of positional or a dict of keyword inputs, tensors nested in
            them or not; None draws random ones from the shapes the file declares.

    Raises:
        NormswapError: no such file or not ONNX, a dtype or operator ONNX Runtime's CPU does not
            have, inputs that the model or the file does not take, a model that is random in eval.
    """
    return of_one_file(
        Path(path),
        lambda place: check(place, model, inputs, rtol=rtol, atol=atol, extreme=True),
    )


def check(
    path: Path,
    model: nn.Module,
    inputs: Any,
    *,
    rtol: float,
    atol: float,
    extreme: bool = False,
) -> ValidationReport:
    """As `validate`, of a file that nobody replaces meanwhile.

    Args:
        extreme: Also on the values of `extremes`, unless the file is in float16, which has no room
            for them.
    """
    if not path.is_file():
        raise NormswapError(f"there is no ONNX file at {str(path)!r}; export the model first")
    session = open_faithful(path)
    declared = session.get_inputs()
    with alone(), generators_kept(), torch.no_grad():
        torch.manual_seed(0)
        drawn = inputs is None
        given = bind(model, tuple(draw(entry) for entry in declared) if drawn else inputs)
        cases = [CaseInputs("random" if drawn else "given", [given], required=True)]
        check_fit(given, declared)
        reference = reference_copy(model, given)
        cases += other_sizes(given, declared)
        if not drawn:
            anew = redraw(given, [tuple(t.shape) for t in tensors(given)])
            cases.append(CaseInputs("random", [anew], required=True))
        if extreme and not has_float16(onnx.load(path, load_external_data=False).graph):
            cases += extremes(given)

        results, divergence, tolerated = [], None, set[str]()
        infinite: tuple[str, ...] = ()
        for inputs_of_case in cases:
            taken = _taken(reference, inputs_of_case, given)
            if taken is None:
                continue
            call, expected = taken
            feed = dict(zip((entry.name for entry in declared), arrays(call), strict=True))
            name = inputs_of_case.name
            case, culprit = _run_case(session, path, name, feed, expected, rtol, atol)
            if inputs_of_case.extreme and not case.passed:
                least = _of_the_last_digit(reference, call, expected)
                if least > atol:
                    case, culprit = _run_case(session, path, name, feed, expected, rtol, least)
                    said = f"within {least:.1e}, by what roundings make of the model"
                    case = case.model_copy(update={"detail": said}) if case.passed else case
            results.append(case)
            if inputs_of_case.extreme and case.passed:
                tolerated.add(name)
            if not case.passed and divergence is None:
                _refuse_random(path, reference, call, expected, rtol, atol)
                infinite = () if culprit else overflows(path, reference, call, feed)
                divergence = culprit or next(iter(infinite), None)
                divergence = divergence or first_divergence(
                    path, reference, call, feed, rtol=rtol, atol=atol
                )
                divergence = divergence or f"no single layer; {case.detail}"
    return ValidationReport(
        passed=all(case.passed for case in results),
        max_abs=max(case.max_abs for case in results if case.name not in tolerated),
        max_rel=max(case.max_rel for case in results if case.name not in tolerated),
        cases=results,
        first_divergence=divergence,
        overflows=infinite,
    )


def _taken(
    reference: nn.Module, case: CaseInputs, given: CallArguments
) -> tuple[CallArguments, list[Array]] | None:
    """The inputs of `case` that the model takes, with its outputs; None if it takes none."""
    for call in case.ways:
        try:
            if not case.extreme:
                return _accepted(reference, call, given)
            outputs = run_reference(reference, call)
        except NormswapError:
            if case.required and call is case.ways[-1]:
                raise
        else:
            return (call, outputs) if all(np.isfinite(y).all() for y in outputs) else None
    return None


def _of_the_last_digit(reference: nn.Module, call: CallArguments, expected: list[Array]) -> float:
    """How far roundings take the model's outputs, relative to them.

    The output of a normalization for a constant is the rounding of its mean, times 1 / sqrt(eps).
    A file may differ by `ROUNDINGS` times what the model itself makes of the last digit of its
    inputs, or by twice what it is off beside a copy in float64.
    """
    least = ROUNDINGS * _apart(run_reference(reference, nearby(call)), expected)
    with suppress(Exception):  # a model that is not for float64 raises what it likes
        exact = run_reference(copied(reference).double(), in_double(call))
        least = max(least, 2 * _apart(exact, expected))
    return least


def _apart(outputs: list[Array], expected: list[Array]) -> float:
    """The largest difference, relative to the largest value of its output."""
    return max(
        (
            float(np.abs(y.astype(np.float64) - z).max(initial=0))
            / max(1.0, float(np.abs(z).max(initial=0)))
            for y, z in zip(outputs, expected, strict=True)
            if y.shape == z.shape
        ),
        default=0.0,
    )


def _accepted(
    reference: nn.Module, call: CallArguments, given: CallArguments
) -> tuple[CallArguments, list[Array]]:
    """`call` and the model's outputs; where it rejects drawn values, with the given ones."""
    try:
        return call, run_reference(reference, call)
    except NormswapError:
        if call is given:
            raise
        call = resize(given, [tuple(t.shape) for t in tensors(call)])
        return call, run_reference(reference, call)


def _run_case(
    session: InferenceSession,
    path: Path,
    name: str,
    feed: dict[str, Array],
    expected: list[Array],
    rtol: float,
    atol: float,
) -> tuple[Case, str | None]:
    """One case, and the layer that ONNX Runtime itself names when it fails to run the file."""
    shapes = [list(value.shape) for value in feed.values()]
    inf = float("inf")

    def failed(detail: str) -> Case:
        return Case(name=name, shapes=shapes, max_abs=inf, max_rel=inf, passed=False, detail=detail)

    try:
        outputs = session.run(None, feed)
    except Exception as error:  # ONNX Runtime's exceptions have no base of their own
        reason = one_line(error)
        culprit = failing_node(path, str(error))
        return failed(f"ONNX Runtime: {reason}"), culprit and f"{culprit}: {reason}"
    if len(outputs) != len(expected):
        return failed(f"the file has {len(outputs)} outputs, the model {len(expected)}"), None
    names = [output.name for output in session.get_outputs()]
    for output, actual, wanted in zip(names, outputs, expected, strict=True):
        if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
            return failed(
                f"output {output!r} is {actual.dtype} {list(actual.shape)} in the file, "
                f"{wanted.dtype} {list(wanted.shape)} in the model"
            ), None
    deviations = [
        compare(actual, wanted, rtol=rtol, atol=atol)
        for actual, wanted in zip(outputs, expected, strict=True)
    ]
    wrong = [output for output, d in zip(names, deviations, strict=True) if not d.agrees]
    return Case(
        name=name,
        shapes=shapes,
        max_abs=max((d.max_abs for d in deviations), default=0.0),
        max_rel=max((d.max_rel for d in deviations), default=0.0),
        passed=not wrong,
        detail=f"in output {', '.join(map(repr, wrong))}" if wrong else "",
    ), None


def _refuse_random(
    path: Path,
    reference: nn.Module,
    call: CallArguments,
    expected: list[Array],
    rtol: float,
    atol: float,
) -> None:
    """Run the model again: its results differ if it draws from torch's generator."""
    again = run_reference(reference, call)
    if len(again) == len(expected) and all(
        compare(a, b, rtol=rtol, atol=atol).agrees for a, b in zip(again, expected, strict=True)
    ):
        return
    nodes = onnx.load(path, load_external_data=False).graph.node
    drawn = sorted({node.op_type for node in nodes} & _RANDOM)
    raise NormswapError(
        "the model is random in eval mode: two runs on the same inputs differ"
        + (f" (operator {', '.join(drawn)})" if drawn else "")
        + "; remove what draws random numbers, or export without validation"
    )
