"""What a rotation saves a quantizer, on a small language model trained here.

    python tools/bench_rotate.py [--steps 800] [--norm rms|layer] [--threads 2]

A pre-norm language model by character (four blocks, 128 channels, LayerNorm or RMSNorm with gains)
learns the sources of Python's standard library, which every machine has; the last files in
alphabetical order are held back. Then the Linears are quantized in simulation, weights symmetric
per output channel, what they take symmetric per token, in 8 or 4 bits, as it is and after
`fold_gains` and `rotate` (Hadamard, random, principal components; heads too). The figures are bits
per character on the held-back text; and the kurtosis of what the Linears that read the stream take,
over the channels of a token, whose mean is 3 for a normal distribution.
"""

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import normswap as ns

CHANNELS, HEADS, BLOCKS, LENGTH, BATCH = 128, 4, 4, 128, 16
HELD_BACK = 0.05  # of the text


class Block(nn.Module):
    """A pre-norm block: causal attention, then two layers with a GELU between them."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(CHANNELS), norm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, CHANNELS))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Characters(nn.Module):
    """A language model of characters."""

    def __init__(self, characters: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.table = nn.Embedding(characters, CHANNELS)
        self.positions = nn.Parameter(torch.randn(LENGTH, CHANNELS) * 0.02)
        self.blocks = nn.Sequential(*(Block(norm) for _ in range(BLOCKS)))
        self.norm, self.head = norm(CHANNELS), nn.Linear(CHANNELS, characters)

    def forward(self, text: Tensor) -> Tensor:
        x = self.table(text) + self.positions[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def sources() -> tuple[Tensor, int]:
    """The text as numbers of characters, and how many different ones there are."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = "".join(each.read_text(encoding="utf-8", errors="ignore") for each in files)
    known = sorted(set(text))
    number = {character: index for index, character in enumerate(known)}
    return torch.tensor([number[each] for each in text]), len(known)


def windows(text: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Pieces of the text, (count, LENGTH + 1): at random, or evenly spaced."""
    last = len(text) - LENGTH - 1
    if generator is None:
        starts = torch.linspace(0, last, count).long()
    else:
        starts = torch.randint(0, last, (count,), generator=generator)
    return torch.stack([text[start : start + LENGTH + 1] for start in starts])


def trained(text: Tensor, characters: int, norm: type[nn.Module], steps: int) -> nn.Module:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Characters(characters, norm)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    for step in track(range(steps), "training"):
        rate = min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = 2e-3 * rate
        pieces = windows(text, BATCH, generator)
        loss = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def rounded(x: Tensor, bits: int, axis: int) -> Tensor:
    """`x` on a symmetric grid of 2^bits - 1 points, with one step for each slice along `axis`."""
    most = 2 ** (bits - 1) - 1
    step = x.abs().amax(axis, keepdim=True).clamp_min(1e-12) / most
    return (x / step).round().clamp(-most, most) * step


@contextmanager
def quantized(model: nn.Module, weights: int | None, inputs: int | None) -> Iterator[None]:
    """Inside, the Linears of the blocks compute with this many bits; the head stays."""

    def rounding(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(args[0], inputs or 32, -1),)

    layers = [each for each in model.get_submodule("blocks").modules() if _is_linear(each)]
    before = [each.weight.detach().clone() for each in layers]
    with ExitStack() as hooks, torch.no_grad():
        for each in layers:
            if weights is not None:
                each.weight.copy_(rounded(each.weight, weights, 1))
            if inputs is not None:
                handle = each.register_forward_pre_hook(rounding)
                hooks.callback(handle.remove)
        yield
        for each, weight in zip(layers, before, strict=True):
            each.weight.copy_(weight)


def _is_linear(module: Any) -> Any:
    return isinstance(module, nn.Linear)


def bits_per_character(model: nn.Module, pieces: Tensor) -> float:
    losses = []
    with torch.no_grad():
        for each in pieces.split(32):
            logits = model(each[:, :-1]).flatten(0, 1)
            losses.append(F.cross_entropy(logits, each[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean() / math.log(2))


def kurtosis(model: nn.Module, pieces: Tensor) -> float:
    """The mean over tokens, and over the layers that read the stream."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0] - args[0].mean(-1, keepdim=True)
        found.append((x.pow(4).mean(-1) / x.square().mean(-1).square()).mean())

    with ExitStack() as hooks, torch.no_grad():
        for name, each in model.named_modules():
            if name.endswith((".qkv", ".up")):
                hooks.callback(each.register_forward_pre_hook(note).remove)
        model(pieces[:32, :-1])
    return float(torch.stack(found).mean())


SETTINGS: dict[str, tuple[int | None, int | None]] = {
    "float32": (None, None),
    "W8A8": (8, 8),
    "W4A16": (4, None),
    "W8A4": (8, 4),
    "W4A4": (4, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--norm", choices=("rms", "layer"), default="rms")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    text, characters = sources()
    split = int(len(text) * (1 - HELD_BACK))
    norm = nn.RMSNorm if args.norm == "rms" else nn.LayerNorm
    start = time.perf_counter()
    model = trained(text[:split], characters, norm, args.steps)
    minutes = (time.perf_counter() - start) / 60
    pieces, x = windows(text[split:], 128), text[:LENGTH].view(1, -1)
    data = [windows(text[:split], 32)[:, :-1]]
    made: dict[str, Callable[[], nn.Module]] = {
        "as trained": lambda: copy.deepcopy(model),
        "gains folded": lambda: ns.fold_gains(model, x),
        "rotated, Hadamard": lambda: ns.rotate(model, x),
        "rotated, Hadamard, heads": lambda: ns.rotate(model, x, heads=True),
        "rotated, random": lambda: ns.rotate(model, x, with_="random"),
    }
    if args.norm == "rms":
        made["rotated, components"] = lambda: ns.rotate(model, x, with_="pca", data=data)
    table = Table("model", *SETTINGS, "kurtosis", box=None)
    for name, make in made.items():
        each = make()
        row = []
        for weights, inputs in SETTINGS.values():
            with quantized(each, weights, inputs):
                row.append(f"{bits_per_character(each, pieces):.3f}")
        table.add_row(name, *row, f"{kurtosis(each, pieces):.1f}")
    table.title = f"{args.norm}, {args.steps} steps in {minutes:.1f} min, torch {torch.__version__}"
    Console().print(table)


if __name__ == "__main__":
    main()
