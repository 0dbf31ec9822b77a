"""Accuracy after fine-tuning against the batch size, as figure 1 of the GroupNorm paper.

    python tools/plot_batch_size.py FOLDER [--images 6400] [--jobs 2]

FOLDER is as `tools/cifar.py` says. The pretrained ResNet-20 is fine-tuned by `normswap.finetune` on
as many images at every batch size, the learning rate in proportion to it (Wu & He 2018, arXiv
1803.08494, section 4.1): with its BatchNorms, with them frozen, as batch renormalization, and as
GroupNorm that `normswap.recover` brought back first. Writes docs/batch_size.json and the
chart of it, docs/charts/batch_size.svg, which is drawn again without a measurement where no FOLDER
is given.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import charts
import torch
from cifar import augmented, pretrained, test_batches

import normswap
from normswap.fit.evaluate import accuracy
from normswap.graph.copies import copied

SIZES = (1, 2, 4, 8, 16, 32)
RATE = 0.01  # at batch size 32
CLIP = 1.0  # as in bench_recover
RECOVERED = 200  # steps at batch size 64
# name: method (None: none), statistics
MODELS = {
    "BatchNorm": (None, "update"),
    "frozen BatchNorm": (None, "eval"),
    "batch renormalization": ("batch_renorm", "update"),
    "GroupNorm (recovered)": ("group_norm", "update"),
}
DOCS = Path(__file__).parents[1] / "docs"


def measure(folder: Path, name: str, images: int) -> dict[str, float]:
    """Accuracy on the test images, in percent, by batch size."""
    torch.set_num_threads(1)
    test = test_batches(folder)
    method, statistics = MODELS[name]
    found = {}
    torch.manual_seed(0)
    start = pretrained(folder)
    if method == "group_norm":
        start = normswap.convert(start, method, inputs=test[0][0][:2], groups=4)
        normswap.recover(start, pretrained(folder), augmented(folder, 64), steps=RECOVERED)
    elif method is not None:
        start = normswap.convert(start, method, inputs=test[0][0][:2])
    for size in SIZES:
        torch.manual_seed(0)
        model = copied(start)
        normswap.finetune(
            model,
            augmented(folder, size),
            steps=images // size,
            statistics=statistics,
            lr=RATE * size / 32,
            clip=CLIP,
        )
        found[str(size)] = round(100 * accuracy(model, test), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="none: draw the figures there are")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, help="measure this one and print its figures")
    arguments = parser.parse_args()
    path = DOCS / "batch_size.json"
    if arguments.model:
        print(json.dumps(measure(arguments.folder, arguments.model, arguments.images)))
        return
    if arguments.folder is not None:
        own = [sys.executable, __file__, str(arguments.folder), "--images", str(arguments.images)]

        def take(name: str) -> dict[str, float]:
            command = [*own, "--model", name]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(ended.stdout.splitlines()[-1])

        with ThreadPoolExecutor(arguments.jobs) as pool:
            figures = dict(zip(MODELS, pool.map(take, MODELS), strict=True))
        before = 100 * accuracy(pretrained(arguments.folder), test_batches(arguments.folder))
        whole = {"images": arguments.images, "before": round(before, 2), "accuracy": figures}
        path.write_text(json.dumps(whole, indent=2) + "\n")
    whole = json.loads(path.read_text())
    charts.write("batch_size")
    for name, found in whole["accuracy"].items():
        print(f"{name:24}", *(f"{size}: {value:.1f}" for size, value in found.items()))


if __name__ == "__main__":
    main()
