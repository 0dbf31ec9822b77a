"""A BatchNorm folds into its own copy of a cheap producer that others use as well."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch_norms, error, in_eval, randomise
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normswap as ns
from normswap.graph.forward import forward_graph
from normswap.passes import Fold
from normswap.passes.plan import Plan


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


IDS = torch.randint(0, 10, (6,))
IMAGE = torch.randn(2, 4, 5, 5, dtype=torch.float64)


class Looked(nn.Module):
    """An embedding that is normalized, and also used as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, **options)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return F.gelu(self.norm(self.drop(h))) + torch.sigmoid(h)


class Shared(nn.Module):
    """A layer whose output is normalized, and also used as it is."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm or nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return F.gelu(self.norm(h)) + torch.sigmoid(h)


class Cast(Shared):
    """The same, with a cast between the two that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return F.gelu(self.norm(h.type_as(x))) + torch.sigmoid(h)


class Function(Shared):
    """The same, with a BatchNorm that is called as a function."""

    def __init__(self) -> None:
        super().__init__(per_channel())

    def forward(self, x: Tensor) -> Tensor:
        h, norm = self.layer(x), self.norm
        y = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return F.gelu(y) + torch.sigmoid(h)


def per_channel(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1, groups=4, **options)


def made(model: nn.Module) -> nn.Module:
    return randomise(model.double())


def decide(model: nn.Module, inputs: Any, **options: Any) -> Plan:
    return ns.plan(model, Fold(duplicate=True, **options), inputs=inputs)


def assert_copied(model: nn.Module, inputs: Any, *, left: int = 0) -> nn.Module:
    made(model)
    plan = decide(model, inputs)
    folded = plan.apply(model)
    assert len(batch_norms(folded)) == left, plan
    assert any(edit.edit == "duplicate" for edit in plan.edits)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    assert error(in_eval(folded, *arguments), in_eval(model, *arguments)) <= 1e-13
    return folded


def reason_left(model: nn.Module, inputs: Any) -> str:
    """Why the one BatchNorm of `model` stays, which the folded model shows to be exact."""
    made(model)
    plan = decide(model, inputs)
    (edit,) = [edit for edit in plan.edits if edit.edit == "reduce" and edit.to == "affine"]
    assert not any(edit.edit == "duplicate" for edit in plan.edits)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    assert error(in_eval(plan.apply(model), *arguments), in_eval(model, *arguments)) <= 1e-13
    return edit.reason.partition("; no copy: ")[2]


# --- what is copied -------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "embedding": (Looked, IDS),
    "embedding with padding": (lambda: Looked(padding_idx=0), IDS),
    "conv": (lambda: Shared(per_channel()), IMAGE),
    "conv without bias": (lambda: Shared(per_channel(bias=False)), IMAGE),
    "conv with a stride": (lambda: Shared(per_channel(stride=2)), IMAGE),
    "wider conv": (lambda: Shared(nn.Conv2d(4, 8, 1, groups=4), nn.BatchNorm2d(8)), IMAGE),
    "transposed": (
        lambda: Shared(nn.ConvTranspose2d(4, 8, 2, 2, groups=4), nn.BatchNorm2d(8)),
        IMAGE,
    ),
    "linear of one feature": (
        lambda: Shared(nn.Linear(1, 4), nn.BatchNorm1d(4)),
        torch.randn(6, 1, dtype=torch.float64),
    ),
    "cast": (lambda: Cast(per_channel()), IMAGE),
    "activation inside": (lambda: Shared(per_channel(), BatchNormAct2d(4)), IMAGE),
    "graph module": (lambda: fx.symbolic_trace(Shared(per_channel())), IMAGE),
    "inside another": (lambda: nn.Sequential(nn.GELU(), Shared(per_channel())), IMAGE),
}


@pytest.mark.parametrize("name", CASES)
def test_cheap_producer_is_copied_and_the_function_stays(name: str) -> None:
    build, inputs = CASES[name]
    assert_copied(build(), inputs)


def test_a_norm_that_is_called_as_a_function_has_a_copy_too() -> None:
    folded = assert_copied(Function(), IMAGE, left=1)  # the module that nobody calls
    assert isinstance(folded.batch_norm, nn.Conv2d)


@pytest.mark.parametrize("name", ["embedding", "conv"])
def test_nothing_is_copied_unless_it_is_allowed(name: str) -> None:
    build, inputs = CASES[name]
    model = made(build())
    folded = ns.fold(model, inputs)
    assert len(batch_norms(folded)) == 1
    assert batch_norms(ns.fold(model, inputs, duplicate=True)) == []


