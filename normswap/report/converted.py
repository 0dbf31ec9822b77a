"""Convert or train a model, and measure the accuracy of the original and of each state after it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import nn

from normswap.api import swapped
from normswap.fit.calibrate import calibrate
from normswap.fit.evaluate import accuracies
from normswap.fit.finetune import finetune
from normswap.fit.recover import recovery
from normswap.fit.training import Settings
from normswap.passes.plan import Plan
from normswap.passes.replace import Replacement
from normswap.report.rewrite import RecoveryReport, RewriteReport, TrainingReport

POINTS = 100  # of a curve of losses


class Losses:
    """The loss of each step of a run."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float]] = []

    def add(self, step: int, loss: float) -> None:
        """The loss of one more step."""
        self._steps.append((step, loss))

    def means(self, steps: int) -> tuple[tuple[int, float], ...]:
        """Means over a hundredth of `steps` each, beside the last step that each is over."""
        length = max(1, -(-steps // POINTS))
        parts = (self._steps[i : i + length] for i in range(0, len(self._steps), length))
        return tuple((part[-1][0], fmean(loss for _, loss in part)) for part in parts)


@dataclass
class States:
    """The states that a model goes through, and the accuracy in each.

    Attributes:
        model: the reference of the original.
        test: what the accuracy is measured on; where it has no labels, it is not.
        measured_on: what that is called.
        weights: where those of each model that came in are from.
    """

    model: str
    test: Iterable[Any] | None
    measured_on: str
    weights: dict[str, str] = field(default_factory=dict)
    accuracy: dict[str, float] = field(default_factory=dict)

    def measure(self, models: dict[str, nn.Module]) -> None:
        """Measure each of the states, as `accuracies` does."""
        self.accuracy |= accuracies(models, self.test)

    def report(
        self, plan: Plan | None = None, training: TrainingReport | None = None
    ) -> RewriteReport:
        """The report so far."""
        return RewriteReport(
            model=self.model,
            weights=self.weights,
            images=getattr(self.test, "images", ""),
            plan=Plan() if plan is None else plan,
            accuracy=self.accuracy,
            measured_on=self.measured_on,
            training=training,
        )


def converted(
    states: States,
    model: nn.Module,
    replace: Replacement,
    inputs: Any,
    data: Iterable[Any] | None,
    recovering_on: Iterable[Any] | None = None,
    **settings: Any,
) -> tuple[nn.Module, RewriteReport]:
    """The converted model, calibrated where there are `data`, and the report.

    With `recovering_on` it is recovered as well, with the `settings` of `normswap.recover`.

    Raises:
        NormswapError: no site can be replaced.
    """
    swap = swapped(model, replace, inputs, data)
    student, teacher = swap.student, swap.teacher
    states.measure({"original": model, "plain swap": student})
    if data is not None and swap.fits:
        calibrate(student, teacher, data)
        states.measure({"calibrated": student})
    training = None
    if recovering_on is not None and swap.fits:
        training = _recover(student, teacher, recovering_on, settings)
        states.measure({"recovered": student})
    return student, states.report(swap.plan, training)


def calibrated(
    states: States, student: nn.Module, teacher: nn.Module, data: Iterable[Any]
) -> RewriteReport:
    """Calibrate `student` in place; the report says what that did."""
    states.measure({"original": teacher, "before": student})
    calibrate(student, teacher, data)
    states.measure({"calibrated": student})
    return states.report()


def recovered(
    states: States, student: nn.Module, teacher: nn.Module, data: Iterable[Any], **settings: Any
) -> RewriteReport:
    """Recover `student` in place, with the `settings` of `normswap.recover`."""
    states.measure({"original": teacher, "before": student})
    training = _recover(student, teacher, data, settings)
    states.measure({"recovered": student})
    return states.report(training=training)


def finetuned(
    states: States, model: nn.Module, data: Iterable[Any], **settings: Any
) -> RewriteReport:
    """Fine-tune `model` in place, with the `settings` of `normswap.finetune`."""
    states.measure({"before": model})
    started, losses = time.perf_counter(), Losses()
    finetune(model, data, on_step=losses.add, **settings)
    training = _training(settings, started, losses)
    states.measure({"fine-tuned": model})
    return states.report(training=training)


def _recover(
    student: nn.Module, teacher: nn.Module, data: Iterable[Any], settings: dict[str, Any]
) -> TrainingReport:
    started, losses = time.perf_counter(), Losses()
    loss, lr = settings.get("loss"), settings.get("lr")
    own = {name: value for name, value in settings.items() if name not in ("loss", "lr")}
    run = Settings(**own, on_step=losses.add)
    done = recovery(student, teacher, data, run, loss=loss, lr=lr)
    return _training(
        settings,
        started,
        losses,
        RecoveryReport(
            compared=done.loss, lr=done.lr, given=done.given, curve=done.curve, step=done.step
        ),
    )


def _training(
    settings: dict[str, Any],
    started: float,
    losses: Losses,
    recovery: RecoveryReport | None = None,
) -> TrainingReport:
    return TrainingReport(
        steps=settings["steps"],
        settings={
            name: value
            for name, value in settings.items()
            if name not in ("steps", "loss", "checkpoint", "save_every", "resume")
            and value is not None
        },
        seconds=time.perf_counter() - started,
        losses=losses.means(settings["steps"]),
        recovery=recovery,
    )
