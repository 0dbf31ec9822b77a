"""What a little data tell before anything is changed: do the statistics fit, what does a swap cost.

Both are bounded: so many samples are read as take about half a minute, by the time of one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from normswap.api import decide
from normswap.core.errors import NormswapError
from normswap.fit.batch import logits_of, run, size_of
from normswap.fit.calibrate import calibrate, replaced_norms
from normswap.fit.data import first_samples
from normswap.fit.evaluate import accuracies
from normswap.fit.reading import Reading
from normswap.fit.reestimate import reestimate
from normswap.fit.site_moments import Moments
from normswap.graph.copies import copied
from normswap.graph.snapshot import evaluating
from normswap.norms.calling import input_of
from normswap.passes import Replace
from normswap.passes.inspection import Inspection
from normswap.passes.plan import carry_out

SECONDS = 30.0
PASSES = 40  # that calibration takes, teacher and student, a backward pass never
FEWEST, MOST = 32, 512  # samples
SHIFTED = 0.5  # standard deviations by which means are off, on average over the channels


@dataclass(frozen=True)
class Measured:
    """What was measured on data.

    Attributes:
        samples: that were learned from, at most.
        measured_on: what the accuracies are of.
        shift: site -> how far its running means are from those of the data, in running standard
            deviations, the mean over its channels.
        accuracy: fraction of right predictions, by state: original, re-estimated, calibrated.
        agreement: fraction of predictions that a calibrated GroupNorm leaves as they are; None
            where it was not tried, or the model does not classify.
    """

    samples: int
    measured_on: str
    shift: Mapping[str, float] = field(default_factory=dict)
    accuracy: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None

    @property
    def shifted(self) -> dict[str, float]:
        """The sites whose statistics do not fit the data, the worst first."""
        off = {name: shift for name, shift in self.shift.items() if shift > SHIFTED}
        return dict(sorted(off.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def measure(
    model: nn.Module,
    inputs: Any,
    inspection: Inspection,
    data: Iterable[Any],
    test: Iterable[Any],
    measured_on: str,
    *,
    include: list[str] | None,
    swap: bool,
    seconds: float,
) -> Measured:
    """Measure `model`, which stays as it is.

    Args:
        data, test: batches to learn from and to measure on, which can be read again.
        include: the sites that a swap replaces; None for every BatchNorm.
        swap: whether to try one.
        seconds: of a forward pass per sample.

    Raises:
        NormswapError: the model rejects the data, or there are none.
    """
    if next(Reading(data), None) is None:
        raise NormswapError("there is no batch to measure on; pass data that yield at least one")
    samples = int(min(max(SECONDS / (PASSES * max(seconds, 1e-6)), FEWEST), MOST))
    data, test = first_samples(data, samples), first_samples(test, 4 * samples)
    shift = _shift(model, inspection, data)
    models = {"original": model}
    if any(value > SHIFTED for value in shift.values()):
        models["re-estimated"] = reestimate(copied(model), data)
    agreement = None
    if swap:
        try:
            models["calibrated"] = _swapped(model, inputs, data, include)
        except NormswapError:  # a plan of the same pass says why
            pass
        else:
            agreement = _agreement(model, models["calibrated"], test)
    accuracy = accuracies(models, test)
    read = sum(size_of(batch) for batch in Reading(data))
    return Measured(read, measured_on, shift, accuracy, agreement)


def _swapped(model: nn.Module, inputs: Any, data: Iterable[Any], include: Any) -> nn.Module:
    owned, replace = decide(model, Replace("group_norm", include=include), inputs, data)
    teacher = owned.apply(model)
    student, _ = carry_out(teacher, replace, inputs=inputs)
    return calibrate(student, teacher, data) if replaced_norms(student, teacher) else student


def _shift(model: nn.Module, inspection: Inspection, data: Iterable[Any]) -> dict[str, float]:
    """How far the running means are from those of what comes in, per site."""
    modules = dict(model.named_modules())
    seen: dict[str, Moments] = {}
    with evaluating(model):
        for site in inspection.sites:
            norm = modules.get(site.name) if site.kind == "batch" and site.paths else None
            mean = getattr(norm, "running_mean", None)
            if norm is not None and isinstance(mean, Tensor):
                seen[site.name] = Moments(mean.numel())
                norm.register_forward_pre_hook(
                    _adding(seen[site.name], site.name), with_kwargs=True
                )
        reading = Reading(data)
        for batch in reading if seen else ():
            with reading.current():
                run(model, batch)
    shift = {}
    for name, moments in seen.items():
        norm = modules[name]
        mean, variance = (
            getattr(norm, f"running_{what}").double().cpu() for what in ("mean", "var")
        )
        if moments.seen:
            off = (moments.mean - mean).abs() / (variance + norm.eps).sqrt()
            shift[name] = float(off.mean())
    return shift


def _adding(moments: Moments, name: str) -> Any:
    def see(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            moments.add(input_of(norm, args, kwargs))
        except FloatingPointError as error:
            raise NormswapError(
                f"{name!r}: the activations there are not finite; check weights and data"
            ) from error

    return see


def _agreement(model: nn.Module, other: nn.Module, data: Iterable[Any]) -> float | None:
    """The fraction of predictions in which two classifiers agree; None for other models."""
    same = total = 0
    reading = Reading(data)
    with evaluating(model, other):
        for batch in reading:
            with reading.current():
                a, b = logits_of(run(model, batch)), logits_of(run(other, batch))
            if a is None or b is None:
                return None
            hits = a.argmax(1) == b.argmax(1)
            same, total = same + int(hits.sum()), total + hits.numel()
    return same / total if total else None
