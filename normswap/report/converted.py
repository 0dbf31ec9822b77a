"""Convert or train a model, and measure the accuracy of the original and of each state after it."""

import time
from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.api import swapped
from normswap.fit.calibrate import calibrate
from normswap.fit.evaluate import accuracies
from normswap.fit.finetune import finetune
from normswap.fit.recover import recover
from normswap.passes.plan import Plan
from normswap.passes.replace import Replacement
from normswap.report.rewrite import RewriteReport, TrainingReport


def recovered(
    reference: str,
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    test: Iterable[Any],
    measured_on: str,
    **settings: Any,
) -> RewriteReport:
    """Recover `student` in place, with the `settings` of `normswap.recover`."""
    measured = accuracies({"original": teacher, "before": student}, test)
    training = recovering(student, teacher, data, **settings)
    measured |= accuracies({"recovered": student}, test)
    return RewriteReport(
        model=reference,
        plan=Plan(),
        accuracy=measured,
        measured_on=measured_on,
        training=training,
    )


def recovering(
    student: nn.Module, teacher: nn.Module, data: Iterable[Any], **settings: Any
) -> TrainingReport:
    """As `recovered`, without measuring accuracies."""
    started = time.perf_counter()
    recover(student, teacher, data, **settings)
    return _training(settings, started)


def finetuned(
    reference: str,
    model: nn.Module,
    data: Iterable[Any],
    test: Iterable[Any],
    measured_on: str,
    **settings: Any,
) -> RewriteReport:
    """Fine-tune `model` in place, with the `settings` of `normswap.finetune`."""
    measured = accuracies({"before": model}, test, learning=True)
    started = time.perf_counter()
    finetune(model, data, **settings)
    training = _training(settings, started)
    measured |= accuracies({"fine-tuned": model}, test, learning=True)
    return RewriteReport(
        model=reference,
        plan=Plan(),
        accuracy=measured,
        measured_on=measured_on,
        training=training,
    )


def _training(settings: dict[str, Any], started: float) -> TrainingReport:
    return TrainingReport(
        steps=settings["steps"],
        settings={
            name: value
            for name, value in settings.items()
            if name not in ("steps", "checkpoint", "save_every", "resume") and value is not None
        },
        seconds=time.perf_counter() - started,
    )


def converted(
    reference: str,
    model: nn.Module,
    replace: Replacement,
    inputs: Any,
    data: Iterable[Any] | None,
    test: Iterable[Any] | None,
    measured_on: str,
    recovering_on: Iterable[Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, RewriteReport]:
    """The converted model, calibrated where there are `data`, and the report so far.

    With `recovering_on` it is recovered as well, with the `settings` of `normswap.recover`.

    Accuracies are measured on `test`; where it has no labels there are none.

    Raises:
        NormswapError: no site can be replaced.
    """
    swap = swapped(model, replace, inputs, data)
    student, teacher = swap.student, swap.teacher
    measured = accuracies({"original": model, "plain swap": student}, test)
    if data is not None and swap.fits:
        calibrate(student, teacher, data)
        measured |= accuracies({"calibrated": student}, test)
    training = None
    if recovering_on is not None and swap.fits:
        training = recovering(student, teacher, recovering_on, **settings)
        measured |= accuracies({"recovered": student}, test)
    report = RewriteReport(
        model=reference,
        plan=swap.plan,
        accuracy=measured,
        measured_on=measured_on,
        training=training,
    )
    return student, report


def calibrated(
    reference: str,
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    test: Iterable[Any],
    measured_on: str,
) -> RewriteReport:
    """Calibrate `student` in place; the report says what that did."""
    measured = accuracies({"original": teacher, "before": student}, test)
    calibrate(student, teacher, data)
    measured |= accuracies({"calibrated": student}, test)
    return RewriteReport(model=reference, plan=Plan(), accuracy=measured, measured_on=measured_on)
