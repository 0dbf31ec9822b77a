"""What a rewrite did, measured: the report of `convert`, `fold`, `recover`, `export` and others.

It is written beside the model as `report.json`, as a page `report.html`, and printed as a table.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import RenderableType
from torch import nn

from normswap.core.atomic import staged
from normswap.core.terminal import facts_table, words
from normswap.deploy.export import ExportReport, export
from normswap.deploy.lower import TARGETS, Target
from normswap.passes.plan import Plan
from normswap.passes.recipe import Recipe, recipe_of
from normswap.report.measurements import Measurements, measure
from normswap.report.onnx_model import OnnxModel
from normswap.report.page import PAGE, REPORT, write_report
from normswap.source.source import weights_facts
from normswap.store import write

ONNX, ONNX_DATA = "model.onnx", "model.onnx.data"


class RecoveryReport(BaseModel):
    """How near a student came to its teacher, on batches that it was not trained on.

    Attributes:
        compared: how the outputs were.
        lr: the rate at the start.
        given: the distance of the outputs of the student that came in.
        curve: after which step it was how far; the first is before all steps, calibrated.
        step: the one whose weights the student has.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    compared: str
    lr: float
    given: float
    curve: tuple[tuple[int, float], ...]
    step: int

    def facts(self) -> list[tuple[str, str]]:
        """Lines for a person."""
        best = dict(self.curve)[self.step]
        return [
            ("compared", self.compared),
            ("rate at the start", f"{self.lr:.2g}"),
            (
                "distance on held-back batches",
                f"{self.given:.3g} as given, {self.curve[0][1]:.3g} calibrated, "
                f"{best:.3g} after step {self.step}, whose weights are kept",
            ),
        ]


