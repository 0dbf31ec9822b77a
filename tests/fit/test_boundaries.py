"""Block outputs are found on the graph: narrow places of the dataflow, behind a join."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from normswap.fit.boundaries import boundaries

IMAGE = torch.randn(2, 3, 64, 64)
RESNET18 = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (torchvision.models.resnet18, RESNET18),
        (lambda: torchvision.models.vgg11_bn(init_weights=False), []),  # it joins nothing
        (
            lambda: torchvision.models.DenseNet(8, (2, 3, 4, 2), 16),
            [f"features.denseblock{i}" for i in range(1, 5)],
        ),
        # Those blocks without a shortcut join nothing.
        (
            torchvision.models.mobilenet_v2,
            [f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)],
        ),
        (lambda: timm.create_model("test_vit", img_size=64), [f"blocks.{i}" for i in range(6)]),
        (lambda: timm.create_model("repvgg_a0").stages[0], ["0", "1"]),
    ],
    ids=["resnet", "vgg", "densenet", "mobilenet", "vit", "repvgg"],
)
def test_they_are_the_outputs_of_the_blocks(make: object, expected: list[str]) -> None:
    x = IMAGE if expected != ["0", "1"] else torch.randn(2, 48, 16, 16)
    assert boundaries(make().eval(), x) == expected


class Block(nn.Module):
    """Two sums; what it returns is the second, through an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return (x + self.second(x)).relu()


def test_one_that_runs_twice_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(self.block(x)))

    assert boundaries(Twice(), IMAGE) == ["block"]


def test_a_value_that_another_goes_around_is_none() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.other(self.one(x)), x], 1).mean((2, 3))

    assert boundaries(Around(), IMAGE) == []


def test_without_a_graph_there_are_none() -> None:
    class Deciding(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    assert boundaries(nn.Sequential(Deciding(), nn.Flatten()), IMAGE) == []
