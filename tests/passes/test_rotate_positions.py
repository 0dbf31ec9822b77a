"""`rotate` and `center` where positions of a stream go apart and come together again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.graph.capture import capture
from normswap.graph.rotations import Rotations
from normswap.graph.sites import find_sites

WIDTH, TOKENS = 8, 6
Change = Callable[[Tensor], Tensor]


class Function(nn.Module):
    """Something that moves positions."""

    def __init__(self, function: Change) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class WithToken(nn.Module):
    """Puts a token of its own among the others."""

    def __init__(self, at: int, count: int = 1) -> None:
        super().__init__()
        self.token, self.at = nn.Parameter(torch.randn(1, count, WIDTH)), at

    def forward(self, x: Tensor) -> Tensor:
        token = self.token.expand(len(x), -1, -1)
        return torch.cat([x[:, : self.at], token, x[:, self.at :]], 1)


class OnPart(nn.Module):
    """Adds a bias, or a table of positions, to some tokens alone."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.added = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] + self.added, x[:, 2:]], 1)


class Replaced(nn.Module):
    """Some tokens are replaced by another, as where an autoencoder masks them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mask = (torch.arange(x.shape[1]) % 2).to(x)[None, :, None]
        return x * (1 - mask) + self.token * mask


class Apart(nn.Module):
    """Two parts of the tokens, each with a block of its own."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.second(x[:, 3:]), self.first(x[:, :3])], 1)


