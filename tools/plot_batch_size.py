"""Accuracy after fine-tuning against the batch size, as figure 1 of the GroupNorm paper.

    python tools/plot_batch_size.py FOLDER [--images 6400] [--jobs 2]

FOLDER is as `tools/cifar.py` says. The pretrained ResNet-20 is fine-tuned by `normswap.finetune` on
as many images at every batch size, the learning rate in proportion to it (Wu & He 2018, arXiv
1803.08494, section 4.1): with its BatchNorms, with them frozen, as batch renormalization, and as
GroupNorm that `normswap.recover` brought back first. Writes docs/batch_size.svg, and the figures
beside it, docs/batch_size.json, from which the picture is drawn again without a measurement.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import torch
from cifar import augmented, pretrained, test_batches
from matplotlib import pyplot

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


def plot(figures: dict[str, dict[str, float]], before: float, images: int) -> None:
    """Draw docs/batch_size.svg."""
    matplotlib.rcParams["svg.hashsalt"] = "normswap"  # the same figures give the same file
    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    for (name, found), marker in zip(figures.items(), "osvD", strict=True):
        axes.plot([int(size) for size in found], list(found.values()), marker=marker, label=name)
    axes.axhline(before, color="grey", linestyle=":", label="before fine-tuning")
    axes.set_xscale("log", base=2)
    axes.set_xticks(SIZES, [str(size) for size in SIZES])
    axes.set_xlabel("batch size")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"ResNet-20 on CIFAR-10 (JPEG), fine-tuned on {images:,} images", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(DOCS / "batch_size.svg", metadata={"Date": None})


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
    plot(whole["accuracy"], whole["before"], whole["images"])
    for name, found in whole["accuracy"].items():
        print(f"{name:24}", *(f"{size}: {value:.1f}" for size, value in found.items()))


if __name__ == "__main__":
    main()