def test_the_original_and_its_gradients_stay_apart_from_the_copy() -> None:
    model = made(Looked())
    model.table.weight.requires_grad_(False)
    folded = ns.fold(model, IDS, duplicate=True)
    assert torch.equal(folded.table.weight, model.table.weight)
    assert not folded.norm.weight.requires_grad
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    expected = (model.table.weight - model.norm.running_mean) * scale + model.norm.bias
    torch.testing.assert_close(folded.norm.weight, expected.detach(), rtol=1e-13, atol=1e-13)


def test_flags_precision_and_layout_are_those_of_the_original() -> None:
    model = randomise(Shared(per_channel(bias=False)).to(memory_format=torch.channels_last))
    folded = decide(model.train(), IMAGE.float()).apply(model)
    conv = folded.norm
    assert isinstance(conv, nn.Conv2d) and conv.training and conv.weight.dtype == torch.float32
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert conv.bias is not None and conv.bias.requires_grad
    assert folded.layer.bias is None
    assert error(in_eval(folded, IMAGE.float()), in_eval(model, IMAGE.float())) <= 1e-6


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    dims=st.integers(1, 3),
    channels=st.integers(1, 4),
    kernel=st.integers(1, 2),
    groups=st.sampled_from(["one", "each"]),
    transposed=st.booleans(),
)
def test_a_copy_is_made_exactly_where_it_takes_no_more_than_the_affine(
    dims: int, channels: int, kernel: int, groups: str, transposed: bool
) -> None:
    kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kinds = kinds if transposed else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](2 * channels)
    count = channels if groups == "each" else 1
    stride = kernel if transposed else 1
    layer = kinds[dims - 1](channels, 2 * channels, kernel, stride, groups=count)
    model = made(Shared(layer, norm))
    x = torch.randn(2, channels, *[3] * dims, dtype=torch.float64)
    # How many products each number of the output is a sum of, from the definition of the operator.
    products = channels // count * (1 if transposed else kernel**dims)
    plan = decide(model, x)
    assert any(edit.edit == "duplicate" for edit in plan.edits) == (products <= 1)
    assert error(in_eval(plan.apply(model), x), in_eval(model, x)) <= 1e-13


def test_the_plan_says_what_is_copied_and_both_counts() -> None:
    (edit,) = decide(made(Shared(per_channel())), IMAGE).edits
    assert edit.reason == "a copy of layer takes 200 multiply-adds, its affine 200"
    assert str(edit) == "its own copy of layer"
    (edit,) = decide(made(Looked()), IDS).edits
    assert edit.reason == "a copy of table takes 0 multiply-adds, its affine 24"


# --- the forward ----------------------------------------------------------------------------------


def test_the_call_takes_the_inputs_of_the_producer_and_what_is_unused_goes() -> None:
    folded = assert_copied(Looked(), IDS)
    calls = [
        (str(n.target), [str(source) for source in n.all_input_nodes])
        for n in forward_graph(folded).nodes
        if n.op == "call_module"
    ]
    assert calls == [("table", ["ids"]), ("norm", ["ids"])]
    assert isinstance(folded.norm, nn.Embedding) and isinstance(folded, Looked)
    assert folded.state_dict().keys() == {"table.weight", "norm.weight"}


class Twice(nn.Module):
    """Two BatchNorms of one value, which nothing else uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = per_channel()
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return torch.sigmoid(self.first(h)) + torch.tanh(self.second(h))


def test_of_several_norms_all_but_one_have_a_copy() -> None:
    model = made(Twice())
    assert batch_norms(ns.fold(model, IMAGE)) == ["second"]
    folded = assert_copied(model, IMAGE)
    layers = [path for path, each in folded.named_modules() if isinstance(each, nn.Conv2d)]
    assert layers == ["layer", "second"] and isinstance(folded.first, nn.Identity)


class Several(nn.Module):
    """Two embeddings of which each is normalized behind a dropout: a forward rewritten twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(10, 4), nn.Embedding(10, 4)
        self.drop = nn.Dropout()
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, ids: Tensor) -> Tensor:
        a, b = self.first(ids), self.second(ids)
        x = torch.sigmoid(self.norm(self.drop(a))) * a.tanh()
        return x + torch.sigmoid(self.other(self.drop(b))) * b.tanh()


def test_one_forward_is_rewritten_for_several_norms() -> None:
    folded = assert_copied(Several(), IDS)
    assert "drop" not in [node.target for node in forward_graph(folded).nodes]


