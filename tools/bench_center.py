"""What turning LayerNorms into RMSNorms leaves and gains, on models of three libraries.

    python tools/bench_center.py [--models GLOB ...] [--batches 1 8] [--runs 20] [--threads 2]

Random weights, random gains and biases. For each model: how many LayerNorms there are before and
after and how many explicit centerings that took, the largest deviation of the outputs relative to
the largest output, and the speed-up, the ratio of median times of the model as it was and as it is
now, above 1 where it is faster: in eager mode with `Center` alone and followed by `FoldAffine`, at
each batch size; and in ONNX Runtime at the first. The variants are called in turn, so that they
meet the same state of the machine, and malloc keeps large blocks (`bench_norms` says why). Below
the table is why LayerNorms are left.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from bench_norms import keep_memory
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from zoo_models import timm, torchvision

import normswap as ns

WARMUP = 3
TOKENS = 128
Call = Callable[[], Any]


class FirstOutput(nn.Module):
    """A model of transformers that takes ids and returns its first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        output: Tensor = self.model(ids)[0]
        return output


def gpt2() -> nn.Module:
    import transformers

    return FirstOutput(transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False)))


def bert() -> nn.Module:
    import transformers

    return FirstOutput(transformers.BertModel(transformers.BertConfig()))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision:vit_b_16": lambda: torchvision.models.vit_b_16(),
    "torchvision:swin_t": lambda: torchvision.models.swin_t(),
    "timm:vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224"),
    "timm:deit3_small_patch16_224": lambda: timm.create_model("deit3_small_patch16_224"),
    "timm:mixer_s16_224": lambda: timm.create_model("mixer_s16_224"),
    "timm:swin_tiny": lambda: timm.create_model("swin_tiny_patch4_window7_224"),
    "timm:convnext_atto": lambda: timm.create_model("convnext_atto"),
    "transformers:gpt2": gpt2,
    "transformers:bert": bert,
}


def inputs(name: str, batch: int) -> Tensor:
    """Images, or ids of tokens."""
    if name.startswith("transformers"):
        return torch.randint(1000, (batch, TOKENS))
    return torch.randn(batch, 3, 224, 224)


def randomise(model: nn.Module) -> nn.Module:
    """Gains, biases and what starts at 0 or next to it (LayerScale, a head) do something."""
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in module.named_parameters(recurse=False):
                if isinstance(module, nn.LayerNorm) and name == "weight":
                    tensor.uniform_(0.5, 1.5)
                elif name == "bias":
                    tensor.normal_(0, 0.3)
                elif tensor.dim() == 1 or not tensor.any():
                    tensor.uniform_(0.05, 0.15)
    return model.eval()


def speed(calls: list[Call], runs: int) -> list[float]:
    """The median times of calls in turn; the first's by each."""
    times: list[list[float]] = [[] for _ in calls]
    for run in range(WARMUP + runs):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if run >= WARMUP:
                own.append(time.perf_counter() - start)
    first, *others = map(median, times)
    return [first / other for other in others]


def in_onnx_runtime(models: list[nn.Module], x: Tensor, threads: int, scratch: Path) -> list[Call]:
    """A session for each model, with torch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    calls: list[Call] = []
    for number, model in enumerate(models):
        path = scratch / f"{number}.onnx"
        ns.export(model, x, path, dynamic=False, validate=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x.numpy()}
        calls.append(partial(session.run, None, feed))
    return calls


def measure(name: str, batches: list[int], runs: int, threads: int) -> tuple[list[str], list[str]]:
    """A row of the table, and the reasons."""
    torch.manual_seed(0)
    model, x = randomise(MODELS[name]()), inputs(name, batches[0])
    decided = ns.plan(model, ns.Center(), inputs=x)
    centered = decided.apply(model)
    folded = ns.plan(centered, ns.FoldAffine(), inputs=x).apply(centered)
    before = sum(isinstance(each, nn.LayerNorm) for each in model.modules())
    explicit = sum(edit.edit == "center_output" for edit in decided.edits)
    with torch.no_grad():
        expected = model(x)
        deviation = ((centered(x) - expected).abs().max() / expected.abs().max()).item()
        row = [name, f"{before} -> {len(decided.left)}", str(explicit), f"{deviation:.0e}"]
        variants = [model, centered, folded]
        for batch in batches:
            own = inputs(name, batch)
            row += map("{:.2f}".format, speed([partial(each, own) for each in variants], runs))
    with TemporaryDirectory() as scratch:
        calls = in_onnx_runtime(variants, x, threads, Path(scratch))
        row += map("{:.2f}".format, speed(calls, runs))
    return row, list(_reasons(name, decided))


def _reasons(name: str, decided: Any) -> Iterator[str]:
    sites: dict[str, list[str]] = {}
    for left in decided.left:
        sites.setdefault(left.reason, []).append(left.site)
    for reason, named in sites.items():
        yield f"{name}: {len(named)} from {named[0]}: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    table = Table(title=f"RMSNorm for LayerNorm, {arguments.threads} threads, speed-up")
    for column in ("model", "LayerNorms", "explicit", "deviation"):
        table.add_column(column)
    for batch in arguments.batches:
        table.add_column(f"batch {batch}")
        table.add_column("+ FoldAffine")
    table.add_column(f"ONNX, batch {arguments.batches[0]}")
    table.add_column("+ FoldAffine")
    reasons: list[str] = []
    for name in MODELS:
        if any(fnmatchcase(name, glob) for glob in arguments.models):
            row, why = measure(name, arguments.batches, arguments.runs, arguments.threads)
            table.add_row(*row)
            print(*row, sep="  ", flush=True)
            reasons += why
    Console(width=160).print(table)
    print(*reasons, sep="\n")


if __name__ == "__main__":
    keep_memory()
    main()
