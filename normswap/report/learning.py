"""Train and measure: the accuracy of the original, of what was begun with, and of the result."""

import time
from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.fit.finetune import finetune
from normswap.fit.recover import recover
from normswap.passes.plan import Plan
from normswap.report.accuracies import accuracies
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
