"""Calibration: the fitted normalizations have the teacher's moments, and nothing else changes."""

import copy
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from normswap.core.errors import NormswapError
from normswap.fit import site_moments
from normswap.fit.calibrate import TOLERANCE, calibrate, replaced_norms
from normswap.fit.sweeps import EXACT
from normswap.norms.sample.group import LayerNormPerPosition
from normswap.norms.sample.rms import RMSNorm


class Net(nn.Module):
    """(N, 3, H, W) to (N, 5); what follows a normalization writes in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(x)))
        y = self.bn3(self.conv3(y))
        y += x
        y.mul_(0.5)
        return self.head(self.relu(y).mean((2, 3)))


def _trained(net: nn.Module) -> nn.Module:
    """Statistics and affine as after training: none of them neutral, gains of both signs."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.weight, 0.2, 1.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2.0)
    return net.eval()


def _swapped(teacher: nn.Module, make: Callable[[int], nn.Module]) -> nn.Module:
    student = copy.deepcopy(teacher)
    for path, module in teacher.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            parent, _, name = path.rpartition(".")
            new = make(module.num_features).to(module.weight)
            setattr(student.get_submodule(parent), name, new)
    return student.eval()


def _group(channels: int) -> nn.Module:
    return nn.GroupNorm(2, channels)


def _images(samples: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    """Samples that differ in brightness and contrast, as real ones do."""
    contrast = torch.rand(samples, 1, 1, 1) + 0.5
    return (torch.randn(samples, 3, 6, 6) * contrast + torch.randn(samples, 3, 1, 1)).to(dtype)


@torch.no_grad()
def _moments(model: nn.Module, x: Tensor, paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Per channel of each path's output, over all of `x` at once, in float64."""
    outputs: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda m, args, output, path=path: outputs[path].append(output.detach().clone())
        )
        for path in paths
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    pooled = {path: torch.cat(value).double() for path, value in outputs.items()}
    return {path: (y.mean((0, 2, 3)), y.std((0, 2, 3), correction=0)) for path, y in pooled.items()}


def _assert_same_moments(
    student: nn.Module, teacher: nn.Module, x: Tensor, paths: list[str], within: float
) -> None:
    got, expected = _moments(student, x, paths), _moments(teacher, x, paths)
    for path in paths:
        unit = expected[path][1].square().mean().sqrt()
        for ours, theirs in zip(got[path], expected[path], strict=True):
            assert ((ours - theirs).abs() / unit).max() < within, path


SITES = ["bn1", "bn2", "bn3"]


@pytest.mark.parametrize(
    "make",
    [
        _group,
        lambda c: nn.GroupNorm(1, c),
        lambda c: nn.InstanceNorm2d(c, affine=True),
        LayerNormPerPosition,
        lambda c: RMSNorm(c, bias=True),
    ],
    ids=["group", "layer", "instance", "per_position", "rms"],
)
@pytest.mark.parametrize("batch_size", [24, 7])
def test_every_replaced_norm_gets_the_teachers_moments(
    make: Callable[[int], nn.Module], batch_size: int
) -> None:
    teacher, x = _trained(Net()), _images()
    student = _swapped(teacher, make)
    before = copy.deepcopy(student)
    assert calibrate(student, teacher, x.split(batch_size), tolerance=EXACT) is student
    _assert_same_moments(student, teacher, x, SITES, within=1e-3)
    # Where it ends by default, no mean and no deviation is far off either.
    calibrate(before, teacher, x.split(batch_size))
    _assert_same_moments(before, teacher, x, SITES, within=TOLERANCE)


def test_only_the_selected_are_fitted() -> None:
    teacher, data = _trained(Net()), [_images()]
    student = _swapped(teacher, _group)
    before = {name: p.clone() for name, p in student.named_parameters()}
    calibrate(student, teacher, data, include="bn2")
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"bn2.weight", "bn2.bias"}
    with pytest.raises(NormswapError, match="matches none"):
        calibrate(student, teacher, data, exclude="bn9")


def test_gains_keep_the_teachers_sign() -> None:
    teacher, x = _trained(Net()), _images()
    student = calibrate(_swapped(teacher, _group), teacher, [x])
    for path in SITES:
        theirs = teacher.get_submodule(path).weight
        assert theirs.min() < 0 < theirs.max()
        assert torch.equal(student.get_submodule(path).weight.sign(), theirs.sign())


