"""What layer normalization in every step of an LSTM costs, forward and backward, against nn.LSTM.

    python tools/bench_recurrent.py [SECONDS]

128 steps, batch 16, input and hidden size 256, float32 on the CPU with 2 threads. The networks take
turns for SECONDS (10) each, so that what else the machine does falls on all of them; where it does
much, two threads wait for one another and the figures mean nothing.
"""

import sys
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from normswap.norms.registry import method_named

STEPS, BATCH, SIZE = 128, 16, 256


def main(seconds: float) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    lstm = nn.LSTM(SIZE, SIZE)
    gru = nn.GRU(SIZE, SIZE)
    layer_norm = method_named("layer_norm_recurrent").build
    batch_norm = method_named("batch_norm_lstm").build
    rows = {
        "nn.LSTM": (lstm, lstm),
        "layer_norm_recurrent": (layer_norm(lstm), lstm),
        "layer_norm_recurrent, per gate": (layer_norm(lstm, per_gate=True), lstm),
        "batch_norm_lstm": (batch_norm(lstm, max_length=STEPS), lstm),
        "nn.GRU": (gru, gru),
        "layer_norm_recurrent of a GRU": (layer_norm(gru), gru),
    }
    x = torch.randn(STEPS, BATCH, SIZE, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for network, _ in rows.values():
        network(x)[0].sum().backward()  # the first call also fills oneDNN's caches
    end = time.perf_counter() + seconds * len(rows)
    while time.perf_counter() < end:
        for name, (network, _) in rows.items():
            start = time.perf_counter()
            network(x)[0].sum().backward()
            times[name].append(time.perf_counter() - start)
    typical = {network: median(times[name]) for name, (network, _) in rows.items()}
    table = Table("network", "ms", "times torch's", title=f"torch {torch.__version__}, median")
    for name, (network, torchs) in rows.items():
        ratio = typical[network] / typical[torchs]
        table.add_row(name, f"{1e3 * typical[network]:.1f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
