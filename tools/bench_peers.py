"""The BatchNorms that each tool leaves of those that a forward executes, in sixteen architectures.

    python tools/bench_peers.py [--tools NAME ...] [--models GLOB ...] [--python TOOL=PATH ...]

Each tool runs in a process of its own, by the interpreter that `--python` names for it, or else by
this one; one that is not installed is skipped. What is measured is in OUT/TOOL.jsonl and not
measured again. Every model has random weights and statistics (`zoo_models.load`), is in eval mode,
and of a detector the backbone is taken. Where a tool raises an error, all BatchNorms of the model
count as left.

normswap, fuse, aimet, mct: the calls of F.batch_norm, or of the scale and shift that a fold puts in
    its place, in a forward of what `normswap.fold`, `torch.fx.experimental.optimization.fuse`,
    AIMET's `fold_all_batch_norms` and the Model Compression Toolkit's `ModelFoldingUtils` (the
    model that its quantizer starts from) return.
nncf: the batch norms in the graph of torch.export after `apply_quantization_transformations`, all
    that NNCF folds before it quantizes.
inductor, export, onnxruntime, onnxslim, onnxsim: the graph that torch.compile has frozen, the file
    that torch.onnx.export writes, and that file after each tool. These may leave a BatchNorm
    as additions and multiplications, so that one is counted as left where its mean, its gain,
    1 / deviation or gain / deviation is still a constant that the graph reads. ONNX Runtime does
    its extended optimizations: those of the layout, beyond them, write a BatchNorm that is left
    as a depthwise convolution.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zoo_models
from torch import Tensor, nn
from zoo_measure import executions

import normswap
from normswap.core.errors import first_line

MODELS = (
    "classification/resnet50",
    "classification/mobilenet_v2",
    "classification/mobilenet_v3_large",
    "classification/efficientnet_b0",
    "classification/regnet_y_400mf",
    "classification/densenet121",
    "classification/shufflenet_v2_x1_0",
    "classification/googlenet",
    "segmentation/lraspp_mobilenet_v3_large",
    "detection/ssdlite320_mobilenet_v3_large",
    "timm/repvgg_a0",
    "timm/mobileone_s0",
    "timm/levit_128s",
    "timm/fastvit_t8",
    "timm/efficientvit_b0",
    "timm/coatnet_bn_0_rw_224",
)


# --- what each tool leaves ----------------------------------------------------------------------
# Each takes a model, its inputs and the path of its file of ONNX.


def by_normswap(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    return len(executed(normswap.fold(model, inputs), inputs))


def by_fuse(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    from torch.fx.experimental.optimization import fuse

    return len(executed(fuse(model), inputs))


def by_aimet(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    from aimet_torch.batch_norm_fold import fold_all_batch_norms

    fold_all_batch_norms(model, None, dummy_input=inputs)
    return len(executed(model, inputs))


def by_mct(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    import model_compression_toolkit as mct
    from model_compression_toolkit.core.pytorch.default_framework_info import DEFAULT_PYTORCH_INFO
    from model_compression_toolkit.core.pytorch.pytorch_implementation import PytorchImplementation
    from model_compression_toolkit.target_platform_capabilities.targetplatform2framework import (
        attach2pytorch,
    )
    from model_compression_toolkit.xquant.common.model_folding_utils import ModelFoldingUtils

    platform = attach2pytorch.AttachTpcToPytorch().attach(mct.get_target_platform_capabilities())
    folding = ModelFoldingUtils(DEFAULT_PYTORCH_INFO, PytorchImplementation(), platform)
    folded = folding.create_float_folded_model(model, lambda: iter([list(inputs)]))
    return len(executed(folded, inputs))


def by_nncf(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    from nncf.experimental.torch.fx.transformations import apply_quantization_transformations

    graph = torch.export.export(model, inputs).module()
    apply_quantization_transformations(graph)
    return sum("batch_norm" in str(node.target) for node in graph.graph.nodes if node.users)


def by_inductor(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    constants: list[Tensor] = []

    def record(graph: torch.fx.GraphModule, *_: Any, **__: Any) -> Callable[..., Any]:
        for node in graph.graph.find_nodes(op="get_attr"):
            constants.append(getattr(graph, node.target))
        return lambda arguments: graph(*arguments)

    paths = executed(model, inputs)
    with config.patch(freezing=True):
        torch.compile(model, backend=partial(compile_fx, inner_compile=record))(*inputs)
    return left_as_constants(model, paths, constants)


def by_export(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    return left_in_file(model, inputs, exported(model, inputs, path))


def by_onnxruntime(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    optimized = path.with_suffix(".optimized.onnx")
    options.optimized_model_filepath = str(optimized)
    file = exported(model, inputs, path).SerializeToString()
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return left_in_file(model, inputs, onnx.load(optimized))


def by_onnxslim(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    import onnxslim

    return left_in_file(model, inputs, onnxslim.slim(exported(model, inputs, path)))


def by_onnxsim(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> int:
    import onnxsim

    simplified, _ = onnxsim.simplify(exported(model, inputs, path))
    return left_in_file(model, inputs, simplified)


# The package that has it, and how it is run.
TOOLS: dict[str, tuple[str, Callable[[nn.Module, tuple[Tensor, ...], Path], int]]] = {
    "normswap": ("normswap", by_normswap),
    "fuse": ("torch", by_fuse),
    "inductor": ("torch", by_inductor),
    "export": ("onnxscript", by_export),
    "onnxruntime": ("onnxruntime", by_onnxruntime),
    "onnxslim": ("onnxslim", by_onnxslim),
    "onnxsim": ("onnxsim", by_onnxsim),
    "nncf": ("nncf", by_nncf),
    "mct": ("model_compression_toolkit", by_mct),
    "aimet": ("aimet_torch", by_aimet),
}


# --- counting -----------------------------------------------------------------------------------


def executed(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[str]:
    with executions(model) as found:
        model(*inputs)
    return found


def left_as_constants(model: nn.Module, paths: list[str], constants: list[Tensor]) -> int:
    """How many of the BatchNorms at `paths` have numbers of their own among the `constants`."""
    of_size: dict[int, list[Tensor]] = {}
    for constant in constants:
        if constant.is_floating_point() and not constant.is_mkldnn:
            of_size.setdefault(constant.numel(), []).append(constant.flatten())

    def is_left(path: str) -> bool:
        norm: Any = model.get_submodule(path)
        inverse = (norm.running_var + norm.eps).rsqrt()
        own = [norm.running_mean, inverse]
        own += [norm.weight, norm.weight * inverse] if norm.affine else []
        read = of_size.get(norm.num_features, [])
        return any(torch.allclose(one, another) for one in own for another in read)

    return sum(map(is_left, paths))


def exported(model: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> Any:
    """The file that torch writes, written once for all tools."""
    import onnx

    if not path.exists():
        options = {"dynamo": True, "external_data": False, "verbose": False}
        torch.onnx.export(model, inputs, path, **options)  # type: ignore[arg-type]
    return onnx.load(path)


def left_in_file(model: nn.Module, inputs: tuple[Tensor, ...], file: Any) -> int:
    from onnx import numpy_helper

    read = {name for node in file.graph.node for name in node.input}
    tensors = [each for each in file.graph.initializer if each.name in read]
    for node in file.graph.node:
        if node.op_type == "Constant":
            tensors += [each.t for each in node.attribute if each.name == "value"]
    arrays = [torch.from_numpy(numpy_helper.to_array(each).copy()) for each in tensors]
    return left_as_constants(model, executed(model, inputs), arrays)


# --- runs ---------------------------------------------------------------------------------------


def measure(tool: str, model: str, folder: Path) -> dict[str, Any]:
    """One line of the log: the BatchNorms of a model, what the tool leaves, why if it fails."""
    case = zoo_models.load(*model.split("/"))
    part = case.model.get_submodule(case.part)
    batch_norms = len(executed(part, case.part_inputs))
    row = {"model": model, "batch_norms": batch_norms, "left": batch_norms, "why": ""}
    try:
        path = folder / f"{model.replace('/', '_')}.onnx"
        row["left"] = TOOLS[tool][1](part, case.part_inputs, path)
    except ImportError:
        raise  # the version of the tool is another one, which says nothing about its folding
    except Exception as error:
        row["why"] = f"{type(error).__name__}: {first_line(error)}"
    return row


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a log, by model."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def is_installed(package: str, python: str) -> bool:
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({package!r}) is None)"
    return not subprocess.run([python, "-c", code], check=False).returncode


def table(rows: dict[str, dict[str, dict[str, Any]]], models: list[str]) -> Iterator[str]:
    """The table in Markdown, of the models that every tool has a line for; * where it fails."""
    models = [model for model in models if all(model in of_tool for of_tool in rows.values())]
    first = next(iter(rows.values()))
    yield f"| | BatchNorms | {' | '.join(rows)} |"
    yield f"| --- {'| ---: ' * (1 + len(rows))}|"
    for model in models:
        found = [of_tool[model] for of_tool in rows.values()]
        cells = [f"{row['left']}{' *' if row['why'] else ''}" for row in found]
        yield f"| {model.partition('/')[2]} | {first[model]['batch_norms']} | {' | '.join(cells)} |"
    sums = [sum(of_tool[model]["left"] for model in models) for of_tool in rows.values()]
    total = sum(first[model]["batch_norms"] for model in models)
    yield f"| all | {total} | {' | '.join(map(str, sums))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--models", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--python", nargs="*", default=[], metavar="TOOL=PATH")
    parser.add_argument("--out", type=Path, default=Path("out/peers"))
    parser.add_argument("--run", choices=list(TOOLS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    globs = args.models
    models = [m for m in MODELS if any(fnmatchcase(m.partition("/")[2], glob) for glob in globs)]
    if args.run:
        log = args.out / f"{args.run}.jsonl"
        with torch.no_grad():
            for model in [m for m in models if m not in read(log)]:
                line = json.dumps(measure(args.run, model, args.out))
                with log.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
                print(args.run, line, file=sys.stderr)
        return
    pythons = dict(each.split("=", 1) for each in args.python)
    rows = {}
    for tool in args.tools:
        python = pythons.get(tool, sys.executable)
        if not is_installed(TOOLS[tool][0], python):
            print(f"{tool} is skipped: {TOOLS[tool][0]} is not installed.", file=sys.stderr)
            continue
        command = [python, __file__, "--run", tool, "--out", str(args.out), "--models", *globs]
        subprocess.run(command, check=False)
        if measured := read(args.out / f"{tool}.jsonl"):
            rows[tool] = measured
    if rows:
        print("\n".join(table(rows, models)))


if __name__ == "__main__":
    main()
