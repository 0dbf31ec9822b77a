"""How often a classifier is right."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit.batch import labels_of, logits_of, run
from normswap.graph.snapshot import evaluating
from normswap.interrupts import whole


@whole
def accuracy(model: nn.Module, data: Iterable[Any], *, batches: int | None = None) -> float:
    """The fraction of samples whose largest logit is that of their label (top-1), in eval mode.

    The model must return logits (N, K), alone or as `logits` of what it returns, and the labels
    are (N,). `batches` limits how many are read. The model, its training flags included, and the
    random state are as before.

    Raises:
        NormswapError: a batch has no labels, they do not fit the logits, the model rejects it, or
            there is none.
    """
    correct = total = 0
    with evaluating(model):
        for batch in islice(data, batches):
            hits = _hits(run(model, batch), labels_of(batch))
            correct += int(hits.sum())
            total += len(hits)
    if not total:
        raise NormswapError("no batch to measure accuracy on; pass data that can be read again")
    return correct / total


@whole
def is_classified(model: nn.Module, data: Iterable[Any]) -> bool:
    """Whether the first batch of `data` has labels, and `model` gives logits for it."""
    with evaluating(model):
        for batch in islice(data, 1):
            return _fit(logits_of(run(model, batch)), labels_of(batch))
    return False


def right_and_labelled(output: Any, labels: Tensor | None) -> Tensor:
    """How many samples of a batch a classifier got right, and how many have a label; (2,).

    Two zeros where there are no labels, or the model is no classifier.
    """
    logits = logits_of(output)
    if not _fit(logits, labels):
        return torch.zeros(2, dtype=torch.float64)
    hits = _hits(output, labels)
    return torch.tensor([int(hits.sum()), len(hits)], dtype=torch.float64)


def _fit(logits: Tensor | None, labels: Tensor | None) -> bool:
    return (
        logits is not None
        and labels is not None
        and logits.ndim == 2
        and labels.shape == logits.shape[:1]
    )


def _hits(output: Any, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise NormswapError("accuracy needs labels; yield (input, label) batches")
    logits = logits_of(output)
    if logits is None or not _fit(logits, labels):
        got = tuple(logits.shape) if logits is not None else type(output).__name__
        raise NormswapError(
            f"accuracy needs logits (N, K) and labels (N,), but the model gave {got} for labels "
            f"{tuple(labels.shape)}; measure a classifier on class labels"
        )
    hits: Tensor = logits.argmax(1) == labels.to(logits.device)
    return hits
