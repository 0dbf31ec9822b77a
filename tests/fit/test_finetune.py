"""Fine-tuning: the steps of a loop written by hand, and a model that is the user's afterwards."""

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from learners import SAMPLES, Net, X, Y, batches, loader, moved_and_mirrored, net, same_bits
from networks import ConvBN
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap as ns
from normswap.core.errors import NormswapError

STEPS = 7
pytestmark = pytest.mark.filterwarnings("ignore:.*which are too few")


def double() -> Net:
    model = net().double()
    model.drop.p = 0.0
    return model


def by_hand(
    model: nn.Module, *, frozen: bool, weight_decay: float = 0.0, clip: float | None = None
) -> nn.Module:
    """SGD with momentum under half a cosine, in plain torch."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": weight_decay}, {"params": vectors}],
        lr=0.05,
        momentum=0.8,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and frozen:
            module.eval()
    for step in range(STEPS):
        x, y = batches()[step % 5]
        optimizer.zero_grad()
        F.cross_entropy(model(x.double()), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return model


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"clip": 0.1}])
@pytest.mark.parametrize("statistics", ["eval", "tune", "update"])
def test_it_is_the_loop_that_one_would_write(statistics: str, options: dict[str, Any]) -> None:
    """So eval and tune give the same weights, norms and biases have no decay, and statistics move
    in update alone."""
    expected = by_hand(double(), frozen=statistics != "update", **options)
    found = ns.finetune(
        double(), batches(), steps=STEPS, statistics=statistics, lr=0.05, momentum=0.8, **options
    )
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-9, atol=1e-10, msg=name)
    moved = [
        not torch.equal(value, double().state_dict()[name])
        for name, value in found.state_dict().items()
        if "running" in name or "tracked" in name
    ]
    assert all(moved) if statistics == "update" else not any(moved)


@pytest.mark.parametrize("make", [loader, moved_and_mirrored, lambda: iter(batches())])
def test_eval_and_tune_see_the_same_shuffled_data(make: Any) -> None:
    found = []
    for statistics in ("eval", "tune"):
        model, data = double(), make()
        model.drop.p = 0.3
        torch.manual_seed(3)
        found.append(ns.finetune(model, data, steps=5, statistics=statistics).state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_accumulated_batches_are_one_batch_of_all() -> None:
    model, whole = double(), double()
    uneven = [*zip(X.split([5, 3, 8] * 2 + [8]), Y.split([5, 3, 8] * 2 + [8]), strict=True)]
    ns.finetune(model, uneven[:6], steps=2, accumulate=3)
    ns.finetune(whole, batches(16), steps=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-10)


class Hooked(nn.Module):
    """A user's model with everything on it that is to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.calls: list[int] = []
        self.net.stem.register_forward_hook(lambda *args: self.calls.append(1))
        self.net.blocks[0].bn.eval()
        self.net.blocks[1].conv.weight.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.net.head.weight.grad = torch.ones_like(self.net.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def shape(model: nn.Module) -> list[Any]:
    """What a user sees of a model, its values left out."""
    return [
        [
            (path, type(module), module.training, [*module._forward_hooks], {*vars(module)})
            for path, module in model.named_modules()
        ],
        [
            (name, p.requires_grad, p.dtype, p.stride(), p.grad is None, id(p))
            for name, p in model.named_parameters()
        ],
        [*model.state_dict()],
    ]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("statistics", ["eval", "tune", "update"])
def test_the_model_is_the_users_afterwards(statistics: str, fails: bool) -> None:
    model = Hooked()
    gradient = model.net.head.weight.grad
    before, frozen = shape(model), model.net.blocks[1].conv.weight.clone()

    def data() -> Iterable[Any]:
        yield from batches()
        raise KeyError("the user's own")

    if fails:
        with pytest.raises(NormswapError, match=r"at batch 6: KeyError: .the user's own") as error:
            ns.finetune(model, data(), steps=9, statistics=statistics)
        assert isinstance(error.value.__cause__, KeyError)
    else:
        ns.finetune(model, batches(), steps=4, statistics=statistics)
    assert shape(model) == before
    assert torch.equal(model.net.blocks[1].conv.weight, frozen)
    assert bool(model.calls) is not fails
    assert torch.equal(model.net.head.weight, net().head.weight) is fails
    assert model.net.head.weight.grad is gradient and bool((gradient == 1).all())


def test_gradients_that_were_there_do_not_count() -> None:
    expected, model = net(), net()
    ns.finetune(expected, batches(), steps=1)
    torch.manual_seed(0)
    net()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    ns.finetune(model, batches(), steps=1, clip=1e9)
    assert same_bits(expected.state_dict(), model.state_dict())


@pytest.mark.parametrize("statistics", ["eval", "tune", "update"])
def test_what_the_user_froze_stays_frozen(statistics: str) -> None:
    model = net()
    frozen = ns.freeze(model, mode="eval", inputs=X[:2])
    before = shape(frozen)
    values = {n: t.clone() for n, t in frozen.state_dict().items() if "running" in n}
    ns.finetune(frozen, batches(), steps=3, statistics=statistics)
    assert shape(frozen) == before
    assert all(torch.equal(frozen.state_dict()[name], value) for name, value in values.items())


class ScaleInvariant(nn.Module):
    """Each weight that trains is normalized after it; gains train too; the head does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.first, self.second = nn.GroupNorm(2, 8, eps=1e-30), nn.GroupNorm(4, 8, eps=1e-30)
        self.head = nn.Linear(8, 4)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.a(x)).relu()
        return self.head(self.second(self.b(x)).relu().mean((2, 3)))


def test_a_growing_rate_is_weight_decay_for_weights_that_are_normalized() -> None:
    torch.manual_seed(0)
    grown = ScaleInvariant().double()
    decayed = copy.deepcopy(grown)
    ns.finetune(
        grown,
        batches(),
        steps=12,
        statistics="update",
        lr=0.1,
        weight_decay=0.02,
        momentum=0.6,
        schedule="exponential",
    )
    weights = [decayed.a.weight, decayed.b.weight]
    others = [p for m in (decayed.first, decayed.second) for p in m.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.02}, {"params": [*others, decayed.head.bias]}],
        lr=0.1,
        momentum=0.6,
    )
    for step in range(12):
        x, y = batches()[step % 5]
        optimizer.zero_grad()
        F.cross_entropy(decayed(x.double()), y).backward()
        optimizer.step()
    for one, other in zip(grown.parameters(), decayed.parameters(), strict=True):
        apart = one / one.norm() - other / other.norm() if one.dim() == 4 else one - other
        assert apart.abs().max() < 1e-9
    assert grown.a.weight.norm() > 1.01 * decayed.a.weight.norm()


class HuggingFaceLike(nn.Module):
    """Keyword inputs; the loss comes with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.net(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits)


def test_the_models_own_loss_is_taken() -> None:
    model, expected = HuggingFaceLike(), net()
    torch.manual_seed(1)
    ns.finetune(model, [{"pixel_values": x, "labels": y} for x, y in batches()], steps=3)
    torch.manual_seed(1)
    ns.finetune(expected, batches(), steps=3)
    assert same_bits(model.net.state_dict(), expected.state_dict())


def test_what_cannot_be_learned_from_is_told_of() -> None:
    with pytest.raises(NormswapError, match="the data have no labels"):
        ns.finetune(net(), [X], steps=1)
    with pytest.raises(NormswapError, match=r"labels go from 0 to 3, .* has 2 outputs"):
        ns.finetune(nn.Sequential(nn.Flatten(), nn.Linear(108, 2)), [(X, Y)], steps=1)
    with pytest.raises(NormswapError, match="no logits"):
        ns.finetune(nn.Sequential(nn.Flatten(0), nn.Linear(108, 2)), [(X[:1], Y[:1])], steps=1)
    with pytest.raises(NormswapError, match="does not run on an input of"):
        ns.finetune(net(), [(X[:, :2], Y)], steps=1)
    with pytest.raises(NormswapError, match="there is no batch"):
        ns.finetune(net(), [], steps=1)
    with pytest.raises(NormswapError, match="none can be trained"):
        ns.finetune(net().requires_grad_(False), batches(), steps=1)


def warnings_of(run: Any, recwarn: pytest.WarningsRecorder) -> list[str]:
    recwarn.clear()
    run()
    return [str(each.message) for each in recwarn if "statistics of" in str(each.message)]


@pytest.mark.filterwarnings("default:.*which are too few")
def test_batches_too_small_for_statistics_are_warned_of(
    recwarn: pytest.WarningsRecorder,
) -> None:
    for statistics, size, count in (("update", 4, 1), ("update", 20, 0), ("eval", 4, 0)):
        model = nn.Sequential(ConvBN(3, 8), nn.Flatten(), nn.Linear(8 * 36, 4))

        def run(model: Any = model, statistics: Any = statistics, size: int = size) -> None:
            ns.finetune(model, batches(size), steps=2, statistics=statistics)

        said = warnings_of(run, recwarn)
        assert len(said) == count
        assert all("1 normalizations such as '0.bn' compute statistics of 4" in s for s in said)


def test_it_learns() -> None:
    model = net()
    before = ns.finetune(net(), batches(), steps=1, lr=1e-9)
    ns.finetune(model, loader(), steps=60, lr=0.05)
    right = [int((m.eval()(X).argmax(1) == Y).sum()) for m in (before, model)]
    assert right[1] > right[0] + SAMPLES // 4
