"""How often a classifier is right."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, warn
from normswap.core.interrupts import whole
from normswap.fit.batch import is_finite, labels_of, logits_of, run
from normswap.fit.reading import Reading
from normswap.graph.snapshot import evaluating
from normswap.graph.supported import check_runs_on_numbers

UNLABELLED = -100  # what torch's losses ignore


# What to do with labels of other classes.
_REMEDY = (
    "call each folder by the index of its class, name the classes of all outputs in order "
    "(--classes), or leave the labels out (--ignore-labels)"
)


class NoClasses(NormswapError):
    """The labels name no classes."""


@usual_settings()
def accuracy(model: nn.Module, data: Iterable[Any], *, batches: int | None = None) -> float:
    """The fraction of samples whose largest logit is that of their label (top-1), in eval mode.

    The model must return logits (N, K), alone or as `logits` of what it returns, and the labels
    are (N,), of 0 to K - 1; those of -100, which torch's losses ignore, are not counted. A sample
    with a logit that is NaN is not right. `batches` limits how many are read. The model, its
    training flags included, and the random state are as before.

    Raises:
        NormswapError: a batch has no labels, they do not fit the logits, the model rejects it, it
            is not finite, or there is none.
    """
    check_runs_on_numbers(model)
    correct = total = 0
    reading = Reading(data)
    with evaluating(model):
        for batch in islice(reading, batches):
            with reading.current():
                hits = _hits(run(model, batch), batch)
            correct += int(hits.sum())
            total += len(hits)
    if not total:
        raise NormswapError("no batch to measure accuracy on; pass data that can be read again")
    return correct / total


def accuracies(models: dict[str, nn.Module], test: Iterable[Any] | None) -> dict[str, float]:
    """The accuracy of each; none without labels, or where the task is another one.

    Labels that are fractions are of another task, of which a warning tells.

    Raises:
        NormswapError: the labels are classes, and not those of the models.
    """
    classes = None if test is None else classes_of(next(iter(models.values())), test)
    if test is None or classes is None:
        return {}
    named = getattr(test, "classes_in_order", None)
    if named is not None and named != classes:
        raise NormswapError(
            f"the data have {named:,} classes, but the model has {classes:,} outputs, so the order "
            f"of the classes says no output; {_REMEDY}"
        )
    try:
        return {state: accuracy(model, test) for state, model in models.items()}
    except NormswapError as error:
        if not isinstance(error.__cause__, NoClasses):
            raise
        warn(f"no accuracy is measured: {error}", stacklevel=2)
        return {}


@whole
def classes_of(model: nn.Module, data: Iterable[Any]) -> int | None:
    """How many outputs `model` has for the first batch of `data`, if that has labels for them."""
    reading = Reading(data)
    with evaluating(model):
        for batch in islice(reading, 1):
            with reading.current():
                logits = logits_of(run(model, batch))
                return (
                    logits.shape[1]
                    if logits is not None and _fit(logits, labels_of(batch))
                    else None
                )
    return None


def right_and_labelled(output: Any, labels: Tensor | None) -> Tensor:
    """How many samples of a batch a classifier got right, and how many have a label; (2,).

    Two zeros where there are no labels, or the model is no classifier.
    """
    logits = logits_of(output)
    if logits is None or labels is None or not _fit(logits, labels):
        return torch.zeros(2, dtype=torch.float64)
    labels, labelled = _labelled(labels)
    hits = (logits.argmax(1).cpu() == labels) & labelled
    return torch.tensor([int(hits.sum()), int(labelled.sum())], dtype=torch.float64)


def predicted(logits: Tensor, batch: Any) -> Tensor:
    """The classes that `logits` (N, K, ...) predict, (N, ...) on the CPU; -1 where one is NaN.

    Raises:
        NormswapError: they are NaN because `batch` is not finite.
    """
    unknown = logits.isnan().any(1)
    if bool(unknown.any()) and not is_finite(batch):
        raise NormswapError("it holds numbers that are not finite; check the data")
    return torch.where(unknown, -1, logits.argmax(1)).cpu()


def _fit(logits: Tensor | None, labels: Tensor | None) -> bool:
    return (
        logits is not None
        and labels is not None
        and logits.ndim == 2
        and labels.shape == logits.shape[:1]
    )


def _hits(output: Any, batch: Any) -> Tensor:
    """Whether each sample that has a label is right, (N,)."""
    logits, labels = logits_of(output), labels_of(batch)
    if labels is None:
        raise NormswapError("accuracy needs labels; yield (input, label) batches")
    if logits is None or not _fit(logits, labels):
        got = tuple(logits.shape) if logits is not None else type(output).__name__
        raise NormswapError(
            f"accuracy needs logits (N, K) and labels (N,), but the model gave {got} for labels "
            f"{tuple(labels.shape)}; measure a classifier on class labels"
        )
    check_labels(labels, logits.shape[1])
    labels, labelled = _labelled(labels)
    return (predicted(logits, batch) == labels)[labelled]


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not of the classes 0 to `classes` - 1, nor -100.

    Raises:
        NoClasses: they are fractions.
        NormswapError: some are of no class.
    """
    labels, labelled = _labelled(labels)
    given = labels[labelled]
    if not len(given):
        return
    if not bool((given == given.round()).all()):
        raise NoClasses("labels are fractions, which name no class; give one class for each sample")
    low, high = float(given.min()), float(given.max())
    if low < 0 or high >= classes:
        raise NormswapError(
            f"labels go from {low:g} to {high:g}, but the model has {classes} outputs; give "
            f"classes of 0 to {classes - 1}"
        )


def _labelled(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels, of whatever type, as numbers on the CPU, and which samples have one."""
    numbers = labels.detach().cpu().double()
    return numbers, numbers != UNLABELLED
