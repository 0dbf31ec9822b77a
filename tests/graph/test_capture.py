"""Capture sees as much as it can, and leaves the model as it was."""

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, Detector, Residual, randomise
from torch import Tensor, nn

from normswap.graph.capture import capture
from normswap.graph.snapshot import all_or_nothing, untouched


class Busy(nn.Module):
    """A forward that leaves marks wherever it can, and then does what it is told to."""

    def __init__(self, then: str) -> None:
        super().__init__()
        self.block = ConvBN()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1))
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.last = self.count * 2
        self.seen = x
        random.random()
        np.random.rand()
        x = self.block(x + torch.rand(1))
        if self.then == "fail":
            raise RuntimeError("on purpose")
        if self.then == "branch" and x.mean().item() > 0:
            x = x + 1
        return x


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        path: (type(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for path, module in model.named_modules()
    }


@pytest.mark.parametrize("then", ["return", "branch", "fail"])
@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
def test_looking_changes_nothing(then: str, given: bool) -> None:
    model = randomise(Busy(then)).train()
    model.block.bn.eval()  # flags that are not all the same
    model.block.conv.register_forward_hook(lambda *_: None)
    parameters = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    state, tensors = _state(model), copy.deepcopy(model.state_dict())
    buffers = {name: id(b) for name, b in model.named_buffers()}
    rng, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    capture(model, torch.randn(2, 4, 6, 6, generator=torch.Generator()) if given else None)
    assert torch.equal(torch.get_rng_state(), rng)
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert _state(model) == state
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == parameters
    assert {name: id(b) for name, b in model.named_buffers()} == buffers
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_inputs_that_the_model_changes_in_place_are_left_alone() -> None:
    class InPlace(Detector):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.add_(1))

    x = torch.zeros(1, 4, 6, 6)
    assert capture(InPlace(), x).how == "submodules"
    assert torch.equal(x, torch.zeros_like(x))


def test_whole_model_is_exported_with_every_tensor_by_its_name() -> None:
    model = Residual()
    seen = capture(model, torch.randn(2, 3, 8, 8))
    assert seen.how == "export"
    assert not seen.unseen
    (region,) = seen.regions
    assert set(region.tensors.values()) == set(model.state_dict())
    convs = [n for n in region.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert [region.module_path(n) for n in convs] == ["first.conv", "conv", "shortcut.0"]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.randn(2, 4, 6, 6),
        (torch.randn(2, 4, 6, 6), torch.ones(1)),
        {"x": torch.randn(2, 4, 6, 6), "gain": torch.ones(1)},
    ],
    ids=["tensor", "tuple", "dict"],
)
def test_inputs_are_a_tensor_a_tuple_or_a_dict(inputs: Any) -> None:
    class Scaled(ConvBN):
        def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
            return super().forward(x if gain is None else x * gain)

    assert capture(Scaled(), inputs).how == "export"


def test_submodules_are_captured_where_the_whole_cannot_be(
    capfd: pytest.CaptureFixture[str],
) -> None:
    seen = capture(Detector(), torch.randn(2, 4, 6, 6))
    assert capfd.readouterr() == ("", "")
    assert seen.how == "submodules"
    assert [region.path for region in seen.regions] == ["body", "heads.0", "heads.1"]
    assert list(seen.unseen) == [""]
    assert not seen.called_outside


def test_submodules_are_captured_with_the_inputs_they_really_received() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = ConvBN(4, 4, stride=2)
            self.head = ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            if x.sum().item() > 1e9:
                return x
            x = self.body(x)
            y = self.head(x)
            x.zero_()  # must not reach what the capture recorded
            return y[:, :, : int(y.abs().sum().item() > 0) + 1]

    seen = capture(Pyramid(), torch.randn(2, 4, 6, 6))
    shapes = {}
    for region in seen.regions:
        (node,) = (n for n in region.graph.nodes if n.target is torch.ops.aten.batch_norm.default)
        shapes[region.path] = tuple(node.args[0].meta["val"].shape)
    assert shapes == {"body": (2, 4, 3, 3), "head": (2, 4, 3, 3)}


