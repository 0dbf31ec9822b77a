"""Check the exact rewrites on a real network: ResNet-20 on CIFAR-10.

    python tools/check_resnet20.py FOLDER

FOLDER holds `resnet20_jpeg.safetensors`, `train.zip` and `test.zip`. Prints how many predictions on
the test images `fold` changes, and how far SGD steps in tune mode are from the same steps in eval
mode: the largest difference of a parameter, relative to its largest value. In float32 a run of
several steps drifts apart by rounding alone; eval mode's own distance from float64 stands beside.
"""

import copy
import runpy
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import normswap
from normswap.fit.data import open_named

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_cifar.py"
RATE, MOMENTUM = 0.01, 0.9
State = dict[str, Tensor]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> State:
    """Take a few SGD steps; return the parameters under the names they have in the plain model."""
    model = copy.deepcopy(model).to(dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
    return {name: p.detach().double() for name, p in normswap.unfreeze(model).named_parameters()}


def distance(a: State, b: State) -> str:
    """The largest difference, relative to the largest value of the parameter."""
    return f"{max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in a):.1e}"


def main(folder: Path) -> None:
    model = runpy.run_path(str(EXAMPLE))["resnet20"]().eval()
    model.load_state_dict(load_file(folder / "resnet20_jpeg.safetensors"))
    batches = list(islice(open_named(str(folder / "train.zip"), None, None, None), 5))
    x = batches[0][0][:2]

    folded = normswap.fold(model, x)
    changed = total = 0
    with torch.no_grad():
        for images, _ in open_named(str(folder / "test.zip"), None, None, None):
            changed += int((folded(images).argmax(1) != model(images).argmax(1)).sum())
            total += len(images)
    print(f"fold: {changed} of {total} predictions changed")

    modes = {mode: normswap.freeze(model, x, mode=mode) for mode in ("eval", "tune")}
    table = Table(
        "SGD steps", "tune - eval, float64", "tune - eval, float32", "eval's own rounding"
    )
    for steps in (1, 2, 5):
        single, double = (
            {mode: train(frozen, batches[:steps], dtype) for mode, frozen in modes.items()}
            for dtype in (torch.float32, torch.float64)
        )
        table.add_row(
            str(steps),
            distance(double["tune"], double["eval"]),
            distance(single["tune"], single["eval"]),
            distance(single["eval"], double["eval"]),
        )
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
