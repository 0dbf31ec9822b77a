"""Two models side by side: what they compute, how well, how fast, and how each normalizes."""

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import RenderableType
from torch import nn

from normswap.core.ambient import usual_settings
from normswap.core.atomic import staged
from normswap.core.calls import check_module
from normswap.core.errors import NormswapError
from normswap.core.results import Result
from normswap.core.terminal import facts_table
from normswap.core.types import Batches, Inputs
from normswap.fit.batch import logits_of, run
from normswap.fit.evaluate import accuracies, predicted
from normswap.fit.reading import Reading, about, hint_for, repeatable
from normswap.graph.snapshot import evaluating
from normswap.graph.supported import check_runs_on_numbers
from normswap.passes.inspection import inspect
from normswap.report.measurements import Measurements, first_few, measure
from normswap.report.onnx_model import OnnxModel
from normswap.report.outputs import OUTPUT, output_deviation
from normswap.report.page import PAGE, REPORT, write_report
from normswap.source.source import weights_facts


class NormPair(BaseModel):
    """What normalizes at one module path in each of two models; None where nothing does."""

    model_config = ConfigDict(frozen=True)

    site: str
    a: str | None
    b: str | None

    @property
    def name(self) -> str:
        """The path, by which a report is indexed."""
        return self.site


