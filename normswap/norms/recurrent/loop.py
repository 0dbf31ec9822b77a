"""The loop over time: a cell's step, from a start state, over all steps of a sequence.

A sequence is a tensor of rows: (T, B, ...), or packed (N, ...) where step t has the next sizes[t]
rows. Sequences are sorted by length, so a step of n rows moves the first n states and leaves the
others where they are: at their end going forward, at their start going backward.

The cells are one step of each of torch's recurrent networks, from gates that are normalized.

Matrix products on the CPU are those of oneDNN; `torch.mm` in float32 uses another library. On an
AMD EPYC, with 2 threads, (16, 256) by (256, 1024) takes 30 us instead of 65, and with 2048 rows 2.2
ms instead of 5.2: recurrent networks spend half of their time there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.core.compat import scan_operator
from normswap.norms import kernels

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

    def combine(carry: State, each: tuple[Tensor, ...]) -> tuple[State, Tensor]:
        moved = step(carry, *each)
        return moved, moved[0].clone()

    if not torch.compiler.is_dynamo_compiling():
        # scan compiles what it is given, and looking for that among what was compiled before, for
        # other sizes, would fix the sizes that are to stay open here.
        torch.compiler.reset()
    state = tuple(each.clone() for each in state)
    last, outputs = scan_operator()(combine, state, (rows, *per_step), reverse=reverse)
    return outputs, last


Norm = Callable[[Tensor], Tensor]


def lstm_cell(gates: Tensor, c: Tensor, norm: Norm, weight_hr: Tensor | None = None) -> State:
    """(h, c) after a step; `norm` is of the cell state that goes into h, `weight_hr` projects h."""
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(norm(c))
    return (h if weight_hr is None else h @ weight_hr.t()), c


def gru_cell(given: Tensor, recurrent: Tensor, h: Tensor) -> State:
    """(h,) after a step, from the shares of the input and of h in the gates r, z and n."""
    r_given, z_given, n_given = given.chunk(3, -1)
    r_recurrent, z_recurrent, n_recurrent = recurrent.chunk(3, -1)
    r = torch.sigmoid(r_given + r_recurrent)
    n = torch.tanh(n_given + r * n_recurrent)
    return (n + torch.sigmoid(z_given + z_recurrent) * (h - n),)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T, differentiable, for x of any rank."""
    if kernels.recording() or not _suits(x, weight):
        return x @ weight.t()
    y: Tensor = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


def times(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x @ weight.T, outside autograd, for many x of `rows` rows (or fewer)."""
    if not _suits(weight, weight):
        return lambda x: x @ weight.t()
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return lambda x: _pointwise(x, ordered)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T of two matrices, outside autograd."""
    if not _suits(x, weight):
        return x @ weight.t()
    return _pointwise(x, weight)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return y


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(Function):
    """x (..., I), weight (O, I) -> x @ weight.T (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        call = linear if torch.is_grad_enabled() else product
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = call(g_rows, weight.t()).view(x.shape)
        return grad_x, call(rows.t(), g_rows.t()).t()
