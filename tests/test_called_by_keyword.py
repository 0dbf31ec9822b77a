"""A normalization may be called by the name of its input, before a verb and after it.

torch's modules name it `input`, so do ours; timm's name it `x`, those of transformers
`hidden_states`. Whoever called one so goes on to call what took its place so.
"""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise
from torch import Tensor, nn

import normswap as ns
from normswap import nn as methods

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


class NamedX(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the input is named `x`, and something follows."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(super().forward(x))
        return y


class NamedHiddenStates(nn.BatchNorm2d):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states)


class Net(nn.Module):
    """A norm that folds into the layer before it, and one between two ReLUs, where it stays."""

    def __init__(self, norm: Callable[[int], nn.Module], keyword: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.a, self.b = norm(8), norm(8)
        self.head = nn.Linear(8, 3)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(**{self.keyword: self.first(input=x)}).relu()
        x = self.b(**{self.keyword: self.second(input=x).relu()}).relu()
        y: Tensor = self.head(input=x.mean((2, 3)))
        return y


NORMS: list[tuple[Callable[[int], nn.Module], str]] = [
    (nn.BatchNorm2d, "input"),
    (NamedX, "x"),
    (NamedHiddenStates, "hidden_states"),
]
EXACT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fold": lambda m: ns.fold(m, X),
    "fold without inputs": lambda m: ns.fold(m, None),
    "freeze": lambda m: ns.freeze(m, X).train(),
    "tune": lambda m: ns.freeze(m, X, mode="tune").train(),
    "unfreeze": lambda m: ns.unfreeze(ns.freeze(m, X, mode="tune")).eval(),
    "bake": lambda m: ns.bake(ns.freeze(m, X, mode="tune")),
    "parametrize": lambda m: ns.parametrize(m, "spectral_norm", inputs=X, conv="operator"),
    "convert": lambda m: ns.convert(m, "batch_renorm", inputs=X),
    "convert without inputs": lambda m: ns.convert(m, "ghost_batch_norm"),
    "convert to frozen": lambda m: ns.unfreeze(ns.convert(m, "frozen_batch_norm")).eval(),
    "convert and fold": lambda m: ns.fold(ns.convert(m, "l1_batch_norm"), X),
    "convert and freeze": lambda m: ns.freeze(ns.convert(m, "sync_batch_norm"), X).train(),
    "mean only": lambda m: ns.convert(m, "mean_only_batch_norm", inputs=X),
}
OTHER: dict[str, Callable[[nn.Module], Any]] = {
    "calibrate": lambda m: ns.convert(m, "group_norm", data=[X]),
    "reestimate": lambda m: ns.reestimate(m, [X]),
    "finetune": lambda m: ns.finetune(m, [(X, torch.arange(4) % 3)], steps=1, statistics="tune"),
    "recover": lambda m: ns.recover(ns.convert(m, "dynamic_tanh", inputs=X), m, [X], steps=1),
    "remove": lambda m: ns.convert(m, "identity"),
    "absorb_input": lambda m: ns.absorb_input(m, X, [0.5] * 3, [0.2] * 3),
    "compare": lambda m: ns.compare(m, ns.fold(m, X), X) and m,
    "advise": lambda m: ns.advise(m, X, data=[X]) and m,
}


def _net(norm: Callable[[int], nn.Module], keyword: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Net(norm, keyword)).double().eval()


