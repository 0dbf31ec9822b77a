"""Measure one model of the zoo: its fold and its swap, against the original and torch.fx's fuse.

The columns:

batch_norms, left, fuse_left, convert_left: the batch normalizations that one forward in eval mode
    executes, as calls of F.batch_norm, in the original, folded, fused and converted model. Calls
    and not modules, because fuse inlines subclasses; and heads that only training runs do not
    count.
error, fuse_error: relative error against the original in float32, max|y - y0| / max|y0| of the
    output tensor where it is largest.
error64: the same in float64, measured where `distance` is too large to say anything in float32.
distance, folded_distance: the same of the original and the folded model in float32, against the
    original in float64.
spread: the same between the outputs for one sample and another. An output that did not depend on
    the input would say nothing.

A model passes if
1. its output is finite and depends on the input (`spread`);
2. folded, its error is at most 1e-5, or 3 times `distance` where that is more; and where `distance`
   exceeds 1e-3, so that float32 is mere rounding, at most 1e-8 in float64;
3. no more batch normalizations are left than fuse leaves, where fuse computes the same function;
4. converted to group_norm, its output is finite.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import zoo_models
from pydantic import BaseModel
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from normswap.errors import first_line
from normswap.graph.capture import capture
from normswap.passes import Fold, Replace
from normswap.passes.plan import Plan, plan

TOLERANCE, TIMES_DISTANCE = 1e-5, 3.0
MIN_SPREAD, MAX_DISTANCE = 1e-3, 1e-3  # of an original that is worth comparing with, in float32
TOLERANCE64 = 1e-8


class Row(BaseModel):
    """What happened to one model; the module's docstring defines the columns."""

    family: str
    name: str
    status: str = "failed"
    why: str = ""
    parameters: int | None = None
    capture: str = ""
    capture_seconds: float | None = None
    batch_norms: int | None = None
    spread: float | None = None
    left: int | None = None
    left_because: str = ""
    fold_seconds: float | None = None
    error: float | None = None
    error64: float | None = None
    distance: float | None = None
    folded_distance: float | None = None
    fuse_left: int | None = None
    fuse_error: float | None = None
    fuse_failed: str = ""
    converted: bool = False
    convert_left: int | None = None
    convert_left_because: str = ""
    seconds: float = 0.0

    @property
    def allowed(self) -> float:
        """The error that the rule allows."""
        return max(TOLERANCE, TIMES_DISTANCE * (self.distance or 0.0))

    @property
    def fuse_is_right(self) -> bool:
        """Whether fuse ran and computes the same function."""
        return self.fuse_error is not None and self.fuse_error <= self.allowed

    def broken_rules(self) -> Iterator[str]:
        """Which of the rules a model does not meet, of which every measurement was taken."""
        assert self.spread is not None and self.error is not None
        assert self.left is not None
        if not MIN_SPREAD < self.spread < math.inf:
            yield f"the original's output is not finite or hardly varies ({self.spread:.1e})"
        if self.error64 is not None and self.error64 > TOLERANCE64:
            yield f"fold: error {self.error64:.1e} in float64"
        if self.error > self.allowed:
            yield f"fold: error {self.error:.1e}, allowed {self.allowed:.1e}"
        if self.fuse_is_right and self.left > (self.fuse_left or 0):
            yield f"fold: {self.left} left, fuse leaves {self.fuse_left}"
        if not self.converted:
            yield "convert: the output is not finite"


class CountBatchNorms(TorchFunctionMode):
    """Count the calls of F.batch_norm, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.batch_norm
        return func(*args, **(kwargs or {}))


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|y - y0| / max|y0|, of the tensor where it is largest; infinite if one is not finite."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return math.inf
    pairs = [(y.double(), y0.double()) for y, y0 in zip(outputs, expected, strict=True)]
    errors = [(y - y0).abs().max() / y0.abs().max() for y, y0 in pairs]
    largest = float(torch.stack(errors).max())  # NaN if one of them is
    return largest if math.isfinite(largest) else math.inf


def measure(row: Row, stage: Callable[[str], None]) -> None:
    """Fill `row`, telling `stage` what comes next."""

    def run(version: nn.Module) -> tuple[list[Tensor], int]:
        with CountBatchNorms() as count:
            return case.outputs(version), count.calls

    stage("load")
    case = zoo_models.load(row.family, row.name)
    model, inputs = case.model, case.inputs
    row.parameters = sum(p.numel() for p in model.parameters())
    stage("run")
    y, row.batch_norms = run(model)
    row.spread = relative_error([t.flip(0) for t in y], y)  # axis 0 is the sample

    stage("capture")
    row.capture, row.capture_seconds = timed(lambda: capture(model, inputs).how)

    stage("fold")
    folding: Plan
    (folding, folded), row.fold_seconds = timed(lambda: planned(model, Fold(), inputs))
    row.left_because = most_frequent(folding)
    y_folded, row.left = run(folded)
    row.error = relative_error(y_folded, y)
    del folded

    stage("fuse")
    try:
        y_fused, row.fuse_left = run(fuse(model))
        row.fuse_error = relative_error(y_fused, y)
    except Exception as error:
        row.fuse_failed = first_line(error)

    stage("convert")
    converting, converted = planned(model, Replace("group_norm"), inputs)
    row.convert_left_because = most_frequent(converting)
    y_converted, row.convert_left = run(converted)
    row.converted = all(bool(t.isfinite().all()) for t in y_converted)
    del converted

    stage("float64")
    try:
        y64 = case.outputs(model.double(), torch.float64)  # last: it changes the model
    except RuntimeError:
        return  # it makes float32 tensors of its own (RAFT's grid): the limit is then TOLERANCE
    row.distance = relative_error(y, y64)
    row.folded_distance = relative_error(y_folded, y64)
    if row.distance > MAX_DISTANCE:
        _, folded = planned(model, Fold(), tree_map_only(Tensor, torch.Tensor.double, inputs))
        row.error64 = relative_error(case.outputs(folded, torch.float64), y64)


def planned(model: nn.Module, what: Fold | Replace, inputs: Any) -> tuple[Plan, nn.Module]:
    """The plan of a pass, and the model it makes."""
    decided = plan(model, what, inputs=inputs)
    return decided, decided.apply(model)


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What `function` returns, and the seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, round(time.perf_counter() - start, 2)


def most_frequent(decided: Plan) -> str:
    """The commonest reasons why sites were left, without the names of modules in them."""
    reasons = Counter(re.sub(r"[\w.]+ \((\w+)\)", r"\1", left.reason) for left in decided.left)
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common(3))
