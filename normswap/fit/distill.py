"""How far a student is from its teacher: in what it returns, and in the state between its blocks.

For one sample, with D the distance of the outputs (`normswap.fit.outputs`), and T_b and S_b what
the two give at the end of block b,

    D + weight * mean over b of |S_b - T_b|^2 / |T_b|^2.

The second term (Romero et al. 2015, arXiv 1412.6550, without a regressor, as the shapes are the
same) tells every block what to do, where the first alone must find its way through all of them.

`Guard` watches the loss of a run: where it blows up it goes back to the last good weights.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from normswap.core.calls import floating, recorded
from normswap.core.errors import NormswapError
from normswap.fit.batch import is_finite, labels_of, run, wide
from normswap.fit.checkpoints import model_tensors
from normswap.fit.evaluate import right_and_labelled
from normswap.fit.outputs import Loss, Part, tensors_in
from normswap.fit.ranks import largest

_ROOM = 2**28  # bytes of what the teacher told


class Teacher:
    """What a teacher returns for a batch, and what its blocks do.

    Args:
        paths: of the modules whose outputs are to agree.
        repeated: batches that come again and again, for which what is told is kept, as long as
            there is room for it.
    """

    def __init__(self, model: nn.Module, paths: list[str], repeated: Iterable[Any]) -> None:
        self._model, self.paths = model, paths
        self._repeated = {id(batch): batch for batch in repeated}  # which keeps them alive
        self._kept: dict[int, tuple[Any, dict[str, list[Tensor]]]] = {}
        self._room = _ROOM

    @torch.no_grad()
    def told(self, batch: Any) -> tuple[Any, dict[str, list[Tensor]]]:
        """The output for `batch`, and what the modules at the paths return, call by call."""
        kept = self._kept.get(id(batch))
        if kept is not None:
            return kept
        modules = {path: self._model.get_submodule(path) for path in self.paths}
        with recorded(modules, floating) as found:
            told = run(self._model, batch), found
        if id(batch) in self._repeated:
            size = sum(each.nbytes for each in chain(floating(told[0]), *found.values()))
            if size <= self._room:
                self._room -= size
                self._kept[id(batch)] = told
        return told


class Distillation(nn.Module):
    """The student, called on a batch, gives its mean loss and how many it got right.

    In eval mode the loss is D alone; where no output can be compared, that of the blocks.

    Args:
        weight: of the agreement of the blocks.
        loss: D, called with the student's output, the teacher's and the batch; or the parts of the
            outputs that are compared, of which it is the mean.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        weight: float,
        loss: Loss | Sequence[Part],
    ) -> None:
        super().__init__()
        # The teacher is no submodule: nothing that wraps, moves or trains this sees it.
        self.student, self._teacher = student, teacher
        self._weight, self._loss = weight, loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        target, expected = self._teacher.told(batch)
        paths = self._teacher.paths
        modules = {path: self.student.get_submodule(path) for path in paths}
        with recorded(modules, floating) as found:
            output = run(self.student, batch)
        right = right_and_labelled(output, labels_of(batch))
        loss = self._of_outputs(output, target, batch)
        if loss is not None and not self.training:
            return loss, right
        apart = [
            distance(s, t)
            for path in paths
            for s, t in zip(found.get(path, ()), expected.get(path, ()), strict=True)
        ]
        if apart:
            blocks = self._weight * torch.stack(apart).mean()
            loss = blocks if loss is None else loss + blocks
        if loss is None:
            raise NormswapError(
                "teacher and student return nothing that can be compared; pass loss=, a function "
                "of the student's output, the teacher's and the batch"
            )
        return loss, right

    def _of_outputs(self, output: Any, target: Any, batch: Any) -> Tensor | None:
        if callable(self._loss):
            return self._loss(output, target, batch)
        ours, theirs = tensors_in(output), tensors_in(target)
        apart = [
            part.apart(ours[part.name], theirs[part.name])
            for part in self._loss
            if part.name in ours and part.name in theirs
        ]
        return torch.stack(apart).mean() if apart else None


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2 over all but the first axis, N, and the mean over that."""
    s, t = wide(student).flatten(1), wide(teacher).flatten(1)
    energy = t.square().sum(1)
    # A sample of which a block gives nothing at all counts as the others do.
    floor = energy.mean() * 1e-3 + torch.finfo(energy.dtype).tiny
    return ((s - t).square().sum(1) / energy.clamp(min=floor)).mean()


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

    Attributes:
        good: that copy, by name.
        step: the moment.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.model, self.rate = model, rate
        self.losses: list[float] = []  # the first ones
        self.high = 0
        self.step = 0
        self.good = {name: t.detach().clone() for name, t in model_tensors(model).items()}

    @torch.no_grad()
    def keep(self, step: int) -> None:
        """Call when `check` has passed the loss of the next step: the weights now are good."""
        if not self.high:
            self.step = step
            for name, tensor in model_tensors(self.model).items():
                self.good[name].copy_(tensor)

    @torch.no_grad()
    def go_back(self) -> None:
        """Give the model the weights of the last good moment."""
        for name, tensor in model_tensors(self.model).items():
            tensor.copy_(self.good[name])

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
                f"float16 overflows, or the rate {self.rate:.3g} is too high; "
                "try bfloat16 or lower it"
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
