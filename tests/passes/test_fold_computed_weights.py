"""A weight that a forward masks, slices or scales folds in the scale where it is stored."""

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns


class Masked(nn.Conv2d):
    """The convolution of PixelCNN, which sees what lies above and to the left."""

    def __init__(self, **options: bool) -> None:
        super().__init__(4, 4, 3, padding=1, **options)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 2:], mask[:, :, 2:] = 0, 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.mask * self.weight, self.bias, padding=1)


class Sliced(nn.Conv2d):
    """A layer of which a part is used (slimmable networks)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:4, :4], self.bias[:4])


class Binary(nn.Conv2d):
    """Signs, times a number per channel (XNOR-Net)."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.alpha = nn.Parameter(torch.rand(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.sign() * self.alpha, self.bias)


class Centered(nn.Conv2d):
    """Every filter has the mean 0."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class MaskedLinear(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.ones(4, 4).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class Octave(nn.Module):
    """One weight for two convolutions, each with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.ones(8))
        self.high, self.low = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(F.conv2d(x, self.weight[:4], self.bias[:4])).relu()
        low = self.low(F.conv2d(F.avg_pool2d(x, 2), self.weight[4:], self.bias[4:])).relu()
        return high.mean((2, 3)) + low.mean((2, 3))


def then_norm(layer: nn.Module, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(layer, norm or nn.BatchNorm2d(4), nn.ReLU())


IMAGE = torch.randn(2, 4, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (then_norm(Masked()), IMAGE),
        (then_norm(Masked(bias=False)), IMAGE),
        (then_norm(Sliced(6, 8, 3)), IMAGE),
        (then_norm(Binary()), IMAGE),
        (then_norm(Centered(4, 4, 3, groups=2, bias=False)), IMAGE),
        (then_norm(MaskedLinear(), nn.BatchNorm1d(4)), torch.randn(5, 4, dtype=torch.float64)),
        (Octave(), IMAGE),
    ],
    ids=lambda value: type(value[0] if isinstance(value, nn.Sequential) else value).__name__,
)
def test_a_computed_weight_takes_up_the_scale(model: nn.Module, x: Tensor) -> None:
    randomise(model.double())
    folded = ns.fold(model, x)
    assert not batch_norms(folded)
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-12
    for name, mask in model.named_buffers():
        if name.endswith("mask"):
            assert torch.equal(folded.get_buffer(name), mask)


def test_tune_mode_trains_a_masked_weight_as_the_original() -> None:
    model = randomise(then_norm(Masked()).double()).eval()
    tuned = ns.freeze(model, IMAGE, mode="tune")
    assert tuned[1].folded
    for each in (model, tuned):
        each(IMAGE).square().sum().backward()
    gradients = [p.grad for p in model.parameters()], [p.grad for p in tuned.parameters()]
    for shape in {g.shape for g in gradients[0]}:
        first, second = ([g for g in each if g.shape == shape] for each in gradients)
        assert error(torch.stack(second).sum(0), torch.stack(first).sum(0)) <= 1e-10


class Conditional(nn.Conv2d):
    """Its weight depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * x.mean().sigmoid()
        return self._conv_forward(x, weight, self.bias)


class Signs(nn.Conv2d):
    """The size of a filter is not seen."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.sign(), self.bias)


class Regularized(nn.Module):
    """The masked weight is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.conv.weight * 0.5
        return self.norm(F.conv2d(x, weight)).relu(), weight


@pytest.mark.parametrize("layer", [Conditional, Signs])
def test_what_does_not_scale_with_the_stored_weight_is_left(layer: type[nn.Conv2d]) -> None:
    model = randomise(then_norm(layer(4, 4, 3)).double())
    folded = ns.fold(model, IMAGE)
    assert batch_norms(folded) == ["1"]
    assert error(in_eval(folded, IMAGE), in_eval(model, IMAGE)) <= 1e-12


def test_a_computed_weight_that_others_see_is_left() -> None:
    model = randomise(Regularized().double()).eval()
    folded = ns.fold(model, IMAGE)
    assert batch_norms(folded) == ["norm"]
    for actual, expected in zip(folded(IMAGE), model(IMAGE), strict=True):
        assert error(actual.detach(), expected.detach()) <= 1e-12
