"""With `pad=True` a BatchNorm folds into a convolution after it that pads with zeros."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import batch_norms, error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.norms.pointwise.channel_affine import ChannelAffine
from normswap.passes import Fold
from normswap.passes.edits.padded_shift import PaddedShift
from normswap.passes.plan import Plan


def before(*layers: nn.Module, norm: nn.Module | None = None) -> nn.Sequential:
    """A BatchNorm that nothing before it can fold in, and `layers` after it."""
    return nn.Sequential(nn.ReLU(), norm or nn.BatchNorm2d(4), *layers)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


IMAGE = normal(2, 4, 9, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "1 axis": (
        lambda: before(
            nn.Conv1d(4, 4, 3, 2, padding=2, dilation=2, groups=2), norm=nn.BatchNorm1d(4)
        ),
        normal(2, 4, 11),
    ),
    "2 axes": (lambda: before(nn.Conv2d(4, 4, (3, 2), padding=(1, 0), bias=False)), IMAGE),
    "3 axes": (
        lambda: before(nn.Conv3d(4, 4, 3, padding=(1, 0, 1)), norm=nn.BatchNorm3d(4)),
        normal(2, 4, 5, 6, 7),
    ),
    "same": (lambda: before(nn.Conv2d(4, 4, (5, 4), padding="same", groups=4)), IMAGE),
    "kernel larger than the image": (lambda: before(nn.Conv2d(4, 4, 9, padding=4)), IMAGE[..., :3]),
    "padding module": (
        lambda: before(nn.ZeroPad2d((1, 2, 3, 0)), nn.Conv2d(4, 4, 3, stride=2, padding=1)),
        IMAGE,
    ),
    "a padding that crops": (
        lambda: before(nn.ZeroPad2d((-1, 2, -1, 0)), nn.Conv2d(4, 4, 3)),
        IMAGE,
    ),
    "pooling between": (
        lambda: before(nn.Dropout(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1)),
        IMAGE,
    ),
    "two BatchNorms": (lambda: before(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), IMAGE),
    "one on either side": (
        lambda: before(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        IMAGE,
    ),
}


def folded(model: nn.Module, x: Tensor) -> nn.Module:
    """The model with its BatchNorms folded, and no affine left."""
    result = ns.fold(randomise(model.to(x.dtype)).eval(), x, pad=True)
    assert not batch_norms(result), ns.plan(model, Fold(pad=True), inputs=x)
    return result


def layer_of(model: nn.Module) -> PaddedShift:
    (layer,) = (each for each in model.modules() if isinstance(each, PaddedShift))
    return layer


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_at_every_size(case: str) -> None:
    make, x = CASES[case]
    model = make()
    result = folded(model, x)
    larger = F.pad(x, (2, 3) * (x.dim() - 2), "circular" if x.shape[-1] > 3 else "replicate")
    for each in (x, x, larger, x[:1], x):
        assert error(in_eval(result, each), in_eval(model, each)) <= 1e-12


class Pitch(nn.Module):
    """CREPE's blocks: padding, convolution, ReLU, BatchNorm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 8, (16, 1), (4, 1)), nn.Conv2d(8, 6, (8, 1))])
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(6)])
        self.pads = ((0, 0, 6, 6), (0, 0, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convs[0](F.pad(x, (0, 0, 6, 6))))
        x = F.max_pool2d(self.norms[0](x), (2, 1), (2, 1))
        x = F.relu(self.convs[1](F.pad(x, (0, 0, 3, 4))))
        return F.max_pool2d(self.norms[1](x), (2, 1), (2, 1)).mean((2, 3))


def test_a_padding_in_the_forward_counts() -> None:
    model, x = Pitch(), normal(2, 1, 64, 1)
    randomise(model.double())
    assert batch_norms(ns.fold(model, x)) == ["norms.0", "norms.1"]
    result = ns.fold(model, x, pad=True)
    assert batch_norms(result) == ["norms.1"]  # nothing comes after it
    for each in (x, normal(1, 1, 128, 1)):
        assert error(in_eval(result, each), in_eval(model, each)) <= 1e-12


class Padded(nn.Module):
    """A BatchNorm and a convolution, with a padding between them that the caller chooses."""

    def __init__(self, pad: Callable[[Tensor], Tensor], conv: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.conv, self.pad = nn.BatchNorm1d(4), conv or nn.Conv1d(4, 4, 3), pad

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pad(self.norm(x.relu())))


class Activated(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Pads(Padded):
    """It pads by as much as the size says."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.relu())
        return self.conv(F.pad(x, (0, x.shape[-1] % 2)))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Pads(torch.relu), "its shift meets a zero padding"),
        (Padded(lambda x: F.pad(x, (2, 0), value=1.0)), "a padding that is not 0"),
        (Padded(torch.clone, Activated(4, 4, 3, padding=1)), "its shift meets the zero padding"),
        (
            Padded(torch.clone, nn.Conv1d(4, 8, 3, padding=1)),
            "zero padding of conv, whose output has 144 numbers, more than the 72 of its affine",
        ),
        (
            nn.Sequential(
                nn.ReLU(), nn.BatchNorm1d(4), nn.AvgPool1d(3, padding=1), nn.Conv1d(4, 4, 3)
            ),
            "its shift meets a zero padding",
        ),
    ],
)
def test_what_is_left_says_why(model: nn.Module, why: str) -> None:
    randomise(model.double())
    x = normal(2, 4, 9)
    plan = ns.plan(model, Fold(pad=True), inputs=x)
    (edit,) = plan.edits
    assert edit.edit == "reduce" and edit.to == "affine"
    assert why in edit.reason
    for each in (x, normal(2, 4, 8)):
        assert error(in_eval(plan.apply(model), each), in_eval(model, each)) <= 1e-12


class Levels(nn.Module):
    """One convolution at two sizes, and without samples."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.relu())
        each = torch.stack([self.conv(sample).mean((1, 2)) for sample in x[:2]])
        return self.conv(F.max_pool2d(x, 2)).mean((2, 3)) + each


def test_a_convolution_at_several_sizes_adds_to_each_what_is_its_own() -> None:
    model = Levels()
    result = folded(model, IMAGE)
    for each in (IMAGE, normal(2, 4, 12, 7)):
        assert error(in_eval(result, each), in_eval(model, each)) <= 1e-12


def test_it_is_not_done_unless_asked_for() -> None:
    model = randomise(before(nn.Conv2d(4, 4, 3, padding=1)).double())
    (left,) = batch_norms(ns.fold(model, IMAGE))
    assert isinstance(ns.fold(model, IMAGE).get_submodule(left), ChannelAffine)


# --- what one does with the result --------------------------------------------------------------


def conv_model() -> tuple[nn.Module, nn.Module]:
    model = before(nn.Conv2d(4, 4, 3, padding=1))
    return model, folded(model, IMAGE)


def test_it_can_be_copied_pickled_and_moved_to_another_dtype() -> None:
    _, result = conv_model()
    expected = in_eval(result, IMAGE)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for each in (copy.deepcopy(result), torch.load(file, weights_only=False)):
        assert isinstance(layer_of(each), nn.Conv2d)
        assert torch.equal(in_eval(each, IMAGE), expected)
    single = copy.deepcopy(result).float()
    assert error(in_eval(single, IMAGE.float()).double(), expected) <= 1e-5
    assert in_eval(single.double(), IMAGE).dtype == torch.float64


def test_other_weights_can_be_loaded_into_it() -> None:
    _, result = conv_model()
    other = folded(randomise(before(nn.Conv2d(4, 4, 3, padding=1)).double(), seed=3), IMAGE)
    in_eval(result, IMAGE)  # what it keeps for this size has to go
    result.load_state_dict(other.state_dict())
    assert torch.equal(in_eval(result, IMAGE), in_eval(other, IMAGE))


def test_a_plan_in_json_gives_it_again() -> None:
    model, result = conv_model()
    plan = Plan.from_json(ns.plan(model, Fold(pad=True), inputs=IMAGE).to_json())
    assert torch.equal(in_eval(plan.apply(model), IMAGE), in_eval(result, IMAGE))


def test_it_can_be_exported_compiled_differentiated_and_mapped_over() -> None:
    model, result = conv_model()
    model.eval(), result.eval()
    exported = torch.export.export(result, (IMAGE,)).module()
    x = IMAGE.clone().requires_grad_()
    gradient = torch.autograd.grad(result(x).square().sum(), x)[0]
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    assert error(gradient, expected) <= 1e-12
    transformed = torch.func.grad(lambda x: result(x).square().sum())(IMAGE)
    assert error(transformed, expected) <= 1e-12
    mapped = torch.func.vmap(result)(IMAGE.unsqueeze(1)).squeeze(1)
    with torch.inference_mode():
        inferred = result(IMAGE[..., :5])
    for actual, x in (
        (exported(IMAGE), IMAGE),
        (mapped, IMAGE),
        (inferred, IMAGE[..., :5]),
        (result(IMAGE[..., :5]), IMAGE[..., :5]),
    ):
        assert error(actual.detach(), in_eval(model, x)) <= 1e-12


def test_onnx_runtime_computes_the_same(tmp_path: Path) -> None:
    model = before(nn.Conv2d(4, 4, 3, padding=1))
    x = IMAGE.float()
    result = folded(model, x)
    ns.export(result, x, tmp_path / "model.onnx")
    report = ns.validate(tmp_path / "model.onnx", model)
    assert report.passed, report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_is_as_good_as_the_original_in_16_bits(dtype: torch.dtype) -> None:
    model, x = before(nn.Conv2d(4, 4, 3, padding=1)), IMAGE.to(dtype)
    result = folded(model, x)
    exact = in_eval(copy.deepcopy(model).double(), x.double())
    original = error(in_eval(model, x).double(), exact)
    assert error(in_eval(result, x).double(), exact) <= 4 * original


def test_it_follows_autocast() -> None:
    model = before(nn.Conv2d(4, 4, 3, padding=1))
    result = folded(model, IMAGE.float())
    with torch.autocast("cpu", torch.bfloat16):
        low = in_eval(result, IMAGE.float())
    assert low.dtype == torch.bfloat16
    for x in (IMAGE.float(), IMAGE.float()):
        assert error(in_eval(result, x), in_eval(model, x)) <= 1e-5
    assert error(low.float(), in_eval(model, IMAGE.float())) <= 0.05


def test_a_mean_too_large_for_the_dtype_is_left() -> None:
    model = randomise(before(nn.Conv2d(4, 4, 3, padding=1))).half().eval()
    plan = ns.plan(model, Fold(pad=True), inputs=IMAGE.half())
    model[1].running_mean.fill_(500)
    with pytest.raises(NormswapError, match="times as large as what it leaves"):
        plan.apply(model)
    (edit,) = ns.plan(model, Fold(pad=True), inputs=IMAGE.half()).edits
    assert edit.reason.startswith("stays a BatchNorm: its mean is")
