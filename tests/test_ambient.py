"""A verb does the same whatever torch is set to around its call, or refuses in one line."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import normswap as ns

X = torch.randn(4, 3, 6, 6)


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
    )
    nn.init.normal_(net[1].weight)
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2)
    return net.append(nn.LayerNorm(4)).append(nn.Linear(4, 3)).eval()


VERBS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "fold": lambda net, x: ns.fold(net, x),
    "channels_last": lambda net, x: ns.fold(net, x, channels_last=True),
    "freeze": lambda net, x: ns.freeze(net, x),
    "tune": lambda net, x: ns.freeze(net, x, mode="tune"),
    "unfreeze": lambda net, x: ns.unfreeze(ns.freeze(net, x, mode="tune")),
    "parametrize": lambda net, x: ns.parametrize(net, "spectral_norm"),
    "bake": lambda net, x: ns.bake(ns.parametrize(net, "weight_norm")),
    "center": lambda net, x: ns.center(net, x),
    "fold_gains": lambda net, x: ns.fold_gains(net, x),
    "rescale": lambda net, x: ns.rescale(net, x, [x], limit=0.5),
    "rotate": lambda net, x: ns.rotate(net, x),
    "absorb_input": lambda net, x: ns.absorb_input(net, x, [0.5] * 3, [0.2] * 3),
    "convert": lambda net, x: ns.convert(net, "l1_batch_norm", inputs=x),
    "calibrate": lambda net, x: ns.convert(net, "group_norm", data=[x]),
    "reestimate": lambda net, x: ns.reestimate(ns.convert(net, "batch_norm"), [x]),
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad_off": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "float64": lambda: _default_dtype(torch.float64),
    "float16": lambda: _default_dtype(torch.float16),
}


@cache
def made(verb: str) -> nn.Module:
    """What a verb makes where nothing is set; not to be changed."""
    net = _net()
    torch.manual_seed(0)
    return VERBS[verb](net, X)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_makes_the_same_under_any_setting_of_torch(verb: str, setting: str) -> None:
    net, expected = _net(), made(verb)
    torch.manual_seed(0)
    with SETTINGS[setting]():
        x = X.clone() if setting == "inference_mode" else X  # an inference tensor
        result = VERBS[verb](net, x)
    state = expected.state_dict()
    assert result.state_dict().keys() == state.keys()
    for name, value in result.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(result.parameters(), expected.parameters(), strict=True):
        assert not mine.is_inference() and mine.requires_grad is theirs.requires_grad
    assert not any(buffer.is_inference() for buffer in result.buffers())
    result.train()(X).sum().backward()


@pytest.mark.parametrize("verb", [*VERBS, "inspect"])
def test_a_verb_inside_a_transform_of_torch_func_is_refused(verb: str) -> None:
    run = VERBS.get(verb, lambda net, x: ns.inspect(net, x))

    net = _net()

    def use(x: Tensor) -> Tensor:
        run(net, X)
        return x.sum()

    for transform, x in ((torch.func.vmap, torch.ones(3)), (torch.func.grad, torch.tensor(1.0))):
        with pytest.raises(ns.NormswapError, match=r"torch\.func.*rewrite it first"):
            transform(use)(x)


# --- models and inputs without numbers ------------------------------------------------------------

ALL = {
    **VERBS,
    "inspect": lambda net, x: ns.inspect(net, x),
    "recover": lambda net, x: ns.recover(net, net, [x], steps=1),
    "finetune": lambda net, x: ns.finetune(net, [(x, torch.zeros(4).long())], steps=1),
    "export": lambda net, x: ns.export(net, x, "never-written.onnx"),
}
NEED_NUMBERS = {"absorb_input", "calibrate", "reestimate", "finetune", "export"}


@pytest.mark.parametrize("verb", ALL)
def test_a_model_of_fake_tensors_is_refused(verb: str) -> None:
    with FakeTensorMode():
        net = _net()
    with pytest.raises(ns.NormswapError, match="fake tensors"):
        ALL[verb](net, X)


@pytest.mark.parametrize("verb", sorted(NEED_NUMBERS))
def test_what_needs_numbers_refuses_a_model_on_the_meta_device(verb: str) -> None:
    with pytest.raises(ns.NormswapError, match="on the meta device"):
        ALL[verb](_net().to("meta"), X.to("meta"))


@pytest.mark.parametrize("verb", sorted(NEED_NUMBERS))
def test_what_needs_numbers_refuses_inputs_that_have_none(verb: str) -> None:
    for x in (X.to("meta"), FakeTensorMode().from_tensor(X)):
        with pytest.raises(ns.NormswapError, match=r"the inputs are .* which have no numbers"):
            ALL[verb](_net(), x)


def test_a_model_made_in_inference_mode_is_not_changed_in_place() -> None:
    with torch.inference_mode():
        net = _net()
    with pytest.raises(ns.NormswapError, match=r"made under torch\.inference_mode"):
        ns.reestimate(net, [X])
    ns.fold(net, X).train()(X).sum().backward()


@pytest.mark.parametrize(
    "verb", ["fold", "tune", "convert", "absorb_input", "calibrate", "inspect"]
)
def test_a_model_that_only_runs_in_training_mode_is_refused(verb: str) -> None:
    class TrainingOnly(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            if not self.training:
                raise RuntimeError("there is no eval mode")
            return super().forward(input)

    model = TrainingOnly(*_net()).train()
    with pytest.raises(ns.NormswapError, match=r"training mode only \(there is no eval mode"):
        ALL[verb](model, X)
    assert model.training