def test_recorded_inputs_survive_operations_in_place() -> None:
    class Branching(nn.Module):
        """Takes its exportable path only for the input that it really received."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([ConvBN()])

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x) if x.sum().item() > 0 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Branching()

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.part(x)
            x.fill_(-1)
            return y

    seen = capture(Outer(), torch.ones(1, 4, 6, 6))
    assert [region.path for region in seen.regions] == ["part.inner.0"]


def test_parts_of_a_container_that_is_never_called_are_found() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(ConvBN(), ConvBN())
            self.holder = nn.Module()
            self.holder.block = ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            for stage in self.stages:
                x = stage(x)
                if x.sum().item() > 1e9:
                    return x
            return self.holder.block(x)

    seen = capture(Indexed(), torch.randn(1, 4, 6, 6))
    assert [r.path for r in seen.regions] == ["stages.0", "stages.1", "holder.block"]


def test_a_module_called_also_from_outside_is_known_whatever_its_name() -> None:
    class Shared(Detector):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.heads[1].conv  # registered before under the region's own path

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.again(x)

    class SharedFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Conv2d(4, 4, 3, padding=1)
            self.body = ConvBN()
            self.body.conv = self.again

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y + self.again(x) if y.sum().item() < 1e9 else y

    x = torch.randn(1, 4, 6, 6)
    for model in (Shared(), SharedFirst()):
        assert len(capture(model, x).called_outside) == 1


def test_without_inputs_the_model_is_traced_symbolically() -> None:
    seen = capture(Residual())
    assert seen.how == "symbolic_trace"
    assert [str(n.target) for n in seen.regions[0].graph.nodes if n.op == "call_module"][:2] == [
        "first.conv",
        "first.bn",
    ]


def test_without_inputs_and_trace_only_the_module_tree_is_known() -> None:
    seen = capture(Detector())
    assert seen.how == "module tree"
    assert seen.regions == ()
    assert "" in seen.unseen


def test_two_calls_of_one_module_are_told_apart() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    (region,) = capture(Twice(), torch.randn(1, 4, 6, 6)).regions
    calls = {
        call
        for node in region.graph.nodes
        for call, path in region.stack(node)
        if path == "block.bn"
    }
    assert len(calls) == 2


def test_tied_weights_are_captured() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)))

    (region,) = capture(Tied(), torch.randn(2, 4)).regions
    linears = [n for n in region.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert len({region.tensors[n.args[1]] for n in linears}) == 1
    assert [region.module_path(n) for n in linears] == ["a", "b"]


@pytest.mark.parametrize("nested", [True, False])
def test_operators_of_a_graph_module_run_in_it_whatever_it_was_exported_from(nested: bool) -> None:
    class Source(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    x = torch.randn(2, 3, 4, 4)
    program = torch.export.export(Source(), (x,)).module()
    calls = []
    program.register_forward_hook(lambda *_: calls.append("hook"))
    model = nn.Sequential(nn.Identity(), program) if nested else program
    cls, attributes = type(program), dict(vars(program))
    (region,) = capture(model, x).regions
    assert type(program) is cls and vars(program) == attributes
    path = "1" if nested else ""
    operators = [node for node in region.graph.nodes if node.op == "call_function"]
    assert [node.name for node in operators] == ["conv2d", "relu"]
    assert {region.module_path(node) for node in operators} == {path}
    inside = "1.block.0" if nested else "block.0"
    assert set(region.tensors.values()) == {f"{inside}.weight", f"{inside}.bias"}
    calls.clear()
    model(x)
    assert calls == ["hook"]


def test_modules_that_a_graph_module_calls_are_modules_of_the_capture() -> None:
    model = torch.fx.symbolic_trace(ConvBN())
    (region,) = capture(model, torch.randn(2, 4, 6, 6)).regions
    operators = [node for node in region.graph.nodes if node.op == "call_function"]
    assert [region.module_path(node) for node in operators] == ["conv", "bn", ""]


def test_capture_is_of_eval_mode_whatever_the_flags() -> None:
    model = nn.Sequential(ConvBN(), nn.Dropout(0.5)).train()
    (region,) = capture(model, torch.randn(2, 4, 6, 6)).regions
    (norm,) = (n for n in region.graph.nodes if n.target is torch.ops.aten.batch_norm.default)
    assert norm.args[5] is False
    assert all(module.training for module in model.modules())


def test_untouched_holds_when_the_body_raises() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = dict(model._modules)
    with pytest.raises(KeyboardInterrupt), untouched(model):
        model.eval()
        model.add_module("more", nn.ReLU())
        raise KeyboardInterrupt
    assert model.training
    assert model._modules == before


def test_all_or_nothing_keeps_what_succeeds() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with all_or_nothing(model):
        model.add_module("more", nn.ReLU())
    assert "more" in model._modules


def test_untouched_takes_hooks_off_again_and_leaves_handles_working() -> None:
    model = nn.Conv2d(3, 3, 1)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append("kept"))
    with untouched(model):
        model.register_forward_hook(lambda *_: calls.append("left behind"))
    model(torch.zeros(1, 3, 2, 2))
    assert calls == ["kept"]
    handle.remove()
    model(torch.zeros(1, 3, 2, 2))
    assert calls == ["kept"]
