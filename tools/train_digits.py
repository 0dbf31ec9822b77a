"""Train the bundled model and write its weights and its record into the package.

    python tools/train_digits.py

Deterministic: one thread, torch's deterministic algorithms, fixed seeds for the split, the initial
weights, the order and the shifts. The hyperparameters were set once and the test images are
looked at once, at the end.
"""

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from normswap.demo.digits import RECORD, SPLIT_SEED, WEIGHTS, DigitsNet, digits_data
from normswap.fit.evaluate import accuracy


def shifted(x: Tensor) -> Tensor:
    """Each image of x, (N, 1, H, W), moved by up to one pixel each way, zeros coming in."""
    n, _, height, width = x.shape
    padded = F.pad(x, (1, 1, 1, 1))
    top, left = torch.randint(0, 3, (2, n, 1, 1))
    rows = top + torch.arange(height).view(1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(n).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def train(epochs: int, seed: int, batch_size: int) -> DigitsNet:
    """AdamW, a one-cycle learning rate, cross entropy on shifted images."""
    torch.manual_seed(seed)
    x, y = digits_data("train")
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * (len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for batch in order.split(batch_size)[: len(x) // batch_size]:
            loss = F.cross_entropy(model(shifted(x[batch])), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS.parent, help="folder to write to")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    started = time.perf_counter()
    model = train(arguments.epochs, arguments.seed, batch_size=64)
    sides = {split: digits_data(split) for split in ("train", "test")}
    record = {
        "model": "demo:digits",
        "test_accuracy": accuracy(model, [sides["test"]]),
        "train_accuracy": accuracy(model, [sides["train"]]),
        "train_images": len(sides["train"][0]),
        "test_images": len(sides["test"][0]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": arguments.epochs,
        "seed": arguments.seed,
        "split_seed": SPLIT_SEED,
        "torch": torch.__version__,
    }
    (arguments.out / WEIGHTS.name).write_bytes(save(model.state_dict()))
    (arguments.out / RECORD.name).write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
