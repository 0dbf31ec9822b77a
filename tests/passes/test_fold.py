"""Fold computes the same function in eval mode, and leaves with a reason what it cannot."""

import copy
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvBN, Detector, Residual, batch_norms, error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.passes import Fold
from normswap.passes.edits import Reduce

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def assert_folds(model: nn.Module, *inputs: Tensor, left: int = 0) -> nn.Module:
    """The folded model has `left` BatchNorms and computes what `model` does, to rounding."""
    randomise(model)
    folded = ns.fold(model, inputs)
    assert len(batch_norms(folded)) == left, ns.plan(model, Fold(), inputs=inputs).left
    expected = in_eval(copy.deepcopy(model).double(), *[x.double() for x in inputs])
    actual = in_eval(folded, *inputs)
    tolerance = TOLERANCE[actual.dtype]
    assert error(actual.double(), expected) <= tolerance
    return folded


def reason_left(model: nn.Module, *inputs: Tensor, site: str = "bn") -> str:
    """Why `site` is left; the fold of the rest is exact."""
    randomise(model)
    plan = ns.plan(model, Fold(), inputs=inputs)
    stays = [edit for edit in plan.edits if edit.effect == "leaves"]
    (left,) = (each for each in (*plan.left, *stays) if each.site == site)
    assert error(in_eval(ns.fold(model, inputs), *inputs), in_eval(model, *inputs)) <= 1e-5
    return left.reason


@st.composite
def conv_then_bn(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 3]))
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs = groups * draw(st.integers(1, 2))
    outputs = groups * draw(st.integers(1, 3))
    options = {
        "kernel_size": draw(st.integers(1, 3)),
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if draw(st.booleans()):
        options["output_padding"] = draw(st.integers(0, options["stride"] - 1))
        conv = TRANSPOSED[dims](inputs, outputs, **options)
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"][: 3 if dims == 3 else 4])
        )
        conv = CONV[dims](inputs, outputs, **options)
    norm = NORM[dims](
        outputs, eps=draw(st.sampled_from([0.0, 1e-5, 1e-3])), affine=draw(st.booleans())
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    x = torch.randn(draw(st.integers(1, 3)), inputs, *[6] * dims, dtype=dtype)
    return nn.Sequential(conv, norm).to(dtype), x


@settings(max_examples=20, deadline=None, derandomize=True)
@given(conv_then_bn())
def test_any_conv_folds_in_its_batch_norm(drawn: tuple[nn.Module, Tensor]) -> None:
    assert_folds(*drawn)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_with_padding_by_name(padding: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=padding)
    assert_folds(nn.Sequential(conv, nn.BatchNorm2d(4)), torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_folds_in_a_batch_norm(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4))
    assert_folds(model, torch.randn(3, 5))


class Between(nn.Module):
    """Linear or conv, something in between, bn."""

    def __init__(
        self, layer: nn.Module, between: Callable[[Tensor], Tensor], norm: nn.Module
    ) -> None:
        super().__init__()
        self.layer, self.between, self.bn = layer, between, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self.layer(x)))


LINEAR, BN1 = lambda: nn.Linear(5, 4), lambda: nn.BatchNorm1d(4)
CONV2, BN2 = lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4)


@pytest.mark.parametrize(
    ("layer", "between", "norm", "shape"),
    [
        (LINEAR, lambda x: x.transpose(1, 2), BN1, (2, 7, 5)),
        (LINEAR, lambda x: x.transpose(1, 2), BN1, (2, 4, 5)),
        (LINEAR, lambda x: x.permute(0, 3, 1, 2), BN2, (2, 6, 7, 5)),
        (LINEAR, lambda x: x.flatten(0, 1), BN1, (2, 7, 5)),
        (LINEAR, lambda x: x.reshape(-1, 4), BN1, (2, 7, 5)),
        (LINEAR, lambda x: x.unsqueeze(-1), BN1, (2, 5)),
        (CONV2, lambda x: x.flatten(2), BN1, (2, 3, 6, 7)),
        (CONV2, lambda x: x.permute(0, 2, 3, 1).reshape(-1, 4), BN1, (2, 3, 6, 7)),
        (CONV2, lambda x: x.permute(0, -2, -1, -3).permute(0, -1, 1, 2), BN2, (2, 3, 6, 7)),
        (CONV2, lambda x: x[:, :, :].contiguous().clone(), BN2, (2, 3, 6, 7)),
        (CONV2, lambda x: F.dropout(x, 0.0, True) * 2, BN2, (2, 3, 6, 7)),
        (CONV2, nn.Identity(), BN2, (2, 3, 6, 7)),
        (CONV2, nn.Dropout(0.5), BN2, (2, 3, 6, 7)),
        (CONV2, nn.Dropout(0.5, inplace=True), BN2, (2, 3, 6, 7)),
        (CONV2, nn.Sequential(nn.Dropout2d(0.5), nn.AlphaDropout(0.1)), BN2, (2, 3, 6, 7)),
        (lambda: nn.Conv2d(3, 4, (6, 7)), lambda x: x.squeeze(-1).squeeze(-1), BN1, (2, 3, 6, 7)),
        (lambda: nn.Conv2d(3, 4, (6, 7)), lambda x: x.flatten(1), BN1, (2, 3, 6, 7)),
    ],
)
def test_affine_moves_through_what_only_moves_values(
    layer: Callable[[], nn.Module],
    between: Callable[[Tensor], Tensor],
    norm: Callable[[], nn.Module],
    shape: tuple[int, ...],
) -> None:
    assert_folds(Between(layer(), between, norm()), torch.randn(*shape))


