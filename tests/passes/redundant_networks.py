"""Networks in which an RMSNorm, `norm`, is redundant, and networks in which it is not."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(2, 5, 8, dtype=torch.float64, generator=GENERATOR)
IMAGE = torch.randn(2, 8, 6, 5, dtype=torch.float64, generator=GENERATOR)


class Net(nn.Module):
    """Modules, and a forward that is a function of them and of the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.how = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def linear(outputs: int = 8, *, bias: bool = False) -> nn.Module:
    return nn.Linear(8, outputs, bias=bias)


def rms(size: int = 8, *, gain: bool = True) -> nn.Module:
    return nn.RMSNorm(size, eps=1e-5, elementwise_affine=gain)


class WrittenOut(nn.Module):
    """An RMSNorm as transformers write it, with its eps under another name."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class FromOne(nn.RMSNorm):
    """An RMSNorm of which the weight says how far the gain is from 1, as Gemma has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * (1 + self.weight)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def attention(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    q, k = m.q_norm(heads(m.q(y))), m.k_norm(heads(m.k(y)))
    return x + F.scaled_dot_product_attention(q, k, heads(m.v(x))).transpose(1, 2).flatten(2)


def rotary(x: Tensor) -> Tensor:
    """Pairs of channels turned by an angle for each position, as position embeddings do."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


def turned(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return F.scaled_dot_product_attention(
        m.q_norm(rotary(heads(m.q(y)))), m.k_norm(rotary(heads(m.k(y)))), heads(x)
    )


def gated(m: Any, x: Tensor) -> Tensor:
    return m.last(m.up(m.norm(x)) * m.gate(x).sigmoid())


def per_sample(m: Any, x: Tensor) -> Tensor:
    return m.last(F.max_pool2d(m.conv(F.leaky_relu(m.norm(x))), 2))


def with_zeros(m: Any, x: Tensor) -> Tensor:
    """A padding token beside those that are normalized."""
    return m.last(F.pad(m.fc(m.norm(x)), (0, 0, 1, 0)))


QKV = {"norm": rms(), "q": linear(), "k": linear(), "v": linear(bias=True)}
PER_HEAD = {"q_norm": rms(4), "k_norm": rms(4)}
# Of each its input, and what normalizes again all that reads the RMSNorm called norm.
REDUNDANT: dict[str, tuple[nn.Module, Tensor, str]] = {
    "query and key norms": (Net(attention, **QKV, **PER_HEAD), TOKENS, "q_norm, k_norm"),
    "rotary embeddings": (Net(turned, **QKV, **PER_HEAD), TOKENS, "q_norm, k_norm"),
    "a projection": (
        Net(lambda m, x: m.last(m.fc(m.norm(x))), norm=rms(), fc=linear(3), last=rms(3)),
        TOKENS,
        "last",
    ),
    "a LayerNorm behind": (
        Net(lambda m, x: m.last(m.fc(m.norm(x))), norm=rms(), fc=linear(), last=nn.LayerNorm(8)),
        TOKENS,
        "last",
    ),
    "written out": (
        Net(
            lambda m, x: m.last(m.fc(m.norm(x))), norm=WrittenOut(), fc=linear(), last=WrittenOut()
        ),
        TOKENS,
        "last",
    ),
    "a gain of 1 + weight": (
        Net(
            lambda m, x: m.last(m.fc(m.norm(x))),
            **{"norm": FromOne(8, eps=1e-5), "fc": linear(), "last": FromOne(8, eps=1e-5)},
        ),
        TOKENS,
        "last",
    ),
    "parallel readers": (
        Net(
            lambda m, x: (m.one(m.a(m.norm(x))), m.two(m.b(m.norm(x)))),
            **{"norm": rms(), "a": linear(), "b": linear(4), "one": rms(), "two": rms(4)},
        ),
        TOKENS,
        "one, two",
    ),
    "two in a row": (
        Net(lambda m, x: m.last(m.norm(x)), norm=rms(gain=False), last=rms()),
        TOKENS,
        "last",
    ),
    "a sum of two branches": (
        Net(
            lambda m, x: m.last(m.a(y := m.norm(x)) - 2 * m.b(y)[..., :8]),
            **{"norm": rms(), "a": linear(), "b": linear(9), "last": rms()},
        ),
        TOKENS,
        "last",
    ),
    "a ReLU": (
        Net(lambda m, x: m.last(F.relu(m.fc(m.norm(x)))), norm=rms(), fc=linear(), last=rms()),
        TOKENS,
        "last",
    ),
    "in place": (
        Net(
            lambda m, x: m.last(m.norm(x + 1).relu_().mul_(3)),
            norm=rms(gain=False),
            last=rms(),
        ),
        TOKENS,
        "last",
    ),
    "a gate": (
        Net(gated, norm=rms(), up=linear(), gate=linear(), last=rms()),
        TOKENS,
        "last",
    ),
    "padding tokens": (Net(with_zeros, norm=rms(), fc=linear(), last=rms()), TOKENS, "last"),
    "channels first": (
        Net(
            lambda m, x: m.last(m.conv(m.norm(x)).flatten(2).transpose(1, 2)),
            norm=ns.create("rms_norm", 8, per_position=True),
            conv=nn.Conv2d(8, 6, 1, bias=False),
            last=rms(6),
        ),
        IMAGE,
        "last",
    ),
    "one number for a sample": (
        Net(
            per_sample,
            norm=ns.create("rms_norm", 8),
            conv=nn.Conv2d(8, 6, 3, padding=1, bias=False),
            last=nn.GroupNorm(2, 6),
        ),
        IMAGE,
        "last",
    ),
    "a part of the channels": (
        Net(
            lambda m, x: torch.cat([m.one(y := m.fc(m.norm(x))[..., :6]), m.two(2 * y)], -1),
            **{"norm": rms(), "fc": linear(), "one": rms(6), "two": nn.LayerNorm(6)},
        ),
        TOKENS,
        "one, two",
    ),
}


def mixing(m: Any, x: Tensor) -> Tensor:
    """Values that an attention mixes are normalized only after that."""
    y = m.norm(x)
    return m.last(F.scaled_dot_product_attention(m.q(x), m.k(x), m.fc(y)))


def by_matmul(m: Any, x: Tensor) -> Tensor:
    return m.last(m.q(x).matmul(m.k(x).mT).softmax(-1) @ m.fc(m.norm(x)))


def written_into(m: Any, x: Tensor) -> Tensor:
    total = x + 1
    total += m.fc(m.norm(x))
    return m.last(total)


def multiplied_into(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What it is multiplied into is seen by others, too."""
    total = x + 1
    part = total[..., :4]
    total.mul_(m.fc(m.norm(x)))
    return m.last(total), part.clone()


def overwritten(m: Any, x: Tensor) -> Tensor:
    x = x + 1
    y = m.norm(x)
    return m.last(y.mul_(2)) + x


TWO = {"norm": rms(), "fc": linear(), "last": rms()}
BARE = {"norm": rms(gain=False), "last": rms()}
NOT_REDUNDANT: dict[str, tuple[nn.Module, Tensor]] = {
    "a bias between": (
        Net(lambda m, x: m.last(m.fc(m.norm(x))), **{**TWO, "fc": linear(bias=True)}),
        TOKENS,
    ),
    "a residual": (Net(lambda m, x: m.last(x + m.fc(m.norm(x))), **TWO), TOKENS),
    "its own output in a sum": (
        Net(lambda m, x: m.last((y := m.norm(x)) + m.fc(y).sigmoid()), **TWO),
        TOKENS,
    ),
    "one reader is not normalized": (
        Net(lambda m, x: m.last(y := m.fc(m.norm(x))) + y, **TWO),
        TOKENS,
    ),
    "it is returned": (Net(lambda m, x: (m.last(y := m.norm(x)), y), **BARE), TOKENS),
    "attention": (Net(mixing, **TWO, q=linear(), k=linear()), TOKENS),
    "attention written out": (Net(by_matmul, **TWO, q=linear(), k=linear()), TOKENS),
    "a GELU": (Net(lambda m, x: m.last(F.gelu(m.fc(m.norm(x)))), **TWO), TOKENS),
    "a number is added": (Net(lambda m, x: m.last(m.norm(x) + 1), **BARE), TOKENS),
    "its square": (Net(lambda m, x: m.last((y := m.norm(x)) * y), **BARE), TOKENS),
    "it divides": (Net(lambda m, x: m.last(x / m.norm(x)), **BARE), TOKENS),
    "a softmax": (Net(lambda m, x: m.last(m.norm(x).softmax(-1)), **BARE), TOKENS),
    "no norm behind": (Net(lambda m, x: m.norm(x).mean(-1) * 0 + x[..., 0], **BARE), TOKENS),
    "over another axis": (
        Net(
            lambda m, x: m.last(m.fc(m.norm(x)).transpose(1, 2)),
            **{**TWO, "last": nn.LayerNorm(5, bias=False)},
        ),
        TOKENS,
    ),
    "positions side by side": (
        Net(
            lambda m, x: m.last(m.fc(m.norm(x)).flatten(1)),
            **{**TWO, "last": nn.LayerNorm(40)},
        ),
        TOKENS,
    ),
    "beside what is not normalized": (
        Net(
            lambda m, x: m.last(torch.cat([m.fc(m.norm(x)), x], -1)),
            **{**TWO, "last": rms(16)},
        ),
        TOKENS,
    ),
    "a sum over positions": (
        Net(lambda m, x: m.last(m.fc(m.norm(x)).mean(1)), **TWO),
        TOKENS,
    ),
    "a 3x3 convolution": (
        Net(
            lambda m, x: m.last(m.conv(m.norm(x))),
            norm=ns.create("rms_norm", 8, per_position=True),
            conv=nn.Conv2d(8, 6, 3, bias=False),
            last=ns.create("rms_norm", 6, per_position=True),
        ),
        IMAGE,
    ),
    "a GroupNorm over positions": (
        Net(
            lambda m, x: m.last(m.conv(m.norm(x))),
            norm=ns.create("rms_norm", 8, per_position=True),
            conv=nn.Conv2d(8, 6, 1, bias=False),
            last=nn.GroupNorm(1, 6),
        ),
        IMAGE,
    ),
    "a BatchNorm": (
        Net(
            lambda m, x: m.last(m.conv(m.norm(x))),
            norm=ns.create("rms_norm", 8),
            conv=nn.Conv2d(8, 6, 1, bias=False),
            last=nn.BatchNorm2d(6),
        ),
        IMAGE,
    ),
    "a LayerNorm, which takes the mean off": (
        Net(lambda m, x: m.last(m.fc(m.norm(x))), **{**TWO, "norm": nn.LayerNorm(8, bias=False)}),
        TOKENS,
    ),
    "an RMSNorm with a bias": (
        Net(
            lambda m, x: m.last(m.fc(m.norm(x))),
            **{**TWO, "norm": ns.create("rms_norm", 8, bias=True, channel_axis=-1)},
        ),
        TOKENS,
    ),
    "one token in the example": (Net(lambda m, x: m.last(m.fc(m.norm(x))), **TWO), TOKENS[:, :1]),
    "a Linear over positions": (
        Net(
            lambda m, x: m.last(m.mix(m.norm(x).transpose(1, 2)).transpose(1, 2)),
            **{**BARE, "mix": nn.Linear(5, 5, bias=False)},
        ),
        TOKENS,
    ),
    "a sum of two positions": (
        Net(lambda m, x: m.last((y := m.fc(m.norm(x))) + y.roll(1, 1)), **TWO),
        TOKENS,
    ),
    "another type": (
        Net(lambda m, x: m.last(m.fc(m.norm(x.float()))), **{**TWO, "norm": WrittenOut()}),
        TOKENS,
    ),
    "multiplied into another value": (Net(multiplied_into, **TWO), TOKENS),
    "written into another value": (Net(written_into, **TWO), TOKENS),
    "its input is needed": (Net(overwritten, **BARE), TOKENS),
}
