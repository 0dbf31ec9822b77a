"""How far a student is from its teacher: in what it predicts, and in the state between its blocks.

For one sample, with p and q the softmax of the teacher's and the student's logits (Hinton et al.
2015, arXiv 1503.02531, at temperature 1), and T_b and S_b what the two give at the end of block b,

    KL(p || q) + weight * mean over b of |S_b - T_b|^2 / |T_b|^2.

The second term (Romero et al. 2015, arXiv 1412.6550, without a regressor, as the shapes are the
same) tells every block what to do, where the first alone must find its way through all of them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normswap.core.errors import NormswapError
from normswap.fit.batch import labels_of, logits_of, run, wide
from normswap.fit.evaluate import right_and_labelled

Loss = Callable[[Any, Any, Any], Tensor]


class Distillation(nn.Module):
    """The student, called on a batch, gives its mean loss and how many it got right.

    Args:
        paths: of the modules whose outputs are to agree.
        weight: of their agreement.
        loss: called with the student's output, the teacher's and the batch, in the place of KL.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        paths: list[str],
        weight: float,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple the teacher is no submodule: nothing that wraps, moves or trains this sees it.
        self._teacher = (teacher,)
        self._paths, self._weight = paths, weight
        self._loss = divergence if loss is None else loss

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        (teacher,) = self._teacher
        with _outputs(teacher, self._paths) as expected, torch.no_grad():
            target = run(teacher, batch)
        with _outputs(self.student, self._paths) as found:
            output = run(self.student, batch)
        loss = self._loss(output, target, batch)
        apart = [
            distance(s, t)
            for path in self._paths
            for s, t in zip(found[path], expected[path], strict=True)
        ]
        if apart:
            loss = loss + self._weight * torch.stack(apart).mean()
        return loss, right_and_labelled(output, labels_of(batch))


def divergence(output: Any, target: Any, batch: Any) -> Tensor:
    """KL(teacher || student) of class probabilities, logits (N, K, ...), mean over N and the rest.

    Raises:
        NormswapError: the models do not return logits.
    """
    student, teacher = logits_of(output), logits_of(target)
    if student is None or teacher is None:
        raise NormswapError(
            f"the model returns {type(output).__name__}, which are no logits (N, K); pass "
            "loss=, a function of the student's output, the teacher's and the batch"
        )
    p, q = (F.log_softmax(wide(each), 1) for each in (teacher, student))
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1).mean()


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """|s - t|^2 / |t|^2 over all but the first axis, N, and the mean over that."""
    s, t = wide(student).flatten(1), wide(teacher).flatten(1)
    energy = t.square().sum(1)
    # A sample of which a block gives nothing at all counts as the others do.
    floor = energy.mean() * 1e-3 + torch.finfo(energy.dtype).tiny
    return ((s - t).square().sum(1) / energy.clamp(min=floor)).mean()


@contextmanager
def _outputs(model: nn.Module, paths: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, what the modules at `paths` return, call by call."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}

    def note(path: str) -> Callable[..., None]:
        # Blocks of transformers return tuples.
        return lambda module, args, output: seen[path].extend(
            leaf
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        )

    with ExitStack() as hooks:
        for path in paths:
            hook = model.get_submodule(path).register_forward_hook(note(path))
            hooks.callback(hook.remove)
        yield seen
