"""A module's forward can be read as a graph and given back, and all else of it stays."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize

import normswap as ns
from normswap.core.errors import Unsupported
from normswap.graph.capture import capture
from normswap.graph.copies import copied
from normswap.graph.forward import forward_graph
from normswap.graph.snapshot import all_or_nothing
from normswap.passes.edits import GiveBias
from normswap.passes.edits.traced_forward import rewriting_at_the_end, set_forward
from normswap.passes.forwards import Forwards
from normswap.passes.recipe import recipe_of, set_source

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Gated(nn.Module):
    """Children, a parameter and a buffer of its own, and a flag that its forward asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1)])
        self.gain = nn.Parameter(torch.rand(3, 1, 1))
        self.register_buffer("shift", torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        x = F.dropout(x * self.gain + self.shift, 0.5, self.training)
        return x.reshape(x.shape[0], -1)

    def method(self) -> int:
        return len(self.convs)


def plain() -> nn.Module:
    return Gated().eval()


def parametrized() -> nn.Module:
    model = Gated().eval()
    parametrizations.weight_norm(model, "gain")
    return model


def symbolic() -> nn.Module:
    return fx.symbolic_trace(Gated().eval())


def exported() -> nn.Module:
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(Gated().eval(), (X,), dynamic_shapes={"x": {0: batch}})
    return program.module()


KINDS = [plain, parametrized, symbolic, exported]


def _without_relu(module: nn.Module) -> fx.Graph:
    graph = forward_graph(module)
    for node in list(graph.nodes):
        if "relu" in node.name:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return graph


def _reference(module: nn.Module, x: Tensor, relu: bool) -> Tensor:
    """What `Gated` computes, from its state dict alone."""
    model = Gated().eval()
    state = {name: t for name, t in module.state_dict().items() if "parametrizations" not in name}
    model.load_state_dict({"gain": module.gain.detach(), **state})
    for conv in model.convs:
        x = conv(x).relu() if relu else conv(x)
    return (x * model.gain + model.shift).flatten(1)


@pytest.mark.parametrize("make", KINDS)
def test_a_graph_given_back_unchanged_computes_the_same(make: Callable[[], nn.Module]) -> None:
    model = make()
    expected = model(X)
    for _ in range(2):  # what was rewritten can be rewritten again
        set_forward(model, forward_graph(model))
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("make", KINDS)
def test_a_changed_graph_is_what_the_module_computes(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert torch.equal(model(X), _reference(model, X, relu=True))
    set_forward(model, _without_relu(model))
    for batch in (X, torch.cat([X, X, X])):
        assert error(model(batch), _reference(model, batch, relu=False)) < 1e-6


@pytest.mark.parametrize("make", KINDS)
def test_all_but_the_forward_stays(make: Callable[[], nn.Module]) -> None:
    model = make()
    keys, cls, name = list(model.state_dict()), type(model).__mro__[1], type(model).__name__
    parameters = [(id(p), p.requires_grad) for p in model.parameters()]
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append("hook"))
    model.note = "kept"
    set_forward(model, _without_relu(model))
    model(X)
    handle.remove()
    model(X)
    assert calls == ["hook"]
    assert model.note == "kept"
    assert isinstance(model, cls) and type(model).__name__ == name
    assert list(model.state_dict()) == keys
    assert [(id(p), p.requires_grad) for p in model.parameters()] == parameters
    if isinstance(model, Gated):
        assert model.method() == 2


@pytest.mark.parametrize("make", KINDS)
def test_a_copy_computes_the_same_and_is_independent(make: Callable[[], nn.Module]) -> None:
    model = make()
    relu, linear = _reference(model, X, relu=True), _reference(model, X, relu=False)
    unchanged = copied(model)
    set_forward(model, _without_relu(model))
    twin = copied(model)
    set_forward(unchanged, forward_graph(unchanged))
    assert error(twin(X), linear) < 1e-6
    with torch.no_grad():
        twin.shift += 1
    assert error(model(X), linear) < 1e-6
    assert error(unchanged(X), relu) < 1e-6


@pytest.mark.parametrize("make", [plain, symbolic])
def test_it_can_be_pickled(make: Callable[[], nn.Module]) -> None:
    model = make()
    set_forward(model, _without_relu(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(X), model(X))
    assert isinstance(again, fx.GraphModule if make is symbolic else Gated)


@pytest.mark.parametrize("strict", [True, False])
def test_it_can_be_exported(strict: bool) -> None:
    model = plain()
    set_forward(model, _without_relu(model))
    program = torch.export.export(model, (X,), strict=strict)
    assert error(program.module()(X), model(X)) < 1e-6


@pytest.mark.parametrize("make", KINDS)
def test_what_fails_half_way_is_undone(make: Callable[[], nn.Module]) -> None:
    model = make()
    cls, expected = type(model), model(X)
    with pytest.raises(KeyboardInterrupt), all_or_nothing(model):
        set_forward(model, _without_relu(model))
        set_forward(model, forward_graph(model))
        assert not torch.equal(model(X), expected)
        raise KeyboardInterrupt
    assert type(model) is cls
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("rewrite_first", [True, False])
def test_parametrizations_come_and_go_on_top(rewrite_first: bool) -> None:
    model = plain()
    expected = _reference(model, X, relu=False)
    if rewrite_first:
        set_forward(model, _without_relu(model))
    parametrizations.weight_norm(model, "gain")
    if not rewrite_first:
        set_forward(model, _without_relu(model))
    assert error(model(X), expected) < 1e-6
    parametrize.remove_parametrizations(model, "gain")
    assert error(model(X), expected) < 1e-6


@pytest.mark.parametrize("make", [symbolic, exported])
def test_the_graph_of_a_graph_module_keeps_its_names_and_is_a_copy(
    make: Callable[[], fx.GraphModule],
) -> None:
    model = make()
    names = [node.name for node in model.graph.nodes]
    graph = forward_graph(model)
    assert [node.name for node in graph.nodes] == names
    graph.erase_node(next(iter(reversed(graph.nodes))))
    assert [node.name for node in model.graph.nodes] == names


def test_a_forward_is_read_in_the_mode_asked_for() -> None:
    def training(graph: fx.Graph) -> Any:
        (dropout,) = (node for node in graph.nodes if node.target is F.dropout)
        return dropout.kwargs["training"]

    model = Gated().train()
    assert training(forward_graph(model)) is False
    assert training(forward_graph(model, training=True)) is True
    assert model.training


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x if mask is None else x * mask


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Counting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape
        return x


class Recording(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x)
        return x


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(1)


def _replaced() -> nn.Module:
    model = nn.Linear(2, 2)
    model.forward = lambda x: x
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Optional, "optional argument, mask"),
        (Branching, "cannot be traced"),
        (Counting, "sets attributes"),
        (Recording, "sets attributes"),
        (Noisy, "makes constants"),
        (_replaced, "replaced on the instance"),
    ],
)
def test_a_forward_that_no_graph_can_say_is_refused(
    make: Callable[[], nn.Module], words: str
) -> None:
    model = make()
    before, rng = dict(vars(model)), torch.get_rng_state()
    with pytest.raises(Unsupported, match=words) as raised:
        forward_graph(model)
    assert "\n" not in str(raised.value)
    assert vars(model) == before
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("nested", [True, False])
def test_a_copy_of_a_graph_module_keeps_hooks_attributes_and_recipe(nested: bool) -> None:
    inner = symbolic()
    calls = []
    inner.register_forward_pre_hook(lambda *_: calls.append("pre"))
    inner.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True)
    inner.note = [1, 2]
    model = nn.Sequential(inner) if nested else inner
    set_source(model, "somewhere:else")
    twin = copied(model)
    assert torch.equal(twin(X), model(X))
    assert calls == ["pre", "post"] * 2
    assert recipe_of(twin) == recipe_of(model)
    note = (twin[0] if nested else twin).note
    assert note == inner.note and note is not inner.note