class Ends(nn.Module):
    """One BatchNorm after two calls of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 4), nn.BatchNorm1d(4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.table(left), self.table(right)
        return torch.sigmoid(self.norm(a) * a) + torch.tanh(self.norm(b) * b)


def test_every_call_takes_the_inputs_of_its_own_producer() -> None:
    folded = assert_copied(Ends(), (IDS, IDS.flip(0)))
    taken = [str(node.args[0]) for node in forward_graph(folded).nodes if node.target == "norm"]
    assert taken == ["left", "right"]


def test_a_block_that_is_called_twice_is_rewritten_once() -> None:
    block = Shared(per_channel())
    assert_copied(nn.Sequential(block, nn.GELU(), block), IMAGE)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.looked, self.shared = Looked(), Shared(per_channel(bias=False))

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.looked(ids).sum() * self.shared(image)


def test_saved_loaded_and_replayed_on_other_weights_it_is_the_same_copy(tmp_path: Path) -> None:
    model, other, inputs = made(Both()), randomise(Both().double(), seed=1), (IDS, IMAGE)
    plan = decide(model, inputs)
    assert Plan.from_json(plan.to_json()) == plan
    folded = plan.apply(model)
    assert batch_norms(folded) == []
    replayed = Plan.from_json(plan.to_json()).apply(other)
    assert error(in_eval(replayed, *inputs), in_eval(other, *inputs)) <= 1e-13
    ns.save(folded, tmp_path / "folded")
    loaded = ns.load(tmp_path / "folded", source=lambda: Both().double())
    assert torch.equal(in_eval(loaded, *inputs), in_eval(folded, *inputs))


# --- what is left ---------------------------------------------------------------------------------


class Outside(nn.Module):
    """The layer is called in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Sequential(per_channel()), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return torch.tanh(self.norm(h)) + torch.sigmoid(h)


