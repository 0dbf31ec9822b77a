"""One step of each of torch's recurrent cells, from gates that are normalized already."""

from collections.abc import Callable

import torch
from torch import Tensor

from normswap.norms.recurrent.loop import State

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