def _deviation(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize(("norm", "keyword"), NORMS, ids=[keyword for _, keyword in NORMS])
@pytest.mark.parametrize("verb", EXACT)
def test_exact_verbs_keep_the_function(verb: str, norm: Any, keyword: str) -> None:
    model = _net(norm, keyword)
    changed = EXACT[verb](model)
    with torch.no_grad():
        assert _deviation(changed(X), model(X)) < 1e-10


@pytest.mark.parametrize(("norm", "keyword"), NORMS, ids=[keyword for _, keyword in NORMS])
@pytest.mark.parametrize("verb", OTHER)
def test_other_verbs_run_and_their_results_do(verb: str, norm: Any, keyword: str) -> None:
    changed = OTHER[verb](_net(norm, keyword))
    assert changed.eval()(X).isfinite().all()
    changed.train()(X).sum().backward()


def test_a_converted_model_is_exported_copied_and_pickled(tmp_path: Path) -> None:
    model = _net(NamedHiddenStates, "hidden_states")
    frozen = ns.freeze(ns.convert(model, "batch_renorm"), X)
    assert torch.export.export(frozen, (X,), strict=True).module()(X).equal(frozen(X))
    changed = ns.convert(model.float(), "group_norm")
    for net, x in ((frozen, X), (changed, X.float())):
        pickles = [pickle.dumps(net, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        for twin in (copy.deepcopy(net), *map(pickle.loads, pickles)):
            assert torch.equal(twin(x), net(x))
    assert ns.export(changed, X.float(), tmp_path / "m.onnx").passed


def test_reestimated_statistics_are_those_of_a_call_by_position() -> None:
    by_keyword, by_position = _net(nn.BatchNorm2d, "input"), _net(nn.BatchNorm2d, "input")
    by_position.forward = partial(_by_position, by_position)  # type: ignore[method-assign]
    for name, value in ns.reestimate(by_keyword, [X]).state_dict().items():
        assert torch.equal(value, ns.reestimate(by_position, [X]).state_dict()[name])


def _by_position(model: Any, x: Tensor) -> Tensor:
    x = model.a(model.first(x)).relu()
    y: Tensor = model.head(model.b(model.second(x).relu()).relu().mean((2, 3)))
    return y


class Tokens(nn.Module):
    def __init__(self, norm: nn.Module, keyword: str) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 8), norm, nn.Linear(8, 2)
        self.keyword = keyword

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(**{self.keyword: self.embed(x)}))
        return y


class LayerNormX(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize(
    ("norm", "keyword"), [(nn.LayerNorm, "input"), (LayerNormX, "x"), (nn.RMSNorm, "x")]
)
def test_verbs_of_transformers(norm: Any, keyword: str) -> None:
    model = randomise(Tokens(norm(8), keyword)).double().eval()
    x = torch.randn(2, 5, 3).double()
    exact = [ns.plan(model, ns.FoldAffine(), inputs=x).apply(model)]
    if norm is nn.LayerNorm:
        exact += [ns.center(model, x), ns.center(model, x, trainable=True)]
        assert type(exact[-1].norm) is methods.RMSNorm
    for changed in exact:
        assert _deviation(changed(x), model(x)) < 1e-10
    for to in ("rms_norm", "dynamic_tanh"):
        assert ns.convert(model, to, inputs=x, include="*")(x).isfinite().all()


@pytest.mark.parametrize("name", [n for n, m in ns.methods().items() if m.kind == "activation"])
@pytest.mark.parametrize("training", [False, True])
def test_every_method_takes_its_input_by_torchs_name(name: str, training: bool) -> None:
    module = ns.create(name, 8).train(training)
    other, x = copy.deepcopy(module), torch.randn(4, 8, 5, 5)
    assert torch.equal(module(x), other(input=x))


def test_recurrent_and_input_methods_take_torchs_names() -> None:
    x = torch.randn(5, 2, 3)
    for name in ("layer_norm_recurrent", "batch_norm_lstm"):
        net = ns.convert(nn.Sequential(nn.LSTM(3, 4)), name, include="*").eval()[0]
        assert torch.equal(net(x)[0], net(input=x, hx=None)[0])
    norm = methods.InputNorm(3).fit([torch.randn(8, 3, 4)])
    assert torch.equal(norm(torch.ones(2, 3, 4)), norm(input=torch.ones(2, 3, 4)))


def test_what_takes_a_place_keeps_its_class_and_its_name() -> None:
    changed = ns.convert(_net(NamedHiddenStates, "hidden_states"), "group_norm")
    assert isinstance(changed.a, nn.GroupNorm)
    assert repr(changed.a).startswith("GroupNorm(")
    assert type(ns.convert(_net(nn.BatchNorm2d, "input"), "group_norm").a) is nn.GroupNorm
    torch.jit.script(changed.a)
