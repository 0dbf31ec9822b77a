"""What a module computes is found by running it once, and remembered."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normswap.graph import recognition
from normswap.graph.norm_modules import formula


class Mine(nn.Module):
    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.g, self.eps = nn.Parameter(torch.ones(channels)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.g * x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Gated(nn.Module):
    """Every tensor is of one length, but it normalizes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weight * x.mean(-1, keepdim=True) + self.bias)


def test_what_is_known_of_a_class_with_its_settings_is_not_looked_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[Any] = []
    judged = recognition._judged
    monkeypatch.setattr(recognition, "_remembered", {})
    monkeypatch.setattr(recognition, "_judged", lambda twins: looked.append(twins) or judged(twins))
    eps = [formula(Mine(4, 1e-5)), formula(Mine(4, 1e-5)), formula(Mine(4, 1e-3))]
    assert [each.eps for each in eps if each is not None] == [1e-5, 1e-5, 1e-3]
    assert len(looked) == 2


def test_what_scales_by_its_mean_is_no_normalization() -> None:
    assert formula(Gated()) is None
