"""A model that folded its input normalization computes from raw pixels what it did before."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, batch_norms, error, in_eval, randomise
from torch import Tensor, nn
from typer.testing import CliRunner

import normswap as ns
from normswap.cli.app import app
from normswap.core.errors import NormswapError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def normalized(raw: Tensor, mean: Any = MEAN, std: Any = STD) -> Tensor:
    """(x / 255 - mean) / std in float64, as torchvision's ToTensor and Normalize have it."""
    shape = (-1, *[1] * (raw.dim() - 2))
    center, spread = (torch.tensor(x, dtype=torch.float64).view(shape) for x in (mean, std))
    return (raw.double() / 255 - center) / spread


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def folded(
    model: nn.Module, raw: Tensor, mean: Any = MEAN, std: Any = STD, tolerance: float = 1e-5
) -> nn.Module:
    """The model that takes `raw`: the same in float64, and in float32 up to rounding."""
    randomise(model)
    plan = ns.plan(model, ns.AbsorbInput(mean, std), inputs=normalized(raw, mean, std).float())
    assert ns.Plan.from_json(plan.to_json()) == plan
    exact = copy.deepcopy(model).double()
    expected = in_eval(exact, normalized(raw, mean, std))
    assert error(in_eval(plan.apply(exact), raw), expected) <= 1e-10
    result = plan.apply(model)
    assert error(in_eval(result, raw).double(), expected) <= tolerance
    assert error(in_eval(result, raw.float()), in_eval(result, raw)) <= 1e-6
    return result


@st.composite
def conv(draw: st.DrawFn) -> tuple[nn.Module, Tensor, list[float], list[float]]:
    dims, groups = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    channels = groups * draw(st.integers(1, 2))
    padding: Any = draw(st.sampled_from([0, 1, 2, "same", "valid"]))
    layer = CONV[dims](
        channels,
        groups * draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "replicate", "circular"])),
    )
    numbers = st.floats(0.05, 1.0)
    mean = draw(st.lists(numbers, min_size=channels, max_size=channels))
    std = draw(st.lists(numbers, min_size=channels, max_size=channels))
    model = nn.Sequential(layer, nn.Tanh())
    return model, pixels(draw(st.integers(1, 2)), channels, *[6] * dims), mean, std


@settings(max_examples=10, deadline=None, derandomize=True)
@given(conv())
def test_any_first_convolution_takes_pixels(drawn: Any) -> None:
    model, raw, mean, std = drawn
    keys = set(model.state_dict())
    # A small std of a bright channel leaves a small difference of large numbers.
    result = folded(model, raw, mean, std, tolerance=1e-4)
    assert isinstance(result[0], type(model[0]))
    assert set(result.state_dict()) - keys <= {"0.bias"}


