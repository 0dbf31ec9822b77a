"""Measure one model of the zoo: what folding it leaves and how exact it is, against torch.fx.

The columns:

input: the shape that the compared part receives, two samples.
batch_norms, left, fuse_left: the batch normalizations that one forward in eval mode executes in the
    original, folded and fused model: the calls of F.batch_norm, and of the scale and shift that a
    fold puts in the place of one. Calls and not modules, because fuse inlines subclasses; and heads
    that only training runs do not count.
left_because: the reasons in the plan for those that are left, with their number. Of modules the
    reasons name the class, so that equal ones can be counted.
error64: relative error of the fold in float64, max|y - y0| / max|y0| of the output tensor where it
    is largest; y0 is the original's output in float64.
error, fuse_error: the same in float32, against the same y0.
distance: the same of the original in float32: what rounding does without any fold.
spread: the same between the outputs for one sample and another. An output that did not depend on
    the input would say nothing.
fold_seconds, seconds: for planning and carrying out the fold, and for the whole row.
swap_left: what remains after converting to group_norm, where that was asked for.

A model passes if
1. its output is finite and depends on the input (`spread`);
2. folded, its error is at most 1e-10 in float64;
3. and in float32 at most 1e-5, or 3 times `distance` where that is more;
4. no more batch normalizations are left than fuse leaves, where fuse computes the same function;
5. the plan gives a reason for each one that is left;
6. converted to group_norm, where that was asked for, its output is finite.
"""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import zoo_models
from pydantic import BaseModel
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.overrides import TorchFunctionMode

from normswap.core.errors import first_line
from normswap.norms.pointwise.channel_affine import ChannelAffine, ChannelShift
from normswap.passes import Fold, Replace
from normswap.passes.plan import Plan, plan

TOLERANCE64, TOLERANCE, TIMES_DISTANCE = 1e-10, 1e-5, 3.0
MIN_SPREAD = 1e-3
NO_REASON = "without a reason"


class Row(BaseModel):
    """What happened to one model; the module's docstring defines the columns."""

    family: str
    name: str
    status: str = "failed"
    why: str = ""
    input: str = ""
    parameters: int | None = None
    batch_norms: int | None = None
    left: int | None = None
    fuse_left: int | None = None
    error64: float | None = None
    error: float | None = None
    distance: float | None = None
    spread: float | None = None
    fuse_error: float | None = None
    fuse_failed: str = ""
    swap_left: int | None = None
    fold_seconds: float | None = None
    seconds: float = 0.0
    left_because: str = ""

    @property
    def allowed(self) -> float:
        """The error in float32 that the rule allows."""
        return max(TOLERANCE, TIMES_DISTANCE * (self.distance or 0.0))

    @property
    def fuse_is_right(self) -> bool:
        """Whether fuse ran and computes the same function."""
        return self.fuse_error is not None and self.fuse_error <= self.allowed

    def broken_rules(self) -> Iterator[str]:
        """Which of the rules a model does not meet, of which every measurement was taken."""
        assert self.spread is not None and self.left is not None
        assert self.error is not None and self.error64 is not None
        if not MIN_SPREAD < self.spread < math.inf:
            yield f"the original's output is not finite or hardly varies ({self.spread:.1e})"
        if self.error64 > TOLERANCE64:
            yield f"fold: error {self.error64:.1e} in float64"
        if self.error > self.allowed:
            yield f"fold: error {self.error:.1e}, allowed {self.allowed:.1e}"
        if self.fuse_is_right and self.left > (self.fuse_left or 0):
            yield f"fold: {self.left} left, fuse leaves {self.fuse_left}"
        if NO_REASON in self.left_because:
            yield "fold: some are left without a reason"


