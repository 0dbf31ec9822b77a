"""`fold_gains` computes the same function, and leaves with a reason what cannot move."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.norms.sample.group import LayerNormPerPosition


def folded(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """The model after FoldAffine: the same function in float64, and in its own dtype."""
    randomise(model)
    plan = ns.plan(model, ns.FoldAffine(), inputs=inputs)
    assert ns.Plan.from_json(plan.to_json()) == plan
    result = plan.apply(model)
    assert error(in_eval(result, *inputs), in_eval(model, *inputs)) <= 1e-5
    double = [x.double() for x in inputs]
    exact = copy.deepcopy(model).double()
    assert error(in_eval(plan.apply(exact), *double), in_eval(exact, *double)) <= 1e-10
    return result


def left(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Why each site is left; the rest is exact."""
    folded(model, *inputs)
    return {x.site: x.reason for x in ns.plan(model, ns.FoldAffine(), inputs=inputs).left}


def has_gain(norm: Any) -> bool:
    """Whether its gain is not 1."""
    return norm.weight is not None and bool((norm.weight != 1).any())


def has_affine(norm: Any) -> bool:
    """Whether its gain is not 1, or its bias not 0."""
    tensors = ((norm.weight, 1.0), (getattr(norm, "bias", None), 0.0))
    return any(tensor is not None and bool((tensor != value).any()) for tensor, value in tensors)


