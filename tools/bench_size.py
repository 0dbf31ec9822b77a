"""The memory that each verb takes on a model with gigabytes of weights.

    python tools/bench_size.py [--model regnet_y_128gf] [--steps GLOB ...]

Each step runs in a process of its own, in place, and exports have external data. The figure is the
most memory that was resident while it ran, the model's own included and what was resident before
the model was built left out, as a ratio to the bytes of the model: 1.00 is the model alone. What
libraries load at their first use is loaded by a small model before. More than 2.5 is red.
The model is one of torchvision's; `wide:MEGABYTES` is a network of few and large convolutions, and
`decoder:LAYERS` a language model of that many pre-norm blocks, 2,048 channels wide, in bfloat16 (24
have 2.6 GB), with steps of its own.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

import normswap
from normswap.deploy import export as export_module

LIMIT = 2.5
WIDTH = 1024
CHANNELS = 2048
X = torch.zeros(2, 3, 32, 32)
TOKENS = torch.arange(16).view(2, 8)


class Wide(nn.Module):
    """Residual blocks of a convolution, 1,024 to 1,024 by 3 by 3 (38 MB), BatchNorm and ReLU."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.convs = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False) for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + torch.relu(norm(conv(x)))
        return x.mean((2, 3))


class Block(nn.Module):
    """A pre-norm block with RMSNorms, 50 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(CHANNELS, eps=1e-5) for _ in range(2))
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.out = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.up = nn.Linear(CHANNELS, 4 * CHANNELS, bias=False)
        self.down = nn.Linear(4 * CHANNELS, CHANNELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(n, length, 3, 16, -1).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, -1))
        return x + self.down(nn.functional.silu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """An embedding, pre-norm blocks, a norm and a head."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(16384, CHANNELS)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm = nn.RMSNorm(CHANNELS, eps=1e-5)
        self.head = nn.Linear(CHANNELS, 16384, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.table(tokens))))


def build(name: str) -> nn.Module:
    if name.startswith("decoder:"):
        with torch.device("meta"):
            model = Decoder(int(name[8:])).bfloat16()
        model = model.to_empty(device="cpu").eval()
        with torch.no_grad():
            for each in model.parameters():
                each.uniform_(0.5, 1.5) if each.dim() == 1 else each.normal_(0, 0.02)
        return model
    if name.startswith("wide:"):
        return Wide(max(1, round(float(name[5:]) / (WIDTH * WIDTH * 9 * 4 / 1e6)))).eval()
    import zoo_models  # only here: it imports every zoo

    model: nn.Module = getattr(zoo_models.torchvision.models, name)().eval()
    return model


def all_in_one(model: nn.Module, out: Path) -> None:
    normswap.fold(model, X, inplace=True)
    normswap.save(model, out)
    if not normswap.export(model, X, out / "model.onnx").passed:
        raise SystemExit("the exported file does not compute the same")


Step = Callable[[nn.Module, Path], object]
STEPS: dict[str, Step] = {
    "build": lambda model, out: None,
    "convert": lambda model, out: normswap.convert(model, "group_norm", inputs=X, inplace=True),
    "fold": lambda model, out: normswap.fold(model, X, inplace=True),
    "tune": lambda model, out: normswap.freeze(model, X, mode="tune", inplace=True),
    "tune, bake": lambda model, out: normswap.bake(
        normswap.freeze(model, X, mode="tune", inplace=True), inplace=True
    ),
    "save": lambda model, out: normswap.save(model, out),
    "load": lambda model, out: normswap.load(out, source=lambda: model),
    "export": lambda model, out: normswap.export(model, X, out / "model.onnx"),
    "export, unchecked": lambda model, out: normswap.export(
        model, X, out / "model.onnx", validate=False
    ),
    "validate": lambda model, out: normswap.validate(out / "model.onnx", model, X),
    "fold, save and export": all_in_one,
}
DECODER_STEPS: dict[str, Step] = {
    "build": lambda model, out: None,
    "fold_gains": lambda model, out: normswap.fold_gains(model, TOKENS, inplace=True),
    "rotate": lambda model, out: normswap.rotate(model, TOKENS, inplace=True),
    "rotate, heads": lambda model, out: normswap.rotate(model, TOKENS, heads=True, inplace=True),
    "rescale": lambda model, out: normswap.rescale(
        model, TOKENS, [TOKENS], limit=1.0, inplace=True
    ),
}
NEEDS = {"load": "save", "validate": "export, unchecked"}  # what another process must write before


def is_decoder(model: str) -> bool:
    return model.startswith("decoder:")


def resident(field: str = "VmRSS") -> int:
    """The resident memory of this process, in KiB; VmHWM is the most it was, not its parent's."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split()[0])


def run(name: str, model: str, out: Path) -> dict[str, float]:
    """Carry out one step in this process and say what it took."""
    torch.set_num_threads(1)
    export_module.EXTERNAL_DATA_BYTES = 0
    steps, small = (DECODER_STEPS, "decoder:1") if is_decoder(model) else (STEPS, "wide:1")
    with tempfile.TemporaryDirectory() as scratch:
        for each in (NEEDS.get(name, "build"), name):
            steps[each](build(small), Path(scratch))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    built = build(model)
    size = sum(t.nbytes for t in (*built.parameters(), *built.buffers()))
    start = perf_counter()
    steps[name](built, out)
    seconds = perf_counter() - start
    most = (resident("VmHWM") - before) * 1024
    return {"bytes": size, "ratio": most / size, "seconds": seconds}


def measure(name: str, model: str, out: Path) -> dict[str, float]:
    """As `run`, in a process of its own."""
    command = [sys.executable, __file__, "--run", name, "--model", model, "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="regnet_y_128gf")
    parser.add_argument("--steps", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--run", choices={**STEPS, **DECODER_STEPS}, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run, args.model, args.out)))
        return
    table = Table("step", "memory, of the model's", "s", box=None)
    size = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        written = set[str]()
        for name in DECODER_STEPS if is_decoder(args.model) else STEPS:
            if not any(fnmatchcase(name, glob) for glob in args.steps):
                continue
            needed = NEEDS.get(name)
            if needed and needed not in written:
                measure(needed, args.model, Path(scratch))
            result = measure(name, args.model, Path(scratch))
            written.add(name)
            size = result["bytes"]
            style = "bold red" if result["ratio"] > LIMIT else ""
            table.add_row(name, Text(f"{result['ratio']:.2f}", style), f"{result['seconds']:.0f}")
    table.title = f"{args.model}, {size / 1e9:.2f} GB, torch {torch.__version__}"
    Console(width=None if sys.stdout.isatty() else 100).print(table)


if __name__ == "__main__":
    main()
