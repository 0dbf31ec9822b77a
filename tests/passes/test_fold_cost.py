"""What folding itself costs, as `tools/bench_fold.py --cost` measures it."""

import importlib
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).parents[2] / "tools"


def test_fold_in_place_takes_little_more_memory_than_the_weights_it_replaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    bench = importlib.import_module("bench_fold")
    model = bench.zoo_models.torchvision.models.resnet50().eval()
    _, memory = bench.fold_cost(model, torch.randn(1, 3, 64, 64))
    # Until all is done the old weights stay, so that a fold that fails can be undone.
    assert 0.5 < memory <= bench.MEMORY_LIMIT
