"""The layer-normalized LSTM over a whole sequence as one differentiable operation.

The same as the loop over steps in `layer_norm`, with a backward written out, which saves most of
the time that autograd spends between operations this small and takes the gradient of weight_hh in
one product instead of one for each step. With u = weight_hh h, LN(u) = gain * n(u), a hat for the
gradient of the loss, and all of one step:

    o^  = h'^ * tanh(LN(c'))        LN(c')^ = h'^ * o * (1 - tanh(LN(c'))^2)
    c'^ = c^ of the next step + backward of LN at c'
    i^, f^, g^ = c'^ * g, c'^ * c, c'^ * i;   gates^ by the derivatives of sigma and tanh
    u^  = backward of LN at u of gates^;      h^ = u^ weight_hh;   c^ = c'^ * f

Gradients of gradients are those of the loop, which is run again for them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normswap.norms import kernels
from normswap.norms.recompute import gradients
from normswap.norms.recurrent.loop import Outcome, State, product, spliced, times

Loop = Callable[..., Outcome]
_layer_norm = torch.ops.aten.native_layer_norm
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


class Form(NamedTuple):
    """What a sequence is, beside tensors; `loop` is the same function, which autograd follows."""

    loop: Loop
    per_gate: bool
    eps: float
    sizes: Sequence[int] | None
    reverse: bool
    differentiable: bool

    def steps(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The rows of each step, in the order in which the steps are taken."""
        parts = rows.unbind(0) if self.sizes is None else torch.split(rows, list(self.sizes))
        return parts[::-1] if self.reverse else parts

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """What `steps` took apart, as (T, B, ...) or packed."""
        parts = tuple(parts[::-1]) if self.reverse else tuple(parts)
        return torch.stack(parts) if self.sizes is None else torch.cat(parts)


class _Saved(NamedTuple):
    """What a step leaves for its backward."""

    before: Tensor  # h that goes in
    held: Tensor  # c that goes in
    unit: Tensor  # n(weight_hh h)
    scale: Tensor
    gates: Tensor  # after sigma and tanh, (n, 4, H)
    cell: Tensor  # c that comes out
    cell_mean: Tensor
    cell_scale: Tensor
    squashed: Tensor  # tanh(LN(cell))


def suits(x: Tensor) -> bool:
    """Whether `layer_norm_lstm` serves here: no compiler, no transform, no autocast, no half."""
    return (
        not kernels.recording()
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(x.device.type)
    )


def layer_norm_lstm(form: Form, given: Tensor, state: State, *weights: Any) -> Outcome:
    """Run one layer in one direction.

    Args:
        given: the share of the input in the gates, and their biases: (T, B, 4 H), or packed.
        state: h and c at the start, each (B, H).
        weights: weight_hh (4 H, H), gain_hh (4 H,), gain_c (H,), bias_c (H,) or None.
    """
    y, h, c = _Sequence.apply(form, given, *state, *weights)  # type: ignore[no-untyped-call]
    return y, (h, c)


