"""A sample of the sweep over real architectures: fold and swap hold its rules on them."""

import importlib
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("classification", "shufflenet_v2_x0_5"),
        ("classification", "mobilenet_v3_small"),
        ("timm", "resnetv2_50"),
        ("timm", "efficientnet_b0"),
    ],
)
def test_real_architecture_holds_the_rules_of_the_sweep(family, name, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    zoo = importlib.import_module("zoo_measure")
    row = zoo.Row(family=family, name=name)
    zoo.measure(row, lambda stage: None)
    assert row.batch_norms > 0 and row.left < row.batch_norms
    assert list(row.broken_rules()) == []
