"""conditional_batch_norm: starts as BatchNorm, follows the condition of each sample."""

from pathlib import Path

import pytest
import torch
from networks import Residual, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.batch.conditional import ConditionalBatchNorm, conditioned


def responsive(channels: int = 3, conditions: int = 2) -> nn.Module:
    module = ns.create("conditional_batch_norm", channels, num_conditions=conditions)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def converted(x: Tensor) -> nn.Module:
    model = randomise(Residual()).eval()
    return ns.convert(model, "conditional_batch_norm", inputs=x, num_conditions=2)


def test_a_converted_network_ignores_conditions_until_it_is_trained() -> None:
    x, condition = torch.randn(4, 3, 8, 8), torch.randn(4, 2)
    model = converted(x)
    expected = in_eval(model, x)
    with conditioned(model, condition):
        assert error(in_eval(model, x), expected) < 1e-6
        model.train()(x).square().mean().backward()
    taught = [m for m in model.modules() if isinstance(m, ConditionalBatchNorm)]
    assert len(taught) == 5
    for module in taught:
        assert module.weight_delta.weight.grad.abs().max() > 0
        assert module.bias_delta.weight.grad.abs().max() > 0


def test_a_sample_follows_its_own_condition() -> None:
    module = responsive().eval()
    x, condition = torch.randn(4, 3, 5), torch.randn(4, 2)
    other = condition.clone()
    other[1] += 1
    changed = (module(x, other) != module(x, condition)).flatten(1).any(1)
    assert changed.tolist() == [False, True, False, False]


def test_the_context_is_the_argument_and_ends() -> None:
    module = responsive().eval()
    x, one, two = torch.randn(4, 3, 5), torch.randn(4, 2), torch.randn(4, 2)
    plain = module(x)
    with conditioned(module, one):
        with conditioned(module, two):
            torch.testing.assert_close(module(x), module(x, two))
        torch.testing.assert_close(module(x), module(x, one))
        assert not torch.equal(module(x), plain)
    assert torch.equal(module(x), plain)


def test_the_context_ends_with_an_error_too() -> None:
    module = responsive().eval()
    with pytest.raises(RuntimeError, match="theirs"), conditioned(module, torch.randn(4, 2)):
        raise RuntimeError("theirs")
    assert module.condition is None


def test_it_exports_with_two_inputs(tmp_path: Path) -> None:
    inputs = torch.randn(2, 3, 4, 4), torch.randn(2, 2)
    report = ns.export(responsive().eval(), inputs, tmp_path / "model.onnx")
    assert report.passed
    assert len(report.inputs) == 2


@pytest.mark.parametrize("shape", [(2,), (4, 3), (3, 2), (1, 2), (4, 2, 1)])
def test_a_condition_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"give one of shape \(4, 2\)"):
        responsive()(torch.randn(4, 3, 5), torch.randn(shape))


def test_what_takes_no_condition_says_so() -> None:
    module = ns.create("conditional_batch_norm", 3)
    with pytest.raises(ValueError, match="num_conditions"):
        module(torch.randn(4, 3), torch.randn(4, 2))
    with (
        pytest.raises(ns.NormswapError, match="num_conditions"),
        conditioned(module, torch.randn(4, 2)),
    ):
        pass
    with pytest.raises(ns.NormswapError, match="at least 1"):
        ns.create("conditional_batch_norm", 3, num_conditions=0)
