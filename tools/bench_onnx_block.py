"""Where the time goes in a residual block with GroupNorm in ONNX Runtime, by the form of it.

    python tools/bench_onnx_block.py [--threads 1] [--rounds 15]

Three bottlenecks of ResNet-50 one after the other (convolutions of 1x1, 3x3 and 1x1, each with a
normalization, and a sum), batch 1, between two convolutions, at three of its stages. ONNX Runtime
computes convolutions in a blocked layout; the forms differ in what else they compute in it:

- folded: the BatchNorm, in all convolutions;
- generic, onnxruntime: GroupNorm of 32 groups, as `normswap.export` writes it, batch fixed;
- pooled: the mean and the mean square by AveragePool over all, which has a blocked form, as x times
  x does; the scale and shift after a conversion;
- blocked: scale and shift as well, each brought to the size of x by a Resize: only tensors of one
  position are converted;
- MatMul: the folded block with channels last, the 1x1 convolutions as MatMul.

Files are not validated on extreme inputs, where a mean square less a squared mean has no digits.

For each form: the time as a ratio to folded (forms in turn, lower quartile of the calls), and by
the runtime's profiler the time of the kinds of operators, in percent of folded.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import quantiles

import onnxruntime
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normswap

STAGES = ((256, 64, 56), (512, 128, 28), (1024, 256, 14))  # channels, those inside, size
GROUPS = 32
KINDS = {
    "convolutions": ("Conv", "MatMul", "Gemm", "FusedGemm"),  # FusedConv applies a scale and shift
    "conversions": ("ReorderInput", "ReorderOutput", "Transpose"),
}


class Pooled(nn.GroupNorm):
    """GroupNorm (1, C, H, W) by the mean and the mean square of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        mean, square = (
            F.avg_pool2d(each, x.shape[2]).view(1, self.num_groups, -1, 1).mean(2, keepdim=True)
            for each in (x, x * x)
        )
        share = (1, self.num_groups, -1, 1)
        scale = self.weight.view(share) / (F.relu(square - mean * mean) + self.eps).sqrt()
        shift = self.bias.view(share) - mean * scale
        return self.applied(x, *(each.reshape(1, -1, 1, 1) for each in (scale, shift)))

    def applied(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return x * scale + shift


class Blocked(Pooled):
    """The same, with scale and shift brought into the layout of x, and to its size."""

    def applied(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        ones = torch.ones(x.shape[1], 1, 1, 1)
        scale, shift = (
            # By its factor: ONNX Runtime has no blocked operator for a Resize to a size.
            F.interpolate(F.conv2d(each, ones, groups=len(ones)), scale_factor=x.shape[2])
            for each in (scale, shift)
        )
        return x * scale + shift


class Pointwise(nn.Linear):
    """A 1x1 convolution of (1, H, W, C)."""


class Middle(nn.Conv2d):
    """A convolution of (1, H, W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inside: int, norm: type[nn.Module] | None, last: bool):
        super().__init__()
        bias = norm is None
        one = Pointwise if last else lambda i, o, bias: nn.Conv2d(i, o, 1, bias=bias)
        three = Middle if last else nn.Conv2d

        def normal(width: int) -> nn.Module:
            return nn.Identity() if norm is None else norm(GROUPS, width)

        self.inner = nn.Sequential(
            *(one(channels, inside, bias=bias), normal(inside), nn.ReLU()),
            *(three(inside, inside, 3, padding=1, bias=bias), normal(inside), nn.ReLU()),
            *(one(inside, channels, bias=bias), normal(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.inner(x))


def network(channels: int, inside: int, norm: type[nn.Module] | None, last: bool) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Bottleneck(channels, inside, norm, last) for _ in range(3))
    ends = [Pointwise(channels, channels) if last else nn.Conv2d(channels, channels, 1)] * 2
    model = nn.Sequential(ends[0], *blocks, ends[1]).eval()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias)
    return model


def session(path: Path, threads: int, profile: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_profiling, options.profile_file_prefix = profile, str(path)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def kernels(path: Path, x: Tensor, threads: int, runs: int) -> Counter[str]:
    """Milliseconds of one run by kind of operator, each a lower quartile over the runs."""
    opened = session(path, threads, profile=True)
    for _ in range(runs):
        opened.run(None, {opened.get_inputs()[0].name: x.numpy()})
    taken: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for event in json.loads(Path(opened.end_profiling()).read_text(encoding="utf-8")):
        if event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    total: Counter[str] = Counter()
    for (operator, _), times in taken.items():
        kind = next((kind for kind, of in KINDS.items() if operator in of), "the rest")
        total[kind] += quantiles(times)[0]
    return total


def stage(folder: Path, sizes: tuple[int, int, int], threads: int, rounds: int) -> Table:
    channels, inside, size = sizes
    forms = {
        "folded": (None, False, {}),
        "generic": (nn.GroupNorm, False, {}),
        "onnxruntime": (nn.GroupNorm, False, {"target": "onnxruntime"}),
        "pooled": (Pooled, False, {}),
        "blocked": (Blocked, False, {}),
        "MatMul": (None, True, {}),
    }
    opened, inputs, found = {}, {}, {}
    for form, (norm, last, options) in forms.items():
        model = network(channels, inside, norm, last)
        x = torch.randn(1, size, size, channels) if last else torch.randn(1, channels, size, size)
        path = folder / f"{form}.onnx"
        normswap.export(model, x, path, dynamic=False, validate=False, **options)
        opened[form], inputs[form] = session(path, threads, profile=False), x.numpy()
        y = opened[form].run(None, {opened[form].get_inputs()[0].name: x.numpy()})[0]
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-3, atol=1e-3)
        found[form] = kernels(path, x, threads, 2 * rounds)
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for form, each in opened.items():
            for count in range(6):
                started = time.perf_counter()
                each.run(None, {each.get_inputs()[0].name: inputs[form]})
                if count > 1:  # before that, caches are another's
                    times[form].append(time.perf_counter() - started)
            time.sleep(0.02 * (threads > 1))  # until the session's threads no longer spin
    quarter = {form: quantiles(each)[0] for form, each in times.items()}
    table = Table(f"{channels} channels, {size}x{size}", "ratio", *KINDS, "the rest")
    for form, kinds in found.items():
        shares = (100 * kinds[kind] / found["folded"].total() for kind in (*KINDS, "the rest"))
        ratio = quarter[form] / quarter["folded"]
        table.add_row(form, f"{ratio:.2f}", *(f"{share:.0f}" for share in shares))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        for sizes in STAGES:
            Console().print(stage(Path(name), sizes, arguments.threads, arguments.rounds))


if __name__ == "__main__":
    main()