@pytest.mark.parametrize(
    ("layer", "between", "norm", "shape", "reason"),
    [
        (LINEAR, lambda x: x, lambda: nn.BatchNorm1d(7), (2, 7, 5), "another axis"),
        (LINEAR, lambda x: x, BN1, (2, 4, 5), "another axis"),
        (LINEAR, lambda x: x.flatten(1), lambda: nn.BatchNorm1d(28), (2, 7, 5), "several axes"),
        (CONV2, lambda x: x.flatten(1), lambda: nn.BatchNorm1d(80), (2, 3, 6, 7), "several axes"),
        (CONV2, lambda x: F.relu(x), BN2, (2, 3, 6, 7), "relu"),
        (CONV2, lambda x: 1 / x, BN2, (2, 3, 6, 7), "reciprocal"),
        (CONV2, lambda x: x * x, BN2, (2, 3, 6, 7), "mul"),
        (CONV2, lambda x: x.half().float(), BN2, (2, 3, 6, 7), "cast"),
    ],
)
def test_what_does_not_commute_is_left_with_its_name(
    layer: Callable[[], nn.Module],
    between: Callable[[Tensor], Tensor],
    norm: Callable[[], nn.Module],
    shape: tuple[int, ...],
    reason: str,
) -> None:
    assert reason in reason_left(Between(layer(), between, norm()), torch.randn(*shape))


def test_dropout_that_is_always_on_stops_the_affine() -> None:
    model = Between(CONV2(), lambda x: F.dropout(x, 0.5, training=True), BN2())
    randomise(model)
    (left,) = ns.plan(model, Fold(), inputs=torch.randn(2, 3, 6, 6)).edits
    assert "dropout" in left.reason


def test_residual_network_folds_all_but_the_norm_after_the_addition() -> None:
    folded = assert_folds(Residual(), torch.randn(2, 3, 8, 8), left=1)
    assert batch_norms(folded) == ["after"]


def test_batch_norm_that_comes_first_goes_into_what_follows() -> None:
    x = torch.randn(2, 3, 6, 6)
    assert_folds(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), x)
    padded = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    reason = reason_left(padded, x, site="0")
    assert "input" in reason and "zero padding" in reason


