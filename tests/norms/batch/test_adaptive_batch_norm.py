"""adaptive_batch_norm: each domain has its statistics, and nothing else of its own."""

from pathlib import Path

import pytest
import torch
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import normswap as ns
from normswap.norms.batch.adaptive import AdaptiveBatchNorm, domain

DOMAINS = ("day", "night")


def original() -> nn.Module:
    torch.manual_seed(1)
    return randomise(Residual()).eval()


def converted() -> nn.Module:
    return ns.convert(original(), "adaptive_batch_norm", domains=DOMAINS)


def photographs(shift: float = 0.0) -> list[Tensor]:
    return [torch.randn(8, 3, 8, 8) * (1 + shift) + shift for _ in range(3)]


def test_every_domain_of_a_converted_network_starts_as_the_original() -> None:
    x = torch.randn(2, 3, 8, 8)
    expected = in_eval(original(), x)
    model = converted()
    for name in DOMAINS:
        with domain(model, name):
            assert error(in_eval(model, x), expected) < 1e-6


def test_training_in_a_domain_leaves_the_others_statistics() -> None:
    model = converted()
    x = torch.randn(2, 3, 8, 8)
    before = in_eval(model, x)
    with domain(model.train(), "night"):
        for batch in photographs(2.0):
            model(batch)
        night = in_eval(model, x)
    assert torch.equal(in_eval(model, x), before)
    assert error(night, before) > 0.1


def test_update_bn_re_estimates_the_current_domain_alone() -> None:
    module = ns.create("adaptive_batch_norm", 3, domains=DOMAINS)
    batches = photographs(2.0)
    module.running_mean.fill_(0.5)
    with domain(module, "night"):
        update_bn(batches, module)
    night = module.statistics("night")
    torch.testing.assert_close(night.running_mean, torch.cat(batches).mean((0, 2, 3)))
    assert night.num_batches_tracked == 3
    assert (module.running_mean == 0.5).all()
    normalized = module.eval()(torch.cat(batches), "night")
    torch.testing.assert_close(normalized.std((0, 2, 3)), torch.ones(3), rtol=0.05, atol=0)


def test_torch_checkpoints_are_the_first_domain() -> None:
    theirs = randomise(nn.Sequential(nn.BatchNorm2d(3)))[0].eval()
    ours = ns.create("adaptive_batch_norm", 3).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def test_an_added_domain_starts_like_another() -> None:
    module = ns.create("adaptive_batch_norm", 3, domains=DOMAINS)
    module.statistics("night").running_mean.fill_(4.0)
    module.add_domain("dusk", like="night")
    module.add_domain("dawn")
    assert module.domains == ("day", "night", "dusk", "dawn")
    assert (module.statistics("dusk").running_mean == 4).all()
    assert (module.statistics("dawn").running_mean == 0).all()
    module.statistics("dusk").running_mean.fill_(5.0)
    assert (module.statistics("night").running_mean == 4).all()


def test_folding_in_a_domain_keeps_that_domains_function() -> None:
    model = converted()
    x = torch.randn(2, 3, 8, 8)
    with domain(model.train(), "night"):
        for batch in photographs(2.0):
            model(batch)
        expected = in_eval(model, x)
        folded = ns.fold(model, x)
        frozen = ns.freeze(model, x)
    assert error(in_eval(folded, x), expected) < 1e-5
    with domain(frozen, "night"):
        assert error(in_eval(frozen, x), expected) < 1e-5
        frozen.train()(x)
        assert error(in_eval(frozen, x), expected) < 1e-5


def test_domains_are_saved_and_loaded(tmp_path: Path) -> None:
    model = converted()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, AdaptiveBatchNorm):
                norm.statistics("night").running_mean.normal_()
    ns.save(model, tmp_path / "saved")
    loaded = ns.load(tmp_path / "saved", source=Residual)
    x = torch.randn(2, 3, 8, 8)
    for name in DOMAINS:
        with domain(model, name), domain(loaded, name):
            torch.testing.assert_close(in_eval(loaded, x), in_eval(model, x))


def test_the_context_ends_with_an_error_too() -> None:
    module = ns.create("adaptive_batch_norm", 3, domains=DOMAINS)
    with pytest.raises(RuntimeError, match="theirs"), domain(module, "night"):
        assert module.current == "night"
        raise RuntimeError("theirs")
    assert module.current == "day"


def test_an_unknown_domain_names_the_known() -> None:
    module = ns.create("adaptive_batch_norm", 3, domains=DOMAINS)
    with pytest.raises(ValueError, match="unknown domain 'noon'; known: day, night"):
        module(torch.randn(2, 3), "noon")
    with pytest.raises(ns.NormswapError, match="known: day, night"), domain(module, "noon"):
        pass
    with pytest.raises(ns.NormswapError, match="known: day, night"):
        module.add_domain("noon", like="evening")
    with pytest.raises(ns.NormswapError, match="convert it"), domain(nn.BatchNorm2d(3), "day"):
        pass


@pytest.mark.parametrize(
    "domains",
    [(), "night", ("day", "day"), ("day", ""), ("day", "a.b"), ("day", "keys"), ("day", 3)],
)
def test_impossible_names_are_refused(domains: tuple[str, ...]) -> None:
    with pytest.raises(ns.NormswapError) as raised:
        ns.create("adaptive_batch_norm", 3, domains=domains)
    assert "\n" not in str(raised.value)
