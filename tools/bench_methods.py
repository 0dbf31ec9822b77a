"""What every method leaves of a real network: ResNet-20 on CIFAR-10.

    python tools/bench_methods.py FOLDER [--methods GLOB ...] [--images 500] [--test-images 5000]

FOLDER holds `resnet20_jpeg.safetensors`, and `train.zip` and `test.zip` with images in one folder
per class. For every method: accuracy right after it has come in, accuracy with its gains and biases
(and numbers of groups) fitted to --images of the training images, without a gradient step, and the
largest relative deviation of the exported ONNX file in ONNX Runtime. Accuracy is top-1 on
--test-images. "-" is where nothing is left to fit.
"""

import argparse
import runpy
import tempfile
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

import normswap
from normswap.core.errors import NormswapError, first_line
from normswap.fit.calibrate import replaced_norms
from normswap.fit.data import open_data
from normswap.fit.evaluate import accuracy
from normswap.norms.registry import Method

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_cifar.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def converted(teacher: nn.Module, method: Method, inputs: Any) -> nn.Module:
    """The network with the method in place of every BatchNorm, or on every weight."""
    if method.kind == "weight" and not method.folds_scale:
        return normswap.parametrize(teacher, method.name)
    return normswap.convert(teacher, method.name, inputs=inputs)


def row(method: Method, teacher: nn.Module, train: list[Any], test: list[Any]) -> list[str]:
    """The cells of the table, in percent and seconds."""
    start = time.perf_counter()
    student = converted(teacher, method, train[0][0][:2])
    cells = [method.name, method.keeps, f"{100 * accuracy(student, test):.2f}"]
    if method.keeps != "exact" and replaced_norms(student, teacher):
        student = normswap.convert(teacher, method.name, data=train)
        cells.append(f"{100 * accuracy(student, test):.2f}")
    else:
        cells.append("-")
    with tempfile.TemporaryDirectory() as folder:
        report = normswap.export(student, train[0][0][:2], Path(folder) / "model.onnx")
    deviation = report.validation.max_rel if report.validation else float("nan")
    cells.append(f"{deviation:.1e}" + ("" if report.passed else ", too much"))
    return [*cells, f"{time.perf_counter() - start:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--methods", nargs="*", default=["*"], metavar="GLOB")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=5000)
    args = parser.parse_args()
    teacher = runpy.run_path(str(EXAMPLE))["resnet20"]().eval()
    teacher.load_state_dict(load_file(args.folder / "resnet20_jpeg.safetensors"))
    train, test = (
        list(open_data(str(args.folder / name), batch_size=100, mean=MEAN, std=STD, limit=limit))
        for name, limit in (("train.zip", args.images), ("test.zip", args.test_images))
    )
    warnings.filterwarnings("ignore", message="calibrate: ")  # a method without gain or bias
    table = Table("method", "keeps", "swapped, %", "calibrated, %", "ONNX, relative", "s", box=None)
    table.title = f"ResNet-20, {100 * accuracy(teacher, test):.2f}% with BatchNorm"
    table.columns[0].no_wrap = True
    console = Console()
    for name, method in normswap.methods().items():
        if method.kind in ("activation", "weight") and any(
            fnmatchcase(name, glob) for glob in args.methods
        ):
            with console.status(name):
                try:
                    table.add_row(*row(method, teacher, train, test))
                except NormswapError as error:
                    table.add_row(name, method.keeps, first_line(error))
    console.print(table)


if __name__ == "__main__":
    main()
