"""Fine-tune with frozen BatchNorm statistics, in eval mode and in tune mode.

Both compute the same function and the same gradients. In tune mode the convolution computes the
BatchNorm as well, so its input is not kept for the backward pass. Each mode runs in a process of
its own, whose peak memory is then read from the operating system.

    python examples/finetune_frozen.py
"""

import multiprocessing
import resource
import sys
import time

import torch
import torch.nn.functional as F

import normswap
from normswap.demo.digits import digits, digits_data

STEPS, BATCH, SIDE = 3, 128, 32  # the digits enlarged, so that activations outweigh weights


def finetune(mode: str) -> tuple[float, float, float]:
    """Train a little; return the last loss, the seconds of a step and the peak memory in MiB."""
    torch.manual_seed(0)
    images, labels = digits_data("train")
    images = F.interpolate(images, size=(SIDE, SIDE))
    model = normswap.freeze(digits(), images[:2], mode=mode).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = _peak_memory()
    seconds = []
    for step in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,))
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        if step:  # the first one warms up
            seconds.append(time.perf_counter() - start)
    return loss.item(), sorted(seconds)[len(seconds) // 2], _peak_memory() - before


def _peak_memory() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main() -> None:
    print("mode   last loss   seconds a step   peak memory of training, MiB")
    for mode in ("eval", "tune"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            loss, seconds, memory = pool.apply(finetune, (mode,))
        print(f"{mode:5} {loss:11.6f} {seconds:16.3f} {memory:14.0f}")


if __name__ == "__main__":
    main()