def measure(row: Row, stage: Callable[[str], None], *, swap: bool = False) -> None:
    """Fill `row`, telling `stage` what comes next; with `swap` convert to group_norm too."""
    stage("load")
    case = zoo_models.load(row.family, row.name)
    model, inputs = case.model, case.inputs
    row.input = "x".join(map(str, case.part_inputs[0].shape))
    row.parameters = sum(p.numel() for p in model.parameters())

    stage("run")
    with executions(model) as executed:
        y = case.outputs(model)
    row.batch_norms = len(executed)
    row.spread = relative_error([t.flip(0) for t in y], y)  # axis 0 is the sample

    stage("fold")
    start = time.perf_counter()
    folding = plan(model, Fold(), inputs=inputs)
    folded = folding.apply(model)
    row.fold_seconds = time.perf_counter() - start
    with executions(folded) as executed:
        y_folded = case.outputs(folded)
    row.left, row.left_because = len(executed), reasons(folding, executed, model)
    del folded  # the largest models come in several copies otherwise

    stage("fuse")
    y_fused: list[Tensor] | None = None
    try:
        fused = fuse(model.get_submodule(case.part))
        with executions(fused) as executed:
            y_fused = case.outputs_of_part(fused)
        row.fuse_left = len(executed)
        del fused
    except Exception as error:
        row.fuse_failed = first_line(error)

    if swap:
        stage("convert")
        swapped = plan(model, Replace("group_norm"), inputs=inputs).apply(model)
        with executions(swapped) as executed:
            y_swapped = case.outputs(swapped)
        row.swap_left = len(executed)
        if not all(bool(t.isfinite().all()) for t in y_swapped):
            raise ArithmeticError("the output is not finite")
        del swapped

    stage("float64")
    model = model.double()  # last: it changes the model
    y64 = case.outputs64(model)
    row.distance, row.error = relative_error(y, y64), relative_error(y_folded, y64)
    if y_fused is not None:
        row.fuse_error = relative_error(y_fused, y64)
    row.error64 = relative_error(case.outputs64(folding.apply(model, inplace=True)), y64)


def relative_error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """max|y - y0| / max|y0|, of the tensor where it is largest; infinite if one is not finite."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return math.inf
    pairs = [(y.double(), y0.double()) for y, y0 in zip(outputs, expected, strict=True)]
    errors = [(y - y0).abs().max() / y0.abs().max() for y, y0 in pairs]
    largest = float(torch.stack(errors).max())  # NaN if one of them is
    return largest if math.isfinite(largest) else math.inf


# --- what is left, and why ----------------------------------------------------------------------


@contextmanager
def executions(model: nn.Module) -> Iterator[list[str]]:
    """Note the module path of every batch normalization that `model` executes inside.

    That is each call of F.batch_norm, whoever makes it, and each call of a scale and shift, or of a
    shift alone, that is left of one.
    """
    found: list[str] = []
    running: list[tuple[str, bool]] = [("", False)]

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            path, is_affine = running[-1]
            if func is F.batch_norm and not is_affine:
                found.append(path)
            return func(*args, **(kwargs or {}))

    def enter(path: str, is_affine: bool) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            running.append((path, is_affine))
            if is_affine:
                found.append(path)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for path, module in model.named_modules():
        is_affine = isinstance(module, (ChannelAffine, ChannelShift))
        handles.append(module.register_forward_pre_hook(enter(path, is_affine)))
        handles.append(module.register_forward_hook(leave))
    with Watch():
        yield found
    for handle in handles:
        handle.remove()


def reasons(decided: Plan, executed: Sequence[str], model: nn.Module) -> str:
    """Why each of `executed` is left, each reason once with its number, the commonest first."""
    given = {left.site.partition(":")[0]: left.reason for left in decided.left}
    given |= {
        edit.path: edit.reason
        for edit in decided.edits
        if edit.effect == "leaves" or (edit.edit == "freeze" and not edit.folded)
    }
    counts: Counter[str] = Counter()
    for path in executed:
        # Where a BatchNorm had an activation in it, its place is taken by a Sequential.
        reason = given.get(path) or given.get(path.rpartition(".")[0])
        counts[_in_short(reason, model) if reason else NO_REASON] += 1
    return " | ".join(f"{n} x {reason}" for reason, n in counts.most_common())


def _in_short(reason: str, model: nn.Module) -> str:
    """A reason without the names of modules: operators alone, and of other modules the class."""

    def class_of(match: re.Match[str]) -> str:
        try:
            return type(model.get_submodule(match.group())).__name__
        except AttributeError:
            return match.group()

    short = re.sub(r"[\w.]+ \((\w+)\)", r"\1", reason.removeprefix("stays: "))
    short = re.sub(r"\w+(\.\w+)+", class_of, short)
    return re.sub(r"\b(\w+)(, \1\b)+", r"\1", short)