class WrittenOut(nn.Module):
    """RMSNorm whose first operator is a cast that changes nothing here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.type_as(self.weight)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Branch(nn.Module):
    """A pre-norm branch, whose norm and layer may see other positions than its place."""

    def __init__(self, norm: Any, moved: Change = lambda x: x) -> None:
        super().__init__()
        self.norm, self.moved = norm(WIDTH), moved
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.gelu(self.up(0.5 * h + self.moved(h))))


class Model(nn.Module):
    """A stream between two Linears, of which a part of the tokens is read."""

    def __init__(self, parts: list[nn.Module], norm: Any, read: Change, *, norm_first: bool):
        super().__init__()
        self.stem, self.parts, self.norm = nn.Linear(3, WIDTH), nn.Sequential(*parts), norm(WIDTH)
        self.head, self.read, self.norm_first = nn.Linear(WIDTH, 5), read, norm_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.parts(self.stem(x))
        x = self.read(self.norm(x)) if self.norm_first else self.norm(self.read(x))
        return self.head(x)


SHIFTS: dict[str, Change] = {
    "none": lambda x: x,
    "by one": lambda x: torch.cat([x[:, -1:], x[:, :-1]], 1),
    "by two": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "three parts": lambda x: torch.cat([x[:, 4:], x[:, 1:4], x[:, :1]], 1),
    "reversed": lambda x: torch.stack([x[:, -1 - i] for i in range(x.shape[1])], 1),
    "unbound": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "chunks": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "samples": lambda x: torch.cat([x[1:], x[:1]], 0),
    "rolled": lambda x: x.roll(1, 1),
    "summed": lambda x: x + torch.cat([x[:, 1:], x[:, :1]], 1),
    "mean": lambda x: torch.cat([x[:, 1:], x.mean(1, keepdim=True)], 1),
    "twice": lambda x: torch.cat([x[:, :1], x[:, :-1]], 1),
}
IN_STREAM: dict[str, Callable[[Any], nn.Module]] = {
    **{name: lambda _, f=f: Function(f) for name, f in SHIFTS.items()},
    "zeros come in": lambda _: Function(
        lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
    ),
    "new zeros": lambda _: Function(
        lambda x: torch.cat([x[:, 1:], x.new_zeros(len(x), 1, WIDTH)], 1)
    ),
    "padded": lambda _: Function(lambda x: F.pad(x[:, :-1], (0, 0, 1, 0))),
    "token inside": lambda _: WithToken(2),
    "registers": lambda _: WithToken(TOKENS, 3),
    "bias on a part": lambda _: OnPart((WIDTH,)),
    "table on a part": lambda _: OnPart((1, 2, WIDTH)),
    "replaced": lambda _: Replaced(),
    "parts apart": lambda norm: Apart(Branch(norm), Branch(norm)),
    "a part alone": lambda norm: Apart(nn.Identity(), Branch(norm)),
    "scaled by position": lambda _: Function(
        lambda x: x * torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)[:, None]
    ),
    "sorted": lambda _: Function(lambda x: x[:, torch.tensor([3, 0, 1, 2])]),
    "windows": lambda _: Function(
        lambda x: x[:, :6].unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)
    ),
    "pooled": lambda _: Function(lambda x: F.avg_pool1d(x.mT, 2, 1).mT),
}
READS: dict[str, Change] = {
    "all": lambda x: x,
    "first": lambda x: x[:, 0],
    "last": lambda x: x[:, -1],
    "without the first": lambda x: x[:, 1:],
    "mean": lambda x: x.mean(1),
    "two apart": lambda x: torch.cat([x[:, :1], x[:, 3:4]], 1),
}
NORMS: dict[str, Any] = {
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "written out": WrittenOut,
}


def model(
    parts: list[nn.Module], norm: str, read: str = "all", *, norm_first: bool = False
) -> Model:
    built = Model(parts, NORMS[norm], READS[read], norm_first=norm_first)
    randomise(built)
    return built.double().eval()


def left(original: nn.Module, rewrite: Any, x: Tensor) -> dict[str, str]:
    """What stays, with the reason; the function is the same in float64."""
    plan = ns.plan(original, rewrite, inputs=x)
    assert error(in_eval(plan.apply(original), x), in_eval(original, x)) <= 1e-10
    return {each.site: each.reason for each in plan.left}


def x() -> Tensor:
    return torch.randn(2, TOKENS, 3, dtype=torch.float64)


# An example is a model of many layers, so there are few, and none is worth shrinking.
@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    streams=st.lists(st.sampled_from(list(IN_STREAM)), min_size=1, max_size=3),
    branches=st.lists(st.sampled_from(list(SHIFTS)), min_size=3, max_size=3),
    norm=st.sampled_from(["layer", "rms"]),
    read=st.sampled_from(list(READS)),
    norm_first=st.booleans(),
)
def test_any_stream_whose_positions_move_is_rotated_and_centered(
    streams: list[str], branches: list[str], norm: str, read: str, norm_first: bool
) -> None:
    parts = [
        part
        for stream, branch in zip(streams, branches, strict=False)
        for part in (IN_STREAM[stream](NORMS[norm]), Branch(NORMS[norm], SHIFTS[branch]))
    ]
    original = model(parts, norm, read, norm_first=norm_first)
    assert not left(original, ns.Rotate(), x())
    if norm == "layer":
        assert not left(original, ns.Center(), x())


@pytest.mark.parametrize("name", IN_STREAM)
@pytest.mark.parametrize("norm", ["rms", "written out"])
def test_a_stream_moves_in_every_way_before_one_token_is_read(norm: str, name: str) -> None:
    make, of = IN_STREAM[name], NORMS[norm]
    original = model([make(of), Branch(of), make(of)], norm, "first")
    assert not left(original, ns.Rotate(), x())


def half(x: Tensor) -> Tensor:
    """Half of the channels come from the token before, as in a temporal shift module."""
    return torch.cat([x[..., :4].roll(1, 1), x[..., 4:]], -1)


class Gain(nn.Module):
    """A gain of some tokens."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] * self.gain, x[:, 2:]], 1)


def of_first(function: Change) -> nn.Module:
    return Function(lambda x: torch.cat([function(x[:, :2]), x[:, 2:]], 1))