class Consumers(nn.Module):
    """A normalization, what passes its output on, and several layers that take it."""

    def __init__(self, norm: nn.Module, passing: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.norm, self.passing, self.layers = norm, passing, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.passing(self.norm(x))
        return sum(layer(y).tanh().sum() for layer in self.layers) + self.layers[0](y)


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@st.composite
def of_tokens(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    channels = draw(st.integers(1, 6))
    norm = draw(
        st.sampled_from(
            [
                nn.LayerNorm(channels),
                nn.LayerNorm(channels, bias=False),
                nn.RMSNorm(channels),
                nn.RMSNorm(channels, eps=1e-6),
            ]
        )
    )
    passing = draw(
        st.sampled_from([nn.Identity(), nn.Dropout(0.3), nn.Flatten(0, 1), nn.Unflatten(1, (2, 3))])
    )
    layers: list[nn.Module] = [
        nn.Linear(channels, 4, bias=draw(st.booleans())) for _ in range(draw(st.integers(1, 3)))
    ]
    return Consumers(norm, passing, layers), torch.randn(2, 6, channels)


@st.composite
def of_images(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    channels = groups * draw(st.integers(1, 3))
    norm = draw(
        st.sampled_from(
            [
                nn.GroupNorm(groups, channels),
                INSTANCE[dims](channels, affine=True),
                INSTANCE[dims](channels, affine=True, track_running_stats=True),
                LayerNormPerPosition(channels),
                ns.create("rms_norm", channels),
                ns.create("rms_norm", channels, bias=True, per_position=True),
            ]
        )
    )
    outputs = groups * draw(st.integers(1, 2))
    layers: list[nn.Module] = [
        CONV[dims](channels, outputs, 2, groups=draw(st.sampled_from([1, groups])), bias=bias)
        for bias in draw(st.lists(st.booleans(), min_size=1, max_size=3))
    ]
    return Consumers(norm, nn.Dropout(0.2), layers), torch.randn(2, channels, *[4] * dims)


@settings(max_examples=13, deadline=None, derandomize=True)
@given(of_tokens() | of_images())
def test_any_norm_before_linears_or_unpadded_convs_moves(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    keys = set(model.state_dict())
    result = folded(model, x)
    assert not has_gain(result.norm)
    assert all(each.bias is not None for each in model.layers) <= (not has_affine(result.norm))
    assert type(result.norm) is type(model.norm)
    assert set(result.state_dict()) == keys


class Attention(nn.Module):
    """A pre-norm block whose query, key and value are Linears of their own, or torch's module."""

    def __init__(self, *, packed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if packed else None
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.attention is not None:
            x = x + self.attention(y, y, y, need_weights=False)[0]
        else:
            x = x + F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


@pytest.mark.parametrize("packed", [False, True])
def test_the_gains_of_a_pre_norm_transformer_move(packed: bool) -> None:
    result = folded(Attention(packed=packed), torch.randn(2, 5, 8))
    norms = {name: m for name, m in result.named_modules() if isinstance(m, nn.LayerNorm)}
    assert not any(map(has_gain, norms.values()))
    # Query, key and value have no bias where they are Linears of their own.
    assert [name for name, m in norms.items() if has_affine(m)] == ["norm1"] * (not packed)


class Conv1D(nn.Module):
    """GPT-2's Linear: x W + b with W (in, out), by addmm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], -1)


def test_the_linear_of_gpt2_absorbs() -> None:
    model = nn.Sequential(nn.LayerNorm(6), Conv1D(6, 9))
    assert not has_affine(folded(model, torch.randn(2, 3, 6))[0])


def test_gains_of_timm_move() -> None:
    vit = timm.create_model("test_vit", img_size=64, num_classes=3).eval()
    result = folded(vit, torch.randn(1, 3, 64, 64))
    norms = [m for m in result.modules() if isinstance(m, nn.LayerNorm)]
    assert norms
    assert not any(map(has_affine, norms))


def test_a_layer_norm_that_permutes_moves() -> None:
    model = nn.Sequential(timm.layers.LayerNorm2d(4), nn.Conv2d(4, 5, 1))
    assert not has_affine(folded(model, torch.randn(2, 4, 3, 3))[0])


def test_a_norm_with_an_activation_inside_is_left_by_its_activation() -> None:
    norm = timm.layers.GroupNormAct(4, num_groups=2, act_layer=nn.SiLU)
    model = nn.Sequential(norm, nn.Conv2d(4, 5, 1))
    assert "silu" in left(model, torch.randn(2, 4, 3, 3))["0"]


def test_a_positive_gain_passes_a_relu_and_a_bias_stays() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 4)
    result = folded(model, x)
    assert not has_gain(result[0])
    assert has_affine(result[0])
    plan = ns.plan(model, ns.FoldAffine(), inputs=x)
    with torch.no_grad():
        model[0].weight[2] = -1.0
    with pytest.raises(NormswapError, match="scale is not positive"):
        plan.apply(model)
    assert "positive scale" in ns.plan(model, ns.FoldAffine(), inputs=x).left[0].reason


def test_a_positive_gain_without_a_bias_passes_a_relu() -> None:
    model = nn.Sequential(nn.RMSNorm(4), nn.ReLU(), nn.Linear(4, 2))
    assert not has_gain(folded(model, torch.randn(5, 4))[0])


def test_a_bias_too_large_beside_its_gain_is_not_divided() -> None:
    model, x = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)), torch.randn(5, 4)
    randomise(model)
    plan = ns.plan(model, ns.FoldAffine(), inputs=x)
    with torch.no_grad():
        model[0].weight[2] = 1e-3 * model[0].bias[2]
    with pytest.raises(NormswapError, match="too small beside its bias"):
        plan.apply(model)
    assert "bias" in ns.plan(model, ns.FoldAffine(), inputs=x).left[0].reason


class Casting(nn.Module):
    """A LayerNorm or RMSNorm as others write it: it computes in float32, and casts back."""

    def __init__(self, *, centers: bool) -> None:
        super().__init__()
        self.weight, self.centers = nn.Parameter(torch.ones(6)), centers

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float().to(torch.float32) if self.centers else x.to(torch.float32)
        x = x - x.mean(-1, keepdim=True) if self.centers else x
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


class CastingStream(nn.Module):
    """What the norm casts, which is its input where that is float32, goes on in the stream."""

    def __init__(self, *, centers: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 3)
        self.norms = nn.ModuleList(Casting(centers=centers) for _ in range(3))
        self.fcs = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for norm, fc in zip(self.norms, self.fcs, strict=False):
            x = x + fc(norm(x)).tanh()
        return self.head(self.norms[-1](x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("centers", [False, True])
def test_a_norm_that_casts_hands_its_input_on(centers: bool, dtype: torch.dtype) -> None:
    model, x = randomise(CastingStream(centers=centers)).to(dtype).eval(), torch.arange(9)
    result = ns.fold_gains(model, x)
    assert ns.plan_of(result).left == ()
    assert not any(map(has_gain, result.norms))
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-6
    assert error(result(x).float(), model(x).float()) <= tolerance
    if centers and dtype == torch.float32:  # tanh is in the way of a mean that is taken off
        reasons = {each.reason for each in ns.plan(model, ns.Center(), inputs=x).left}
        assert all("tanh" in reason for reason in reasons)


class TiedHead(nn.Module):
    """A language model whose head is the table of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 4), nn.RMSNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.table(x)))


def test_a_tied_head_is_untied_on_request_alone() -> None:
    model, x = randomise(TiedHead()).double().eval(), torch.arange(7)
    with pytest.warns(UserWarning, match=r"head\.weight is tied to that of table; untie=True"):
        kept = ns.fold_gains(model, x)
    assert has_gain(kept.norm)
    assert kept.head.weight is kept.table.weight
    result = ns.fold_gains(model, x, untie=True)
    assert not has_gain(result.norm)
    assert torch.equal(result.table.weight, model.table.weight)
    assert error(result(x), model(x)) <= 1e-12


def test_one_norm_called_twice_moves_into_both_consumers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.RMSNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.norm(self.a(self.norm(x))))

    assert not has_affine(folded(Twice(), torch.randn(2, 4)).norm)


class Swapped(nn.LayerNorm):
    """Takes its bias for its gain."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.bias, self.weight, self.eps)


def hooked(norm: nn.Module) -> nn.Module:
    norm.register_forward_hook(lambda module, args, output: 3 * output)
    return norm


class Tied(nn.Module):
    """One Linear that takes the normalized value, and the raw one too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x)) + self.fc(x)