OPERATORS: dict[str, tuple[Callable[..., Tensor], int, tuple[int, ...]]] = {
    "linear": (F.linear, 0, (4, 3)),
    "conv1d": (F.conv1d, 1, (4, 3, 2)),
    "conv2d": (F.conv2d, 2, (4, 3, 2, 2)),
    "conv3d": (F.conv3d, 3, (4, 3, 1, 2, 2)),
    "conv_transpose1d": (F.conv_transpose1d, 1, (3, 4, 2)),
    "conv_transpose2d": (F.conv_transpose2d, 2, (3, 4, 2, 2)),
    "conv_transpose3d": (F.conv_transpose3d, 3, (3, 4, 1, 2, 2)),
}


class Holder(nn.Module):
    """An operator called as a function, twice, on a weight that a child holds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.operator, self.spatial, shape = OPERATORS[name]
        self.part = nn.Module()
        self.part.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.part.weight) + 2 * self.operator(x * x, self.part.weight)


@settings(deadline=None, max_examples=11, derandomize=True)
@given(st.sampled_from(list(OPERATORS)), st.sampled_from(["traced", "exported", "decomposed"]))
def test_an_operator_called_as_a_function_is_given_a_bias(name: str, how: str) -> None:
    torch.manual_seed(0)
    holder = Holder(name)
    x = torch.randn(2, 3, *[5] * holder.spatial, dtype=torch.float64)
    model: nn.Module = holder
    if how != "traced":
        program = torch.export.export(holder, (x,))
        model = (program.run_decompositions() if how == "decomposed" else program).module()
    before = model(x)
    seen = capture(model, x)
    forwards = Forwards(seen, x)
    operators = [
        node
        for node in seen.regions[0].graph.nodes
        if node.op == "call_function" and any(word in node.name for word in ("conv", "linear"))
    ]
    if not operators:  # a Linear without a bias is decomposed to a matrix product
        assert (name, how) == ("linear", "decomposed")
        return
    places = [forwards.call(seen.regions[0], node) for node in operators]
    assert [path for path, _ in places] == ["", ""]
    edit = GiveBias(
        site="norm",
        path="",
        reason="",
        nodes=tuple(call.name for _, call in places),
        owner="part",
        channels=4,
    )
    edit.apply(model)
    assert torch.equal(model(x), before)
    bias = model.get_parameter("part.bias")
    assert not bias.requires_grad and bias.dtype == torch.float64
    with torch.no_grad():
        bias += torch.arange(4)
        axis = (1, 4, *[1] * holder.spatial)
        assert error(model(x), before + 3 * torch.arange(4).view(axis)) < 1e-14
    with pytest.raises(ns.NormswapError, match="plan it anew"):  # it has one by now
        edit.apply(model)


def test_a_call_that_the_forward_does_not_show_is_not_guessed() -> None:
    class Hidden(nn.Module):
        """Computes with a child's weight in a loop that a trace unrolls for another number."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor, times: Tensor | None) -> Tensor:
            y = F.linear(x, self.weight)
            return y if times is None else F.linear(y, self.weight)

    inputs = (torch.randn(2, 3), None)
    model = Hidden()
    seen = capture(model, inputs)
    (region,) = seen.regions
    (linear,) = (n for n in region.graph.nodes if n.target is torch.ops.aten.linear.default)
    with pytest.raises(Unsupported, match="does more than a trace shows"):
        Forwards(seen, inputs).call(region, linear)
    assert type(model) is Hidden


def test_deepcopy_is_as_good_for_modules_that_are_not_graph_modules() -> None:
    model = plain()
    set_forward(model, _without_relu(model))
    assert torch.equal(copy.deepcopy(model)(X), model(X))


@pytest.mark.parametrize("make", KINDS)
def test_many_changes_are_written_once_and_none_if_one_fails(
    make: Callable[[], nn.Module],
) -> None:
    model = make()
    expected = _reference(model, X, relu=False)
    before, cls = model(X), type(model)
    with pytest.raises(KeyboardInterrupt), rewriting_at_the_end():
        set_forward(model, _without_relu(model))
        raise KeyboardInterrupt
    assert type(model) is cls and torch.equal(model(X), before)
    with rewriting_at_the_end():
        set_forward(model, _without_relu(model))
        assert type(model) is cls
        graph = forward_graph(model)
        assert not any("relu" in node.name for node in graph.nodes)
        set_forward(model, graph)
    assert error(model(X), expected) < 1e-6
    assert type(model) is not cls