class Uses(nn.Module):
    """conv and bn, used as `how` says."""

    def __init__(self, how: Callable[["Uses", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.bn, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


@pytest.mark.parametrize(
    "how",
    [
        lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))) + m.bn2(m.conv2(x)),
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(x * 2)) + m.bn2(m.conv2(x)),
        lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)) + m.bn2(m.conv2(x)) * 0,
        lambda m, x: m.bn2(m.bn(m.conv(x))),
        lambda m, x: m.bn2(m.bn(m.conv(x))) + m.bn(m.conv(x)),
        lambda m, x: m.bn(m.conv(x)) + m.conv(x) + m.bn2(m.conv2(x)),
        lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv(x)),
        lambda m, x: m.bn(y := m.conv(x)) + y,
        lambda m, x: m.bn(m.conv(x)) + m.bn(x),
        lambda m, x: m.bn(m.conv(x)) + F.conv2d(x, m.conv.weight),
        lambda m, x: m.bn(m.conv(x)) * m.conv.weight.norm(),
        lambda m, x: m.bn(m.conv(x)) * m.conv.bias.norm(),
        lambda m, x: m.bn(m.conv(x)) * m.bn.weight.norm(),
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias)),
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight)),
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight * 2, m.conv.bias)),
        lambda m, x: m.bn(F.conv2d(x, m.conv2.weight, m.conv.bias)),
        lambda m, x: m.bn(m.conv(x).add_(1)),
        lambda m, x: m.bn((y := m.conv(x)) + 0 * y.view(-1).add_(1).sum()),
        lambda m, x: m.bn(m.conv(x)).add_(m.conv2(x)),
        lambda m, x: m.bn(torch.cat([m.conv(x), m.conv(x)])),
        lambda m, x: m.bn(m.conv(x).chunk(2)[0]),
        lambda m, x: torch.cat([m.bn(z) for z in m.conv(x).chunk(2)]),
        lambda m, x: m.bn(m.conv(x).detach()),
        lambda m, x: m.bn(m.conv2(x)) + F.relu(m.bn2(m.conv(x))),
    ],
)
def test_whatever_the_uses_the_function_is_the_same(
    how: Callable[[Uses, Tensor], Tensor],
) -> None:
    model = randomise(Uses(how))
    x = torch.randn(2, 4, 5, 5)
    assert error(in_eval(ns.fold(model, x), x), in_eval(model, x)) <= 1e-5
    assert error(in_eval(ns.fold(model, None), x), in_eval(model, x)) <= 1e-5


@pytest.mark.parametrize(
    ("how", "folded"),
    [
        (lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), ["bn"]),
        (lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv2(x)), ["bn"]),
        (lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias)), ["bn"]),
        (lambda m, x: m.bn(m.conv(x)) + F.relu(m.conv(x)), []),
        (lambda m, x: m.bn(y := m.conv(x)) + F.relu(y), []),
        (lambda m, x: m.bn(m.conv(x)) + F.relu(m.bn2(m.conv(x))), []),
    ],
)
def test_what_can_be_folded_is(how: Callable[[Uses, Tensor], Tensor], folded: list[str]) -> None:
    model = randomise(Uses(how))
    each = Fold(assume_example=True)  # else what the example does not call might take a value too
    plan = ns.plan(model, each, inputs=torch.randn(2, 4, 5, 5))
    removed = [edit.site for edit in plan.edits if edit.effect == "removes"]
    assert removed == folded
    stays = [edit for edit in plan.edits if isinstance(edit, Reduce) and edit.to == "affine"]
    assert {each.site for each in (*plan.left, *stays)} == {"bn", "bn2"} - set(folded)
    assert all(each.reason for each in (*plan.left, *stays))


def test_weight_shared_with_another_module_is_untied_and_both_stay_correct() -> None:
    class Tied(Uses):
        def __init__(self, how: Callable[[Uses, Tensor], Tensor]) -> None:
            super().__init__(how)
            self.conv2.weight = self.conv.weight

    for how, left in (
        (lambda m, x: m.bn(m.conv(x)) + m.conv2(x), 2),  # bn2 is not called, and may take it too
        (lambda m, x: m.bn(m.conv(x)) + m.bn2(m.conv2(x)), 0),
        (lambda m, x: m.bn(m.conv(x) + m.conv2(x)), 2),
        (lambda m, x: m.bn(m.conv(x) + m.conv2(F.relu(m.conv2(x)))), 2),
    ):
        assert_folds(Tied(how), torch.randn(2, 4, 5, 5), left=left)


def test_shared_conv_is_never_corrupted() -> None:
    """A conv that is also called without its BatchNorm (pytorch issues 104593 and 197539)."""
    body = nn.Conv2d(4, 4, 3, padding=1)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(body, nn.BatchNorm2d(4))
            self.b = nn.Sequential(body, nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    assert "a.0" in reason_left(Shared(), torch.randn(2, 4, 5, 5), site="a.1")


def test_batch_norm_under_two_names_is_removed_under_both() -> None:
    class Named(ConvBN):
        def __init__(self) -> None:
            super().__init__()
            self.alias = self.bn

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.conv(x))

    folded = assert_folds(Named(), torch.randn(2, 4, 5, 5))
    assert folded.alias is folded.bn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", [["weight"], ["spectral"], ["weight", "spectral"]])
