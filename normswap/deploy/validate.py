"""Prove that an ONNX file computes what a model computes: ONNX Runtime on the CPU against torch.

The inputs are given or random, and of other sizes as well.
"""

from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime import InferenceSession
from pydantic import BaseModel, ConfigDict
from torch import nn

from normswap.core.ambient import alone, generators_kept, usual_settings
from normswap.core.atomic import of_one_file
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.core.memory import Allowance
from normswap.core.shown import shown
from normswap.deploy.diverge import (
    Array,
    CallArguments,
    arrays,
    compare,
    failing_node,
    first_divergence,
    one_line,
    open_session,
)
from normswap.deploy.reference_run import bind, reference_copy, run_reference, tensors

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
LARGER, LARGER_BY = "larger", 32  # a multiple of what networks reduce height and width by


def draw(entry: Any) -> torch.Tensor:
    """A random input of the declared shape, two samples where the batch is dynamic."""
    dtype = _DTYPES.get(entry.type)
    shape = [2 if i == 0 and not isinstance(n, int) else n for i, n in enumerate(entry.shape)]
    fixed = all(isinstance(n, int) for n in shape)
    most = Allowance.of(entry.name, 0).limit  # a file may declare an input of any size
    if (
        dtype is None
        or not (fixed and dtype.is_floating_point)
        or prod(shape) * dtype.itemsize > most
    ):
        raise NormswapError(
            f"no values can be guessed for input {entry.name!r} ({entry.type} "
            f"{list(entry.shape)}); give inputs"
        )
    return torch.randn(shape, dtype=dtype)


def random_cases(given: CallArguments, declared: Any) -> dict[str, CallArguments]:
    """Random inputs of other sizes, where the file leaves sizes open."""
    shapes = [tuple(tensor.shape) for tensor in tensors(given)]
    opened = {
        (entry.shape[axis], axis == 0): shape[axis]
        for entry, shape in zip(declared, shapes, strict=True)
        for axis in range(len(shape))
        if not isinstance(entry.shape[axis], int)
    }

    def resized(batch: bool, by: int) -> CallArguments:
        return redraw(
            given,
            [
                tuple(
                    size + by
                    if (entry.shape[axis], axis == 0) in opened and (axis == 0) == batch
                    else size
                    for axis, size in enumerate(shape)
                )
                for entry, shape in zip(declared, shapes, strict=True)
            ],
        )

    cases = {}
    batches = [size for (_, batch), size in opened.items() if batch]
    if batches:
        cases[f"batch of {batches[0] + 1}"] = resized(True, 1)
    if len(batches) < len(opened):
        cases[LARGER] = resized(False, LARGER_BY)
    return cases


def redraw(call: CallArguments, shapes: list[tuple[int, ...]]) -> CallArguments:
    """`call` with its tensors in these shapes, and floats drawn anew.

    Integers are those of `call`: what they mean (a length, an index, a class) says which fit.
    """

    def drawn(given: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(given) if given.is_floating_point() else given

    redrawn: CallArguments = pytree.tree_map_only(torch.Tensor, drawn, resize(call, shapes))
    return redrawn


def resize(call: CallArguments, shapes: list[tuple[int, ...]]) -> CallArguments:
    """`call` with its tensors in these shapes: cut, or the last along an axis repeated."""
    waiting = iter(shapes)

    def resized(given: torch.Tensor) -> torch.Tensor:
        shape = next(waiting)
        if not given.numel():
            return given.new_zeros(shape)
        for axis, size in enumerate(shape):
            if size != given.shape[axis]:
                index = torch.arange(size).clamp(max=given.shape[axis] - 1)
                given = given.index_select(axis, index)
        return given

    changed: CallArguments = pytree.tree_map_only(torch.Tensor, resized, call)
    return changed


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
        if not fits or _DTYPES.get(entry.type) != tensor.dtype:
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