class Overwritten(nn.Module):
    """The input of the layer, or its output, is written into before it is normalized."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.norm, self.what = per_channel(), nn.BatchNorm2d(4), what

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x)
        h = self.layer(x)
        (x if self.what == "input" else h).mul_(2)
        return torch.tanh(self.norm(h)) + torch.sigmoid(h) + x


class Axis(nn.Module):
    """The positions of a sequence are normalized, not the columns of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(6, 4), nn.BatchNorm1d(6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return torch.tanh(self.norm(h)) + torch.sigmoid(h)


LEFT: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "ordinary conv": (
        lambda: Shared(nn.Conv2d(4, 4, 1)),
        IMAGE,
        "a copy of layer takes 800 multiply-adds, its affine 200",
    ),
    "depthwise conv": (
        lambda: Shared(nn.Conv2d(4, 4, 3, padding=1, groups=4)),
        IMAGE,
        "a copy of layer takes 1800 multiply-adds, its affine 200",
    ),
    "another forward": (
        Outside,
        IMAGE,
        "what computes its input is not called in the model, as it is",
    ),
    "operator": (lambda: Shared(nn.Tanh()), IMAGE, "its input comes from layer (tanh)"),
    "written input": (
        lambda: Overwritten("input"),
        IMAGE,
        "what computes its input is written into before it",
    ),
    "written output": (
        lambda: Overwritten("output"),
        IMAGE,
        "its input comes from mul_",
    ),
    "padded conv": (
        lambda: Shared(per_channel(padding=1, padding_mode="circular")),
        IMAGE,
        "layer does more than the operator that is copied",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_may_not_be_copied_is_left_with_the_reason(name: str) -> None:
    build, inputs, why = LEFT[name]
    assert reason_left(build(), inputs) == why


def test_another_axis_than_the_columns_of_a_table_is_left() -> None:
    ids = torch.randint(0, 6, (3, 6))
    assert reason_left(Axis(), ids) == "normalizes another axis than the rows of table"


def test_a_weight_that_is_no_parameter_is_left() -> None:
    layer = per_channel()
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", weight)
    why = "layer does more than the operator that is copied"
    assert reason_left(Shared(layer), IMAGE) == why


def test_statistics_that_cannot_be_used_are_refused() -> None:
    model = made(Shared(per_channel()))
    model.norm.running_mean[0] = torch.nan
    with pytest.raises(ns.NormswapError, match="NaN"):
        decide(model, IMAGE)


@pytest.mark.parametrize("path", ["table", "norm", "drop"])
def test_a_hook_sees_what_it_saw(path: str) -> None:
    model = Looked()
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    assert reason_left(model, IDS) == f"{path} has a hook"


def test_without_inputs_nothing_is_copied() -> None:
    plan = decide(made(Shared(per_channel())), None)
    assert not any(edit.edit == "duplicate" for edit in plan.edits)


def test_a_plan_for_another_model_leaves_that_as_it_is() -> None:
    plan, other = decide(made(Looked()), IDS), made(Shared(per_channel()))
    before = in_eval(other, IMAGE)
    with pytest.raises(ns.NormswapError):
        plan.apply(other, inplace=True)
    assert torch.equal(in_eval(other, IMAGE), before)


# --- one layer, one BatchNorm per call ---------------------------------------------------------


class Levels(nn.Module):
    """The head of a detector: a convolution for all levels, a BatchNorm for each."""

    def __init__(self, channels: int = 4, levels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(channels) for _ in range(levels)])

    def forward(self, x: Tensor) -> Tensor:
        sizes = [F.avg_pool2d(x, k + 1) for k in range(len(self.norms))]
        return self.head(sizes)

    def head(self, sizes: list[Tensor]) -> Tensor:
        values = [norm(self.conv(x)) for norm, x in zip(self.norms, sizes, strict=True)]
        return torch.stack([F.silu(value).mean((2, 3)) for value in values])


class List(nn.Module):
    """The same, in a module that takes a list: its forward cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head([F.avg_pool2d(x, k + 1) for k in range(3)])


class _Head(Levels):
    def forward(self, sizes: list[Tensor]) -> Tensor:  # type: ignore[override]
        return self.head(list(sizes))


class Step(nn.Module):
    """A block of TabNet: a layer that other blocks hold as well, a BatchNorm of its own."""

    def __init__(self, layer: nn.Module, chunks: int) -> None:
        super().__init__()
        self.layer, self.norm, self.chunks = layer, nn.BatchNorm1d(8), chunks

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        values = self.layer(x).chunk(self.chunks)
        value = torch.cat([self.norm(each) for each in values])
        return (x + value[:, :4] * torch.sigmoid(value[:, 4:])) * scale


def steps(chunks: int) -> nn.Module:
    layer = nn.Linear(4, 8, bias=False)
    return nn.Sequential(*[Step(layer, chunks) for _ in range(3)])


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Levels(), normal(2, 4, 12, 12)),
        (Levels(channels=6), normal(2, 4, 12, 12)),
        (List(), normal(2, 4, 12, 12)),
        (steps(chunks=1), normal(6, 4)),
        (steps(chunks=3), normal(6, 4)),
    ],
)
def test_each_call_of_a_shared_layer_gets_a_copy(model: nn.Module, x: Tensor) -> None:
    randomise(model.double())
    assert len(batch_norms(ns.fold(model, x))) == 3
    folded = ns.fold(model, x, duplicate=True)
    assert not batch_norms(folded)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    again = Plan.from_json(ns.plan(model, Fold(duplicate=True), inputs=x).to_json()).apply(model)
    assert torch.equal(in_eval(again, x), in_eval(folded, x))
    # Nothing is computed twice: as many convolutions and products as before.
    assert _products(folded, x) == _products(model, x)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in str(func) or str(func) in (
            "aten.mm.default",
            "aten.addmm.default",
        )
        return func(*args, **(kwargs or {}))


def _products(model: nn.Module, x: Tensor) -> int:
    with _Count() as counted:
        in_eval(model, x)
    return counted.count


class AlsoPlain(Levels):
    """One call of the layer is for no BatchNorm."""

    def head(self, sizes: list[Tensor]) -> Tensor:
        return super().head(sizes) + self.conv(sizes[0]).mean((2, 3))


class PlainStep(Step):
    """The layer is called for something else as well."""

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        return super().forward(x, scale) + self.layer(x)[:, :4]


def test_a_call_that_no_batch_norm_takes_keeps_the_layer() -> None:
    model, x = randomise(AlsoPlain().double()), normal(2, 4, 12, 12)
    folded = ns.fold(model, x, duplicate=True)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    assert isinstance(folded.conv, nn.Conv2d)
    layer = nn.Linear(4, 8)
    steps = randomise(nn.Sequential(PlainStep(layer, 1), PlainStep(layer, 1)).double())
    x = normal(6, 4)
    assert len(batch_norms(ns.fold(steps, x, duplicate=True))) == 2
    assert error(in_eval(ns.fold(steps, x, duplicate=True), x), in_eval(steps, x)) <= 1e-12