class TrainingReport(BaseModel):
    """How a model was trained.

    Attributes:
        steps: of the optimizer.
        settings: the others that were given, by name.
        seconds: that this took, from the checkpoint on where it was resumed.
        losses: after which step it was how large, as the mean of up to a hundredth of the steps;
            from the checkpoint on where it was resumed.
        recovery: what `recover` measured; None of a `finetune`.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    steps: int
    settings: dict[str, Any] = {}
    seconds: float
    losses: tuple[tuple[int, float], ...] = ()
    recovery: RecoveryReport | None = None


class RewriteReport(BaseModel):
    """What was done to a model, and what that did to it.

    Attributes:
        model: the reference of the original.
        weights: where those of the model, or of each of several, are from: "random" for fresh ones;
            "" where the code that builds it knows.
        images: what became of the images of the data.
        plan: the edits and the sites left, with reasons.
        deviation: of the outputs from the original's in eval mode, max|a - b| / max|b|.
        unchecked: why the outputs were not compared; "" where they were, or are not to be the same.
        allowed: the largest deviation that counts as rounding, for a rewrite that is to be exact.
        accuracy: fraction of correct predictions, by state of the model: original, swapped, ....
        measured_on: what the accuracy was measured on.
        training: the run of `recover` or `finetune`.
        export: the ONNX file.
        measurements: outputs site by site, latency and sizes, of the original and the result.
        recipe: how the result came to be; `recipe.json` has the structure it starts from too.
        command: what was typed; None from Python.
        files: what was written.
        bytes: the sizes of the files that hold the result, by name.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    model: str
    weights: dict[str, str] = {}
    images: str = ""
    plan: Plan
    deviation: float | None = None
    allowed: float | None = None
    unchecked: str = ""
    accuracy: dict[str, float] = {}
    measured_on: str = ""
    training: TrainingReport | None = None
    export: ExportReport | None = None
    measurements: Measurements = Measurements()
    recipe: Recipe | None = None
    command: str | None = None
    files: tuple[str, ...] = ()
    bytes: dict[str, int] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sites_changed(self) -> int:
        """How many sites the plan changes."""
        return len(self.plan.changed)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def sites_left(self) -> int:
        """How many it leaves as they are."""
        return len(self.plan.left)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether every check held."""
        exact = self.deviation is None or self.allowed is None or self.deviation <= self.allowed
        return exact and (self.export is None or self.export.passed)

    def tables(self, *, whole: bool = False) -> list[RenderableType]:
        """The plan, then the figures.

        Args:
            whole: list every site of the plan, however many there are.
        """
        facts = weights_facts(self.weights)
        facts += [(f"accuracy, {state}", f"{value:.2%}") for state, value in self.accuracy.items()]
        if self.accuracy:
            facts.append(("measured on", self.measured_on))
        if self.images:
            facts.append(("images", self.images))
        if self.training is not None:
            steps = f"{self.training.steps} step{'s' * (self.training.steps != 1)}"
            facts.append(("trained", f"{steps}, {self.training.seconds:.0f} s"))
            facts += [] if self.training.recovery is None else self.training.recovery.facts()
        if self.plan.edits or self.plan.left:
            facts.append(("sites changed", f"{len(self.plan.changed)}, left {len(self.plan.left)}"))
        if self.deviation is not None:
            limit = "" if self.allowed is None else f" (<= {self.allowed:.2g})"
            facts.append(("deviation", f"{self.deviation:.2g} of the largest output{limit}"))
        elif self.unchecked:
            facts.append(("deviation", f"not checked: {self.unchecked}"))
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
        tables: list[RenderableType] = []
        if self.plan.edits or self.plan.left:
            tables += [*self.plan.tables(whole=whole), words("")]
        tables.append(facts_table("", facts))
        if self.export is not None and not self.export.passed:
            tables += [words(line, "red") for line in str(self.export.validation).splitlines()]
        if self.files:
            page = Path(self.files[0]).parent / PAGE
            tables.append(words(f"report: {page}", f"link {page.resolve().as_uri()}"))
        return tables


def deliver(
    report: RewriteReport,
    model: nn.Module,
    out: Path,
    *,
    original: nn.Module | None = None,
    inputs: Any = None,
    data: Iterable[Any] | None = None,
    onnx: bool = False,
    opset: int | None = None,
    target: Target = "generic",
    command: str | None = None,
    gone: Sequence[str] = (),
) -> RewriteReport:
    """Write the model, its recipe, the report and, if asked, the ONNX file to `out`, all at once.

    An ONNX file that lies there goes, if there is no new one.

    Args:
        original: what the result is compared with, site by site.
        inputs: example inputs of both.
        data: batches on which they are compared, if not on the inputs.
        command: what was typed.
        gone: names of other files that go with it, such as the checkpoint of the training.

    Raises:
        NormswapError: `out` cannot be written, or the model cannot be exported.
    """
    # An ONNX file that is there is of the model that was there.
    with staged(out, gone=(ONNX, ONNX_DATA, *gone)) as scratch:
        write(model, scratch)
        compared = {} if original is None else {"original": original}
        compared["result"] = model
        if onnx:
            dynamic = not TARGETS[target].fixed_sizes
            exported = export(
                model, inputs, scratch / ONNX, opset=opset, dynamic=dynamic, target=target
            )
            report = report.model_copy(
                update={"export": exported.model_copy(update={"path": out / ONNX})}
            )
            compared["result in ONNX"] = OnnxModel(scratch / ONNX)
        recipe = recipe_of(model)
        sites = report.plan.changed or tuple(edit.site for edit in recipe.edits)
        measured = measure(compared, sites, inputs, data, report.measured_on)
        return _written(report, recipe, measured, command, scratch, out)


def ship(
    reference: str,
    model: nn.Module,
    inputs: Any,
    out: Path,
    *,
    weights: str = "",
    images: str = "",
    command: str | None = None,
    **options: Any,
) -> ExportReport:
    """Write the model to `out` as ONNX, with the `options` of `normswap.export`, and the report.

    Args:
        weights: where those of the model are from.
        images: what became of the images of the data.

    Returns:
        What `normswap.export` returns.

    Raises:
        NormswapError: as `normswap.export`.
    """
    with staged(out, gone=(ONNX_DATA,)) as scratch:
        exported = export(model, inputs, scratch / ONNX, **options)
        exported = exported.model_copy(update={"path": out / ONNX})
        report = RewriteReport(
            model=reference,
            weights={"model": weights},
            images=images,
            plan=Plan(),
            export=exported,
        )
        compared = {"model": model, "ONNX file": OnnxModel(scratch / ONNX)}
        measured = measure(compared, (), inputs)
        _written(report, recipe_of(model), measured, command, scratch, out)
    return exported


def _written(
    report: RewriteReport,
    recipe: Recipe,
    measured: Measurements,
    command: str | None,
    scratch: Path,
    out: Path,
) -> RewriteReport:
    sizes = {file.name: file.stat().st_size for file in sorted(scratch.iterdir())}
    report = report.model_copy(
        update={
            "measurements": measured,
            "recipe": recipe.model_copy(update={"structure": {}}),
            "command": command,
            "files": tuple(str(out / name) for name in sorted({*sizes, REPORT, PAGE})),
            "bytes": sizes,
        }
    )
    write_report(report, scratch)
    return report