def test_parametrized_conv_folds_in(names: list[str], training: bool) -> None:
    known = {"weight": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm}
    model = ConvBN().train()
    for name in names:
        known[name](model.conv)
    model(torch.randn(2, 4, 5, 5))  # spectral_norm estimates
    model.train(training)
    folded = assert_folds(model, torch.randn(2, 4, 5, 5))
    assert type(folded.conv) is nn.Conv2d
    assert model.conv.parametrizations.weight is not None  # the original's is where it was
    assert error(in_eval(folded, x := torch.ones(1, 4, 5, 5)), in_eval(model, x)) <= 1e-5


def test_weight_norm_by_hook_is_baked_and_folded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = ConvBN()
        torch.nn.utils.weight_norm(model.conv)
    with torch.no_grad():  # the weight it leaves behind is not a leaf, so it cannot be deep-copied
        model.conv.weight = model.conv.weight.detach()
    x = torch.randn(2, 4, 5, 5)
    randomise(model)
    for inputs in (x, None):
        folded = ns.fold(model, inputs)
        assert isinstance(folded.bn, nn.Identity)
        assert isinstance(folded.conv.weight, nn.Parameter)
        assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


def test_weight_norm_by_hook_that_has_not_run_is_folded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = randomise(nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)))
    x = torch.randn(2, 3)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


def test_hook_on_the_batch_norm_that_changes_its_input_stops_the_affine() -> None:
    model = ConvBN()
    model.bn.register_forward_pre_hook(lambda _, args: (args[0] * 2 + 1,))
    assert reason_left(model, torch.randn(2, 4, 5, 5))
    assert ns.plan(model, Fold()).left


def test_hook_on_the_conv_that_changes_its_output_stops_the_affine() -> None:
    model = ConvBN()
    model.conv.register_forward_hook(lambda _, args, output: output * 2 + 1)
    x = torch.randn(2, 4, 5, 5)
    assert reason_left(model, x)
    assert error(in_eval(ns.fold(model, None), x), in_eval(model, x)) <= 1e-5


def test_hooks_on_the_batch_norm_still_fire() -> None:
    fired: list[str] = []
    model = randomise(ConvBN())
    x = torch.randn(2, 4, 5, 5)
    expected = in_eval(model.bn, in_eval(model.conv, x))

    def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        fired.append("forward")
        outputs.append(output)

    outputs: list[Tensor] = []
    handle = model.bn.register_forward_hook(keep)
    folded = ns.fold(model, x)
    fired.clear(), outputs.clear()
    in_eval(folded, x)
    assert fired == ["forward"]
    assert error(outputs[0], expected) <= 1e-5
    handle.remove()


@pytest.mark.parametrize("options", [{"track_running_stats": False}])
def test_batch_norm_without_running_statistics_is_left(options: dict[str, bool]) -> None:
    model = ConvBN()
    model.bn = nn.BatchNorm2d(4, **options)
    assert "running statistics" in reason_left(model, torch.randn(2, 4, 5, 5))


def test_batch_norm_called_in_no_grad_as_well_stays_in_both_calls() -> None:
    class Part(Uses):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.bn(x)
            return self.bn(self.conv(x)) + self.bn2(self.conv2(x))

    model = randomise(Part(lambda m, x: x))
    x = torch.randn(2, 4, 5, 5)
    folded = ns.plan(model, Fold(), inputs=x).apply(model)
    assert batch_norms(folded) == ["bn"]
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


def test_parts_of_a_model_that_cannot_be_exported_are_folded() -> None:
    model = randomise(Detector())
    x = torch.randn(2, 4, 6, 6)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_conv_shared_with_code_that_cannot_be_captured_is_left(first: bool) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            again = nn.Conv2d(4, 4, 3, padding=1)
            if first:
                self.again = again
            self.body = ConvBN()
            self.body.conv = again
            if not first:
                self.again = again

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y + self.again(x) if y.sum().item() < 1e9 else y

    assert reason_left(Shared(), torch.randn(2, 4, 6, 6), site="body.bn")


class Switched(ConvBN):
    def forward(self, x: Tensor, normalized: bool = True) -> Tensor:
        return self.bn(self.conv(x)) if normalized else self.conv(x)


class InTwoWays(Detector):
    """A part that can be exported is called with the switch on, then off."""

    def __init__(self) -> None:
        super().__init__()
        self.head = Switched()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return self.head(x) + self.head(x, normalized=False)


def test_part_that_is_called_in_two_ways_is_left() -> None:
    model, x = randomise(InTwoWays()), torch.randn(2, 4, 6, 6)
    folded = ns.fold(model, x)
    assert batch_norms(folded) == ["head.bn"]
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5


