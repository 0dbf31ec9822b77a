"""Running a model in other sizes than its example has, to see which it takes."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, islice, product

import torch
from torch import nn

from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.deploy.diverge import Array, CallArguments, compare
from normswap.deploy.reference_run import run_reference, tensors

Axis = tuple[int, int]  # which tensor, in the order of a file's inputs, and which axis of it
Group = tuple[Axis, ...]  # axes of one size that change together

_MOST_TRIALS = 32  # ways in which axes may change together


def resize(call: CallArguments, shapes: list[tuple[int, ...]]) -> CallArguments:
    """`call` with its tensors in these shapes: cut, or the last along an axis repeated."""
    waiting = iter(shapes)

    def resized(given: torch.Tensor) -> torch.Tensor:
        shape = next(waiting)
        if not given.numel():
            return given.new_zeros(shape)
        for axis, size in enumerate(shape):
            if size != given.shape[axis]:
                index = torch.arange(size).clamp(max=given.shape[axis] - 1)
                given = given.index_select(axis, index)
        return given

    changed: CallArguments = pytree.tree_map_only(torch.Tensor, resized, call)
    return changed


class Trials:
    """`model` on inputs that differ from those of `call` in the sizes of some axes."""

    def __init__(self, model: nn.Module, call: CallArguments) -> None:
        self.model, self.call = model, call

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the inputs."""
        return [tuple(tensor.shape) for tensor in tensors(self.call)]

    def size(self, group: Group) -> int:
        """How large the axes of `group` are."""
        i, axis = group[0]
        return self.shapes[i][axis]

    def resized(self, group: Group, size: int) -> CallArguments:
        """The inputs with the axes of `group` of this size."""
        shapes = [list(shape) for shape in self.shapes]
        for i, axis in group:
            shapes[i][axis] = size
        return resize(self.call, [tuple(shape) for shape in shapes])

    def refusal(self, group: Group, sizes: Sequence[int]) -> str:
        """Why the model takes none of the `sizes` for `group`; "" if it takes one."""
        why = ""
        for size in sizes:
            try:
                run_reference(self.model, self.resized(group, size))
            except NormswapError as error:
                why = why or str(error).removesuffix("; give others")
            else:
                return ""
        return why

    def keeps_samples(self, group: Group, outputs: list[Array]) -> bool:
        """Whether a sample put before along `group` leaves what the others give, `outputs`."""
        given = tensors(self.call)
        for i, axis in group:
            given[i] = torch.cat([given[i].narrow(axis, 0, 1), given[i]], axis)
        waiting = iter(given)
        longer = pytree.tree_map_only(torch.Tensor, lambda _: next(waiting), self.call)
        try:
            return _kept(outputs, run_reference(self.model, longer))
        except NormswapError:
            return False

    def groups(self, start: Axis, barred: Iterable[Axis] = ()) -> Iterator[Group]:
        """Sets of axes that have the size of `start`, which is in each; the likeliest first."""
        size, barred = self.size((start,)), {start, *barred}
        choices: list[list[Group]] = []
        for i, shape in enumerate(self.shapes):
            alike = [(i, axis) for axis, n in enumerate(shape) if n == size]
            alike = [each for each in alike if each not in barred]
            alike.sort(key=lambda each: each[1] != start[1])
            some = chain.from_iterable(combinations(alike, n) for n in range(1, len(alike) + 1))
            choices.append([(), *some] if i == start[0] else [*some, ()])
        for chosen in islice(product(*choices), _MOST_TRIALS):
            yield (start, *chain(*chosen))


def _kept(outputs: list[Array], more: list[Array]) -> bool:
    """Whether some of the outputs are longer than before, and each ends in what it was."""
    if [y.ndim for y in outputs] != [y.ndim for y in more]:
        return False
    grown = [(y, z) for y, z in zip(outputs, more, strict=True) if y.shape != z.shape]
    ends = [
        z[tuple(slice(max(0, m - n), None) for n, m in zip(y.shape, z.shape, strict=True))]
        for y, z in grown
    ]
    return bool(grown) and all(
        compare(end, y, rtol=1e-3, atol=1e-5).agrees
        for (y, _), end in zip(grown, ends, strict=True)
    )
