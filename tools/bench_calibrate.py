"""What calibration gives on a real network: ResNet-20 on CIFAR-10, by the number of groups.

    python tools/bench_calibrate.py FOLDER [IMAGES]

FOLDER holds `resnet20_jpeg.safetensors`, and `train.zip` and `test.zip` with images in one folder
per class. Every BatchNorm becomes a GroupNorm with at least two channels a group; IMAGES (500) of
the training images calibrate it, and no gradient is taken. Accuracy is top-1 on all of `test.zip`.
"""

import copy
import runpy
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import nn

from normswap import convert
from normswap.fit.calibrate import calibrate
from normswap.fit.data import open_data
from normswap.fit.evaluate import accuracy
from normswap.fit.groups import choose_groups

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet20_cifar.py"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GROUPS = (1, 2, 4, 8, 16, 32)


def main(folder: Path, images: int) -> None:
    teacher = runpy.run_path(str(EXAMPLE))["resnet20"]().eval()
    teacher.load_state_dict(load_file(folder / "resnet20_jpeg.safetensors"))
    test = list(open_data(str(folder / "test.zip"), batch_size=250, mean=MEAN, std=STD))
    train = list(
        open_data(str(folder / "train.zip"), batch_size=100, mean=MEAN, std=STD, limit=images)
    )
    channels = {
        name: module.num_features
        for name, module in teacher.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    candidates = {name: [g for g in GROUPS if g <= c // 2] for name, c in channels.items()}
    start = time.perf_counter()
    chosen = choose_groups(teacher, candidates, train)
    choosing = time.perf_counter() - start
    rows = {str(g): {name: min(g, c // 2) for name, c in channels.items()} for g in GROUPS}
    rows["auto"] = chosen

    table = Table("groups", "plain swap, %", "calibrated, %", "seconds", "numbers of groups")
    table.title = f"ResNet-20, {100 * accuracy(teacher, test):.2f}% with BatchNorm"
    for label, groups in rows.items():
        plain = convert(teacher, "group_norm", inputs=train[0][:1], groups=groups)
        start = time.perf_counter()
        student = calibrate(copy.deepcopy(plain), teacher, train)
        seconds = time.perf_counter() - start + (choosing if label == "auto" else 0)
        table.add_row(
            label,
            f"{100 * accuracy(plain, test):.2f}",
            f"{100 * accuracy(student, test):.2f}",
            f"{seconds:.1f}",
            " ".join(map(str, sorted(set(groups.values())))),
        )
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 500)