def test_weight_read_by_code_that_cannot_be_captured_is_left() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.other = ConvBN(), ConvBN()

        def forward(self, x: Tensor) -> Tensor:
            y = self.other(self.body(x)).to(self.other.conv.weight.dtype)
            return y * self.body.conv.weight.norm() if y.sum().item() < 1e9 else y

    model = Reads()
    x = torch.randn(2, 4, 6, 6)
    assert reason_left(model, x, site="body.bn")
    edits = ns.plan(model, Fold(), inputs=x).edits
    assert [edit.site for edit in edits if edit.effect == "removes"] == ["other.bn"]


def test_custom_layer_without_a_place_for_a_bias_is_left() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 5))
            self.bias = None

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    class Registered(Plain):
        def __init__(self) -> None:
            super().__init__()
            del self.bias
            self.register_parameter("bias", None)

    for layer in (Plain(), Registered()):
        model = Between(layer, lambda x: x, BN1())
        x = torch.randn(3, 5)
        assert error(in_eval(ns.fold(randomise(model), x), x), in_eval(model, x)) <= 1e-5


def test_bias_that_forward_scales_is_not_given() -> None:
    class Equalized(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.weight)
            return y if self.bias is None else y + 0.1 * self.bias.view(-1, 1, 1)

    model = Between(Equalized(3, 4, 1, bias=False), lambda x: x, BN2())
    x = torch.randn(2, 3, 5, 5)
    assert error(in_eval(ns.fold(randomise(model), x), x), in_eval(model, x)) <= 1e-5


class Unbiased(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(input, weight)


@pytest.mark.parametrize("replaced", [True, False])
def test_bias_that_forward_leaves_out_is_not_given(replaced: bool) -> None:
    conv = (nn.Conv2d if replaced else Unbiased)(3, 4, 1, bias=False)
    if replaced:
        conv.forward = lambda x: F.conv2d(x, conv.weight)
    assert "bias" in reason_left(Between(conv, nn.Identity(), BN2()), torch.randn(2, 3, 4, 4))


def test_without_inputs_a_forward_replaced_on_the_instance_stops_the_affine() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    conv = model[0]
    conv.forward = lambda x: F.relu(F.conv2d(x, conv.weight, conv.bias))
    (stays,) = ns.plan(model, Fold()).edits
    assert isinstance(stays, Reduce) and stays.to == "affine" and "replaced" in stays.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = randomise(ConvBN()).to(dtype)
    x = torch.randn(2, 4, 5, 5, dtype=dtype)
    folded = ns.fold(model, x)
    assert {p.dtype for p in folded.parameters()} == {dtype}
    expected = in_eval(copy.deepcopy(model).double(), x.double())
    assert error(in_eval(folded, x).double(), expected) <= 4 * torch.finfo(dtype).eps


def test_weights_stay_channels_last() -> None:
    model = ConvBN().to(memory_format=torch.channels_last)
    folded = assert_folds(model, torch.randn(2, 4, 5, 5))
    assert folded.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_requires_grad_survives() -> None:
    model = randomise(Residual())
    model.conv.weight.requires_grad_(False)
    model.bn.bias.requires_grad_(False)
    folded = ns.fold(model, torch.randn(2, 3, 8, 8))
    flags = {name: p.requires_grad for name, p in folded.named_parameters()}
    assert not flags["conv.weight"]
    assert flags["conv.bias"]
    assert flags["first.conv.weight"]
    assert flags["first.conv.bias"]  # given by the fold; the BatchNorm's bias was trained


@pytest.mark.parametrize("training", [True, False])
def test_training_flags_survive(training: bool) -> None:
    folded = ns.fold(randomise(Residual()).train(training), torch.randn(2, 3, 8, 8))
    assert {module.training for module in folded.modules()} == {training}


def test_inplace_returns_the_same_object_and_otherwise_nothing_changes() -> None:
    model = randomise(Residual())
    x = torch.randn(2, 3, 8, 8)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    folded = ns.fold(model, x)
    assert folded is not model
    assert dict(model.named_modules()) == modules
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    expected = in_eval(model, x)
    assert ns.fold(model, x, inplace=True) is model
    assert error(in_eval(model, x), expected) <= 1e-5
    assert batch_norms(model) == ["after"]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("running_mean", float("nan"), "NaN"),
        ("running_var", float("inf"), "NaN or infinity"),
        ("running_var", -0.5, "negative"),
    ],
)
def test_unusable_statistics_are_refused(name: str, value: float, words: str) -> None:
    model = ConvBN()
    getattr(model.bn, name)[1] = value
    x = torch.randn(2, 4, 5, 5)
    for call in (
        lambda: ns.fold(model, x),
        lambda: ns.freeze(model),
        lambda: ns.freeze(model, x, mode="tune"),
        lambda: ns.convert(model, "frozen_batch_norm"),
    ):
        with pytest.raises(ns.NormswapError, match=words) as raised:
            call()
        assert "bn" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("inputs", [None, torch.empty(2, 4, 5, 5, device="meta")])
