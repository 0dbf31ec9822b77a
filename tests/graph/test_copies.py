"""A copy is the model: what it refers to is its own."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import normswap as ns
from normswap.graph.copies import copied

X = torch.randn(3, 4)


class Calling(nn.Module):
    """A forward that calls `self.function`, which uses `self.linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.function = lambda x: self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.function(x))


def _with(function: Callable[[Calling], object]) -> Calling:
    model = Calling()
    function(model)
    return model


def _replaced_forward(model: Calling) -> None:
    original = model.forward

    @functools.wraps(original)
    def forward(x: Tensor) -> Tensor:
        return original(x) * 2

    model.forward = forward


def _default(model: Calling) -> None:
    model.function = lambda x, of=model: of.linear(x)


def _keyword(model: Calling) -> None:
    def function(x: Tensor, *, of: nn.Module = model) -> Tensor:
        return of.linear(x)

    model.function = function


def _in_a_list(model: Calling) -> None:
    layers = [model.linear]
    model.function = lambda x: layers[0](x)


def _of_a_weight(model: Calling) -> None:
    weight = model.linear.weight
    model.function = lambda x: x @ weight.t()


def _partial(model: Calling) -> None:
    model.function = functools.partial(lambda of, x: of.linear(x), model)


def _method(model: Calling) -> None:
    model.function = model.linear.forward


def _recursive(model: Calling) -> None:
    def function(x: Tensor, times: int = 1) -> Tensor:
        return function(x, times - 1) if times else model.linear(x)

    model.function = function


def _nested(model: Calling) -> None:
    inner = model.function
    model.functions = [lambda x: inner(x)]
    model.function = lambda x: model.functions[0](x)


def _hook(model: Calling) -> None:
    model.bn.register_forward_hook(lambda _, args, y: y @ model.linear.weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: None,
        _replaced_forward,
        _default,
        _keyword,
        _in_a_list,
        _of_a_weight,
        _partial,
        _method,
        _recursive,
        _nested,
        _hook,
    ],
)
def test_a_function_of_a_copy_uses_the_copy(change: Callable[[Calling], object]) -> None:
    model = _with(change).eval()
    expected = model(X)
    twin = copied(model)
    assert torch.equal(twin(X), expected)
    with torch.no_grad():
        twin.linear.weight.add_(1)
    assert not torch.equal(twin(X), expected)
    assert torch.equal(model(X), expected)


def test_a_function_that_has_nothing_of_the_model_stays_the_same() -> None:
    model = Calling()
    model.function = torch.relu
    model.other = other = lambda x: x
    twin = copied(model)
    assert twin.function is torch.relu and twin.other is other


def test_a_folded_model_with_a_lambda_of_its_own_is_the_folded_one() -> None:
    model = Calling().double().eval()
    model.bn.running_mean.normal_()
    x = X.double()
    result = ns.fold(model, x)
    torch.testing.assert_close(result(x), model(x), rtol=1e-10, atol=1e-12)
    del result.linear
    with pytest.raises(AttributeError):
        result(x)


def test_a_function_that_names_the_model_as_a_global_variable_is_refused() -> None:
    names: dict[str, object] = {"model": Calling()}
    exec("model.function = lambda x: model.linear(x)", names)
    with pytest.raises(ns.NormswapError, match=r"by the global variable 'model'.*inplace=True"):
        ns.freeze(names["model"])
    assert ns.freeze(names["model"], inplace=True) is names["model"]


def test_hooks_on_parameters_come_through() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain = ns.convert(model, "layer_norm", inputs=X)
    seen: list[Tensor] = []
    model[0].weight.register_hook(lambda grad: grad * 3)
    model[0].weight.register_post_accumulate_grad_hook(seen.append)
    twin = ns.convert(model, "layer_norm", inputs=X)
    for each in (twin, plain):
        each(X)[:, 0].square().sum().backward()
    torch.testing.assert_close(twin[0].weight.grad, 3 * plain[0].weight.grad)
    assert len(seen) == 1 and seen[0] is twin[0].weight


def test_a_hook_on_a_parameter_uses_the_copy() -> None:
    model = nn.Linear(4, 4)
    model.norms = norms = []
    model.weight.register_hook(lambda grad: norms.append(grad.norm()))
    twin = copied(model)
    twin(X).sum().backward()
    assert len(twin.norms) == 1 and not model.norms


def test_a_symbolically_traced_model_keeps_class_name_and_the_modes_inside() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x).relu()

    traced = fx.symbolic_trace(Net().eval())
    traced.block.train(False)
    twin = copied(traced)
    assert type(twin).__name__ == "Net"
    for path, module in traced.named_modules():
        assert twin.get_submodule(path).training is module.training, path
