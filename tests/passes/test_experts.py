"""Gains, rotations and scales go into the experts of a mixture, whose matrices are one tensor."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.graph.operators.operator import TABLE


# torch's own has no kernel in float64, and is exported in bfloat16 alone.
@torch.library.custom_op("normswap_tests::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    parts, start = [], 0
    for end, weight in zip(ends.tolist(), weights, strict=True):
        parts.append(x[start:end] @ weight)
        start = end
    return torch.cat(parts)


@grouped_mm.register_fake
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[2])


TARGET = torch.ops.normswap_tests.grouped_mm.default


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    ns.register_rule(TARGET, like=torch.ops.aten._grouped_mm.default)
    yield
    del TABLE[TARGET]


WIDTH, INNER, EXPERTS, WORDS = 16, 24, 4, 11


class Experts(nn.Module):
    """A router, and experts of which each position takes one, as products of groups.

    Args:
        transposed: the matrices are stored (experts, out, in), as transformers has them.
    """

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.router, self.transposed = nn.Linear(WIDTH, EXPERTS, bias=False), transposed
        up, down = (EXPERTS, WIDTH, 2 * INNER), (EXPERTS, INNER, WIDTH)
        shapes = [(e, o, i) if transposed else (e, i, o) for e, i, o in (up, down)]
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 4) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
        up, down = (each.mT if self.transposed else each for each in (self.up, self.down))
        gate, value = grouped_mm(flat[order], up, ends).chunk(2, -1)
        y = grouped_mm(F.silu(gate) * value, down, ends) * weights[order][:, None]
        return y[order.argsort()].view(x.shape)


class Model(nn.Module):
    """An embedding, two pre-norm mixtures, a norm and a head."""

    def __init__(self, norm: type[nn.Module], transposed: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(3))
        self.experts = nn.ModuleList(Experts(transposed) for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.experts[0](self.norms[0](x))
        x = x + self.experts[1](self.norms[1](x))
        return self.head(self.norms[2](x))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("verb", ["fold_gains", "rotate", "rescale"])
def test_experts_take_it_in(verb: str, transposed: bool) -> None:
    model = Model(nn.RMSNorm, transposed)
    randomise(model)
    model.eval().double()
    tokens = torch.randint(0, WORDS, (3, 7))
    if verb == "rescale":
        with torch.no_grad():
            model.experts[0].down *= 1e6
        result = ns.rescale(model, tokens, [tokens])
        assert torch.equal(in_eval(result, tokens), in_eval(model, tokens))
    else:
        result = getattr(ns, verb)(model, tokens)
        assert error(in_eval(result, tokens), in_eval(model, tokens)) <= 1e-12
    plan = ns.plan_of(result)
    assert plan.edits and not plan.left
    changed = [
        name
        for name, each in result.state_dict().items()
        if "experts" in name and not torch.allclose(each, model.state_dict()[name])
    ]
    wanted = {"fold_gains": 4, "rotate": 6, "rescale": 2}[verb]
    assert len(changed) == wanted, changed


def test_torchs_own_operator_takes_a_gain_in() -> None:
    model = Model(nn.RMSNorm, transposed=False).bfloat16().eval()
    with torch.no_grad():
        for norm in model.norms:
            norm.weight.copy_(2.0 ** torch.randint(-2, 3, (WIDTH,)))  # exact in any type
    for experts in model.experts:
        experts.forward = torchs.__get__(experts)
    tokens = torch.randint(0, WORDS, (3, 8))
    plan = ns.plan(model, ns.FoldAffine(), inputs=tokens)
    assert not plan.left
    result = plan.apply(model, check=False)
    assert error(in_eval(result, tokens).double(), in_eval(model, tokens).double()) <= 0.05


def torchs(self: Experts, x: Tensor) -> Tensor:
    """The forward of `Experts` with torch's operator."""
    flat = x.reshape(-1, WIDTH)
    weights, chosen = self.router(flat).softmax(-1).max(-1)
    order = chosen.argsort(stable=True)
    ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0).to(torch.int32)
    gate, value = F.grouped_mm(flat[order], self.up, offs=ends).chunk(2, -1)
    y = F.grouped_mm(F.silu(gate) * value, self.down, offs=ends) * weights[order][:, None]
    return y[order.argsort()].view(x.shape)
