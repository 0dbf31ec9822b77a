"""What a rewrite did, measured: the report of `convert`, `fold`, `freeze`, `bake`, `calibrate`.

It is written beside the model as `report.json` and printed as a table.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.atomic import staged
from normswap.deploy.export import ExportReport, export
from normswap.graph.capture import as_call
from normswap.graph.snapshot import evaluating
from normswap.passes.plan import Plan
from normswap.report.tables import facts_table, plan_table
from normswap.store import write

REPORT, ONNX = "report.json", "model.onnx"
TOLERANCE = 1e-5  # of an exact rewrite in float32, relative to the largest output
ROUNDING = 3.0  # or this many times what rounding alone does to the original


class TrainingReport(BaseModel):
    """How a model was trained.

    Attributes:
        steps: of the optimizer.
        settings: the others that were given, by name.
        seconds: that this took, from the checkpoint on where it was resumed.
    """

    model_config = ConfigDict(frozen=True)

    steps: int
    settings: dict[str, Any] = {}
    seconds: float


class RewriteReport(BaseModel):
    """What was done to a model, and what that did to it.

    Attributes:
        model: the reference of the original.
        plan: the edits and the sites left, with reasons.
        deviation: of the outputs from the original's in eval mode, max|a - b| / max|b|.
        allowed: the largest deviation that counts as rounding, for a rewrite that is to be exact.
        accuracy: fraction of correct predictions, by state of the model: original, swapped, ....
        measured_on: what the accuracy was measured on.
        training: the run of `recover` or `finetune`.
        export: the ONNX file.
        files: what was written.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    plan: Plan
    deviation: float | None = None
    allowed: float | None = None
    accuracy: dict[str, float] = {}
    measured_on: str = ""
    training: TrainingReport | None = None
    export: ExportReport | None = None
    files: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        exact = self.deviation is None or self.allowed is None or self.deviation <= self.allowed
        return exact and (self.export is None or self.export.passed)

    def tables(self) -> list[RenderableType]:
        """The plan, then the figures."""
        facts = [(f"accuracy, {state}", f"{value:.2%}") for state, value in self.accuracy.items()]
        if self.accuracy:
            facts.append(("measured on", self.measured_on))
        if self.training is not None:
            facts.append(("trained", f"{self.training.steps} steps, {self.training.seconds:.0f} s"))
        if self.plan.edits or self.plan.left:
            facts.append(("sites changed", f"{len(self.plan.changed)}, left {len(self.plan.left)}"))
        if self.deviation is not None:
            limit = "" if self.allowed is None else f" (<= {self.allowed:.2g})"
            facts.append(("deviation", f"{self.deviation:.2g} of the largest output{limit}"))
        if self.export is not None:
            checked = self.export.validation
            facts += [
                ("ONNX", f"opset {self.export.opset}, {self.export.bytes / 1024:,.0f} KiB"),
                (
                    "largest deviation in ONNX Runtime",
                    f"{checked.max_abs:.2g} absolute, {checked.max_rel:.2g} relative"
                    if checked
                    else "not validated",
                ),
            ]
        if self.files:
            paths = [Path(file) for file in self.files]
            facts.append(("written to", str(paths[0].parent)))
            facts.append(("files", ", ".join(path.name for path in paths)))
        planned = [*plan_table(self.plan), Text()] if self.plan.edits or self.plan.left else []
        tables: list[RenderableType] = [*planned, facts_table("", facts)]
        if self.export is not None and not self.export.passed:
            tables.append(Text(str(self.export.validation), style="red"))
        return tables


def deliver(
    report: RewriteReport,
    model: nn.Module,
    out: Path,
    *,
    inputs: Any = None,
    onnx: bool = False,
    opset: int | None = None,
) -> RewriteReport:
    """Write the model, its recipe, the report and, if asked, the ONNX file to `out`, all at once.

    Raises:
        NormswapError: `out` cannot be written, or the model cannot be exported.
    """
    with staged(out) as scratch:
        write(model, scratch)
        if onnx:
            exported = export(model, inputs, scratch / ONNX, opset=opset)
            report = report.model_copy(
                update={"export": exported.model_copy(update={"path": out / ONNX})}
            )
        names = sorted({file.name for file in scratch.iterdir()} | {REPORT})
        report = report.model_copy(update={"files": tuple(str(out / name) for name in names)})
        (scratch / REPORT).write_text(report.model_dump_json(indent=2) + "\n")
    return report


def compare_outputs(
    original: nn.Module, changed: nn.Module, inputs: Any
) -> tuple[float, float] | None:
    """How far `changed` is from `original` on `inputs` in eval mode, and how far it may be.

    Returns:
        The deviation max|a - b| / max|b| of the floating-point output where it is largest, and what
        counts as rounding: 1e-5, or 3 times the distance of the original from itself in float64.
        None where there is nothing to compare: a detector that found nothing.
    """
    expected = _outputs(original, inputs)
    if not any(output.numel() for output in expected):
        return None
    deviation = _distance(_outputs(changed, inputs), expected)
    if deviation <= TOLERANCE:
        return deviation, TOLERANCE
    exact = _outputs(_double(original), _double(inputs))
    return deviation, max(TOLERANCE, ROUNDING * _distance(expected, exact))


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    # A model may write into its inputs, and the next one needs them as they were.
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, as_call(inputs))
    with evaluating(model):
        leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True) if b.numel()]
    # torch's maximum, unlike Python's, is NaN if one of the values is.
    distances = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(distances).max())


def _double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)
