"""Hooks of a normalization go over to what takes its place, with what they find on the module."""

import warnings
from collections.abc import Callable

import pytest
import torch
from networks import randomise
from torch import Tensor, nn
from torch.nn.utils import prune

import normswap as ns

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.bn(self.conv(x).relu()).relu())
        return y


def _module(norm: nn.Module) -> None:
    norm.probe = nn.Linear(1, 1)
    norm.register_forward_hook(lambda module, _, y: y + module.probe.weight.sum())


def _attribute(norm: nn.Module) -> None:
    norm.boost = 3.0
    norm.register_forward_hook(lambda module, _, y: y * module.boost)


def _parameter(norm: nn.Module) -> None:
    norm.extra = nn.Parameter(torch.tensor(2.0))
    norm.register_forward_hook(lambda module, _, y: y * module.extra)


def _buffer(norm: nn.Module) -> None:
    norm.register_buffer("extra", torch.tensor(2.0))
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.extra,))


def _size(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.num_features,))


def _observed(norm: nn.Module) -> None:
    norm.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.prepare(nn.Sequential(norm), inplace=True)
    norm.activation_post_process.disable_fake_quant()
    assert norm._forward_hooks


def _pruned(norm: nn.Module) -> None:
    prune.random_unstructured(norm, "weight", 0.5)
    prune.l1_unstructured(norm, "bias", 0.25)
    norm.weight_orig.data.mul_(2)  # as a step of the optimizer: the next call computes the weight


def _normed(norm: nn.Module) -> None:
    torch.nn.utils.weight_norm(norm, "weight", dim=None)


KINDS = [_module, _attribute, _parameter, _buffer, _size, _observed, _pruned, _normed]
VERBS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fold": lambda m: ns.fold(m, X),
    "freeze": lambda m: ns.freeze(m, X),
    "tune, bake": lambda m: ns.bake(ns.freeze(m, X, mode="tune")),
    "exact": lambda m: ns.convert(m, "batch_renorm", inputs=X),
    "exact without inputs": lambda m: ns.convert(m, "ghost_batch_norm"),
    "another": lambda m: ns.convert(m, "group_norm", inputs=X),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("give", KINDS, ids=lambda give: give.__name__.strip("_"))
def test_a_hook_finds_what_it_needs(give: Callable[[nn.Module], None], verb: str) -> None:
    torch.manual_seed(0)
    model = randomise(Net()).eval()
    give(model.bn)
    with torch.no_grad():
        changed, expected = VERBS[verb](model), model(X)
        y = changed(X)
    if verb != "another":
        assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5
    extra = {name for name in model.state_dict() if "probe" in name or "extra" in name}
    assert extra <= set(changed.state_dict())
    changed.load_state_dict(changed.state_dict())


def test_without_a_hook_nothing_goes_over() -> None:
    model = Net()
    model.bn.note = "mine"
    assert not hasattr(ns.convert(model, "group_norm", inputs=X).bn, "note")
