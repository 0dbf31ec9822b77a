"""How the cost of a rewrite grows with the number of normalizations.

    python tools/bench_sites.py [--sites 10 100 1000] [--rounds 3] [--networks GLOB ...]

The networks are chains of residual blocks with few channels, so that all of the time goes into
seeing the model and changing it: `residual` with BatchNorm before the addition (arXiv 1512.03385),
`pre-activation` with BatchNorm before the convolutions (1603.05027), whose BatchNorms all normalize
one stream and do not fold; `decoder` of pre-norm attention and MLPs with an RMSNorm each, of which
48, 96 and 192 are 24, 48 and 96 layers. Processor time, one thread, the least of the rounds, in
milliseconds per site: of the whole verb, of torch.export in it (torch's own cost of a graph), of
the check of the result beside the original (what `check=False` saves), and of the rest, which is
ours. `growth` is the slope of log(time) over log(sites) between the last two sizes; 1 is linear.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normswap

CHANNELS, SIDE = 4, 4


class Residual(nn.Module):
    """Two convolutions with a BatchNorm each, and their input added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(x + self.bn2(self.conv2(y)))


class PreActivation(Residual):
    """Two convolutions, each after BatchNorm and ReLU, and their input added."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.bn1(x)))
        return x + self.conv2(self.relu(self.bn2(y)))


class Decoder(nn.Module):
    """Attention and an MLP, each after an RMSNorm and added to the stream, (N, L, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x))))


WIDTH = 8
NETWORKS = {"residual": Residual, "pre-activation": PreActivation, "decoder": Decoder}


def chain(network: str, sites: int) -> nn.Module:
    """A network with so many normalizations, an even number."""
    blocks = (NETWORKS[network]() for _ in range(sites // 2))
    if network == "decoder":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), *blocks, nn.Linear(WIDTH, WIDTH)).eval()
    return nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), *blocks).eval()


Verb = Callable[[nn.Module], nn.Module]
X, TOKENS = torch.zeros(2, CHANNELS, SIDE, SIDE), torch.randn(2, 5, WIDTH)
VERBS: dict[str, Verb] = {
    "convert": partial(normswap.convert, to="group_norm", inputs=X, inplace=True),
    "fold": partial(normswap.fold, inputs=X, inplace=True),
    "freeze, tune": partial(normswap.freeze, inputs=X, mode="tune", inplace=True),
}
DECODER_VERBS: dict[str, Verb] = {
    "fold_gains": partial(normswap.fold_gains, inputs=TOKENS, inplace=True),
    "rescale": partial(normswap.rescale, inputs=TOKENS, data=[TOKENS], limit=0.01, inplace=True),
    "rotate": partial(normswap.rotate, inputs=TOKENS, inplace=True),
}


def verbs_of(network: str) -> dict[str, Verb]:
    """What is done to it."""
    return DECODER_VERBS if network == "decoder" else VERBS


@contextmanager
def time_in_torch() -> Iterator[list[float]]:
    """Yield a list; after it, its one item is the seconds that torch.export took inside."""
    spent, export = [0.0], torch.export.export

    def timed(*args: object, **kwargs: object) -> object:
        start = time.process_time()
        try:
            return export(*args, **kwargs)  # type: ignore[arg-type]
        finally:
            spent[0] += time.process_time() - start

    torch.export.export = timed  # type: ignore[assignment]
    try:
        yield spent
    finally:
        torch.export.export = export


def measure(verb: Verb, network: str, sites: int, rounds: int) -> tuple[float, float]:
    """Seconds that the verb takes, and those of torch.export among them."""
    results = []
    for _ in range(rounds):
        model = chain(network, sites)
        with time_in_torch() as torchs:
            start = time.process_time()
            verb(model)
            results.append((time.process_time() - start, torchs[0]))
    return min(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=["*"], metavar="GLOB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = sorted(args.sites)
    for network in ("residual", "decoder"):
        for verb in verbs_of(network).values():
            verb(chain(network, 4))  # imports, and what torch caches
    table = Table("ms per site", *map(str, sizes), "growth", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for network in NETWORKS:
        if not any(fnmatchcase(network, glob) for glob in args.networks):
            continue
        for name, verb in verbs_of(network).items():
            unchecked = partial(verb, check=False)
            measured = [
                (
                    *measure(verb, network, size, args.rounds),
                    measure(unchecked, network, size, args.rounds)[0],
                )
                for size in sizes
            ]
            parts = {
                f"{network}: {name}": [whole for whole, _, _ in measured],
                "  torch.export": [torchs for _, torchs, _ in measured],
                "  the check": [whole - without for whole, _, without in measured],
                "  the rest": [without - torchs for _, torchs, without in measured],
            }
            for part, seconds in parts.items():
                cells = [f"{1e3 * t / size:.2f}" for t, size in zip(seconds, sizes, strict=True)]
                table.add_row(part, *cells, growth(sizes, seconds))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def growth(sizes: list[int], seconds: list[float]) -> str:
    if len(sizes) == 1 or min(seconds) <= 0:  # a difference of two measurements may be noise
        return ""
    return f"{math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2]):.2f}"


if __name__ == "__main__":
    main()
