"""A normalization by the sample's statistics becomes one by those of data, and is folded away."""

import copy
from typing import Any

import pytest
import torch
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.fit.sweeps import EXACT
from normswap.norms.pointwise.dynamic_tanh import DynamicTanh
from normswap.norms.sample.group import LayerNormPerPosition

TO = ["batch_norm", "frozen_batch_norm"]


def images(norm: nn.Module) -> nn.Module:
    """Two convolutions with normalizations after them."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), norm, nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), copy.deepcopy(norm), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )
    randomise(model)
    return model.eval().double()


def tokens(norm: nn.Module) -> nn.Module:
    """A pre-norm MLP on a residual stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = copy.deepcopy(norm)
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))

    model = nn.Sequential(nn.Linear(3, 8), Block(), Block(), copy.deepcopy(norm), nn.Linear(8, 2))
    randomise(model)
    return model.eval().double()


OF_IMAGES: dict[str, Any] = {
    "group": lambda: nn.GroupNorm(2, 8),
    "group without affine": lambda: nn.GroupNorm(2, 8, affine=False),
    "one group": lambda: nn.GroupNorm(1, 8),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance without affine": lambda: nn.InstanceNorm2d(8),
}
OF_TOKENS: dict[str, Any] = {
    "layer": lambda: nn.LayerNorm(8),
    "layer without bias": lambda: nn.LayerNorm(8, bias=False),
    "layer without affine": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(8),
}


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("kind", list(OF_IMAGES))
def test_with_the_statistics_of_one_whole_image_it_is_exact_on_that_and_folds_away(
    kind: str, to: str
) -> None:
    model, image = images(OF_IMAGES[kind]()), torch.randn(1, 3, 12, 12).double() * 2 + 1
    fixed = ns.convert(model, to, include="*", data=[image])
    assert error(in_eval(fixed, image), in_eval(model, image)) <= 1e-12
    assert torch.allclose(fixed[1].running_mean, model[0](image).mean((0, 2, 3)))
    variance = model[0](image).var((0, 2, 3), correction=0)
    assert torch.allclose(fixed[1].running_var, variance)
    folded = ns.fold(fixed, image)
    assert [type(each).__name__ for each in folded.children()].count("Identity") == 2
    assert error(in_eval(folded, image), in_eval(model, image)) <= 1e-12
    # A tile of the image is computed as a part of it, which no normalization by the sample does.
    inner = in_eval(fixed, image)[..., :4, :4]
    assert error(in_eval(folded, image[..., :8, :8]), inner) <= 1e-12
    assert error(in_eval(model, image[..., :8, :8]), inner) > 1e-3


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("kind", list(OF_TOKENS))
def test_each_channel_has_the_mean_and_deviation_that_it_had(kind: str, to: str) -> None:
    model = tokens(OF_TOKENS[kind]())
    data = [torch.randn(6, 5, 3).double() for _ in range(3)]
    fixed = ns.convert(model, to, include="*", data=data)
    ns.calibrate(fixed, model, data, tolerance=EXACT)
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    model[3].register_forward_hook(lambda _, __, y: seen["before"].append(y))
    fixed[3].register_forward_hook(lambda _, __, y: seen["after"].append(y))
    for batch in data:
        in_eval(model, batch), in_eval(fixed, batch)
    before, after = (torch.cat(each).flatten(0, 1) for each in seen.values())
    assert torch.allclose(before.mean(0), after.mean(0), atol=1e-4)
    assert torch.allclose(before.std(0), after.std(0), atol=1e-4)
    x = torch.cat(data)
    folded = ns.fold(fixed, x)
    assert error(in_eval(folded, x), in_eval(fixed, x)) <= 1e-10
    names = {type(each).__name__ for each in folded.modules()}
    assert not any("BatchNorm" in name for name in names), names


@pytest.mark.parametrize("to", [*TO, "dynamic_tanh", "rms_norm"])
def test_what_follows_may_take_a_view(to: str) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x).view(-1, 8))

    data = [torch.randn(4, 5, 8)]
    result = ns.convert(Views().eval(), to, include="*", data=data)
    assert not ns.plan_of(result).left and in_eval(result, data[0]).isfinite().all()


def test_batches_and_their_order_do_not_matter() -> None:
    model = tokens(nn.LayerNorm(8))
    x = torch.randn(12, 5, 3).double()
    whole = ns.convert(model, "frozen_batch_norm", include="*", data=[x])
    parts = ns.convert(model, "frozen_batch_norm", include="*", data=[x[6:], x[:2], x[2:6]])
    assert error(in_eval(parts, x), in_eval(whole, x)) <= 1e-3


