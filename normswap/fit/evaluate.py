"""How often a classifier is right."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit.data import inputs_of, labels_of
from normswap.graph.snapshot import untouched


def accuracy(model: nn.Module, data: Iterable[Any], *, batches: int | None = None) -> float:
    """The fraction of samples whose largest logit is that of their label (top-1), in eval mode.

    The model's output must be logits (N, K) and the labels (N,). `batches` limits how many are
    read. The model, its training flags included, and the random state are as before.

    Raises:
        NormswapError: a batch has no labels, they do not fit the logits, or there is no batch.
    """
    correct = total = 0
    with untouched(model), torch.no_grad():
        for module in model.modules():
            module.training = False  # not eval(), which the module of a .pt2 refuses
        for batch in islice(data, batches):
            arguments, keywords = inputs_of(batch)
            hits = _hits(model(*arguments, **keywords), labels_of(batch))
            correct += int(hits.sum())
            total += len(hits)
    if not total:
        raise NormswapError("no batch to measure accuracy on; pass data that can be read again")
    return correct / total


def _hits(logits: Any, labels: Tensor | None) -> Tensor:
    if labels is None:
        raise NormswapError("accuracy needs labels; yield (input, label) batches")
    if not isinstance(logits, Tensor) or logits.ndim != 2 or labels.shape != logits.shape[:1]:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise NormswapError(
            f"accuracy needs logits (N, K) and labels (N,), but the model gave {got} for labels "
            f"{tuple(labels.shape)}; measure a classifier on class labels"
        )
    return logits.argmax(1) == labels.to(logits.device)
