"""Weights decay; biases, gains and gates do not."""

import pytest
import torch
from networks import Residual
from torch import nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.fit.parameter_groups import param_groups
from normswap.norms.mixed.batch_instance import BatchInstanceNorm


class Tied(nn.Module):
    """One of everything; the embedding is the head's weight as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.gated, self.norm = BatchInstanceNorm(4), nn.LayerNorm(4)
        self.conv = parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.scale = nn.Parameter(torch.ones(4, 1))


def names(model: nn.Module, group: dict[str, object]) -> set[str]:
    taken = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in taken}


def test_each_parameter_is_in_its_group() -> None:
    model = Tied()
    weights, others, gates = param_groups(model, weight_decay=0.1, gate_lr=1.0)
    assert names(model, weights) == {"embedding.weight", "conv.parametrizations.weight.original1"}
    assert names(model, others) == {
        *("head.bias", "gated.weight", "gated.bias", "norm.weight", "norm.bias", "scale"),
        *("conv.bias", "conv.parametrizations.weight.original0"),
    }
    assert names(model, gates) == {"gated.gate"}
    assert [each["weight_decay"] for each in (weights, others, gates)] == [0.1, 0.0, 0.0]
    assert gates["lr"] == 1.0


@pytest.mark.parametrize("method", ["group_norm", "dynamic_tanh", "evonorm_s0"])
def test_every_parameter_of_a_converted_network_is_in_one_group(method: str) -> None:
    model = ns.convert(Residual(), method)
    groups = param_groups(model, weight_decay=0.1)
    together = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(together) == sorted(id(parameter) for parameter in model.parameters())
    weights = names(model, groups[0])
    assert weights == {
        n for n, p in model.named_parameters() if p.ndim > 1 and p.shape[1:] != (1, 1)
    }


def test_an_optimizer_takes_them() -> None:
    """The gradients are zero, so that decay alone moves a parameter."""
    model = Tied()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(param_groups(model, weight_decay=0.1), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"embedding.weight", "conv.parametrizations.weight.original1"}
