"""`rescale` brings activations into the range of float16, and changes no bit of the outputs."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import in_eval, randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.ranges import ranges_on
from normswap.graph.capture import capture

FLOAT16 = torch.finfo(torch.float16).max


class Reach(TorchDispatchMode):
    """Keeps how far the floating-point tensors reach that torch's operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        if isinstance(first, Tensor) and first.is_floating_point() and first.numel():
            self.most = max(self.most, float(first.abs().max()))
        return result


def reach(model: nn.Module, x: Tensor) -> float:
    """How far anything reaches that runs in `model`."""
    with Reach() as mode:
        in_eval(model, x)
    return mode.most


def rescaled(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, dict[str, str]]:
    """The result, the same to the bit and of the same class and keys, and what was left."""
    before = copy.deepcopy(model.state_dict())
    result = ns.rescale(model, x, [x], **options)
    assert torch.equal(in_eval(result, x), in_eval(model, x))
    assert type(result) is type(model) and result.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    plan = ns.plan_of(result)
    assert ns.Plan.from_json(plan.to_json()) == plan
    return result, {each.site: each.reason for each in plan.left}


# --- networks -------------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + scale * body(x)."""

    def __init__(self, body: nn.Module, scale: bool) -> None:
        super().__init__()
        self.body = body
        self.gamma = nn.Parameter(torch.rand(8, 1, 1)) if scale else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + (y if self.gamma is None else y * self.gamma)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Written(nn.Module):
    """RMSNorm over the channels, as arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * x).permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """A LayerNorm or RMSNorm over the channels of an image."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS: dict[str, Any] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "batch without affine": lambda: nn.BatchNorm2d(8, affine=False),
    "group": lambda: nn.GroupNorm(2, 8),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "layer": lambda: ChannelsLast(nn.LayerNorm(8)),
    "rms": lambda: ChannelsLast(nn.RMSNorm(8)),
    "written out": Written,
}
BETWEEN: dict[str, Any] = {
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "leaky": lambda: nn.LeakyReLU(0.1),
    "prelu": lambda: nn.PReLU(8),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "max pool": lambda: nn.MaxPool2d(3, 1, 1),
    "average": lambda: nn.AvgPool2d(3, 1, 1),
    "resize": lambda: nn.Upsample(scale_factor=1, mode="bilinear"),
    "dropout": lambda: nn.Dropout2d(0.3),
    "gate": Gate,
    "pad": lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3)),
    "none": nn.Identity,
}
CONVS: dict[str, Any] = {
    "same": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "grouped": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, padding=1),
    "pointwise": lambda: nn.Conv2d(8, 8, 1),
}


