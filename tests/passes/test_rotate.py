"""`rotate` computes the same function, and leaves with a reason what does not commute."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.passes.edits import RotateStream
from normswap.passes.orthogonal import Orthogonal

WIDTH, HEADS, TOKENS, WORDS = 12, 2, 5, 11


# --- networks -------------------------------------------------------------------------------------


class OnePlus(nn.Module):
    """RMSNorm whose gain is 1 + weight, as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale * (1 + self.weight)


NORMS: dict[str, Any] = {
    "layer": nn.LayerNorm,
    "layer without bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer without affine": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "rms": nn.RMSNorm,
    "rms without gain": lambda width: nn.RMSNorm(width, elementwise_affine=False),
    "1 + weight": OnePlus,
}


class Attention(nn.Module):
    """Self-attention: how queries, keys and values come, and how they are summed up."""

    def __init__(self, fused: str, grouped: bool, eager: bool, bias: bool) -> None:
        super().__init__()
        self.fused, self.eager = fused, eager
        self.kv_heads = 1 if grouped else HEADS
        self.size = WIDTH // HEADS
        self.kv_width = self.kv_heads * self.size
        if fused == "apart":
            self.q = nn.Linear(WIDTH, WIDTH, bias=bias)
            self.k = nn.Linear(WIDTH, self.kv_width, bias=bias)
            self.v = nn.Linear(WIDTH, self.kv_width, bias=bias)
        else:
            self.qkv = nn.Linear(WIDTH, WIDTH + 2 * self.kv_width, bias=bias)
        self.out = nn.Linear(WIDTH, WIDTH, bias=bias)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, t, _ = x.shape
        if self.fused == "interleaved" and self.kv_heads == HEADS:  # GPT-NeoX
            q, k, v = self.qkv(x).view(n, t, HEADS, 3 * self.size).transpose(1, 2).chunk(3, -1)
            return q, k, v
        if self.fused == "apart":
            q, k, v = self.q(x), self.k(x), self.v(x)
        else:
            q, k, v = self.qkv(x).split([WIDTH, self.kv_width, self.kv_width], -1)
        q, k, v = (each.view(n, t, -1, self.size).transpose(1, 2) for each in (q, k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        if self.eager:
            y = (q @ k.transpose(-1, -2) / self.size**0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(*x.shape))


class MLP(nn.Module):
    """Two layers with a GELU between them, or three with a gate."""

    def __init__(self, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 16, bias=bias)
        self.gate = nn.Linear(WIDTH, 16, bias=bias) if gated else None
        self.down = nn.Linear(16, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A pre-norm block, one branch after the other."""

    def __init__(
        self, norms: list[nn.Module], attention: nn.Module, mlp: nn.Module, scale: nn.Module
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention, self.mlp, self.scale = attention, mlp, scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class SideBySide(Block):
    """Both branches take the same value, as in GPT-NeoX."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.attention(self.norm1(x))) + self.mlp(self.norm2(x))


class Scale(nn.Module):
    """A gain per channel on a branch, as LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Words(nn.Module):
    """Tokens and positions, each a table."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.table, self.factor = nn.Embedding(WORDS, WIDTH), factor
        self.positions = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) * self.factor + self.positions[:, : tokens.shape[1]]


class Patches(nn.Module):
    """A convolution over patches, and a class token before them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 2, 2)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(images), -1, -1), patches], 1)


class Model(nn.Module):
    """Something that starts a stream, blocks, a last norm and a head."""

    def __init__(
        self, stem: nn.Module, blocks: list[nn.Module], norm: nn.Module, pool: str
    ) -> None:
        super().__init__()
        self.stem, self.blocks, self.norm = stem, nn.Sequential(*blocks), norm
        self.head = nn.Linear(WIDTH, WORDS)
        self.before = POOLS["token"] if pool == "token, then norm" else POOLS[""]
        self.after = POOLS["mean"] if pool == "mean" else POOLS[""]

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(self.blocks(self.stem(x)))
        return self.head(self.after(self.norm(x)))


class Pool(nn.Module):
    """What is kept of the positions."""

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


POOLS = {
    "": nn.Identity(),
    "token": Pool(lambda x: x[:, 0]),
    "mean": Pool(lambda x: x.mean(1)),
}


def language_model(**what: Any) -> tuple[Model, Tensor]:
    return model(images=False, **what)


def model(
    *,
    norm: str = "rms",
    images: bool = False,
    blocks: int = 2,
    fused: str = "apart",
    grouped: bool = False,
    eager: bool = False,
    bias: bool = True,
    gated: bool = False,
    scaled: bool = False,
    side: bool = False,
    factor: float = 1.0,
    pool: str = "",
) -> tuple[Model, Tensor]:
    make = NORMS[norm]

    def block() -> Block:
        attention = Attention(fused, grouped, eager, bias)
        scale, kind = Scale() if scaled else nn.Identity(), SideBySide if side else Block
        return kind([make(WIDTH), make(WIDTH)], attention, MLP(gated, bias), scale)

    stem = Patches() if images else Words(factor)
    built = Model(stem, [block() for _ in range(blocks)], make(WIDTH), pool)
    randomise(built)
    x = torch.randn(2, 3, 4, 4) if images else torch.randint(0, WORDS, (2, TOKENS))
    return built.eval(), x


def rotated(
    original: nn.Module, x: Tensor, **options: Any
) -> tuple[nn.Module, list[RotateStream], dict[str, str]]:
    """The rotated model, its streams, and what was left: the same function in float64."""
    exact = copy.deepcopy(original).double()
    x = x.double() if x.is_floating_point() else x
    plan = ns.plan(exact, ns.Rotate(**options), inputs=x)
    assert ns.Plan.from_json(plan.to_json()) == plan
    result = plan.apply(exact)
    assert error(in_eval(result, x), in_eval(exact, x)) <= 1e-10
    assert type(result) is type(original)
    assert result.state_dict().keys() == original.state_dict().keys()
    streams = [edit for edit in plan.edits if isinstance(edit, RotateStream)]
    return result, streams, {each.site: each.reason for each in plan.left}


# --- what can be rotated --------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    norm=st.sampled_from(list(NORMS)),
    images=st.booleans(),
    fused=st.sampled_from(["apart", "side by side", "interleaved"]),
    grouped=st.booleans(),
    eager=st.booleans(),
    bias=st.booleans(),
    gated=st.booleans(),
    scaled=st.booleans(),
    side=st.booleans(),
    factor=st.sampled_from([1.0, 3.5]),
    pool=st.sampled_from(["", "mean", "token, then norm"]),
    with_=st.sampled_from(["hadamard", "random"]),
)
def test_any_pre_norm_transformer_is_rotated_with_its_heads(with_: Any, **what: Any) -> None:
    original, x = model(**what)
    result, streams, left = rotated(original, x, with_=with_, heads=True, seed=3)
    assert not left
    (stream, *heads) = streams
    assert len(stream.norms) == 5 and stream.matrix.size == WIDTH
    assert len(heads) == 2 and {each.matrix.size for each in heads} == {WIDTH // HEADS}
    assert stream.matrix.keeps_ones == ("layer" in what["norm"])
    before, after = original.state_dict(), result.state_dict()
    for each in stream.tensors:
        name = f"{each.path}.{each.tensor}"
        assert not torch.allclose(before[name].double(), after[name]), name


@pytest.mark.parametrize(("norm", "most"), [("rms", 1.1), ("layer", 2.5)])
def test_a_channel_that_is_far_out_is_spread_over_all(norm: str, most: float) -> None:
    original, x = language_model(norm=norm)
    with torch.no_grad():
        original.stem.table.weight[:, 3] *= 1000
    result, _, _ = rotated(original, x)
    out = [net.stem(x) for net in (original, result)]
    peak = [(each.abs().amax(-1) / each.square().mean(-1).sqrt()).max() for each in out]
    assert peak[0] > 0.99 * WIDTH**0.5 and peak[1] < most


def test_what_is_tied_stays_tied_where_it_rotates_alike() -> None:
    original, x = language_model(norm="rms without gain")
    original.head.weight = original.stem.table.weight
    result, _, left = rotated(original, x)
    assert not left and result.head.weight is result.stem.table.weight


def test_a_gain_before_a_tied_head_stops_the_stream_unless_the_head_may_be_untied() -> None:
    original, x = language_model()
    original.head.weight = original.stem.table.weight
    _, streams, left = rotated(original, x)
    assert not streams and len(left) == 5
    assert "tied" in left["norm"]
    result, streams, left = rotated(original, x, untie=True)
    assert streams and not left
    assert result.head.weight is not result.stem.table.weight


class Merging(nn.Module):
    """Pixels side by side are concatenated along the channels, as between the stages of Swin."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm1, self.norm2 = norm(WIDTH), norm(4 * WIDTH)
        self.reduction, self.norm3 = nn.Linear(4 * WIDTH, 8), norm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block(self.norm1(x))
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = self.reduction(self.norm2(torch.cat(parts, -1)))
        return self.head(self.norm3(x))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_each_block_of_channels_side_by_side_is_rotated(norm: str) -> None:
    original = Merging(NORMS[norm])
    randomise(original)
    _, streams, left = rotated(original.eval(), torch.randn(2, 4, 4, 3))
    assert not left and [stream.matrix.size for stream in streams] == [WIDTH, 8]
    starts = {norm.path: norm.starts for norm in streams[0].norms}
    assert starts == {"norm1": (0,), "norm2": (0, WIDTH, 2 * WIDTH, 3 * WIDTH)}


def test_a_bias_that_has_no_place_is_rotated_where_it_is() -> None:
    original, x = language_model(norm="layer", bias=False, blocks=1)
    result, _, left = rotated(original, x)
    assert not left
    norm = result.blocks[0].norm1
    assert bool((norm.weight == 1).all()) and bool((norm.bias != 0).any())


def test_several_examples_share_one_rotation() -> None:
    original, x = language_model()
    _, streams, left = rotated_on(original, [x, x[:, :3]])
    assert not left and len(streams) == 1


def rotated_on(original: nn.Module, inputs: Any) -> tuple[nn.Module, list[Any], tuple[Any, ...]]:
    exact = copy.deepcopy(original).double()
    plan = ns.plan(exact, ns.Rotate(heads=False), inputs=inputs)
    result = plan.apply(exact)
    for x in inputs:
        assert error(in_eval(result, x), in_eval(exact, x)) <= 1e-10
    return result, [e for e in plan.edits if isinstance(e, RotateStream)], plan.left


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_verb_keeps_dtype_flags_and_hooks(dtype: torch.dtype) -> None:
    original, x = language_model(norm="layer")
    original.to(dtype).train()
    original.stem.table.weight.requires_grad_(False)
    calls: list[int] = []
    original.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    result = ns.rotate(original, x)
    assert {p.dtype for p in result.parameters()} == {dtype}
    assert result.training and not result.stem.table.weight.requires_grad
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.float16: 0.05}[dtype]
    assert error(in_eval(result, x).double(), in_eval(original, x).double()) <= limit
    before = len(calls)
    in_eval(result, x)
    assert len(calls) == before + 1


# --- what cannot ----------------------------------------------------------------------------------


class Stopping(nn.Module):
    """A stream that something other than a weight looks at."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.stem, self.norm, self.other = nn.Linear(3, WIDTH), nn.LayerNorm(WIDTH), other
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.head(self.norm(x)).flatten(1), self.other(x).flatten(1)], 1)


class Does(nn.Module):
    """A function, and then a layer."""

    def __init__(self, function: Any, layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.function(x))


STOPPING: dict[str, tuple[Any, str]] = {
    "gelu": (nn.GELU, "stem (linear) is also used by other (gelu)"),
    "itself": (nn.Identity, "is also used by output"),
    "gain": (Scale, "is also used by"),
    "half": (
        lambda: Does(lambda x: x[..., : WIDTH // 2], nn.Linear(WIDTH // 2, 2)),
        "has not all its channels in one position",
    ),
    "two thirds and a third": (
        lambda: Does(lambda x: torch.cat([x, x[..., :4]], -1), nn.Linear(WIDTH + 4, 2)),
        "has not all its channels in one position",
    ),
    "group": (
        lambda: Does(lambda x: x.mT, nn.GroupNorm(2, WIDTH)),
        "is also used by other.layer (group_norm)",
    ),
    "depthwise": (
        lambda: Does(lambda x: x.mT, nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)),
        "the groups of other.layer (conv1d) do not mix",
    ),
    "softmax": (lambda: nn.Softmax(-1), "is also used by other (softmax)"),
    "maximum": (lambda: Does(lambda x: x.amax(1), nn.Linear(WIDTH, 2)), "used by other (amax)"),
    "norm": (lambda: Does(lambda x: x.norm(dim=-1), nn.Identity()), "linalg_vector_norm"),
    "positions": (
        lambda: Does(lambda x: x.flatten(1).unflatten(1, (WIDTH, -1)).mT, nn.Linear(WIDTH, 2)),
        "channels of several positions meet in one",
    ),
    "channels rolled": (
        lambda: Does(lambda x: x.roll(1, -1), nn.Linear(WIDTH, 2)),
        "has its channels in no order",
    ),
    "heads swapped in part": (
        lambda: Does(lambda x: torch.cat([x[:, 1:, :4], x[:, :-1, 4:]], -1), nn.Linear(WIDTH, 2)),
        "",
    ),
}


@pytest.mark.parametrize("what", list(STOPPING))
def test_what_does_not_commute_is_named(what: str) -> None:
    make, why = STOPPING[what]
    original = Stopping(make()).eval()
    randomise(original)
    _, streams, left = rotated(original, torch.randn(2, TOKENS, 3))
    assert not streams and why in left["norm"]


def test_a_rolled_position_is_another_position() -> None:
    original = Stopping(Does(lambda x: x.roll(1, 1), nn.Linear(WIDTH, 2))).eval()
    randomise(original)
    _, streams, left = rotated(original, torch.randn(2, TOKENS, 3))
    assert len(streams) == 1 and not left


class PostNorm(nn.Module):
    """The gain of a normalization whose output goes on in the stream cannot move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Linear(3, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norms[1](self.inner(self.norms[0](x)))
        return self.head(self.norms[2](x))


def test_a_gain_in_the_stream_is_named() -> None:
    original = PostNorm().eval()
    randomise(original)
    _, streams, left = rotated(original, torch.randn(2, 3))
    assert not streams and "the gain of norms.1 stays" in left["norms.0"]
    nn.init.ones_(original.norms[1].weight)
    _, streams, left = rotated(original, torch.randn(2, 3))
    assert streams and not left


def test_a_gain_that_is_no_longer_1_is_refused() -> None:
    original, x = language_model(norm="rms without gain")
    original.norm = nn.RMSNorm(WIDTH)
    plan = ns.plan(original, ns.Rotate(), inputs=x)
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.norm.weight[2] = 1.5
    if any(edit.edit == "reset_gain" for edit in plan.edits):  # it would be folded then
        pytest.fail("a gain of 1 needs no place")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(NormswapError, match="the gain of norm is not 1"):
        plan.apply(other, inplace=True)
    assert all(torch.equal(before[name], each) for name, each in other.state_dict().items())


def test_a_stream_is_rotated_only_where_all_on_it_is_selected() -> None:
    original, x = language_model()
    _, streams, left = rotated(original, x, exclude="norm")
    assert not streams and "norm is on its stream, and is not selected" in left["blocks.0.norm1"]


# --- matrices -------------------------------------------------------------------------------------

SIZES = [2, 3, 4, 6, 12, 20, 28, 36, 40, 44, 52, 60, 64, 90, 96, 128, 192, 384]


@pytest.mark.parametrize("keeps_ones", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_matrices_are_orthogonal(kind: Any, keeps_ones: bool) -> None:
    for size in SIZES:
        matrix = Orthogonal(kind=kind, size=size, seed=size, keeps_ones=keeps_ones).matrix()
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(matrix.sum(1), torch.ones(()).double(), atol=1e-12) or not keeps_ones


@pytest.mark.parametrize("size", [2, 4, 12, 20, 24, 28, 36, 40, 60, 64, 96, 128, 384, 768, 896])
def test_the_entries_of_a_hadamard_matrix_have_one_size(size: int) -> None:
    matrix = Orthogonal(kind="hadamard", size=size).matrix()
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))


def test_seeds_give_different_matrices_and_the_same_one_twice() -> None:
    first, again, other = (Orthogonal(kind="random", size=6, seed=s).matrix() for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_a_matrix_of_your_own() -> None:
    original, x = language_model()
    own, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    result, streams, left = rotated(original, x, with_={"blocks.1.norm1": own})
    assert len(streams) == 1 and not left
    expected = original.stem.positions.double() @ own.T
    assert torch.allclose(result.stem.positions, expected)


def test_a_matrix_that_fits_no_stream_is_refused_or_named() -> None:
    original, x = language_model()
    own, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64))
    with pytest.raises(NormswapError, match="12 channels"):
        ns.rotate(original, x, with_={"norm": own[:6, :6]})
    with pytest.raises(NormswapError, match="not orthogonal"):
        ns.rotate(original, x, with_={"norm": own * 2})
    centered, _ = language_model(norm="layer")
    left = ns.plan(centered, ns.Rotate({"norm": own}), inputs=x).left
    assert all("center it first" in each.reason for each in left) and len(left) == 5
    left = ns.plan(original, ns.Rotate({"other": own}), inputs=x).left
    assert {each.reason for each in left} == {"no matrix is given for its stream"}
    with pytest.raises(NormswapError, match="no matrix is called 'fourier'"):
        ns.rotate(original, x, with_="fourier")  # type: ignore[arg-type]


def test_principal_components_leave_no_covariance_and_are_in_order() -> None:
    original, x = language_model(blocks=1)
    original = original.double()
    data = [torch.randint(0, WORDS, (4, TOKENS)) for _ in range(5)]
    result = ns.rotate(original, x, with_="pca", data=data)
    assert error(in_eval(result, x), in_eval(original, x)) <= 1e-10
    seen: list[Tensor] = []
    for norm in (result.blocks[0].norm1, result.blocks[0].norm2, result.norm):
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in data:
        in_eval(result, batch)
    rows = torch.cat([each.flatten(0, -2) for each in seen])
    rows = rows / rows.square().mean(-1, keepdim=True).sqrt()
    covariance = rows.T @ rows
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-9 * variances.max()
    assert all(first >= second for first, second in pairwise(variances.tolist()))


def test_components_need_data_and_nothing_else_does() -> None:
    original, x = language_model(blocks=1)
    with pytest.raises(NormswapError, match="measured on data"):
        ns.rotate(original, x, with_="pca")
    with pytest.raises(NormswapError, match="measured on data"):
        ns.rotate(original, x, data=[x])
    with pytest.raises(NormswapError, match="no batch"):
        ns.rotate(original, x, with_="pca", data=[])