STAYING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "half of the channels shift": (lambda: Function(half), "channels of several positions meet"),
    "some are bent": (lambda: of_first(torch.tanh), "is also used by parts.1 (tanh)"),
    "some are the largest of two": (
        lambda: of_first(lambda x: x.amax(1, keepdim=True)),
        "is also used by parts.1 (amax)",
    ),
    "ones come in": (
        lambda: Function(lambda x: torch.cat([torch.ones_like(x[:, :1]), x], 1)),
        "its input comes from parts.1 (ones_like)",
    ),
    "some are overwritten": (
        lambda: Function(lambda x: x.clone().index_fill_(1, torch.tensor(0), 1.0)),
        "its input comes from parts.1 (index_fill_)",
    ),
    "tokens are the channels": (
        lambda: nn.Conv1d(TOKENS, TOKENS, 1),
        "normalizes another axis than its channels (parts.1 (conv1d))",
    ),
    "a gain for each token and channel": (
        lambda: Gain(2, WIDTH),
        "the gain of parts.1 (mul) is none per channel",
    ),
    "a gain per channel of some": (lambda: Gain(WIDTH), "is also used by"),
    "positions are cut": (
        lambda: Function(lambda x: x.flatten(1)[:, 3 : 3 + 2 * WIDTH].unflatten(1, (2, WIDTH))),
        "channels of several positions meet in one (parts.1 (flatten))",
    ),
    "sums go on": (
        lambda: Function(lambda x: x.cumsum(1)),
        "its input comes from parts.1 (cumsum)",
    ),
}


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_says_truly_why(name: str) -> None:
    make, reason = STAYING[name]
    original = model([Branch(nn.RMSNorm), make(), Branch(nn.RMSNorm)], "rms")
    assert reason in left(original, ns.Rotate(), x())["norm"]


def test_a_gain_per_token_is_none_per_channel() -> None:
    original = model([Branch(nn.RMSNorm), Gain(2, 1), Branch(nn.RMSNorm)], "rms")
    assert not left(original, ns.Rotate(), x())


class Attention(nn.Module):
    """Queries, keys and values of one Linear, which go through `moved` before they part."""

    def __init__(self, moved: Change, of_values: Change) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.moved, self.of_values = moved, of_values

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = self.moved(qkv).unbind(0)
        y = F.scaled_dot_product_attention(q, k, self.of_values(v))
        return x + self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("moved", [lambda x: x, lambda x: x * 0.5, lambda x: x.clone()])
@pytest.mark.parametrize(
    "of_values",
    [
        lambda x: x,
        lambda x: torch.cat([x[:, :, -1:], x[:, :, :-1]], 2),
        lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2),
        lambda x: x + x.mean(2, keepdim=True),
    ],
)
def test_heads_are_rotated_beside_queries_and_keys(moved: Change, of_values: Change) -> None:
    original = model([Attention(moved, of_values)], "rms")
    assert not left(original, ns.Rotate(heads=True), x())


class PartFirst(nn.Module):
    """A part of the tokens is normalized first, and all of them after that."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.norm = norm(WIDTH), norm(WIDTH)
        self.stem, self.heads = (
            nn.Linear(3, WIDTH),
            nn.ModuleList(nn.Linear(WIDTH, 2) for _ in "12"),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).clone()
        first, second = self.heads
        return torch.cat([first(self.first(x[:, 1:3])), second(self.norm(x))], 1)


@pytest.mark.parametrize("norm", NORMS)
def test_whichever_norm_is_asked_first_finds_the_whole_stream(norm: str) -> None:
    original = PartFirst(NORMS[norm])
    randomise(original)
    assert not left(original.double().eval(), ns.Rotate(), x())
    seen = capture(original, x())
    sites = find_sites(seen)
    rotations = Rotations(seen, sites, sites)
    assert all(
        rotations.around(name).norms.keys() == {"first", "norm"} for name in ("first", "norm")
    )
