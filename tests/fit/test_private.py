"""Converted models under differential privacy: Opacus takes them, and clips the right gradients.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133, algorithm 1) clips the gradient of each sample, so no
sample's may depend on the others, as it does through a BatchNorm.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import randomise
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap as ns

opacus = pytest.importorskip("opacus")
resnets = pytest.importorskip("torchvision.models.resnet")

SAMPLES, LR, MAX_NORM = 3, 0.1, 0.5
_generator = torch.Generator().manual_seed(1)
X = torch.randn(SAMPLES, 3, 32, 32, dtype=torch.float64, generator=_generator)
Y = torch.tensor([0, 3, 1])


class Block(resnets.BasicBlock):
    """Torchvision's, which adds in place; the backward hooks of Opacus forbid that."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet() -> nn.Module:
    """Every kind of block of a ResNet-18, but half as many."""
    torch.manual_seed(0)
    model = randomise(resnets.ResNet(Block, [1, 1, 1, 1], num_classes=4)).double()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model.train()


def without_gains(model: nn.Module) -> nn.Module:
    """Opacus takes a module that holds buffers, as frozen statistics are, if it trains nothing."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.requires_grad_(False)
    return model


FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "group_norm": lambda model: ns.convert(model, "group_norm", inputs=X),
    "frozen_batch_norm": lambda model: without_gains(
        ns.convert(model, "frozen_batch_norm", inputs=X)
    ),
    "freeze": lambda model: without_gains(ns.freeze(model)),
    "fold": lambda model: ns.fold(model, X),
}


@cache
def converted(form: str) -> nn.Module:
    """Not to be changed."""
    return FORMS[form](resnet()).train()


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return copy.deepcopy(converted(request.param))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def sample_by_sample(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of each sample on its own, (N, ...), by torch's autograd."""
    names, parameters = zip(*trained(model).items(), strict=True)
    each = [
        torch.autograd.grad(F.cross_entropy(model(x[None]), y[None]), parameters)
        for x, y in zip(X, Y, strict=True)
    ]
    return {name: torch.stack(g) for name, g in zip(names, zip(*each, strict=True), strict=True)}


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def private_step(model: nn.Module, noise: float) -> Any:
    """One step of DP-SGD on all samples, in place; the engine that did it."""
    engine = opacus.PrivacyEngine(accountant="rdp")
    wrapped, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.SGD(trained(model).values(), lr=LR),
        data_loader=DataLoader(TensorDataset(X, Y), batch_size=SAMPLES),
        noise_multiplier=noise,
        max_grad_norm=MAX_NORM,
        poisson_sampling=False,
    )
    for x, y in loader:
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    return engine


def test_opacus_finds_nothing_to_object_to_or_to_replace(model: nn.Module) -> None:
    validator = opacus.validators.ModuleValidator
    assert validator.validate(resnet(), strict=False)
    assert validator.validate(model, strict=False) == []
    fixed = validator.fix(model)
    assert [type(module) for module in fixed.modules()] == [type(m) for m in model.modules()]


def test_gradients_per_sample_are_those_of_each_sample_alone(model: nn.Module) -> None:
    expected = sample_by_sample(copy.deepcopy(model))
    wrapped = opacus.GradSampleModule(model)
    F.cross_entropy(wrapped(X), Y).backward()
    assert expected.keys() == trained(model).keys()
    for name, parameter in trained(model).items():
        torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-8, atol=1e-10)


def test_a_step_without_noise_is_that_of_the_clipped_gradients(model: nn.Module) -> None:
    gradients = sample_by_sample(copy.deepcopy(model))
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
    assert (norms > MAX_NORM).any()  # or nothing would be clipped
    clip = (MAX_NORM / norms).clamp(max=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = statistics(model)
    private_step(model, noise=0.0)
    for name, parameter in model.named_parameters():
        step = torch.zeros_like(parameter)
        if name in gradients:
            step = torch.einsum("n,n...->...", clip, gradients[name]) / SAMPLES
        torch.testing.assert_close(
            parameter.detach(), before[name] - LR * step, rtol=1e-6, atol=1e-8
        )
    assert all(map(torch.equal, statistics(model), kept))


def test_a_private_step_moves_all_that_trains_and_no_statistic(model: nn.Module) -> None:
    before, kept = copy.deepcopy(trained(model)), statistics(model)
    engine = private_step(model, noise=1.0)
    assert not any(torch.equal(p, before[name]) for name, p in trained(model).items())
    assert all(map(torch.equal, statistics(model), kept))
    assert 0 < engine.get_epsilon(delta=1e-5) < float("inf")


class Reader(nn.Module):
    """A recurrent network, of whose results the head reads one."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.rnn, self.last = getattr(nn, kind)(3, 4, **options), False
        self.head = nn.Linear(8 if options.get("bidirectional") else 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, hidden = self.rnn(x)
        if self.last:
            y = (hidden[0] if isinstance(hidden, tuple) else hidden).transpose(0, 1)
        return self.head(y)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_network_gives_the_gradients_of_each_sample(
    kind: str, batch_first: bool
) -> None:
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    x = torch.randn(*((3, 5) if batch_first else (5, 3)), 3, dtype=torch.float64)
    model = ns.convert(Reader(kind, **options).double(), "layer_norm_recurrent", inputs=x).train()
    private = opacus.GradSampleModule(
        copy.deepcopy(model), batch_first=batch_first, loss_reduction="sum"
    )
    private(x).square().sum().backward()
    for sample in range(3):
        alone = x[sample : sample + 1] if batch_first else x[:, sample : sample + 1]
        model.zero_grad()
        model(alone).square().sum().backward()
        for (name, mine), (_, theirs) in zip(
            model.named_parameters(), private._module.named_parameters(), strict=True
        ):
            torch.testing.assert_close(theirs.grad_sample[sample], mine.grad, msg=name)


@pytest.mark.parametrize(
    ("options", "last", "reason"),
    [
        ({}, True, "not of its last state"),
        ({"num_layers": 2, "dropout": 0.5}, False, "dropout would be drawn anew"),
    ],
)
def test_what_opacus_would_clip_wrongly_is_refused(
    options: dict[str, Any], last: bool, reason: str
) -> None:
    x = torch.randn(3, 5, 3)
    given = Reader("LSTM", batch_first=True, **options)
    model = ns.convert(given, "layer_norm_recurrent", inputs=x)
    model.last = last
    private = opacus.GradSampleModule(model.train())
    with pytest.raises(ns.NormswapError, match=reason):
        private(x).square().sum().backward()
