"""What normalization costs in ONNX Runtime, by the form in which it is written.

    python tools/bench_onnx.py [--threads 2] [--rounds 9]     layers, then ResNet-50
    python tools/bench_onnx.py --rms                          RMSNorm beside LayerNorm
    python tools/bench_onnx.py --formats FOLDER               size, latency, accuracy, deviation
    python tools/bench_onnx.py --equalize FOLDER              int8 after rescale(per="channel")
    python tools/bench_onnx.py --openvino PYTHON              ResNet-50, beside OpenVINO

Layers: GroupNorm of 32 groups with gain and bias, at the shapes in LAYERS, in milliseconds and as a
ratio to what torch's exporter writes (`generic`):

- opset 21: its operator GroupNormalization, as torch exports it;
- rows: LayerNormalization over the grouped view, then Mul and Add;
- onnxruntime: `normswap.export(..., target="onnxruntime")`, batch open; static: batch fixed;
- torch: eager mode.

Moments: the methods in MOMENTS, at the first two shapes, `onnxruntime` as a ratio to `generic`.

ResNet-50, random weights, batch 1, 224 px: the model with each method in the place of BatchNorm, as
a ratio to its folded BatchNorm, in the same forms.

--rms: RMSNorm with a gain, at the shapes in TOKENS, in opset 20 as torch's exporter writes it and
as `normswap.export` does, and in opset 23, as a ratio to LayerNorm with gain and bias.

--formats: the ResNet-20 in FOLDER (as `tools/cifar.py` says), with folded BatchNorm and with
GroupNorm of 4 groups, calibrated: float32 for both targets, float16, and int8 quantized on 256
training images. Accuracy on the test images, deviation of the logits from those of torch in
float32, as the largest difference over the largest value, and latency at batch 1.

--equalize: the EfficientNet-Lite0 in FOLDER (see `tools/real_networks.py`), folded, in int8 with
ranges of 32 training images, as it is, after `rescale(per="channel")`, and with ReLU in the place
of ReLU6, which no factor passes, before that (as arXiv 1906.04721 does): how many sets of layers
were equalized, accuracy on the 250 test images, how often the class is that of the network in
float32, and the squared error of the logits, relative to their variance. A few minutes.

--openvino: that ResNet-50, folded and with GroupNorm, in ONNX Runtime and in OpenVINO, with the
batch open and fixed, as ratios to the folded one in ONNX Runtime. PYTHON is one that has both
packages; it needs no torch. Each file in each runtime is a process of its own
(`tools/timed_runs.py`), and they take turns; a figure is the median of the ratios of the rounds.

Every session has its threads to itself while it is measured: in each round the forms take turns, a
burst each, of which the first calls do not count. A figure is the median of all calls.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from cifar import augmented, pretrained, test_batches
from real_networks import efficientnet
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from zoo_models import load

import normswap
from normswap.passes import Equalize

LAYERS = (
    (1, 64, 112, 112),
    (8, 256, 56, 56),
    (1, 256, 56, 56),
    (1, 512, 28, 28),
)
TOKENS = ((1, 128, 384), (1, 128, 768), (8, 512, 768))
OPSET_21 = "opset 21"
FORMS: dict[str, dict[str, Any]] = {
    "generic": {},
    OPSET_21: {},
    "onnxruntime": {"target": "onnxruntime"},
    "static": {"target": "onnxruntime", "dynamic": False},
}
MOMENTS = (
    "rms_norm",
    "filter_response_norm",
    "global_response_norm",
    "batch_instance_norm",
    "switchable_norm",
    "evonorm_s0",
    "evonorm_b0",
)
IN_OPENVINO: dict[str, dict[str, Any]] = {
    "open": {},
    "fixed": {"dynamic": False},
    "fixed, onnxruntime": FORMS["static"],
}
TIMED_RUNS = str(Path(__file__).with_name("timed_runs.py"))
METHODS: dict[str, dict[str, Any]] = {
    "group_norm": {"groups": 32},
    "layer_norm": {},
    "instance_norm": {},
}


class Rows(nn.GroupNorm):
    """GroupNorm as LayerNormalization over the grouped view."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], self.num_groups, -1)
        normal = F.layer_norm(rows, rows.shape[-1:], eps=self.eps).reshape(x.shape)
        return normal * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    opened, value = session(path, threads), x.numpy()
    name = opened.get_inputs()[0].name
    return lambda: opened.run(None, {name: value})


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int, burst: int) -> dict[str, float]:
    """The median time of each call."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            for count in range(3 + burst):
                started = time.perf_counter()
                call()
                if count >= 3:  # before that, caches and threads are another's
                    taken[name].append(time.perf_counter() - started)
            time.sleep(0.05)  # until the session's threads no longer spin
    return {name: 1e3 * median(times) for name, times in taken.items()}


def write(form: str, module: nn.Module, x: Tensor, path: Path) -> None:
    """Write the module in this form."""
    if form == OPSET_21:
        sizes = ({0: "batch"},)
        torch.onnx.export(
            module.eval(), (x,), path, dynamo=True, opset_version=21, dynamic_shapes=sizes
        )
    else:
        assert normswap.export(module, x, path, **FORMS[form]).passed


def layers(folder: Path, threads: int, rounds: int) -> Table:
    table = Table("shape", *FORMS, "rows", "torch")
    for shape in LAYERS:
        torch.manual_seed(0)
        x, norm = torch.randn(shape), nn.GroupNorm(32, shape[1])
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        rows = Rows(32, shape[1])
        rows.load_state_dict(norm.state_dict())
        calls: dict[str, Callable[[], Any]] = {}
        path = folder / "layer.onnx"
        for form in FORMS:
            write(form, norm, x, path)
            calls[form] = runner(path, x, threads)
        write("generic", rows, x, path)
        calls["rows"] = runner(path, x, threads)
        calls["torch"] = lambda norm=norm, x=x: norm(x)
        with torch.no_grad():
            found = milliseconds(calls, rounds, 30 if shape[0] == 1 else 8)
        cells = (f"{ms:.3f} ({ms / found['generic']:.2f})" for ms in found.values())
        table.add_row("x".join(map(str, shape)), *cells)
    return table


def moments(folder: Path, threads: int, rounds: int) -> Table:
    table = Table("method", *("x".join(map(str, shape)) for shape in LAYERS[:2]))
    for method in MOMENTS:
        ratios = []
        for shape in LAYERS[:2]:
            x, calls = torch.randn(shape), {}
            norm = normswap.create(method, shape[1])
            for form in ("generic", "onnxruntime"):
                path = folder / "layer.onnx"
                write(form, norm, x, path)
                calls[form] = runner(path, x, threads)
            found = milliseconds(calls, rounds, 30 if shape[0] == 1 else 8)
            ratios.append(f"{found['onnxruntime'] / found['generic']:.2f}")
        table.add_row(method, *ratios)
    return table


def root_mean_squares(folder: Path, threads: int, rounds: int) -> Table:
    table = Table("shape", "LayerNorm, ms", "torch's, opset 20", "ours, opset 20", "ours, opset 23")
    for shape in TOKENS:
        x, path = torch.randn(shape), folder / "layer.onnx"
        calls: dict[str, Callable[[], Any]] = {}
        for name, norm, opset in (
            ("LayerNorm", nn.LayerNorm(shape[-1]), 20),
            ("opset 20", nn.RMSNorm(shape[-1]), 20),
            ("opset 23", nn.RMSNorm(shape[-1]), 23),
        ):
            assert normswap.export(norm, x, path, opset=opset).passed
            calls[name] = runner(path, x, threads)
        torch.onnx.export(nn.RMSNorm(shape[-1]), (x,), path, dynamo=True, opset_version=20)
        calls["torch's"] = runner(path, x, threads)
        found = milliseconds(calls, rounds, 30)
        ratios = [found[name] / found["LayerNorm"] for name in ("torch's", "opset 20", "opset 23")]
        cells = (f"{ratio:.2f}" for ratio in ratios)
        table.add_row("x".join(map(str, shape)), f"{found['LayerNorm']:.3f}", *cells)
    return table


def models(folder: Path, threads: int, rounds: int) -> Table:
    case, x = load("classification", "resnet50"), torch.randn(1, 3, 224, 224)
    model, folded = case.model, folder / "folded.onnx"
    assert normswap.export(normswap.fold(model, x), x, folded).passed
    calls = {"folded": runner(folded, x, threads)}
    for method, options in METHODS.items():
        swapped = normswap.convert(model, method, inputs=x, **options)
        for form in FORMS:
            if form == OPSET_21 and method == "instance_norm":
                continue  # the same operator as before
            path = folder / "model.onnx"
            write(form, swapped, x, path)
            calls[f"{method}, {form}"] = runner(path, x, threads)
    found = milliseconds(calls, rounds, 6)
    table = Table("ResNet-50", "ms", "ratio to folded", "of what the generic form adds")
    base = found["folded"]
    for name, ms in found.items():
        generic = found.get(f"{name.partition(',')[0]}, generic", base)
        share = f"{(ms - base) / (generic - base):.2f}" if generic != base else ""
        table.add_row(name, f"{ms:.1f}", f"{ms / base:.3f}", share)
    return table


def beside_openvino(python: str, folder: Path, threads: int, rounds: int) -> Table:
    case, x = load("classification", "resnet50"), torch.randn(1, 3, 224, 224)
    models = {
        "BatchNorm, folded": normswap.fold(case.model, x),
        "group_norm": normswap.convert(case.model, "group_norm", inputs=x),
    }
    children: dict[tuple[str, str], Popen[str]] = {}
    for name, model in models.items():
        for form, how in IN_OPENVINO.items():
            path = folder / f"{len(children)}.onnx"
            normswap.export(model, x, path, validate=False, **how)
            for runtime in ("onnxruntime", "openvino"):
                command = [python, TIMED_RUNS, runtime, str(path), str(threads)]
                child = Popen(command, stdin=PIPE, stdout=PIPE, text=True)
                children[f"{name}, {form}", runtime] = child
                burst(child, 0)
    ratios: dict[tuple[str, str], list[float]] = {which: [] for which in children}
    for _ in range(rounds):
        taken = {which: median(burst(child, 5)) for which, child in children.items()}
        base = next(iter(taken.values()))
        for which, seconds in taken.items():
            ratios[which].append(seconds / base)
    for child in children.values():
        child.communicate()
    table = Table("ResNet-50, ratio to the first", "ONNX Runtime", "OpenVINO")
    for name, runtime in ratios:
        if runtime == "onnxruntime":
            both = (median(ratios[name, each]) for each in ("onnxruntime", "openvino"))
            table.add_row(name, *(f"{ratio:.3f}" for ratio in both))
    return table


def burst(child: "Popen[str]", runs: int) -> list[float]:
    """The seconds of so many runs in a process of `tools/timed_runs.py`."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(f"{runs}\n")
    child.stdin.flush()
    return [float(each) for each in child.stdout.readline().split()]


