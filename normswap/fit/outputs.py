"""How far what a student returns is from what its teacher returns, part by part.

A model may return one tensor, or several in tuples, dicts and objects. What each of them is decides
how it is compared. With t the teacher's and s the student's, the mean over samples and positions of

- logits, log-probabilities, probabilities: KL(p || q) over the classes (Hinton et al. 2015, arXiv
  1503.02531, at temperature 1), p and q the softmax of t and s, or t and s themselves;
- binary logits and binary probabilities, as of a sigmoid: the sum over the classes of the
  Kullback-Leibler divergence of each, p log(p / q) + (1 - p) log((1 - p) / (1 - q));
- values (regressions, embeddings, images): (s - t)^2 / v, with v the variance of t over the data,
  by channel;
- directions: 1 - cos(s, t) over the channels, on request.

Which it is, the captured graph says where it ends in a softmax or a sigmoid, and the numbers
otherwise: the teacher's logits decide between classes with confidence, and not always for the same
one. What is in doubt counts as values, of which the loss has its minimum at the same place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normswap.core.calls import recorded
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.fit.batch import inputs_of, labels_of, run, wide
from normswap.fit.reading import Reading
from normswap.graph.capture import Capture
from normswap.graph.returned import Returned, returned
from normswap.graph.snapshot import evaluating

Loss = Callable[[Any, Any, Any], Tensor]
LossName = Literal["kl", "bce", "mse", "cosine"]
Kind = Literal[
    "logits",
    "log-probabilities",
    "probabilities",
    "binary logits",
    "binary probabilities",
    "values",
    "directions",
]
_CONFIDENT = (
    0.25  # the mean probability of the class that wins, of what chance leaves above its own
)
_MOST_WON = 0.95  # the share of samples that one class may win
_NEAR = 1e-3  # of 1, a sum of probabilities in half precision


@dataclass(frozen=True)
class Part:
    """A tensor in what a model returns, and how it is compared.

    Attributes:
        name: where it is: "logits", "1", "boxes.0"; empty where it is all that is returned.
        kind: what it holds.
        axis: that of the classes or channels, counted from the end.
        spread: of values, the variance v, broadcastable to the tensor.
    """

    name: str
    kind: Kind
    axis: int
    spread: Tensor | None = None

    def __str__(self) -> str:
        how = {"values": "normalized squared error", "directions": "cosine"}
        by = how.get(self.kind, "Kullback-Leibler divergence")
        return f"{f'{self.name!r}: ' if self.name else ''}{self.kind} by {by}"

    def apart(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of two such tensors, (N, ...), as the docstring of the module has it."""
        s, t = _in_columns(student), _in_columns(teacher)
        if self.kind == "values":
            assert self.spread is not None
            return ((s - t).square() / self.spread.to(t.device, t.dtype)).mean()
        if self.kind == "directions":
            return (1 - F.cosine_similarity(s, t, self.axis)).mean()
        if self.kind.startswith("binary"):
            yes, no = _binary(s, t, self.kind == "binary logits")
            return (yes + no).sum(self.axis).mean()
        if self.kind == "logits":
            s, t = F.log_softmax(s, self.axis), F.log_softmax(t, self.axis)
        elif self.kind == "probabilities":
            s, t = _log(s), _log(t)
        return F.kl_div(s, t, reduction="none", log_target=True).sum(self.axis).mean()


def _in_columns(value: Tensor) -> Tensor:
    """`value` with an axis of channels: one number for each sample is one channel."""
    return wide(value[:, None] if value.ndim == 1 else value)


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(p.dtype).eps).log()


def _binary(s: Tensor, t: Tensor, are_logits: bool) -> tuple[Tensor, Tensor]:
    """p log(p / q), and the same of 1 - p and 1 - q."""
    if are_logits:
        p, logs = t.sigmoid(), [F.logsigmoid(sign * each) for sign in (1, -1) for each in (t, s)]
    else:
        p, logs = t, [_log(side) for side in (t, s, 1 - t, 1 - s)]
    return p * (logs[0] - logs[1]), (1 - p) * (logs[2] - logs[3])


def tensors_in(output: Any) -> dict[str, Tensor]:
    """The floating-point tensors in what a model returned, by where they are.

    What a detector found in an image (`boxes`, `labels`) is left out: a student finds others, and
    in another order.
    """
    return dict(_walk("", output))


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim and value.numel():
            yield name, value
        return
    items: Any = ()
    if isinstance(value, Mapping):
        items = () if {"boxes", "labels"} <= value.keys() else value.items()
    elif isinstance(value, (tuple, list)):
        items = zip(getattr(value, "_fields", range(len(value))), value, strict=True)
    elif is_dataclass(value):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, SimpleNamespace):
        items = vars(value).items()
    elif hasattr(value, "logits"):
        items = [("logits", value.logits)]
    for key, each in items:
        yield from _walk(f"{name}.{key}" if name else str(key), each)