@st.composite
def network(draw: st.DrawFn) -> nn.Module:
    """Convolutions, normalizations and what lies between, with residual streams."""

    def block() -> nn.Module:
        layers: list[nn.Module] = [CONVS[draw(st.sampled_from(list(CONVS)))]()]
        if draw(st.booleans()):
            layers.append(NORMS[draw(st.sampled_from(list(NORMS)))]())
        layers.append(BETWEEN[draw(st.sampled_from(list(BETWEEN)))]())
        body = nn.Sequential(*layers)
        return Residual(body, draw(st.booleans())) if draw(st.booleans()) else body

    blocks = [block() for _ in range(draw(st.integers(1, 4)))]
    last = [NORMS[draw(st.sampled_from(list(NORMS)))](), nn.Flatten(), nn.Linear(8 * 16, 3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, *last)
    randomise(model)
    hot = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    with torch.no_grad():
        for each in draw(st.lists(st.sampled_from(hot), max_size=2, unique_by=id)):
            each.weight *= draw(st.sampled_from([3e3, 1e5]))
    return model.eval()


@settings(max_examples=25, deadline=None, derandomize=True, phases=[Phase.generate])
@given(model=network(), limit=st.sampled_from(["float16", "square", 100.0]))
def test_random_networks_are_the_same_to_the_bit_and_in_range_but_for_what_is_named(
    model: nn.Module, limit: Any
) -> None:
    x = torch.randn(2, 3, 4, 4)
    result, left = rescaled(model, x, limit=limit)
    assert all("reaches" in reason for reason in left.values())
    # What is left over is what the plan names, measured anew on the result.
    again = ns.plan_of(ns.rescale(result, x, [x], limit=limit))
    of_first = ns.plan_of(result)
    assert len(again.edits) == len(of_first.edits)
    assert {each.site for each in again.left} == set(left)
    if limit == "float16" and not left:
        assert reach(result, x) <= max(FLOAT16, reach_inside_norms(result, x))


def reach_inside_norms(model: nn.Module, x: Tensor) -> float:
    """The squares that arithmetic takes are no activations of their own."""
    # torch computes its RMSNorm by several operators.
    written = any(isinstance(each, (Written, nn.RMSNorm)) for each in model.modules())
    return float("inf") if written else 0.0


# --- the shapes of problem that people report -----------------------------------------------------


def test_a_convolution_before_a_group_norm_that_reaches_80000() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    x = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        model[0].weight *= 82366 / model[0](x).abs().max()
    for limit, most in (("float16", FLOAT16), ("square", FLOAT16**0.5)):
        result, left = rescaled(model, x, limit=limit)
        assert not left and result[0](x).abs().max() <= most / 2
        assert result[1].eps < model[1].eps
        half = copy.deepcopy(result).half()(x.half())
        assert half.isfinite().all()
        expected = model(x)
        assert (half.float() - expected).abs().max() <= 1e-3 * expected.abs().max() * 4
    assert not copy.deepcopy(model).half()(x.half()).isfinite().all()


class Decoder(nn.Module):
    """The published diffusion VAE's shape of problem: GroupNorm, SiLU, residuals, one channel far
    out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(4, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
                *(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1)),
            )
            for _ in range(3)
        )
        self.norm, self.end = nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for block in self.blocks:
            x = x + block(x)
        return self.end(F.silu(self.norm(x)))


def test_a_residual_stream_of_group_norms_with_one_channel_far_out() -> None:
    torch.manual_seed(0)
    model, x = Decoder().eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model.blocks[0][5].weight[3] *= 2e6
    result, left = rescaled(model, x)
    assert not left and reach(model, x) > FLOAT16 >= reach(result, x)
    half = copy.deepcopy(result).half()(x.half()).float()
    assert half.isfinite().all() and (half - model(x)).abs().max() <= 0.01 * model(x).abs().max()


def test_what_cannot_be_scaled_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)

    def left(*layers: nn.Module) -> str:
        hot = nn.Conv2d(3, 8, 1)
        with torch.no_grad():
            hot.weight *= 1e6
        _, reasons = rescaled(nn.Sequential(hot, *layers).eval(), x)
        return reasons["0"]

    assert "gelu is not f(s x) = s f(x)" in left(nn.GELU(), nn.Conv2d(8, 2, 1))
    assert "softmax" in left(nn.Softmax(1), nn.Conv2d(8, 2, 1))
    assert "the model returns it" in left(nn.ReLU())
    assert "reaches" in left(nn.Sigmoid(), nn.Conv2d(8, 2, 1))
    plain = nn.GroupNorm(2, 8, affine=False)
    assert left(nn.Tanh(), plain, nn.Conv2d(8, 2, 1))


class Shared(nn.Module):
    """One layer is called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer, self.norm = nn.Linear(3, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.layer(x).relu()
        return self.head(self.norm(self.layer(x)))


def test_a_shared_layer_has_one_factor() -> None:
    model, x = Shared().eval(), torch.randn(4, 3)
    with torch.no_grad():
        model.stem.weight *= 1e6
    result, left = rescaled(model, x)
    assert not left and reach(result, x) <= FLOAT16


class Tied(nn.Module):
    """The head has the weight of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.table(tokens)))


def test_a_tied_weight_is_used_in_two_ways() -> None:
    model, tokens = Tied().eval(), torch.randint(0, 9, (2, 5))
    with torch.no_grad():
        model.table.weight *= 1e5
    _, left = rescaled(model, tokens)
    assert any("used in two ways" in reason for reason in left.values())


class InPlace(nn.Module):
    """A value is written into, and read by its first name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gain = nn.Linear(3, 6), nn.Parameter(torch.rand(6))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x.mul_(self.gain)
        return self.head(self.norm(x))


def test_what_is_written_into_has_the_factor_of_what_is_written() -> None:
    model, x = InPlace().eval(), torch.randn(4, 3)
    with torch.no_grad():
        model.gain *= 1e6
        result = ns.rescale(model, x, [x])
        assert ns.plan_of(result).edits
        assert torch.equal(result(x), model(x))


def test_ranges_are_those_of_the_operators_on_all_batches() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    data = [torch.randn(5, 3), torch.randn(5, 3) * 9, torch.randn(5, 3)]
    seen = capture(model, data[0])
    found = ranges_on(seen, data)
    for name, layer in (("linear", model[:1]), ("relu", model[:2]), ("linear_1", model)):
        expected = max(float(layer(batch).abs().max()) for batch in data)
        assert found[0, "", name] == pytest.approx(expected)


def test_batches_of_other_sizes_and_dicts_are_measured() -> None:
    torch.manual_seed(0)

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return self.head(self.norm(self.layer(a if b is None else a + b)))

    model = Takes().eval()
    data = [{"a": torch.randn(n, 3), "b": torch.randn(n, 3) * 1e6} for n in (4, 4, 2)]
    result = ns.rescale(model, None, data)
    assert len(ns.plan_of(result).edits) == 1
    for batch in data:
        assert torch.equal(result(**batch), model(**batch))


def test_bad_arguments_are_refused_in_one_line() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)).eval(), torch.randn(2, 3)
    with pytest.raises(NormswapError, match="no limit is called 'int8'"):
        ns.rescale(model, x, [x], limit="int8")  # type: ignore[arg-type]
    with pytest.raises(NormswapError, match="a number above 0"):
        ns.rescale(model, x, [x], limit=-1.0)
    with pytest.raises(NormswapError, match="1 or more"):
        ns.rescale(model, x, [x], margin=0.5)
    with pytest.raises(NormswapError, match="no batch"):
        ns.rescale(model, x, [])
    with pytest.raises(NormswapError, match="does not run"):
        ns.rescale(model, x, [torch.randn(2, 4)])
