"""Accuracy against epsilon: what a ResNet-20 learns in private, by what became of its BatchNorms.

    python tools/bench_private.py FOLDER [--images 2500] [--seeds 0] [--jobs 2]

FOLDER is as `tools/cifar.py` says. The published network, trained on lossless images, is tuned to
JPEG images by DP-SGD (Abadi et al. 2016, arXiv 1607.00133) in Opacus: one epoch of the private
ones, 250 expected in a batch, delta 1e-5. The training images are cut in three: 2,000 are public
and have no labels, on which swaps are calibrated and recovered; on the next 2,000, with labels, the
best of RATES is chosen for each start and epsilon (which does not count that choice); of the rest,
`--images` are private. Test images are for the result alone.

- `fix`: Opacus' own `ModuleValidator.fix`, a GroupNorm of gcd(32, C) groups for each BatchNorm of C
  channels, whose gains are new, 1, and whose biases are 0;
- `plain`: `convert` to GroupNorm without data, which keeps the gains and biases;
- `calibrated`: with the public images;
- `recovered`: after that, `recover` on them, towards the original;
- `frozen`: `freeze`, and the gains and biases of the BatchNorms do not train;
- `folded`: `fold`, so that what is left of a BatchNorm are the convolution's weight and bias.

Epsilon 0 is the start. Every run is a process of one thread; what is done is kept in `--log`, and
not done again. Writes docs/private.json and its chart, docs/charts/private.svg, which is drawn
again without a measurement where no FOLDER is given.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import charts
import torch
import torch.nn.functional as F
from cifar import labelled_images, published, test_batches
from opacus import PrivacyEngine
from opacus.utils.batch_memory_manager import BatchMemoryManager
from opacus.validators import ModuleValidator
from rich.console import Console
from rich.table import Table
from runs import carried_out, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import normswap
from normswap.fit.augment import Shuffled
from normswap.fit.data import Data
from normswap.fit.evaluate import accuracy
from normswap.graph.copies import copied

EPSILONS = (3.0, 8.0)
DELTA = 1e-5
RATES = (0.1, 0.4, 1.6)
CLIP = 1.0
PUBLIC, REST, BATCH = 2000, 4000, 250  # images: public to, private from; in a batch
AT_ONCE = 50  # gradients of samples that are in memory
STEPS = 200  # of recover
DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Run:
    """The private training of one start on so many images, at every epsilon."""

    start: str
    images: int
    seed: int


def recovered(model: nn.Module, public: Tensor) -> nn.Module:
    """A calibrated swap that learned from `model` on the public images."""
    student = STARTS["calibrated"](model, public)
    data = Data(lambda chosen: public[chosen], None, torch.arange(len(public)), 64)
    return normswap.recover(student, model, Shuffled(data, flip=True), steps=STEPS)


def frozen(model: nn.Module, public: Tensor) -> nn.Module:
    """Statistics that stay; Opacus takes no layer with such buffers whose parameters train."""
    found = normswap.freeze(model)
    for module in found.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return found


STARTS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "fix": lambda model, _: ModuleValidator.fix(model),
    "plain": lambda model, public: normswap.convert(model, "group_norm", inputs=public[:2]),
    "calibrated": lambda model, public: normswap.convert(
        model, "group_norm", data=public.split(250)
    ),
    "recovered": recovered,
    "frozen": frozen,
    "folded": lambda model, public: normswap.fold(model, public[:2]),
}


def tuned(start: nn.Module, private: TensorDataset, epsilon: float, rate: float) -> nn.Module:
    """A copy of `start` after its private training."""
    model = copied(start).train()
    engine = PrivacyEngine()
    learner, optimizer, loader = engine.make_private_with_epsilon(
        module=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate),
        data_loader=DataLoader(private, batch_size=BATCH),
        target_epsilon=epsilon,
        target_delta=DELTA,
        epochs=1,
        max_grad_norm=CLIP,
    )
    with BatchMemoryManager(
        data_loader=loader, max_physical_batch_size=AT_ONCE, optimizer=optimizer
    ) as batches:
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(learner(x), y).backward()
            optimizer.step()
    assert engine.get_epsilon(DELTA) <= epsilon
    return model


def measure(folder: Path, run: Run) -> dict[str, Any]:
    """The accuracies of one run, in percent; the chosen rates."""
    warnings.simplefilter("ignore")  # of Opacus, on its random numbers and hooks
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    x, y = labelled_images(folder, "train.zip")
    public = x[:PUBLIC]
    validation = list(zip(*(each[PUBLIC:REST].split(250) for each in (x, y)), strict=True))
    private = TensorDataset(x[REST:][: run.images], y[REST:][: run.images])
    start = STARTS[run.start](published(folder), public)
    models, rates = {0.0: start}, {}
    for epsilon in EPSILONS:
        tried = {rate: tuned(start, private, epsilon, rate) for rate in RATES}
        right = {rate: accuracy(model, validation) for rate, model in tried.items()}
        rates[str(epsilon)] = max(right, key=right.__getitem__)
        models[epsilon] = tried[rates[str(epsilon)]]
    test = test_batches(folder)
    found = {str(epsilon): 100 * accuracy(model, test) for epsilon, model in models.items()}
    return {"accuracy": found, "rates": rates}


def summary(results: dict[Run, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each start the accuracies of its seeds, by epsilon, and the rates chosen."""
    figures = {}
    for start in dict.fromkeys(run.start for run in results):
        found = [each for run, each in results.items() if run.start == start]
        figures[start] = {
            "rates": [rate for each in found for rate in each["rates"].values()],
            "accuracy": {
                f"{epsilon:g}": [round(each["accuracy"][str(epsilon)], 2) for each in found]
                for epsilon in sorted((0.0, *EPSILONS))
            },
        }
    return figures


def table(figures: dict[str, dict[str, Any]]) -> Table:
    """One row for each start."""
    epsilons = next(iter(figures.values()))["accuracy"]
    shown = Table("start", *(f"epsilon {each}" for each in epsilons), "rates")
    for name, found in figures.items():
        cells = [spread(values) for values in found["accuracy"].values()]
        shown.add_row(name, *cells, ", ".join(map(str, found["rates"])))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="none: draw the figures there are")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--images", type=int, default=2500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("normswap-out/bench_private.jsonl"))
    parser.add_argument("--run", help="one run, as JSON; used by the others")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(measure(arguments.folder, Run(**json.loads(arguments.run)))))
        return
    path = DOCS / "private.json"
    if arguments.folder is not None:
        wanted = [
            Run(start, arguments.images, seed)
            for start in arguments.starts
            for seed in arguments.seeds
        ]
        found = carried_out(wanted, __file__, arguments.folder, arguments.log, arguments.jobs)
        whole = {"images": arguments.images, "starts": summary(found)}
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    whole = json.loads(path.read_text(encoding="utf-8"))
    charts.write("private")
    Console(width=110).print(table(whole["starts"]))


if __name__ == "__main__":
    main()