def test_a_batch_norm_that_trains_starts_where_eval_mode_is() -> None:
    model, image = images(nn.GroupNorm(2, 8)), torch.randn(4, 3, 12, 12).double()
    fixed = ns.convert(model, "batch_norm", include="*", data=[image])
    in_training = copy.deepcopy(fixed).train()(image)
    assert error(in_training, in_eval(fixed, image)) <= 1e-4


def test_what_has_running_statistics_keeps_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.GroupNorm(2, 8)).eval()
    randomise(model)
    data = [torch.randn(2, 3, 6, 6)]
    fixed = ns.convert(model, "frozen_batch_norm", include="*", data=data)
    assert torch.equal(fixed[1].running_mean, model[1].running_mean)
    assert torch.equal(fixed[1].weight, model[1].weight)
    assert fixed[2].running_var.ne(1).all()


def test_without_data_the_reason_says_what_is_missing() -> None:
    model = images(nn.GroupNorm(2, 8))
    x = torch.randn(2, 3, 12, 12).double()
    with pytest.raises(NormswapError, match="give data to measure them on"):
        ns.convert(model, "frozen_batch_norm", include="*", inputs=x)


def test_local_response_normalization_has_nothing_to_fix() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LocalResponseNorm(2)).eval()
    data = [torch.randn(2, 3, 6, 6)]
    with pytest.raises(NormswapError, match="local_response"):
        ns.convert(model, "batch_norm", include="*", data=data)


def test_the_original_is_as_before_and_the_result_saves_and_loads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), LayerNormPerPosition(8), nn.Conv2d(8, 2, 1)).eval()
    data = [torch.randn(2, 3, 6, 6)]
    before = copy.deepcopy(model.state_dict())
    fixed = ns.convert(model, "frozen_batch_norm", include="*", data=data)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    path = tmp_path / "factory.py"
    path.write_text(
        "from torch import nn\n"
        "from normswap.norms.sample.group import LayerNormPerPosition\n"
        "def net():\n"
        "    return nn.Sequential(\n"
        "        nn.Conv2d(3, 8, 3), LayerNormPerPosition(8), nn.Conv2d(8, 2, 1))\n"
    )
    ns.save(fixed, tmp_path / "saved")
    loaded = ns.load(tmp_path / "saved", source=f"{path}:net")
    assert torch.equal(in_eval(loaded, data[0]), in_eval(fixed, data[0]))


# --- the slope of a dynamic tanh ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
def test_the_slope_follows_the_size_of_what_is_normalized(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval().double()
    with torch.no_grad():
        model[0].weight *= scale
        model[0].bias *= scale
    data = [torch.randn(16, 5, 3).double() for _ in range(3)]
    x = torch.cat(data)
    result = ns.convert(model, "dynamic_tanh", include="*", data=data)
    (tanh,) = (each for each in result.modules() if isinstance(each, DynamicTanh))
    size = model[0](x).square().mean().sqrt()
    assert 0.1 < float(tanh.alpha * size) < 3
    # No slope of the same grid, each with its own gain and bias, is nearer the original.
    expected, start = in_eval(model, x), error_of(result, model, x)
    for factor in (0.25, 4.0):
        other = copy.deepcopy(result)
        slope = next(each for each in other.modules() if isinstance(each, DynamicTanh))
        slope.alpha.data.mul_(factor)
        fitted(slope, model, x, other)
        assert error_of(other, model, x) >= start * 0.98
    assert expected.isfinite().all()


def error_of(model: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    return float((in_eval(model, x) - in_eval(teacher, x)).square().mean().sqrt())


def fitted(tanh: Any, teacher: Any, x: Tensor, student: nn.Module) -> None:
    """Give `tanh` the gain and bias of calibration, by hand."""
    wanted = teacher[1](teacher[0](x)).flatten(0, 1)
    value = torch.tanh(tanh.alpha * teacher[0](x)).flatten(0, 1)
    with torch.no_grad():
        tanh.weight.copy_(wanted.std(0) / value.std(0))
        tanh.bias.copy_(wanted.mean(0) - tanh.weight * value.mean(0))


def test_a_failed_calibration_leaves_the_slope_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)).eval()
    student = ns.convert(model, "dynamic_tanh", include="*", inputs=torch.randn(2, 5, 3))
    (tanh,) = (each for each in student.modules() if isinstance(each, DynamicTanh))
    before = tanh.alpha.detach().clone()
    good, bad = torch.randn(2, 5, 3), torch.full((2, 5, 3), float("inf"))
    with pytest.raises(NormswapError):
        ns.calibrate(student, model, [*[good] * 9, bad])
    assert torch.equal(tanh.alpha, before)
