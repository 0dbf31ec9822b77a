"""Which parameters an optimizer decays, and which it moves faster."""

from typing import Any

from torch import Tensor, nn

from normswap.graph.norm_modules import norm_kind
from normswap.norms.mixed.batch_instance import BatchInstanceNorm


def param_groups(
    model: nn.Module, *, weight_decay: float, gate_lr: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: every parameter of `model` in one of them, in order.

    Weight decay is for weights. What a normalization owns, biases, and gains, one number for each
    channel, have none: decay would draw a gain to 0, and through it what a scale-invariant weight
    was meant to be kept from (van Laarhoven 2017, arXiv 1706.05350). Nor have the gates of
    batch-instance normalization, which it would draw to instance normalization.

    Args:
        weight_decay: of the weights.
        gate_lr: the learning rate of the gates, 10 times that of the others in the authors' code
            (Nam & Kim 2018, arXiv 1805.07925); None for the optimizer's.

    Returns:
        The weights, then the others, then the gates; groups without parameters are left out.
    """
    gates = {id(m.gate) for m in model.modules() if isinstance(m, BatchInstanceNorm)}
    of_norms = {
        id(parameter)
        for module in model.modules()
        if norm_kind(module) is not None
        for parameter in module.parameters(recurse=False)
    }
    weights: list[Tensor] = []
    others: list[Tensor] = []
    apart: list[Tensor] = []
    for name, parameter in model.named_parameters():
        bias = name.rpartition(".")[2] == "bias" or ".parametrizations.bias." in f".{name}"
        if id(parameter) in gates:
            apart.append(parameter)
        elif bias or id(parameter) in of_norms or _is_vector(parameter):
            others.append(parameter)
        else:
            weights.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": apart, "weight_decay": 0.0, **({} if gate_lr is None else {"lr": gate_lr})},
    ]
    return [group for group in groups if group["params"]]


def _is_vector(parameter: Tensor) -> bool:
    """Whether at most one axis is longer than 1: a gain, of weight normalization for example."""
    return sum(size > 1 for size in parameter.shape) <= 1