class _Sequence(Function):
    """form, given, h, c, weight_hh, gain_hh, gain_c, bias_c -> outputs, last h, last c."""

    @staticmethod
    def forward(ctx: Any, form: Form, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given, h, c, weight, gain, gain_c, bias_c = inputs
        size = h.shape[1]
        width = [size] if form.per_gate else [4 * size]
        gain = gain.view(-1, *width)
        outputs: list[Tensor] = []
        saved: list[Tensor] = []
        recurrent = times(weight, len(h))
        for part in form.steps(given):
            n = len(part)
            before, held = h[:n], c[:n]
            sums = recurrent(before).view(n, len(gain), *width)
            unit, _, scale = _layer_norm(sums, width, None, None, form.eps)
            gates = torch.addcmul(part.view_as(unit), unit, gain).view(n, 4, size)
            active = torch.sigmoid(gates)
            i, f, g, o = active.unbind(1)
            torch.tanh(gates[:, 2], out=g)
            cell = torch.addcmul(f * held, i, g)
            normed, cell_mean, cell_scale = _layer_norm(cell, [size], gain_c, bias_c, form.eps)
            squashed = normed.tanh_()
            outputs.append(o * squashed)
            if form.differentiable:
                saved += _Saved(
                    before,
                    held,
                    unit,
                    scale,
                    active,
                    cell,
                    cell_mean,
                    cell_scale,
                    squashed,
                )
            h, c = spliced(outputs[-1], h), spliced(cell, c)
        ctx.form = form
        ctx.save_for_backward(*inputs, *saved)
        # Copies: what is saved must not hold an output, which holds what is saved.
        return form.joined(outputs), h.clone(), c.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor) -> tuple[Any, ...]:
        form, tensors = ctx.form, ctx.saved_tensors
        inputs, rest = tensors[:7], tensors[7:]
        if torch.is_grad_enabled():

            def again(given: Tensor, h: Tensor, c: Tensor, *weights: Any) -> tuple[Tensor, ...]:
                y, state = form.loop(given, (h, c), *weights)
                return y, *state

            needed = ctx.needs_input_grad[1:]
            return None, *gradients(again, inputs, (grad_y, grad_h, grad_c), needed)
        _, _, _, weight, gain, gain_c, bias_c = inputs
        size = grad_h.shape[1]
        width = [size] if form.per_gate else [4 * size]
        gain = gain.view(-1, *width)
        across = times(weight.t(), len(grad_h))
        grad_given = torch.empty_like(inputs[0])
        grad_gain = gain.new_zeros(len(grad_h), *gain.shape)
        fields = len(_Saved._fields)
        steps = [_Saved(*rest[at : at + fields]) for at in range(0, len(rest), fields)]
        zeros = gain.new_zeros(len(grad_h), len(gain), 1)
        ones = torch.ones_like(zeros)
        grad_sums: list[Tensor] = []
        grad_normed: list[Tensor] = []
        rows = zip(steps, form.steps(grad_y), form.steps(grad_given), strict=True)
        for step, grad_out, grad_gates in reversed(list(rows)):
            n = len(grad_out)
            i, f, g, o = step.gates.unbind(1)
            dh = grad_h[:n] + grad_out
            normed = torch.ops.aten.tanh_backward(dh * o, step.squashed)
            grad_normed.append(normed)
            dc = grad_c[:n] + _layer_norm_backward(
                normed, step.cell, [size], step.cell_mean, step.cell_scale, gain_c, bias_c,
                [True, False, False],
            )[0]  # fmt: skip
            active = torch.stack((dc * g, dc * step.held, g, dh * step.squashed), 1)
            gates = grad_gates.view(n, 4, size)
            torch.ops.aten.sigmoid_backward.grad_input(active, step.gates, grad_input=gates)
            torch.ops.aten.tanh_backward.grad_input(dc * i, g, grad_input=gates[:, 2])
            gates = grad_gates.view_as(step.unit)
            grad_gain[:n].addcmul_(gates, step.unit)
            sums = _layer_norm_backward(
                gates * gain, step.unit, width, zeros[:n], ones[:n], None, None,
                [True, False, False],
            )[0].mul_(step.scale).view(n, 4 * size)  # fmt: skip
            grad_sums.append(sums)
            grad_h = spliced(across(sums), grad_h)
            grad_c = spliced(dc * f, grad_c)
        before = torch.cat([step.before for step in steps])
        grad_weight = product(before.t(), torch.cat(grad_sums[::-1]).t()).t()
        _, grad_gain_c, grad_bias_c = _layer_norm_backward(
            torch.cat(grad_normed[::-1]),
            torch.cat([step.cell for step in steps]),
            [size],
            torch.cat([step.cell_mean for step in steps]),
            torch.cat([step.cell_scale for step in steps]),
            gain_c,
            bias_c,
            [False, True, bias_c is not None],
        )
        grads = grad_given, grad_h, grad_c, grad_weight, grad_gain.sum(0).flatten(), grad_gain_c
        return None, *grads, grad_bias_c if bias_c is not None else None
