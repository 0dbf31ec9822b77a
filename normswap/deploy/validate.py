"""Prove that an ONNX file computes what a model computes: ONNX Runtime on the CPU against torch."""

from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime import InferenceSession
from pydantic import BaseModel, ConfigDict
from torch import nn

from normswap.core.ambient import alone, generators_kept, usual_settings
from normswap.core.atomic import of_one_file
from normswap.core.errors import NormswapError
from normswap.core.shown import shown
from normswap.deploy.cases import LARGER, check_fit, draw, random_cases, redraw, resize
from normswap.deploy.diverge import (
    Array,
    Call,
    arrays,
    compare,
    failing_node,
    first_divergence,
    one_line,
    open_session,
)
from normswap.deploy.reference import bind, reference_copy, run_reference, tensors

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


class ValidationReport(BaseModel):
    """What `validate` found.

    `max_abs` is the largest absolute difference over all cases and outputs; `max_rel` the largest
    ratio of an output's absolute difference to the largest absolute value the model gave there.
    Both are infinite where outputs cannot be compared. `first_divergence` names the first layer
    that differs: module path, ONNX node, operator.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    passed: bool
    max_abs: float
    max_rel: float
    cases: list[Case]
    first_divergence: str | None = None

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        lines = [f"validation {verdict}: max_abs {self.max_abs:.2e}, max_rel {self.max_rel:.2e}"]
        for case in self.cases:
            shapes = ", ".join("x".join(map(str, shape)) for shape in case.shapes)
            outcome = "ok" if case.passed else f"MISMATCH {case.detail}".rstrip()
            numbers = f"max_abs {case.max_abs:.2e}  max_rel {case.max_rel:.2e}"
            lines.append(f"  {case.name:<12} {shapes}  {numbers}  {outcome}")
        if self.first_divergence:
            lines.append(f"  first divergence: {self.first_divergence}")
        return "\n".join(map(shown, lines))


@usual_settings()
def validate(
    path: str | Path,
    model: nn.Module,
    inputs: Any = None,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-5,
) -> ValidationReport:
    """Compare an ONNX file with `model` in eval mode on the CPU; `model` itself is not touched.

    The cases: the given inputs; random inputs at another batch size, if the file's batch
    dimension (dimension 0) is dynamic, and at another height and width, if these are; random inputs
    of the given shapes. Random floats are normal; integers and booleans (lengths, indices, masks)
    are the given ones, the last of them repeated where there are more, and so are floats where the
    model rejects random ones. Every output must satisfy `|file - model| <= atol * peak + rtol *
    |model|`, with `peak` its largest absolute value, or 1 if that is less, and `atol * peak` never
    below a few roundings of the output's dtype (see `diverge.compare`), the same shape and dtype,
    and NaN and infinities in the same places; integers must be equal.

    Args:
        path: The ONNX file, with its external data beside it.
        inputs: A tensor, a tuple of positional or a dict of keyword inputs, tensors nested in
            them or not; None draws random ones from the shapes the file declares.

    Raises:
        NormswapError: no such file or not ONNX, a dtype or operator ONNX Runtime's CPU does not
            have, inputs that the model or the file does not take, a model that is random in eval.
    """
    return of_one_file(Path(path), lambda place: check(place, model, inputs, rtol=rtol, atol=atol))


def check(
    path: Path, model: nn.Module, inputs: Any, *, rtol: float, atol: float, random: bool = True
) -> ValidationReport:
    """As `validate`; without `random` on the given inputs alone, as fits a quantized file."""
    if not path.is_file():
        raise NormswapError(f"there is no ONNX file at {str(path)!r}; export the model first")
    session = open_session(path, path.parent)
    declared = session.get_inputs()
    with alone(), generators_kept(), torch.no_grad():
        torch.manual_seed(0)
        drawn = inputs is None
        given = bind(model, tuple(draw(entry) for entry in declared) if drawn else inputs)
        cases = {"random" if drawn else "given": given}
        check_fit(given, declared)
        reference = reference_copy(model, given)
        if random:
            cases |= random_cases(given, declared)
            if not drawn:
                cases["random"] = redraw(given, [tuple(t.shape) for t in tensors(given)])

        results, divergence = [], None
        for name, call in cases.items():
            try:
                call, expected = _accepted(reference, call, given)
            except NormswapError:
                if name != LARGER:
                    raise
                continue  # a model may take fewer sizes than the file declares
            feed = dict(zip((entry.name for entry in declared), arrays(call), strict=True))
            case, culprit = _run_case(session, path, name, feed, expected, rtol, atol)
            results.append(case)
            if not case.passed and divergence is None:
                _refuse_random(path, reference, call, expected, rtol, atol)
                divergence = culprit or first_divergence(
                    path, reference, call, feed, rtol=rtol, atol=atol
                )
                divergence = divergence or f"no single layer; {case.detail}"
    return ValidationReport(
        passed=all(case.passed for case in results),
        max_abs=max(case.max_abs for case in results),
        max_rel=max(case.max_rel for case in results),
        cases=results,
        first_divergence=divergence,
    )


def _accepted(reference: nn.Module, call: Call, given: Call) -> tuple[Call, list[Array]]:
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
    path: Path, reference: nn.Module, call: Call, expected: list[Array], rtol: float, atol: float
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
