"""What is frozen, or more than a BatchNorm, survives torch's own rewriters."""

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import timm.layers
import torch
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from networks import Residual, in_eval, randomise
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import normswap as ns
from normswap.norms.batch.frozen import FixedStatistics

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _lightning(model: nn.Module) -> nn.Module:
    sync = TorchSyncBatchNorm()
    return sync.revert(sync.apply(model).train())


def _update_bn(model: nn.Module) -> nn.Module:
    update_bn((3 * X + 1).split(4), model)
    return model


def _averaged(model: nn.Module) -> nn.Module:
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    update_bn((3 * X + 1).split(4), averaged)
    return averaged.module


def _set_again(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        setattr(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
    return model


REWRITERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm": timm.layers.convert_sync_batchnorm,
    "lightning": _lightning,
    "by hand": _set_again,
    "update_bn": _update_bn,
    "averaged": _averaged,
}


def _timm() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 6, 3, bias=False), timm.layers.BatchNormAct2d(6)
            self.last = nn.Conv2d(6, 6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bn(self.conv(x))).mean((2, 3))

    return Net()


def _synced() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Residual())


def _of(*, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps, affine=affine), nn.ReLU())


@pytest.mark.parametrize("mode", ["eval", "tune"])
@pytest.mark.parametrize("build", [Residual, _timm, _synced, lambda: _of(eps=0.1, affine=False)])
def test_frozen_statistics_survive(mode: Any, build: Callable[[], nn.Module]) -> None:
    model = randomise(build()).double()
    expected = in_eval(model, X)
    frozen = ns.freeze(model, X, mode=mode)
    kept = [name for name, each in frozen.named_modules() if isinstance(each, FixedStatistics)]
    for name, rewrite in REWRITERS.items():
        after = rewrite(copy.deepcopy(frozen))
        torch.testing.assert_close(after.train()(X), expected, msg=name)
        assert list(after.state_dict()) == list(frozen.state_dict())
        assert [n for n, m in after.named_modules() if isinstance(m, FixedStatistics)] == kept
    back = ns.unfreeze(after)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    torch.testing.assert_close(in_eval(back, X), expected)


@pytest.mark.parametrize("rewrite", ["torch", "timm", "lightning"])
def test_a_model_frozen_in_part_is_converted_in_part(rewrite: str) -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6))
    ).double()
    frozen = ns.plan(model, ns.passes.Freeze(exclude="3"), inputs=X).apply(model)
    convert = TorchSyncBatchNorm().apply if rewrite == "lightning" else REWRITERS[rewrite]
    after = convert(frozen)
    assert isinstance(after[1], FixedStatistics)
    assert type(after[3]) is nn.SyncBatchNorm
    torch.testing.assert_close(in_eval(after, X), in_eval(model, X))


METHODS: dict[str, dict[str, Any]] = {
    "adaptive_batch_norm": {"domains": ("day", "night")},
    "batch_instance_norm": {},
    "batch_renorm": {},
    "conditional_batch_norm": {"num_conditions": 4},
    "decorrelated_batch_norm": {"group_size": 2},
    "evonorm_b0": {},
    "ghost_batch_norm": {"ghost_batch_size": 4},
    "l1_batch_norm": {},
    "mean_only_batch_norm": {},
    "switchable_norm": {},
}


