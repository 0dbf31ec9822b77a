"""How often a classifier is right."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit.batch import labels_of, run
from normswap.graph.snapshot import evaluating


def accuracy(model: nn.Module, data: Iterable[Any], *, batches: int | None = None) -> float:
    """The fraction of samples whose largest logit is that of their label (top-1), in eval mode.

    The model's output must be logits (N, K) and the labels (N,). `batches` limits how many are
    read. The model, its training flags included, and the random state are as before.

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


def is_classified(model: nn.Module, data: Iterable[Any]) -> bool:
    """Whether the first batch of `data` has labels, and `model` gives logits for it."""
    with evaluating(model):
        for batch in islice(data, 1):
            labels = labels_of(batch)
            return labels is not None and _fit(run(model, batch), labels)
    return False


def _fit(logits: Any, labels: Tensor) -> bool:
    return isinstance(logits, Tensor) and logits.ndim == 2 and labels.shape == logits.shape[:1]


def _hits(logits: Any, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise NormswapError("accuracy needs labels; yield (input, label) batches")
    if not _fit(logits, labels):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NormswapError(
            f"accuracy needs logits (N, K) and labels (N,), but the model gave {got} for labels "
            f"{tuple(labels.shape)}; measure a classifier on class labels"
        )
    hits: Tensor = logits.argmax(1) == labels.to(logits.device)
    return hits
