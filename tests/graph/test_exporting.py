"""What torch.export hides of a model is seen all the same: slices, no_grad, autocast, objects."""

import types
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.graph.capture import capture
from normswap.passes.fold import Fold

Forward = Callable[[Any, Tensor], Any]


class Blocks(nn.Module):
    """Containers of conv, BatchNorm and one ReLU that all of them share."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        act = nn.ReLU()

        def block() -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)

        self.act, self.seq = act, nn.Sequential(*block(), *block())
        self.layers = nn.ModuleList(block() for _ in range(4))
        self.named = nn.ModuleDict({"a": block(), "b": block()})
        self.tuple, self.how = tuple(self.layers), forward

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def _each(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class _Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


SLICES: dict[str, tuple[Forward, set[str]]] = {
    "of a Sequential": (lambda m, x: m.seq[:-1](x), {"seq.1", "seq.4"}),
    "with a step": (lambda m, x: m.seq[::3](m.seq[1::3](x)), {"seq.1", "seq.4"}),
    "of a ModuleList": (lambda m, x: _each(m.layers[1:3], x), {"layers.1.1", "layers.2.1"}),
    "of a slice": (lambda m, x: _each(m.layers[1:][1:], x), {"layers.2.1", "layers.3.1"}),
    "of a slice's member": (lambda m, x: m.layers[2:][0][:2](x), {"layers.2.1"}),
    "of values": (
        lambda m, x: _each((v[:2] for v in m.named.values()), x),
        {"named.a.1", "named.b.1"},
    ),
    "made in the forward": (lambda m, x: nn.Sequential(*list(m.seq)[:-1])(x), {"seq.1", "seq.4"}),
    "of a plain tuple": (lambda m, x: _each(m.tuple[:1], x), {"layers.0.1"}),
    "joined": (
        lambda m, x: _each(m.layers[:1] + nn.ModuleList([m.seq[:2]]), x),
        {"layers.0.1", "seq.1"},
    ),
    "backwards": (lambda m, x: _each(reversed(m.layers[2:]), x), {"layers.3.1", "layers.2.1"}),
}


@pytest.mark.parametrize(("forward", "called"), SLICES.values(), ids=SLICES)
def test_members_of_a_slice_are_named_by_their_own_paths(
    forward: Forward, called: set[str]
) -> None:
    model, x = randomise(Blocks(forward)).double(), torch.randn(2, 4, 5, 5).double()
    (region,) = capture(model, x).regions
    paths = {path for node in region.graph.nodes for _, path in region.stack(node)}
    assert paths <= {path for path, _ in model.named_modules(remove_duplicate=False)}
    assert {site.name for site in ns.inspect(model, x).sites if site.calls} == called
    expected = in_eval(model, x)
    assert error(in_eval(ns.fold(model, x), x), expected) <= 1e-10
    converted = ns.convert(model, "group_norm", inputs=x, groups=2)
    assert not any(isinstance(converted.get_submodule(path), nn.BatchNorm2d) for path in called)


def test_members_of_slices_fold_and_train_in_tune_mode() -> None:
    for name in ("of a Sequential", "joined"):
        forward, called = SLICES[name]
        model, x = randomise(Blocks(forward)).double(), torch.randn(2, 4, 5, 5).double()
        # The network holds BatchNorms for other forwards.
        assert called.isdisjoint(batch_norms(ns.fold(model, x, assume_example=True)))
        tuned = ns.freeze(model, x, mode="tune", assume_example=True)
        assert all(tuned.get_submodule(path).folded for path in called)
        assert error(in_eval(tuned, x), in_eval(model, x)) <= 1e-10


def test_a_shared_module_is_the_module_itself_while_it_is_captured() -> None:
    def exact(m: Blocks, x: Tensor) -> Tensor:
        for part in m.layers[0]:
            x = part(x)
            if type(part) is nn.BatchNorm2d and part is m.tuple[0][1]:
                x = x * 2
        return x

    (region,) = capture(Blocks(exact), torch.randn(2, 4, 5, 5)).regions
    assert torch.ops.aten.mul.Tensor in {node.target for node in region.graph.nodes}


def test_a_module_that_is_not_registered_is_left_with_the_reason() -> None:
    model = Blocks(lambda m, x: m.act(m.held[1](m.held[0](x))))
    model.held = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).eval()]
    x = torch.randn(2, 4, 5, 5)
    plan = ns.plan(model, Fold(), inputs=x)
    (reason,) = (left.reason for left in plan.left if left.site == "batch_norm")
    assert "no module owns" in reason or "functional call" in reason
    assert torch.equal(in_eval(plan.apply(model), x), in_eval(model, x))


# --- torch.no_grad and autocast -------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.conv(x))
        return y


class Parts(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = Part(), Part(), Part(), forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.how(self, x)
        return y


def _one(m: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
    return m.c(m.b(x))


def _switched(m: Parts, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.training):
        x = m.a(x)
    with torch.enable_grad():
        return m.c(m.b(x))


def _autocast(m: Parts, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = m.a(x)
        with torch.autocast("cpu", enabled=False):
            x = m.b(x.to(m.b.conv.weight.dtype))
    return m.c(x)


def _nested(m: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = m.a(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = m.b(x)
        with torch.enable_grad():
            return m.c(x.to(m.b.conv.weight.dtype))


def _over_the_border(m: Parts, x: Tensor) -> Tensor:
    x = m.a.conv(x)
    with torch.no_grad():
        x = m.b.conv(m.a.bn(x))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        return m.c(m.b.bn(x))


MODES: dict[str, Forward] = {
    "one": _one,
    "whole": torch.no_grad()(lambda m, x: m.c(m.b(m.a(x)))),
    "switched": _switched,
    "autocast": _autocast,
    "nested": _nested,
    "over the border": _over_the_border,
    "inference": torch.inference_mode()(lambda m, x: m.c(m.b(m.a(x)))),
}


@pytest.mark.parametrize("forward", MODES.values(), ids=MODES)
def test_batch_norms_in_no_grad_and_autocast_fold(forward: Forward) -> None:
    model, x = randomise(Parts(forward)).double(), torch.randn(2, 4, 5, 5).double()
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10  # autocast leaves float64 alone
    assert ns.inspect(model, x).foldable == {"a.bn", "b.bn", "c.bn"}


def test_in_autocast_a_fold_is_exact_up_to_its_type() -> None:
    model, x = randomise(Parts(_autocast)), torch.randn(2, 4, 5, 5)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 2 * torch.finfo(torch.bfloat16).eps
    (region,) = capture(model, x).regions
    modes = {region.module_path(node): each for node, each in region.modes.items()}
    assert "autocast(cpu, torch.bfloat16)" in modes["a.bn"]
    assert "no autocast(cpu)" in modes["b.bn"]
    assert "c.bn" not in modes


@pytest.mark.parametrize("name", [name for name in MODES if name != "inference"])  # no gradient
def test_tune_mode_has_the_gradients_that_no_grad_lets_through(name: str) -> None:
    model, x = randomise(Parts(MODES[name])).double(), torch.randn(2, 4, 5, 5).double()
    frozen = ns.freeze(model, x)
    tuned = ns.freeze(model, x, mode="tune")
    found = []
    for each in (frozen, tuned):
        y = each.train()(x)
        if y.requires_grad:
            y.sin().sum().backward()
        gains = (each.get_submodule(f"{name}.bn").weight.grad for name in "abc")
        found.append([torch.zeros(4).double() if g is None else g for g in gains])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_site_that_no_gradient_reaches_stays_out_of_tune_mode_with_the_reason() -> None:
    plan = ns.plan(Parts(_one), ns.Freeze("tune"), inputs=torch.randn(2, 4, 5, 5))
    reasons = {edit.site: edit.reason for edit in plan.edits}
    assert "torch.no_grad" in reasons["a.bn"]


def test_what_is_written_in_place_under_no_grad_is_seen() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        x = m.a.conv(x)
        with torch.no_grad():
            x.abs_()  # torch.export drops a region that returns nothing
        y: Tensor = m.a.bn(x)
        return y

    model, x = randomise(Parts(forward)).double(), torch.randn(2, 4, 5, 5).double()
    assert error(in_eval(ns.fold(model, x), x), in_eval(model, x)) <= 1e-10


def test_a_functional_batch_norm_is_left_where_a_graph_would_drop_its_mode() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.batch_norm(m.a.conv(x), m.a.bn.running_mean, m.a.bn.running_var)

    plan = ns.plan(Parts(forward), Fold(), inputs=torch.randn(2, 4, 5, 5))
    (reason,) = (left.reason for left in plan.left if left.site == "batch_norm")
    assert "autocast" in reason


# --- outputs that are objects ---------------------------------------------------------------------


@dataclass
class Output:
    y: Tensor
    more: dict[str, Any]
    count: int = 3


class Thing:
    def __init__(self, y: Tensor) -> None:
        self.y, self.me, self.name = y, self, "thing"


class Slotted:
    __slots__ = ("y",)

    def __init__(self, y: Tensor) -> None:
        self.y = y


class MyDict(dict[str, Any]):
    pass


class MyList(list[Any]):
    pass


OBJECTS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda y: Output(y, {"twice": y * 2}),
    "object": Thing,
    "slots": Slotted,
    "dict": lambda y: MyDict(y=y),
    "list": lambda y: MyList([y]),
    "UserDict": lambda y: UserDict({"y": y}),
    "namespace": lambda y: types.SimpleNamespace(y=y),
    "distribution": lambda y: torch.distributions.Normal(y, y.exp()),
    "nested": lambda y: [Output(y, {"thing": (Thing(y), None)})],
    "with a dtype": lambda y: (y, y.dtype, y.device, y.shape),
}


class Returns(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.part, self.make = Part(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.part.bn(self.part.conv(x)))


@pytest.mark.parametrize("make", OBJECTS.values(), ids=OBJECTS)
def test_a_model_that_returns_an_object_is_captured_whole(make: Callable[[Tensor], Any]) -> None:
    model, x = randomise(Returns(make)), torch.randn(2, 4, 5, 5)
    assert capture(model, x).how == "export"
    assert batch_norms(ns.fold(model, x)) == []
    assert not model._forward_hooks


def test_an_object_returned_by_a_child_is_followed() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = Returns(OBJECTS["dataclass"]), Part()

        def forward(self, x: Tensor) -> Any:
            inner = self.inner(x)
            return Thing(self.last(inner.y + inner.more["twice"]))

    model, x = randomise(Outer()).double().eval(), torch.randn(2, 4, 5, 5).double()
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(folded(x).y, model(x).y) <= 1e-10


def _later(y: Tensor) -> Iterator[Tensor]:
    yield y


@pytest.mark.parametrize("make", [_later, lambda y: (y, lambda: y), lambda y: (y, map(abs, [y]))])
def test_what_an_output_hides_counts_as_not_seen(make: Callable[[Tensor], Any]) -> None:
    seen = capture(Returns(make), torch.randn(2, 4, 5, 5))
    assert seen.how == "submodules"
    assert "in output" in seen.unseen[""]


# --- what cannot be captured ----------------------------------------------------------------------


def test_a_site_that_could_not_be_captured_says_why() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.block(x)
            return self.block.bn(y) if y.sum().item() > -1e9 else y

    model, x = Decides(), torch.randn(1, 4, 6, 6)
    (left,) = ns.plan(model, Fold(), inputs=x).left
    assert "could not be captured: " in left.reason
    assert "data-dependent" in left.reason
    assert "data-dependent" in ns.inspect(model, x).folds["block.bn"]