def _with(method: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(Residual()).double()
    swapped = ns.convert(model, method, inputs=X, **METHODS[method])
    with torch.no_grad():
        for parameter in swapped.parameters():
            parameter.mul_(1 - 0.1 * torch.rand_like(parameter))
    return swapped


@pytest.mark.filterwarnings("ignore:.*stays a")
@pytest.mark.parametrize("method", METHODS)
def test_a_method_keeps_what_it_adds_when_batch_norms_are_converted(method: str) -> None:
    model = _with(method)
    expected, trained = in_eval(model, X), copy.deepcopy(model).train()(X)
    for rewrite in ("torch", "timm", "lightning"):
        after = REWRITERS[rewrite](copy.deepcopy(model))
        assert list(after.state_dict()) == list(model.state_dict())
        pairs = zip(after.modules(), model.modules(), strict=True)
        assert all(type(n) is type(o) for n, o in pairs if "normswap" in type(o).__module__)
        torch.testing.assert_close(in_eval(after, X), expected)
        torch.testing.assert_close(after.train()(X), trained)


def test_tune_mode_survives_what_freezes_batch_norms_in_timm() -> None:
    model = randomise(_timm()).double()
    expected = in_eval(model, X)
    tuned = ns.freeze(model, X, mode="tune")
    with pytest.warns(UserWarning, match="stays frozen in tune mode"):
        after = timm.layers.freeze_batch_norm_2d(tuned)
    torch.testing.assert_close(after.train()(X), expected)
    frozen = timm.layers.freeze_batch_norm_2d(ns.freeze(model))
    assert isinstance(frozen.bn, timm.layers.FrozenBatchNormAct2d)
    torch.testing.assert_close(frozen.train()(X), expected)


def test_a_method_that_stays_is_said() -> None:
    with pytest.warns(UserWarning, match="stays a GhostBatchNorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(_with("ghost_batch_norm"))


@pytest.mark.parametrize(
    "method", ["batch_instance_norm", "batch_renorm", "ghost_batch_norm", "switchable_norm"]
)
def test_update_bn_gives_a_method_the_statistics_of_the_data_and_no_more(method: str) -> None:
    model = _with(method)
    first = next(m for m in model.modules() if getattr(m, "running_mean", None) is not None)
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    before = {name: p.clone() for name, p in model.named_parameters()}
    update_bn((3 * X + 1).split(4), model)
    torch.testing.assert_close(first.running_mean, torch.cat(seen).mean((0, 2, 3)))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_is_put_in_its_place_by_hand_is_registered() -> None:
    """The hook on registration is torch's own, and asked about every module of the process."""
    frozen = ns.freeze(randomise(_of()))
    thawed, other = nn.BatchNorm2d(6), nn.SyncBatchNorm(6)
    thawed.running_mean, thawed.running_var = frozen[1].running_mean, frozen[1].running_var
    frozen[1] = thawed
    assert frozen[1] is thawed
    frozen = ns.freeze(randomise(_of()))
    frozen[1] = other
    assert frozen[1] is other


def test_our_own_batch_norm_becomes_a_sync_batch_norm() -> None:
    model = ns.convert(randomise(_of()), "batch_norm")
    after = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(after[1]) is nn.SyncBatchNorm


def test_a_converted_model_pickles() -> None:
    frozen = nn.SyncBatchNorm.convert_sync_batchnorm(ns.freeze(randomise(Residual()).double()))
    loaded = pickle.loads(pickle.dumps(frozen))
    assert torch.equal(loaded.train()(X), frozen.train()(X))


def _reset(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def test_resetting_its_parameters_leaves_the_statistics() -> None:
    frozen = ns.freeze(randomise(_of()))
    before = frozen[1].running_mean.clone()
    _reset(frozen.modules())
    assert torch.equal(frozen[1].running_mean, before)
    assert torch.equal(frozen[1].weight, torch.ones(6))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_whoever_replaces_modules_of_other_kinds_is_not_disturbed(device: str) -> None:
    """timm's pruned models replace BatchNorms while they are built, which may be on meta."""
    model = nn.Sequential(nn.BatchNorm2d(3, device=device), nn.LayerNorm(4, device=device))
    for old in (model[0], ns.freeze(nn.Sequential(nn.BatchNorm2d(3))).to(device)[0]):
        model[0] = old
        new = nn.BatchNorm2d(3, device=device)
        model[0] = new
        assert model[0] is new
        model[0] = nn.Identity()
        assert type(model[0]) is nn.Identity
