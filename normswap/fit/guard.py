"""Watch the loss of a run: where it blows up, go back to the last good weights and say why."""

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from normswap.core.errors import NormswapError
from normswap.fit.batch import is_finite
from normswap.fit.checkpoints import model_tensors
from normswap.fit.ranks import largest

FIRST = 5  # losses that say what is usual
LIMIT = 20.0  # times their median, three steps in a row, is no training any more
# A pretrained model's loss is near 0 and that of a hard batch, perhaps of one sample, many times
# that; but more than 10, LIMIT times this, is worse than to guess among 22,000 classes.
LOWEST = 0.5


class BlewUp(NormswapError):
    """The training diverged, through no fault of the data; the model has its last good weights."""


class Guard:
    """Keeps a copy of `model` from the last moment at which its loss was sound.

    Args:
        rate: the learning rate that was asked for.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model, self.rate = model, rate
        self.losses: list[float] = []  # the first ones
        self.high = 0
        self.step = 0
        self._good = {name: t.detach().clone() for name, t in model_tensors(model).items()}

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Call when `check` has passed the loss of the next step: the weights now are good."""
        if not self.high:
            self.step = step
            for name, tensor in model_tensors(self.model).items():
                self._good[name].copy_(tensor)

    @torch.no_grad()
    def go_back(self) -> None:
        """Give the model the weights of the last good moment."""
        for name, tensor in model_tensors(self.model).items():
            tensor.copy_(self._good[name])

    def check(
        self, loss: float, step: int, batches: Iterable[tuple[str, Any]], *, half: bool
    ) -> None:
        """Raise, with the good weights back in the model, if `loss` of `step` is past hope.

        Args:
            batches: what this process computed it on, each by its name.

        Raises:
            BlewUp: it is not finite, or far above the first ones for three steps.
            NormswapError: it is not finite, nor is a batch.
        """
        if len(self.losses) < FIRST:
            self.losses.append(loss)
        usual = max(median(self.losses), LOWEST)
        self.high = self.high + 1 if loss > LIMIT * usual else 0
        if math.isfinite(loss) and self.high < 3:
            return
        self.go_back()
        bad = [name for name, batch in batches if not is_finite(batch)]
        if bad:
            raise NormswapError(
                f"{bad[0]} holds numbers that are not finite, so the loss is {loss:.3g} at step "
                f"{step + 1}; check the data"
            )
        if not step:
            cause = "so it is before the first update; check the model's weights and the loss"
        elif half and not math.isfinite(loss):
            cause = (
                f"float16 overflows, or the rate {self.rate:.3g} is too high; try bf16 or lower it"
            )
        else:
            cause = f"the rate {self.rate:.3g} is likely too high; try a third of it"
        what = f"{loss:.3g} after {usual:.3g} at first" if math.isfinite(loss) else f"{loss}"
        raise BlewUp(
            f"the loss is {what} at step {step + 1}: {cause} (the weights are those of the last "
            f"good step, {self.step})"
        )

    def check_weights(self, step: int) -> None:
        """Raise, with the good weights back, if those after `step` are no numbers any more.

        A gradient can be infinite where the loss is not, and no later loss tells of the last step.
        """
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        own = [p.to_local() if isinstance(p, DTensor) else p for p in trained]
        if not largest(float(not all(bool(each.isfinite().all()) for each in own))):
            return
        self.go_back()
        raise BlewUp(
            f"weights are not finite after step {step}, as its gradient was not: the rate "
            f"{self.rate:.3g} is likely too high; try a third of it (the weights are those of "
            f"step {self.step})"
        )