class ComparisonReport(Result, BaseModel):
    """Two models, A and B, on the same inputs.

    It iterates over the pairs in `norms`; `report["layer1.0.bn1"]` is the one at that path.

    Attributes:
        a, b: what they are called.
        weights: where those of each are from: "random" for fresh ones; "" where its code knows.
        images: what became of the images of the data.
        deviation: max|a - b| / max|a| of the output where it is largest; None where there is none.
        agreement: the fraction of samples of the data for which both predict the same class.
        accuracy: the fraction of correct predictions of each, where the data have labels.
        measured_on: what the data are called.
        norms: the normalizations of both, by module path; none of an ONNX file.
        measurements: B against A.
        command: what was typed; None from Python.
        files: what was written.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    a: str
    b: str
    weights: dict[str, str] = {}
    images: str = ""
    deviation: float | None
    agreement: float | None = None
    accuracy: dict[str, float] = {}
    measured_on: str = ""
    norms: tuple[NormPair, ...] = ()
    measurements: Measurements
    command: str | None = None
    files: tuple[str, ...] = ()

    def entries(self) -> tuple[NormPair, ...]:
        """What normalizes at each path."""
        return self.norms

    def summary(self) -> str:
        """How far B is from A."""
        said = [f"{self.b} against {self.a}"]
        if self.deviation is not None:
            said.append(f"deviation {self.deviation:.2g}")
        if self.agreement is not None:
            said.append(f"same prediction {self.agreement:.2%}")
        said += [f"accuracy of {name} {value:.2%}" for name, value in self.accuracy.items()]
        return ", ".join(said)

    def tables(self) -> list[RenderableType]:
        """The figures."""
        named = [(name, given) for name, given in (("A", self.a), ("B", self.b)) if given != name]
        facts = [*named, *weights_facts(self.weights)]
        facts += [(f"accuracy of {name}", f"{value:.2%}") for name, value in self.accuracy.items()]
        if self.agreement is not None:
            facts.append(("same prediction", f"{self.agreement:.2%}"))
        if self.measured_on and (self.accuracy or self.agreement is not None):
            facts.append(("measured on", self.measured_on))
        if self.images:
            facts.append(("images", self.images))
        if self.deviation is not None:
            facts.append(("deviation", f"{self.deviation:.2g} of the largest output of A"))
        for site in self.measurements.sites:
            if site.site == OUTPUT and site.snr_db is not None:
                facts.append(("signal-to-noise of the output", f"{site.snr_db:.1f} dB"))
        facts += [
            (f"latency of {each.model}", f"{each.milliseconds:.3g} ms, {each.runtime}")
            for each in self.measurements.latency
        ]
        facts += [
            (f"size of {each.model}", f"{each.bytes / 1024:,.0f} KiB")
            for each in self.measurements.sizes
        ]
        if self.files:
            facts.append(("written to", str(Path(self.files[0]).parent)))
            facts.append(("files", ", ".join(Path(file).name for file in self.files)))
        return [facts_table("", facts)]

    def write(self, out: Path) -> "ComparisonReport":
        """Write it to the folder `out`, for programs and for people; return it with the files.

        Raises:
            NormswapError: `out` cannot be written.
        """
        report = self.model_copy(update={"files": (str(out / REPORT), str(out / PAGE))})
        with staged(out) as scratch:
            write_report(report, scratch)
        return report


@usual_settings()
def compare(
    a: nn.Module | str | Path,
    b: nn.Module | str | Path,
    inputs: Inputs | None = None,
    *,
    data: Batches | None = None,
    names: tuple[str, str] = ("A", "B"),
    weights: tuple[str, str] = ("", ""),
    measured_on: str = "",
    command: str | None = None,
) -> ComparisonReport:
    """Compare two models in eval mode; they are as before.

    Args:
        a, b: modules, or paths of ONNX files, which run in ONNX Runtime on the CPU. B is held
            against A.
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs that both take;
            None takes the first samples of the data.
        data: batches (x, y) for accuracy and agreement, or x for agreement alone.
        names: of the models, in the report.
        weights: where those of each are from.
        measured_on: what the data are called there.
        command: what was typed.

    Raises:
        NormswapError: neither inputs nor data, a model rejects them, a file is no ONNX, or the
            outputs are of different shapes.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> folded = normswap.fold(model, images[:2])
        >>> normswap.compare(model, folded, inputs=images[:2]).deviation < 1e-5
        True
    """
    data = None if data is None else repeatable(data)
    models = {name: _module(each) for name, each in (("A", a), ("B", b))}
    for each in models.values():
        check_runs_on_numbers(each)
    one, other = models.values()
    samples = inputs if data is None else first_few(one, data)
    if samples is None:
        raise NormswapError("nothing to compare the models on; give inputs, or data with a batch")
    with nullcontext() if data is None else about("batch 1", hint_for(data)):
        deviation = output_deviation(one, other, samples)
    norms = _norms(one, other, samples if inputs is None else inputs)
    return ComparisonReport(
        a=names[0],
        b=names[1],
        weights=dict(zip(("A", "B"), weights, strict=True)),
        images=getattr(data, "images", ""),
        deviation=deviation,
        agreement=None if data is None else _agreement(one, other, data),
        accuracy=accuracies(models, data),
        measured_on=measured_on,
        norms=norms,
        measurements=measure(models, (pair.site for pair in norms), inputs, data, measured_on),
        command=command,
    )


def _module(model: nn.Module | str | Path) -> nn.Module:
    if isinstance(model, (str, Path)):
        return OnnxModel(Path(model))
    check_module(model)
    return model


def _norms(one: nn.Module, other: nn.Module, inputs: Any) -> tuple[NormPair, ...]:
    if isinstance(one, OnnxModel) or isinstance(other, OnnxModel):
        return ()
    found = [{site.name: site.cls for site in inspect(each, inputs).sites} for each in (one, other)]
    return tuple(
        NormPair(site=name, a=found[0].get(name), b=found[1].get(name))
        for name in dict.fromkeys((*found[0], *found[1]))
    )


def _agreement(one: nn.Module, other: nn.Module, data: Iterable[Any]) -> float | None:
    same = total = 0
    reading = Reading(data)
    with evaluating(one, other):
        for batch in reading:
            with reading.current():
                both = [logits_of(run(model, batch)) for model in (one, other)]
                chosen = [predicted(logits, batch) for logits in both if logits is not None]
            if len(chosen) < 2 or chosen[0].ndim > 1 or chosen[0].shape != chosen[1].shape:
                return None
            same += int((torch.eq(*chosen) & (chosen[0] >= 0)).sum())
            total += len(chosen[0])
    return same / total if total else None
