"""The accuracies that a report compares."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from normswap.core.errors import NormswapError, warn
from normswap.fit.evaluate import OtherLabels, accuracy, is_classified


def accuracies(
    models: dict[str, nn.Module], test: Iterable[Any] | None, *, learning: bool = False
) -> dict[str, float]:
    """The accuracy of each; none without labels, or where the task is another one.

    Labels of other classes than the model's are another task, of which a warning tells; or an
    error, where the model is `learning` from such labels.
    """
    if test is None or not is_classified(next(iter(models.values())), test):
        return {}
    try:
        return {state: accuracy(model, test) for state, model in models.items()}
    except NormswapError as error:
        if learning or not isinstance(error.__cause__, OtherLabels):
            raise
        warn(f"no accuracy is measured: {error}", stacklevel=2)
        return {}