def parts_of(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    seen_teacher: Capture | None,
    name: LossName | None = None,
) -> tuple[Part, ...]:
    """The parts of an output that teacher and student have in one shape, and how to compare them.

    Args:
        batches: a few, on which both are run.
        seen_teacher: the captured teacher, where it can be captured.
        name: of a loss that every part is to have.

    Raises:
        NormswapError: a part is not what the loss `name` is for, or a model rejects a batch.
    """
    found, origins = [], dict[int, Returned]()
    regions = {} if seen_teacher is None else returned(seen_teacher)
    reading = Reading(batches)
    for batch in reading:
        with reading.current(), evaluating(student, teacher):
            modules = {path: teacher.get_submodule(path) for path in regions}
            with recorded(modules, lambda output: [pytree.tree_leaves(output)]) as ran:
                told = tensors_in(run(teacher, batch))
            found.append((told, tensors_in(run(student, batch))))
        if not origins:
            for path, (leaves, *_) in ran.items():
                if len(leaves) == len(regions[path]):
                    pairs = zip(leaves, regions[path], strict=True)
                    origins |= {id(leaf): each for leaf, each in pairs if each is not None}
    parts, seen = list[Part](), set[int]()
    named = any(_is_called_logits(path) for path in found[0][0])
    for path, first in found[0][0].items():
        if id(first) in seen:  # returned twice
            continue
        seen.add(id(first))
        values = [_in_columns(t[path]) for t, s in found if path in t and path in s]
        alike = all(t[path].shape == s[path].shape for t, s in found if path in t and path in s)
        if alike and len(values) == len(found):
            is_named = _is_called_logits(path) if named else None
            origin = origins.get(id(first))
            parts.append(_part(path, values, batches, origin, name, is_named))
    return tuple(parts)


def _part(
    path: str,
    values: Sequence[Tensor],
    batches: Sequence[Any],
    origin: Returned | None,
    name: LossName | None,
    is_named: bool | None,
) -> Part:
    first = values[0]
    axis = origin.axis if origin is not None else None
    if axis is None:  # as torch's losses have it; a sequence ends in its classes
        axis = -1 if first.ndim < 4 else 1 - first.ndim
    kind = (
        _kind(values, batches, axis, origin, is_named)
        if name is None
        else _by_name(path, values, axis, name)
    )
    return Part(path, kind, axis, _variance(values, axis) if kind == "values" else None)


def _by_name(path: str, values: Sequence[Tensor], axis: int, name: LossName) -> Kind:
    if name == "mse":
        return "values"
    if name == "cosine":
        return "directions"
    within = all(bool(((v >= 0) & (v <= 1)).all()) for v in values)
    if name == "bce":
        return "binary probabilities" if within else "binary logits"
    if values[0].shape[axis] < 2:
        raise NormswapError(
            f"the output{f' {path!r}' if path else ''} has one value for each sample, and kl is "
            "for classes; take bce or mse as the loss"
        )
    return "probabilities" if within and _adds_up(values, axis) else "logits"


def _kind(
    values: Sequence[Tensor],
    batches: Sequence[Any],
    axis: int,
    origin: Returned | None,
    is_named: bool | None,
) -> Kind:
    """What the `values` of a part are.

    Args:
        is_named: whether the part is called logits; None where no part of the output is.
    """
    by = None if origin is None else origin.origin
    if by == "softmax":
        return "probabilities"
    if by == "log softmax":
        return "log-probabilities"
    if by == "sigmoid":
        return "binary probabilities"
    if _are_marked(values, batches):
        return "binary logits"
    if values[0].shape[axis] < 2 or _like_an_input(values[0], batches[0]):
        return "values"
    if is_named is not None:
        return "logits" if is_named else "values"
    within = all(bool(((v >= 0) & (v <= 1)).all()) for v in values)
    if within and by is None and _adds_up(values, axis):  # not seen on a graph
        return "probabilities"
    return "logits" if _decides(values, axis) else "values"


def _is_called_logits(path: str) -> bool:
    return path.rpartition(".")[2] == "logits"


def _adds_up(values: Sequence[Tensor], axis: int) -> bool:
    """Whether each value is 1 in sum over its classes."""
    return all(bool((v.sum(axis) - 1).abs().max() < _NEAR) for v in values)


def _decides(values: Sequence[Tensor], axis: int) -> bool:
    """Whether the teacher chooses classes by them, with confidence, and not always the same."""
    if not any(bool((v < 0).any()) for v in values):
        return False
    chosen = [v.softmax(axis).max(axis) for v in values]
    most = torch.cat([each.values.flatten() for each in chosen])
    winner = torch.cat([each.indices.flatten() for each in chosen])
    share = float(winner.bincount().max()) / len(winner)
    chance = 1 / values[0].shape[axis]
    return float(most.mean()) >= chance + _CONFIDENT * (1 - chance) and share <= _MOST_WON


def _are_marked(values: Sequence[Tensor], batches: Sequence[Any]) -> bool:
    """Whether each batch has labels, of which every value has its own, 0 or 1."""
    labels = [labels_of(batch) for batch in batches]
    return all(
        label is not None
        and label.shape == value.shape
        and bool(((label == 0) | (label == 1)).all())
        for value, label in zip(values, labels, strict=True)
    )


def _like_an_input(value: Tensor, batch: Any) -> bool:
    """Whether it has the shape of an image or signal that goes in."""
    args, kwargs = inputs_of(batch)
    given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
    return any(
        each.shape == value.shape and each.is_floating_point() and each.ndim > 2 for each in given
    )


def _variance(values: Sequence[Tensor], axis: int) -> Tensor:
    """The variance over samples and positions of each channel along `axis`.

    A channel that is next to constant counts as the others do, and a tensor that is as 1.
    """
    flat = torch.cat([v.double().movedim(axis, 0).flatten(1) for v in values], 1)
    each = flat.var(1, correction=0)
    usual = each.mean()
    if not usual > 0:
        usual = flat.square().mean() if bool(flat.any()) else torch.ones((), dtype=torch.float64)
    each = torch.where(each > 1e-3 * usual, each, usual)
    return each.view(-1, *[1] * (-axis - 1))


def check_loss(loss: Any) -> None:
    """Refuse what is no loss.

    Raises:
        NormswapError: it is no function and no name of one.
    """
    if loss is not None and not callable(loss) and loss not in get_args(LossName):
        raise NormswapError(
            f"loss is {loss!r:.40}; it is kl, bce, mse, cosine, or a function (module:function) of "
            "the student's output, the teacher's and the batch"
        )