class PostNorm(nn.Module):
    """The normalized value goes on in a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return (x + self.fc(x)).tanh()


@pytest.mark.parametrize(
    ("model", "shape", "site", "reason"),
    [
        (Tied(), (2, 4), "norm", "also computes"),
        (PostNorm(), (2, 4), "norm", "tanh"),
        (nn.Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 2)), (2, 3, 4), "0", "several axes"),
        (nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)), (2, 4), "0", "gelu"),
        (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2)), (2, 4), "0", "parametrized"),
        (nn.Sequential(nn.RMSNorm(4, elementwise_affine=False)), (2, 4), "0", "no gain"),
        (nn.Sequential(Swapped(4), nn.Linear(4, 2)), (2, 4), "0", "does more"),
        (
            nn.Sequential(hooked(ns.create("rms_norm", 4, bias=True)), nn.Linear(4, 2)),
            (2, 4),
            "0",
            "hook",
        ),
        (
            nn.Sequential(nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 2)),
            (2, 4),
            "0",
            "name it in include",
        ),
    ],
)
def test_what_cannot_move_is_left_with_its_reason(
    model: nn.Module, shape: tuple[int, ...], site: str, reason: str
) -> None:
    if reason == "parametrized":
        nn.utils.parametrizations.weight_norm(model[0])
    assert reason in left(model, torch.randn(shape))[site]


def test_a_gain_passes_a_zero_padding_and_a_bias_stays() -> None:
    for norm in (ns.create("rms_norm", 4, per_position=True), nn.GroupNorm(2, 4)):
        model = nn.Sequential(norm, nn.Conv2d(4, 4, 3, padding=1))
        assert not has_gain(folded(model, torch.randn(1, 4, 5, 5))[0])


def test_the_fused_kernel_of_torch_finds_gains_of_1() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model, x = nn.Sequential(encoder, nn.LayerNorm(8), nn.Linear(8, 2)), torch.randn(2, 3, 8)
    assert left(model, x) == {}
    result = ns.fold_gains(model.eval(), x)
    assert not any(has_affine(m) for m in result.modules() if isinstance(m, nn.LayerNorm))
    with torch.no_grad():
        assert error(result(x), model(x)) <= 1e-5
    assert error(result(x), model(x)) <= 1e-5


def test_flags_dtype_and_hooks_survive() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)).to(torch.bfloat16)
    randomise(model)
    model.requires_grad_(False)
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(64, 4).to(torch.bfloat16)
    result = ns.plan(model, ns.FoldAffine(), inputs=x).apply(model)
    calls.clear()
    assert error(in_eval(result, x).float(), in_eval(model, x).float()) <= 2e-2
    assert len(calls) == 2
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in result.parameters())
    assert result.training


def test_a_failing_plan_leaves_the_model_as_it_was() -> None:
    model = randomise(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2, bias=False)))
    plan = ns.plan(model, ns.FoldAffine(), inputs=torch.randn(2, 4))
    before, x = dict(model.state_dict()), torch.randn(2, 4)
    expected = in_eval(model, x)
    elsewhere = plan.edits[-1].model_copy(update={"path": "1"})
    broken = plan.model_copy(update={"edits": (*plan.edits, elsewhere)})
    with pytest.raises(NormswapError, match="another model"):
        broken.apply(model, inplace=True)
    assert model.state_dict().keys() == before.keys()
    assert torch.equal(in_eval(model, x), expected)
    assert not hasattr(model[0], "eval_affine")


def test_a_folded_model_is_saved_loaded_and_folded_again(tmp_path: Any) -> None:
    def source() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2))

    x = torch.randn(3, 4)
    result = folded(source(), x)
    ns.save(result, tmp_path / "model")
    loaded = ns.load(tmp_path / "model", source=source)
    assert torch.equal(in_eval(loaded, x), in_eval(result, x))
    again = ns.plan(loaded, ns.FoldAffine(), inputs=x)
    assert again.changed == ("0", "2")
    for name, tensor in again.apply(loaded).state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_only_what_is_included_moves() -> None:
    model = randomise(
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 2))
    )
    plan = ns.plan(model, ns.FoldAffine(include="2"), inputs=torch.randn(2, 4))
    assert plan.changed == ("2",)
    with pytest.raises(NormswapError, match="matches none"):
        ns.plan(model, ns.FoldAffine(include="norm*"), inputs=torch.randn(2, 4))
    with pytest.raises(NormswapError, match="1 BatchNorm1d and no layer, rms, group"):
        ns.fold_gains(nn.BatchNorm1d(4), torch.randn(2, 4))
    named = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    (reason,) = ns.plan(named, ns.FoldAffine(include="0"), inputs=torch.randn(2, 4)).left
    assert "batch normalization, whose affine is not the last" in reason.reason
    with pytest.raises(NormswapError, match="this model has no normalization"):
        ns.plan(nn.Linear(4, 4), ns.FoldAffine(), inputs=torch.randn(2, 4))