def formats(images: Path, folder: Path, threads: int, rounds: int) -> Table:
    teacher, test, train = pretrained(images), test_batches(images), augmented(images, 64)
    x = test[0][0][:1]
    grouped = normswap.convert(teacher, "group_norm", inputs=x, groups=4)
    normswap.calibrate(grouped, teacher, islice(train, 8))
    table = Table("ResNet-20", "format", "KiB", "ms", "accuracy, %", "deviation")
    for name, model in {"folded": normswap.fold(teacher, x), "group_norm": grouped}.items():
        kinds: dict[str, dict[str, Any]] = {
            "float32": {},
            "float32, onnxruntime": {"target": "onnxruntime"},
            "float16": {"precision": "float16"},
            "int8": {"precision": "int8", "data": [batch[0] for batch in islice(train, 4)]},
        }
        calls, rows = {}, {}
        with torch.no_grad():
            expected = [model(batch[0]).numpy() for batch in test]
        peak = max(float(np.abs(each).max()) for each in expected)
        for kind, options in kinds.items():
            path = folder / f"{kind}.onnx"
            report = normswap.export(model, x, path, **options)
            opened = session(path, threads)
            (entry,) = opened.get_inputs()
            given = [opened.run(None, {entry.name: batch[0].numpy()})[0] for batch in test]
            right = sum(
                int((y.argmax(1) == batch[1].numpy()).sum())
                for y, batch in zip(given, test, strict=True)
            )
            off = max(float(np.abs(y - e).max()) for y, e in zip(given, expected, strict=True))
            accuracy = 100 * right / sum(len(batch[1]) for batch in test)
            rows[kind] = (report.bytes, accuracy, off / peak)
            calls[kind] = runner(path, x, threads)
        found = milliseconds(calls, rounds, 50)
        for kind, (size, accuracy, off) in rows.items():
            cells = (f"{size / 1024:.0f}", f"{found[kind]:.2f}", f"{accuracy:.2f}", f"{off:.1e}")
            table.add_row(name, kind, *cells)
    return table


