"""The accuracies that a report compares."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.fit.evaluate import accuracy, is_classified


def accuracies(models: dict[str, nn.Module], test: Iterable[Any] | None) -> dict[str, float]:
    """The accuracy of each; none without labels, or where the task is another one."""
    if test is None or not is_classified(next(iter(models.values())), test):
        return {}
    return {state: accuracy(model, test) for state, model in models.items()}
