"""Momentum whose step is orthogonalized, for fine-tuning weights of any scale.

For the momentum M of a weight, as a matrix of one row per output, the step is in the direction of
the nearest orthogonal matrix, U V^T of M = U S V^T: every direction that the gradient has is taken
equally far, where plain SGD goes far along the few steep ones and hardly along the others (Jordan
et al. 2024, "Muon", kellerjordan.github.io/posts/muon). The step's length is a fraction of the
weight's own norm, as a weight before a normalization is known up to its scale only (You et al.
2017, arXiv 1708.03888, section 4). Vectors, gains and biases, take Adam's step (Kingma & Ba 2014,
arXiv 1412.6980, algorithm 1), a fraction of their root mean square.

`torch.optim.Muon` takes matrices only, not the weights of convolutions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from normswap.core.compat import AnyConv

# Of the quintic iteration, chosen by Jordan et al. to bring singular values near 1 in five steps.
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_ITERATIONS = 5
_BETAS = 0.9, 0.99
_EPS = 1e-8
_SMALLEST = 0.1  # the root mean square that a vector of zeros, a fresh bias, counts as


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for `Muon`: weights by the number of their convolution's groups, vectors."""
    groups_of = {
        id(parameter): module.groups
        for module in model.modules()
        if isinstance(module, AnyConv) and not module.transposed
        for parameter in module.parameters()
    }
    found: dict[int, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = sum(size > 1 for size in parameter.shape) > 1
            blocks = groups_of.get(id(parameter), 1) if matrix else 0
            found.setdefault(blocks, []).append(parameter)
    return [
        {"params": parameters, "blocks": blocks}
        for blocks, parameters in sorted(found.items(), reverse=True)
    ]


class Muon(torch.optim.Optimizer):
    """See the module's docstring.

    Args:
        groups: each with `blocks`, into how many matrices the rows of a weight are divided, one
            for each group of a convolution; 0 for vectors.
        lr: the step's length as a fraction of the weight's norm (Frobenius), or of a vector's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "blocks": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                        if not group["blocks"]:
                            state["square"] = torch.zeros_like(parameter)
                            state["step"] = torch.zeros(())
                    update = _orthogonal if group["blocks"] else _adam
                    update(parameter, parameter.grad, state, group)


def _adam(parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    first, second = _BETAS
    state["step"] += 1
    state["momentum"].lerp_(grad, 1 - first)
    state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
    steps = float(state["step"])
    mean = state["momentum"] / (1 - first**steps)
    spread = (state["square"] / (1 - second**steps)).sqrt_().add_(_EPS)
    size = (_norm(parameter) / parameter.numel() ** 0.5).clamp(min=_SMALLEST)
    parameter.add_(mean / spread * size, alpha=-group["lr"])


def _orthogonal(
    parameter: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
) -> None:
    momentum = state["momentum"].mul_(_BETAS[0]).add_(grad)
    ahead = grad.add(momentum, alpha=_BETAS[0])  # Nesterov's
    whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
    rows = whole.reshape(group["blocks"], whole.shape[0] // group["blocks"], -1)
    direction = orthogonalized(rows).view(whole.shape)
    direction *= _norm(parameter) / torch.linalg.vector_norm(direction).clamp(min=_EPS)
    if isinstance(parameter, DTensor):
        direction = distribute_tensor(direction, parameter.device_mesh, parameter.placements)
    parameter.add_(direction.to(parameter.dtype), alpha=-group["lr"])


def _norm(tensor: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(tensor)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def orthogonalized(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, (..., rows, columns), by a Newton-Schulz iteration.

    Its singular values are between 0.7 and 1.2, but for those that were next to nothing.
    """
    x: Tensor = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + torch.finfo(x.dtype).tiny)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
