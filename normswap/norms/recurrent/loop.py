"""The loop over time: a cell's step, from a start state, over all steps of a sequence.

A sequence is a tensor of rows: (T, B, ...), or packed (N, ...) where step t has the next sizes[t]
rows. Sequences are sorted by length, so a step of n rows moves the first n states and leaves the
others where they are: at their end going forward, at their start going backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Outcome = tuple[Tensor, State]  # all outputs, and the last state
Step = Callable[..., State]


def run_steps(
    step: Step,
    rows: Tensor,
    per_step: Sequence[Any],
    state: State,
    *,
    sizes: Sequence[int] | None = None,
    reverse: bool = False,
) -> Outcome:
    """Run `step` over a sequence.

    Args:
        step: (state, rows of the step, what the step has of each of `per_step`) -> next state,
            whose first tensor is the output.
        rows: (T, B, ...), or packed (N, ...).
        per_step: tensors (T, ...), or in eager mode anything that the step's number indexes.
        state: tensors (B, ...).
        sizes: rows of each step of a packed sequence.
        reverse: from the last step to the first.

    Returns:
        The outputs as (T, B, ...), or packed, and the last state of each sequence.
    """
    if torch.compiler.is_exporting():
        return _scan(step, rows, per_step, state, reverse)
    parts = rows.unbind(0) if sizes is None else torch.split(rows, list(sizes))
    outputs: list[Tensor] = []
    for t in reversed(range(len(parts))) if reverse else range(len(parts)):
        part = parts[t]
        alive = state if sizes is None else tuple(each[: len(part)] for each in state)
        moved = step(alive, part, *(each[t] for each in per_step))
        outputs.append(moved[0])
        state = moved if sizes is None else tuple(map(spliced, moved, state))
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if sizes is None else torch.cat(outputs)), state


def spliced(first: Tensor, whole: Tensor) -> Tensor:
    """`whole` with `first` in the place of its first rows."""
    return first if len(first) == len(whole) else torch.cat((first, whole[len(first) :]))


def _scan(
    step: Step, rows: Tensor, per_step: Sequence[Tensor], state: State, reverse: bool
) -> Outcome:
    """The same as one operator, so that the exported program runs for any number of steps."""
    from torch._higher_order_ops.scan import scan  # torch has no public name for it yet

    def combine(carry: State, each: tuple[Tensor, ...]) -> tuple[State, Tensor]:
        moved = step(carry, *each)
        return moved, moved[0].clone()

    if not torch.compiler.is_dynamo_compiling():
        # scan compiles what it is given, and looking for that among what was compiled before, for
        # other sizes, would fix the sizes that are to stay open here.
        torch.compiler.reset()
    state = tuple(each.clone() for each in state)
    last, outputs = scan(combine, state, (rows, *per_step), reverse=reverse)
    return outputs, last