def equalized(real: Path, folder: Path, threads: int) -> Table:
    task = efficientnet(real, 16)
    example = task.test[0][0][:2]
    folded = normswap.fold(task.model, example)
    with_relu = copy.deepcopy(folded)
    for module in with_relu.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, name, nn.ReLU(inplace=True))
    plans = {
        name: normswap.plan(model, Equalize(assume_example=True), inputs=example)
        for name, model in {"equalized": folded, "with ReLU, equalized": with_relu}.items()
    }
    models = {
        "as it is": folded,
        "equalized": plans["equalized"].apply(folded),
        "with ReLU": with_relu,
        "with ReLU, equalized": plans["with ReLU, equalized"].apply(with_relu),
    }
    torch.manual_seed(0)
    ranges = list(islice(task.training, 2))
    labels = torch.cat([label for _, label in task.test])
    with torch.no_grad():
        expected, rectified = (
            torch.cat([model(each) for each, _ in task.test]) for model in (folded, with_relu)
        )
    table = Table("EfficientNet-Lite0", "sets", "right, %", "same class, %", "squared error")

    def add(name: str, sets: int, logits: Tensor) -> None:
        chosen = logits.argmax(1)
        right, same = (
            100 * float((chosen == each).double().mean()) for each in (labels, expected.argmax(1))
        )
        error = float((logits - expected).square().mean() / expected.var())
        table.add_row(name, str(sets), f"{right:.1f}", f"{same:.1f}", f"{error:.1e}")

    add("float32", 0, expected)
    add("float32, with ReLU", 0, rectified)
    for name, model in models.items():
        path = folder / "model.onnx"
        normswap.export(model, example, path, precision="int8", data=ranges, validate=False)
        opened = session(path, threads)
        (entry,) = opened.get_inputs()
        given = [opened.run(None, {entry.name: each.numpy()})[0] for each, _ in task.test]
        sets = len(plans[name].edits) if name in plans else 0
        add(f"int8, {name}", sets, torch.from_numpy(np.concatenate(given)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rms", action="store_true")
    parser.add_argument("--formats", type=Path, metavar="FOLDER")
    parser.add_argument("--equalize", type=Path, metavar="FOLDER")
    parser.add_argument("--openvino", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=140)
    with tempfile.TemporaryDirectory() as name:
        folder, threads, rounds = Path(name), arguments.threads, arguments.rounds
        if arguments.rms:
            console.print(root_mean_squares(folder, threads, rounds))
            return
        if arguments.formats:
            console.print(formats(arguments.formats, folder, threads, rounds))
            return
        if arguments.equalize:
            console.print(equalized(arguments.equalize, folder, threads))
            return
        if arguments.openvino:
            console.print(beside_openvino(arguments.openvino, folder, threads, rounds))
            return
        console.print(layers(folder, threads, rounds))
        console.print(moments(folder, threads, rounds))
        console.print(models(folder, threads, rounds))


if __name__ == "__main__":
    main()