class Focus(nn.Module):
    """Space to depth by slices (YOLOv5's), then a padded convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 5, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return self.conv(torch.cat(corners, 1))


class Branches(nn.Module):
    """Two layers that take the input: one pads and one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.padded, self.flat = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(3 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.padded(x).mean((2, 3)) + self.flat(x.flatten(1))


class Cast(nn.Conv2d):
    """Casts its input, as a layer for mixed precision would."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


@pytest.mark.parametrize(
    "model",
    [
        Residual(),
        Focus(),
        Branches(),
        nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3, padding=1)),
        nn.Sequential(nn.Conv2d(3, 8, 4, 4, bias=False), nn.Flatten(2), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 10, bias=False), nn.ReLU()),
        nn.Sequential(timm.layers.Conv2dSame(3, 4, 3, stride=2), nn.ReLU()),
        nn.Sequential(nn.Dropout(), Cast(3, 4, 3, padding=1)),
    ],
    ids=["residual", "focus", "branches", "unshuffle", "patches", "mlp", "same", "cast"],
)
def test_stems_take_pixels(model: nn.Module) -> None:
    folded(model, pixels(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_resnet", {}),
        ("test_vit", {"img_size": 64}),
        ("tf_mobilenetv3_small_minimal_100", {}),
    ],
)
def test_models_of_timm_take_pixels(name: str, options: dict[str, int]) -> None:
    folded(timm.create_model(name, num_classes=5, **options), pixels(1, 3, 64, 64))


def test_an_unpadded_layer_needs_nothing_but_a_cast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1))
    result = folded(model, pixels(1, 3, 8, 8))
    assert result[0].raw_offset is None


def test_a_padded_layer_subtracts_what_becomes_zero() -> None:
    result = folded(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1)), pixels(1, 3, 8, 8))
    expected = torch.tensor([255 * m for m in MEAN]).view(3, 1, 1)
    assert torch.allclose(result[0].raw_offset, expected)
    black = in_eval(result, expected.expand(1, 3, 8, 8))
    assert torch.allclose(black, result[0].bias.view(1, -1, 1, 1).expand_as(black), atol=1e-5)


def test_folding_before_or_after_is_the_same() -> None:
    model, raw = randomise(Residual()), pixels(2, 3, 8, 8)
    x = normalized(raw).float()
    first = ns.absorb_input(ns.fold(model, x), x, MEAN, STD)
    then = ns.fold(ns.absorb_input(model, x, MEAN, STD), x)
    assert batch_norms(first) == batch_norms(then)
    expected = in_eval(model, x)
    assert error(in_eval(first, raw), expected) <= 1e-5
    assert error(in_eval(then, raw), expected) <= 1e-5


def test_keyword_inputs_and_other_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.embed = nn.Conv2d(3, 4, 3, padding=1), nn.Embedding(5, 4)

        def forward(self, index: Tensor, image: Tensor) -> Tensor:
            return self.conv(input=image).mean((2, 3)) + self.embed(index)

    model, raw, index = Two(), pixels(2, 3, 8, 8), torch.tensor([1, 4])
    x = normalized(raw).float()
    result = ns.absorb_input(model, {"index": index, "image": x}, MEAN, STD)
    assert error(in_eval(result, index, raw), in_eval(model, index, x)) <= 1e-5


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "store"])
def test_it_can_be_copied_pickled_and_saved(how: str, tmp_path: Path) -> None:
    def source() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())

    raw = pixels(1, 3, 8, 8)
    result = folded(source(), raw)
    if how == "deepcopy":
        again = copy.deepcopy(result)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(result))
    else:
        ns.save(result, tmp_path / "model")
        again = ns.load(tmp_path / "model", source=source)
    assert torch.equal(in_eval(again, raw), in_eval(result, raw))
    assert isinstance(again[0], nn.Conv2d)


def test_half_precision_casts_to_its_own() -> None:
    model, raw = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))), pixels(1, 3, 8, 8)
    x = normalized(raw).float()
    result = ns.absorb_input(model, x, MEAN, STD).to(torch.bfloat16)
    assert in_eval(result, raw).dtype == torch.bfloat16
    assert error(in_eval(result, raw).float(), in_eval(model, x)) <= 2e-2


def test_parametrized_weights_flags_and_hooks_survive() -> None:
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3, padding=1), "bias")
    model, raw, calls = nn.Sequential(conv).eval(), pixels(1, 3, 8, 8), []
    conv.weight.requires_grad_(False)
    conv.register_forward_hook(lambda *_: calls.append(1))
    x = normalized(raw).float()
    result = ns.absorb_input(model, x, MEAN, STD, inplace=True)
    assert result is model
    assert result[0] is conv
    calls.clear()
    in_eval(result, raw)
    assert calls == [1]
    assert not conv.weight.requires_grad
    assert "bias" in conv.parametrizations
    assert torch.equal(in_eval(copy.deepcopy(result), raw), in_eval(result, raw))


class Computes(nn.Module):
    def __init__(self, before: Any) -> None:
        super().__init__()
        self.before, self.conv = before, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.before(x))


class Leaks(nn.Module):
    """A value inside a layer is used outside it: torch.export takes a cast that does nothing for
    its input.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = Cast(3, 4, 3, padding=1), nn.Linear(192, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean() + self.fc(x.flatten(1)).sum()


class ScalesIntegers(Computes):
    """As models that take images from a camera or a replay buffer do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.is_floating_point() else x.to(self.conv.weight.dtype) / 255)


class Shared(Computes):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.conv(x.tanh())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Computes(lambda x: 2 * x), "mul"),
        (Computes(lambda x: F.avg_pool2d(x, 2)), "avg_pool2d"),
        (Computes(lambda x: F.pad(x, (1, 1))), "zero padding"),
        (Computes(torch.tanh), "tanh"),
        (Computes(lambda x: x + torch.ones(3, 1, 1)), "ones"),
        (Shared(None), "tanh"),
        (Leaks(), "takes what conv has"),
        (ScalesIntegers(None), "decides by arguments, sizes or attributes"),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)), "BatchNorm"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "transposed"),
        (nn.Sequential(nn.InstanceNorm2d(3), nn.Conv2d(3, 4, 1)), "instance_norm"),
    ],
)
def test_what_stops_it_is_named_and_nothing_changes(model: nn.Module, reason: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormswapError, match=f"cannot move into the model: .*{reason}"):
        ns.absorb_input(model, x, MEAN, STD, inplace=True)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_it_is_not_folded_twice() -> None:
    x = torch.randn(1, 3, 8, 8)
    model = ns.absorb_input(nn.Sequential(nn.Conv2d(3, 4, 2)), x, MEAN, STD)
    with pytest.raises(NormswapError, match="already"):
        ns.absorb_input(model, x, MEAN, STD)


@pytest.mark.parametrize(
    ("mean", "std", "shape", "message"),
    [
        (MEAN, (0.2,), (1, 3, 8, 8), "3 numbers and std 1"),
        ((), (), (1, 3, 8, 8), "0 numbers"),
        (MEAN, (0.2, 0.0, 0.2), (1, 3, 8, 8), "above 0"),
        ((0.5, float("nan"), 0.5), STD, (1, 3, 8, 8), "finite"),
        (0.5, 0.2, (1, 3, 8, 8), "lists of numbers"),
        ((0.5,), (0.5,), (1, 3, 8, 8), "of 1 channels"),
        (MEAN, STD, None, "example inputs"),
    ],
)
def test_mistakes_are_one_clear_line(mean: Any, std: Any, shape: Any, message: str) -> None:
    inputs = None if shape is None else torch.randn(shape)
    with pytest.raises(NormswapError, match=message) as caught:
        ns.absorb_input(nn.Sequential(nn.Conv2d(3, 4, 3)), inputs, mean, std)
    assert "\n" not in str(caught.value)


def test_mean_and_std_may_be_tensors() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 2)), torch.randn(1, 3, 8, 8)
    of_tensors = ns.plan(model, ns.AbsorbInput(torch.tensor(MEAN), torch.tensor(STD)), inputs=x)
    assert of_tensors.changed == ns.plan(model, ns.AbsorbInput(MEAN, STD), inputs=x).changed


def test_onnx_takes_uint8_and_agrees(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    raw = pixels(2, 3, 8, 8)
    report = ns.export(folded(model, raw), raw, tmp_path / "model.onnx")
    assert report.passed
    assert report.validation is not None
    assert report.operators["Cast"] == 1
    assert report.operators["Sub"] == 1


def test_the_command_compares_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "raw"
    arguments = ["demo:digits", "--mean", "0.3", "--std", "0.4", "--json"]
    result = CliRunner().invoke(app, ["absorb-input", *arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["deviation"] <= report["allowed"]
    loaded = ns.load(out).eval()
    assert loaded(pixels(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("padding", [0, 1])
def test_a_model_whose_weights_are_buffers_takes_raw_pixels(padding: int) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=padding).double()
    for name in ("weight", "bias"):
        fixed = getattr(conv, name).detach()
        delattr(conv, name)
        conv.register_buffer(name, fixed)
    raw = pixels(2, 3, 8, 8)
    assert not list(conv.parameters())
    result = ns.absorb_input(nn.Sequential(conv), normalized(raw), MEAN, STD)
    torch.testing.assert_close(result(raw), conv(normalized(raw)), rtol=1e-9, atol=1e-9)


def test_a_model_that_does_not_use_its_input_is_refused() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ones(x.shape[0])

    with pytest.raises(NormswapError, match="no layer of the model takes the input"):
        ns.absorb_input(Constant(), torch.randn(2, 3, 8, 8), MEAN, STD)