def test_a_model_on_the_meta_device_is_refused(inputs: Tensor | None) -> None:
    with torch.device("meta"):
        model = ConvBN()
    assert "into conv" in str(ns.inspect(model, inputs))
    with pytest.raises(ns.NormswapError, match="bn has no numbers, it is on the meta device"):
        ns.fold(model, inputs)


def test_uninitialised_lazy_model_is_refused() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(ns.NormswapError, match="lazy"):
        ns.fold(model, torch.randn(2, 3, 6, 6))


def test_fold_after_tune_mode_equals_fold() -> None:
    model = randomise(Residual())
    x = torch.randn(2, 3, 8, 8)
    tuned = ns.freeze(model, x, mode="tune")
    folded = ns.fold(tuned, x)
    assert batch_norms(folded) == ["after"]
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-5
    assert not any("parametrizations" in name for name in folded.state_dict())


@st.composite
def residual_graph(draw: st.DrawFn) -> nn.Module:
    """A few convs and norms, called in a random order on random earlier values."""
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(0, 2),  # which conv
                st.sampled_from([None, 0, 1, 2]),  # which norm follows it, if any
                st.integers(0, 7),  # which earlier value goes in
                st.sampled_from(["", "relu", "add", "dropout"]),
            ),
            min_size=2,
            max_size=6,
        )
    )
    tied = draw(st.booleans())

    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1, bias=i > 0) for i in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
            if tied:
                self.convs[2].weight = self.convs[1].weight
            self.steps = steps

        def forward(self, x: Tensor) -> Tensor:
            values = [x]
            for conv, norm, source, after in self.steps:
                given = values[source % len(values)]
                y = self.convs[conv](given)
                if after == "dropout":
                    y = F.dropout(y, 0.5, self.training)
                if norm is not None:
                    y = self.norms[norm](y)
                y = F.relu(y) if after == "relu" else y + given if after == "add" else y
                values.append(y)
            return torch.stack(values[1:]).sum(0)

    return randomise(Random()).double()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(residual_graph())
def test_random_graphs_with_shared_modules_compute_the_same(model: nn.Module) -> None:
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = in_eval(model, x)
    for inputs in (x, None):
        assert error(in_eval(ns.fold(model, inputs), x), expected) <= 1e-10
    tuned = ns.freeze(model, x, mode="tune")
    assert error(in_eval(tuned, x), expected) <= 1e-10
    assert error(in_eval(ns.unfreeze(tuned), x), expected) <= 1e-10


@pytest.mark.parametrize("with_inputs", [True, False])
def test_batch_norms_one_after_the_other_fold_into_the_same_conv(with_inputs: bool) -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.ReLU()
        )
    ).eval()
    x = torch.randn(2, 3, 7, 7)
    expected = copy.deepcopy(model).double()(x.double())
    folded = ns.fold(model, x if with_inputs else None)
    tuned = ns.freeze(model, x if with_inputs else None, mode="tune")
    for changed in (folded, tuned, ns.bake(tuned)):
        torch.testing.assert_close(changed(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert not batch_norms(folded) and not batch_norms(ns.bake(tuned))
    assert folded[0].bias.requires_grad and ns.bake(tuned)[0].bias.requires_grad
    thawed = ns.unfreeze(tuned)
    assert thawed[0].bias is None and not hasattr(thawed[0], "parametrizations")
    torch.testing.assert_close(thawed.eval()(x), model(x), rtol=0, atol=0)


def test_a_batch_norm_behind_an_activation_of_another_does_not_fold_through_it() -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8), nn.BatchNorm2d(8))
    )
    model.eval()
    x = torch.randn(2, 3, 7, 7)
    folded = ns.fold(model, x)
    assert len(batch_norms(folded)) == 1
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_inputs_that_the_model_rejects_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(NormswapError, match="does not run on an input of 2x4x7x7"):
        ns.fold(model, torch.randn(2, 4, 7, 7))
