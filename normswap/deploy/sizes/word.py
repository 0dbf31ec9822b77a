"""Open sizes by a word: which axes of a model's inputs it stands for."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, get_args

from torch import nn
from torch.export import Dim

from normswap.core.errors import NormswapError
from normswap.deploy.diverge import Array, CallArguments
from normswap.deploy.sizes.opened import NAMED, OpenSizes, dynamic_shapes
from normswap.deploy.sizes.trials import Axis, Group, Trials

Word = Literal["batch", "size", "all"]

# The names of the sizes behind batch and channels, by how many there are.
_POSITIONS = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}


def open_by_word(
    model: nn.Module, call: CallArguments, outputs: list[Array], word: str
) -> OpenSizes:
    """The axes that `word` stands for; axes that only change together have one name.

    - "batch": that of the first input, and of all inputs that have as many samples; another
      number of samples in an input of its own is open as well, if the model takes any.
    - "size": the sizes of these inputs too, except for channels: those of (N, C, ...) from the
      third on, and in sequences and tokens what the model takes in another size.
    - "all": whatever the model takes in another size.

    Raises:
        NormswapError: there is no such word, no batch, or for "size" no size that the model takes.
    """
    if word not in get_args(Word):
        raise NormswapError(
            f"dynamic is {word!r}, which is none of {', '.join(get_args(Word))}; choose one, or "
            f"{NAMED}"
        )
    trials = Trials(model, call)
    if not trials.shapes[0] or trials.shapes[0][0] == 0:
        raise NormswapError(
            "the first input has no batch dimension to make dynamic; export with dynamic=False "
            "(--static)"
        )
    batch = _batch(trials, outputs)
    trials = Trials(model, trials.resized(batch, max(2, trials.size(batch))))
    groups = [batch]
    of_batch = {i for i, _ in batch}
    shapes = trials.shapes
    inside = [(i, axis) for i in of_batch for axis in range(len(shapes[i]))]
    for i, shape in enumerate(shapes):
        if i not in of_batch and len(shape) > batch[0][1]:
            _open(trials, groups, (i, batch[0][1]), inside)
    if word == "all":
        for i, shape in enumerate(shapes):
            for axis in range(len(shape)):
                _open(trials, groups, (i, axis))
    elif word == "size":
        _open_positions(trials, groups, sorted(of_batch))
    names = _names(shapes, groups, batch[0][1])
    axes = [{axis: _hint(name, word) for axis, name in each.items()} for each in names]
    return OpenSizes(trials.call, dynamic_shapes(model, trials.call, axes), names)


def _batch(trials: Trials, outputs: list[Array]) -> Group:
    """The axes of the batch: the first ones, or the second ones where the first is the time.

    Along the batch a sample may be put before without changing what the others give. There may be
    no such axis (a loss over the batch, statistics of it): then it is the first.
    """
    own = [(0, axis) for axis in range(len(trials.shapes[0]))]
    for axis in own[:2]:
        for group in trials.groups(axis, own):
            if trials.keeps_samples(group, outputs):
                return group
    return next(trials.groups((0, 0), own))


def _open(trials: Trials, groups: list[Group], start: Axis, barred: Sequence[Axis] = ()) -> str:
    """Add the axes that change with `start` to `groups`; why the model takes no other size."""
    taken = {*chain(*groups), *barred}
    size = trials.size((start,))
    if start in taken or size < 2:  # a size of 1 may broadcast
        return ""
    why = ""
    for group in trials.groups(start, taken):
        refused = trials.refusal(group, [n for n in (2 * size, size // 2) if n > 1])
        if not refused:
            groups.append(group)
            return ""
        why = why or refused
    return why


def _open_positions(trials: Trials, groups: list[Group], inputs: list[int]) -> None:
    before, why = len(groups), ""
    for i in inputs:
        rank = len(trials.shapes[i])
        channels = rank - 2 > 1 and rank - 2 in _POSITIONS
        for axis in range(2 if channels else 0, rank):
            refused = _open(trials, groups, (i, axis))
            if refused and channels:
                raise NormswapError(
                    f"the size of the inputs cannot be left open: {refused}; export with "
                    "dynamic=True (without --dynamic-size)"
                )
            why = why or refused
    if len(groups) == before:
        raise NormswapError(
            "the inputs have no size beside the batch that can be left open"
            f"{': ' if why else ''}{why}; export with dynamic=True (without --dynamic-size)"
        )


def _names(
    shapes: list[tuple[int, ...]], groups: list[Group], batch_axis: int
) -> list[dict[int, str]]:
    """Names by what an axis is, each group's its own."""
    names: list[dict[int, str]] = [{} for _ in shapes]
    kinds: list[str] = []
    for group in groups:
        i, axis = group[0]
        positions = _POSITIONS.get(len(shapes[i]) - 2, ())
        if axis == batch_axis:
            kinds.append("batch")
        elif axis >= 2 and positions:
            kinds.append(positions[axis - 2])
        else:
            kinds.append("length" if len(positions) < 2 else "channels")
        number = kinds.count(kinds[-1])
        for tensor, place in group:
            names[tensor][place] = kinds[-1] if number == 1 else f"{kinds[-1]}_{number}"
    return names


def _hint(name: str, word: str) -> Any:
    """What was asked for must be open; what the model itself leaves open may be."""
    asked = name == "batch" or (word == "size" and not name.startswith("batch"))
    return Dim.DYNAMIC if asked else Dim.AUTO