def test_recovers_the_teacher_where_samples_have_equal_statistics() -> None:
    values = torch.randn(4, 36, dtype=torch.float64)
    x = torch.stack([values[:, torch.randperm(36)] for _ in range(9)]).view(9, 4, 6, 6)
    teacher = _trained(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True))).double()
    student = _swapped(teacher, lambda c: nn.InstanceNorm2d(c, affine=True))
    assert (student(x) - teacher(x)).abs().max() > 0.1
    calibrate(student, teacher, x.split(2))
    torch.testing.assert_close(student(x), teacher(x), rtol=0, atol=1e-10)


def _parameters(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Counted(list[Tensor]):
    """Batches that know how often they were read."""

    read = 0

    def __iter__(self) -> Any:
        self.read += 1
        return super().__iter__()


def test_the_sweeps_have_an_end_unless_more_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normswap.fit.calibrate.SWEEPS", 1)
    torch.manual_seed(0)
    deep = [[nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(12)]
    teacher = nn.Sequential(*(layer for block in deep for layer in block)).eval()
    batches = Counted((torch.randn(32, 8, 6, 6) * torch.rand(32, 1, 1, 1)).split(8))
    for norm in teacher[1::3]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    calibrate(_swapped(teacher, _group), teacher, batches, tolerance=TOLERANCE / 2)
    thorough, batches.read = batches.read, 0
    calibrate(_swapped(teacher, _group), teacher, batches)
    assert batches.read == 1 < thorough


@pytest.mark.parametrize("tolerance, within", [(0.0, 1e-9), (EXACT, 1e-6), (TOLERANCE, 5e-2)])
def test_result_depends_neither_on_batch_size_nor_on_order(
    monkeypatch: pytest.MonkeyPatch, tolerance: float, within: float
) -> None:
    monkeypatch.setattr(site_moments, "BLOCKS", 16)
    teacher, x = _trained(Net()).double(), _images(40, torch.float64)
    shuffled = x[torch.randperm(len(x))]
    results = [
        _parameters(calibrate(_swapped(teacher, _group), teacher, batches, tolerance=tolerance))
        # One sample a batch is more batches than `Moments` has blocks for.
        for batches in ([x], x.split(16), shuffled.split(11), shuffled.split(1))
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=within, atol=within)


def test_sites_are_fitted_on_what_the_fitted_ones_before_them_give() -> None:
    teacher = _trained(
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    ).double()
    x = torch.randn(30, 4, 5, 5, dtype=torch.float64) * (torch.rand(30, 1, 1, 1).double() + 0.5)
    student = calibrate(
        _swapped(teacher, lambda c: nn.GroupNorm(1, c)), teacher, x.split(8)
    ).requires_grad_(False)

    def fitted(norm: nn.Module, value: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        normalized = F.group_norm(value, 1)
        std = [v.std((0, 2, 3), correction=0) for v in (target, normalized)]
        gain = norm.weight.sign() * std[0] / std[1]
        return gain, target.mean((0, 2, 3)) - gain * normalized.mean((0, 2, 3))

    with torch.no_grad():
        first = fitted(teacher[0], x, teacher[:1](x))
        seen = teacher[2](F.relu(F.group_norm(x, 1, *first)))
        second = fitted(teacher[3], seen, teacher(x))
        unfitted = fitted(teacher[3], teacher[2](F.relu(F.group_norm(x, 1))), teacher(x))
    assert (second[0] - unfitted[0]).abs().max() > 0.05
    for norm, (gain, bias) in ((student[0], first), (student[3], second)):
        torch.testing.assert_close(norm.weight, gain, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(norm.bias, bias, rtol=1e-6, atol=1e-6)


class Shared(nn.Module):
    """One normalization after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.norm(self.left(x))) + F.relu_(self.norm(self.right(2 * x + 1)))


def test_moments_of_a_shared_norm_are_pooled_over_its_calls() -> None:
    teacher, x = _trained(Shared()), _images()
    student = calibrate(_swapped(teacher, _group), teacher, x.split(5))
    _assert_same_moments(student, teacher, x, ["norm"], within=1e-5)


class NormAct(nn.BatchNorm2d):
    """A BatchNorm with more inside, written as timm writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        y = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(self.drop(y))


def test_only_the_norm_of_a_norm_with_activation_is_matched() -> None:
    teacher = _trained(nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 1)))
    student, x = copy.deepcopy(teacher), _images()
    student[1] = nn.Sequential(
        OrderedDict(norm=nn.GroupNorm(2, 8), drop=teacher[1].drop, act=teacher[1].act)
    )
    assert [path for path, *_ in replaced_norms(student, teacher)] == ["1"]
    calibrate(student, teacher, [x])
    with torch.no_grad():
        expected = nn.BatchNorm2d.forward(teacher[1], teacher[0](x)).transpose(0, 1).flatten(1)
        got = student[1].norm(student[0](x)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(got.mean(1), expected.mean(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.std(1), expected.std(1), rtol=1e-4, atol=1e-4)


def test_channels_that_lie_last_are_fitted_where_they_lie() -> None:
    teacher = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    nn.init.normal_(teacher[1].weight)
    nn.init.normal_(teacher[1].bias)
    student, x = copy.deepcopy(teacher), torch.randn(10, 5, 6, dtype=torch.float64)
    student[1] = RMSNorm(8, bias=True, per_position=True, channel_axis=-1).double()
    calibrate(student, teacher, x.split(3))
    with torch.no_grad():
        got, expected = (m[:2](x).flatten(0, 1) for m in (student, teacher))
    torch.testing.assert_close(got.mean(0), expected.mean(0))
    torch.testing.assert_close(got.std(0), expected.std(0))


def _state(model: nn.Module) -> dict[str, Any]:
    return {
        "flags": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "grad": [(p.requires_grad, p.grad) for p in model.parameters()],
        "dtypes": [(p.dtype, p.device) for p in model.parameters()],
        "buffers": [buffer.tolist() for buffer in model.buffers()],
    }


def _prepared() -> tuple[nn.Module, nn.Module, Tensor]:
    teacher, x = _trained(Net()), _images()
    student = _swapped(teacher, _group)
    teacher.train()
    student.conv2.train()
    student.bn2.weight.requires_grad_(False)
    student.bn1.register_forward_hook(lambda module, args, output: None)
    return student, teacher, x


def test_everything_but_the_fitted_parameters_is_as_before() -> None:
    student, teacher, x = _prepared()
    before = _state(student), _state(teacher), _parameters(teacher)
    others = {n: p.clone() for n, p in student.named_parameters() if "bn" not in n}
    identities = [id(parameter) for parameter in student.parameters()]
    generators = torch.get_rng_state(), random.getstate()
    loader = DataLoader(list(x), batch_size=5, shuffle=True)
    calibrate(student, teacher, loader)
    assert (_state(student), _state(teacher)) == before[:2]
    assert torch.equal(_parameters(teacher), before[2])
    assert all(torch.equal(student.get_parameter(n), p) for n, p in others.items())
    assert [id(parameter) for parameter in student.parameters()] == identities
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]


def test_student_is_as_before_after_an_error() -> None:
    student, teacher, x = _prepared()
    before = _state(student), _parameters(student)
    with pytest.raises(NormswapError):
        calibrate(student, teacher, [x, x[:, :2]])
    assert _state(student) == before[0]
    assert torch.equal(_parameters(student), before[1])


def test_a_shuffling_loader_shows_the_same_batches_to_every_sweep() -> None:
    teacher, x = _trained(Net()), _images()
    loader = DataLoader(list(x), batch_size=4, shuffle=True)
    torch.manual_seed(3)
    expected = [batch for batch, _ in zip(loader, range(2), strict=False)]
    torch.manual_seed(3)
    student = calibrate(_swapped(teacher, _group), teacher, loader, batches=2)
    _assert_same_moments(student, teacher, torch.cat(expected), SITES, within=1e-3)


@pytest.mark.parametrize(
    "form", [iter, lambda b: [(v, torch.zeros(len(v))) for v in b], lambda b: [{"x": v} for v in b]]
)
def test_iterators_labelled_batches_and_keyword_batches_serve_as_well(form: Any) -> None:
    teacher, x = _trained(Net()), _images()
    expected = calibrate(_swapped(teacher, _group), teacher, x.split(9))
    student = calibrate(_swapped(teacher, _group), teacher, form(x.split(9)))
    assert torch.equal(_parameters(student), _parameters(expected))


@pytest.mark.parametrize("dtype, within", [(torch.float16, 2e-2), (torch.bfloat16, 0.15)])
def test_half_precision_models_are_fitted_on_float32_data(
    dtype: torch.dtype, within: float
) -> None:
    teacher, x = _trained(Net()).to(dtype), _images()
    student = calibrate(_swapped(teacher, _group), teacher, x.split(9))
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    _assert_same_moments(student, teacher, x.to(dtype), SITES, within=within)


def test_large_mean_does_not_spoil_the_deviation() -> None:
    teacher = _trained(nn.Sequential(nn.BatchNorm2d(4)))
    teacher[0].bias.data.fill_(1e4)
    student, x = _swapped(teacher, _group).double(), torch.randn(12, 4, 5, 5, dtype=torch.float64)
    calibrate(student, teacher.double(), x.split(5))
    _assert_same_moments(student, teacher, x, ["0"], within=1e-9)


def test_constant_channel_gets_a_gain_of_the_teachers_size() -> None:
    teacher, x = _trained(Net()), _images()
    student = _swapped(teacher, lambda c: nn.InstanceNorm2d(c, affine=True))
    teacher.conv1.weight.data[2] = student.conv1.weight.data[2] = 0
    calibrate(student, teacher, x.split(9))
    assert torch.isfinite(_parameters(student)).all()
    assert student.bn1.weight[2].abs() < 1
    _assert_same_moments(student, teacher, x, ["bn1"], within=1e-3)


def test_norm_without_bias_gets_the_deviation_and_a_warning() -> None:
    teacher, x = _trained(Net()), _images()
    student = _swapped(teacher, RMSNorm)
    with pytest.warns(UserWarning, match="has no bias"):
        calibrate(student, teacher, [x])
    got, expected = (_moments(m, x, ["bn1"])["bn1"][1] for m in (student, teacher))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_norm_that_is_never_called_stays_with_a_warning() -> None:
    teacher, x = _trained(Net()), _images()
    teacher.unused = nn.BatchNorm2d(4)
    student = _swapped(teacher, _group)
    student.unused.weight.data.fill_(3.0)
    with pytest.warns(UserWarning, match="'unused' was never called"):
        calibrate(student, teacher, [x])
    assert student.unused.weight.tolist() == [3.0] * 4


def test_batch_norm_in_another_form_is_left_out() -> None:
    teacher = _trained(Net())
    student = copy.deepcopy(teacher)
    student.bn1 = nn.SyncBatchNorm(8)
    student.bn2 = _group(8)
    assert [path for path, *_ in replaced_norms(student, teacher)] == ["bn2"]


@pytest.mark.parametrize(
    "data, words",
    [
        ([], "there is no batch"),
        ([torch.full((2, 3, 6, 6), float("nan"))], "'bn1': the teacher's activations .*not finite"),
        ([torch.randn(2, 7, 6, 6)], "does not run on an input of 2x7x6x6"),
        (["image"], "type str"),
    ],
)
def test_unusable_data_is_refused(data: Any, words: str) -> None:
    teacher = _trained(Net())
    with pytest.raises(NormswapError, match=words) as error:
        calibrate(_swapped(teacher, _group), teacher, data)
    assert "\n" not in str(error.value)


def test_student_without_a_replacement_is_refused() -> None:
    teacher = _trained(Net())
    with pytest.raises(NormswapError, match="same normalization layers"):
        calibrate(copy.deepcopy(teacher), teacher, [_images()])


def test_gain_that_is_not_per_channel_is_refused() -> None:
    teacher = _trained(Net())
    student = copy.deepcopy(teacher)
    student.bn1 = nn.LayerNorm([8, 6, 6])
    with pytest.raises(NormswapError, match="'bn1'"):
        calibrate(student, teacher, [_images()])


def test_progress_is_shown_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for terminal in (True, False):
        student, teacher, x = _prepared()
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        monkeypatch.setattr("normswap.core.terminal.stderr", console)
        calibrate(student, teacher, list(x.split(4)))
        shown[terminal] = console.file.getvalue()
    assert "calibrating 3 normalizations: sweep" in shown[True]
    assert shown[False] == ""
