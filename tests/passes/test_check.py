"""What a plan made runs beside its original, and what does not agree is left, or refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold, Replace
from tests.networks import randomise

IMAGE = torch.randn(2, 3, 9, 9, dtype=torch.float64)
SEQUENCE = torch.randn(3, 5, 8, dtype=torch.float64)


class Net(nn.Module):
    """A convolution and a BatchNorm, then another pair; `how` is the forward."""

    def __init__(self, how: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.how(self, x)))


def made(how: Callable[[Net, Tensor], Tensor]) -> nn.Module:
    return randomise(Net(how)).double().eval()


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return randomise(nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 4))).double().eval()


def agree(changed: nn.Module, original: nn.Module, *inputs: Any) -> bool:
    """Whether both compute the same, with gradients and without."""
    with torch.no_grad():
        without = torch.allclose(changed(*inputs), original(*inputs), rtol=1e-9, atol=1e-9)
    return without and torch.allclose(changed(*inputs), original(*inputs), rtol=1e-9, atol=1e-9)


LOOKS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "class": lambda m, x: m.bn(m.conv(x)) * (2.0 if isinstance(m.bn, nn.BatchNorm2d) else 1.0),
    "class name": lambda m, x: m.bn(m.conv(x)) * len(type(m.bn).__name__),
    "count": lambda m, x: m.bn(m.conv(x)) * sum(isinstance(e, nn.BatchNorm2d) for e in m.modules()),
    "hasattr": lambda m, x: m.bn(m.conv(x)) * (2.0 if hasattr(m.bn, "running_mean") else 1.0),
    "num_features": lambda m, x: m.bn(m.conv(x)) * m.bn.num_features,
    "eps": lambda m, x: m.bn(m.conv(x)) + m.bn.eps,
    "dtype": lambda m, x: m.bn(m.conv(x).to(m.bn.weight.dtype)),
    "device": lambda m, x: m.bn(m.conv(x).to(m.bn.running_mean.device)),
    "bias": lambda m, x: m.bn(m.conv(x)) if m.conv.bias is None else m.conv(x).relu() - 1,
    "gradients": lambda m, x: m.bn(m.conv(x)) * (1.0 if torch.is_grad_enabled() else 2.0),
    "compiling": lambda m, x: m.bn(m.conv(x) if torch.compiler.is_compiling() else -m.conv(x)),
}


@pytest.mark.parametrize("how", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize(
    "verb",
    [
        lambda model: ns.fold(model, IMAGE),
        lambda model: ns.convert(model, "batch_norm", inputs=IMAGE),
    ],
    ids=["fold", "exact swap"],
)
def test_a_forward_that_looks_keeps_its_function_or_is_refused(
    how: Callable[[Net, Tensor], Tensor], verb: Callable[[nn.Module], nn.Module]
) -> None:
    model = made(how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            changed = verb(model)
        except ns.NormswapError:
            return
    assert agree(changed.eval(), model, IMAGE)


def test_the_other_sites_are_folded_and_the_reason_is_in_the_plan() -> None:
    model = made(LOOKS["hasattr"])
    with pytest.warns(UserWarning, match="1 normalization was left, for example bn: left, as"):
        folded = ns.fold(model, IMAGE)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    assert isinstance(folded.bn2, nn.Identity)
    (left,) = ns.plan_of(folded).left
    assert left.site == "bn"
    assert "the forward asks what its normalizations are" in left.reason


def test_a_swap_whose_forward_asks_for_the_class_is_refused() -> None:
    model = made(LOOKS["count"])
    with pytest.raises(ns.NormswapError, match="though each new module computes what was there"):
        ns.convert(model, "group_norm", inputs=IMAGE)


def test_a_norm_with_another_call_of_its_own_is_not_swapped_silently() -> None:
    class PlusOne(nn.BatchNorm2d):
        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) + 1

    model = nn.Sequential(nn.Conv2d(3, 4, 3), PlusOne(4)).double().eval()
    with pytest.raises(ns.NormswapError):
        ns.convert(model, "group_norm", inputs=IMAGE)


@pytest.mark.parametrize("to", ["rms_norm", "dynamic_tanh", "group_norm"])
def test_what_replaces_a_norm_of_a_fused_layer_is_called(to: str) -> None:
    changed = ns.convert(transformer(), to, include="1.norm?", inputs=SEQUENCE)
    with torch.no_grad():
        without = changed(SEQUENCE)
    torch.testing.assert_close(without, changed(SEQUENCE))


@pytest.mark.parametrize("trained", [True, False])
def test_a_swap_in_a_fused_layer_is_planned_whether_parameters_train(trained: bool) -> None:
    model = transformer().requires_grad_(trained)
    assert len(ns.plan(model, Replace("rms_norm", include="1.norm?"), inputs=SEQUENCE).edits) == 2


def test_a_centered_fused_layer_stays_right_when_it_is_trained() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), transformer()[1]).double().eval()
    centered = ns.convert(model, "rms_norm", include="2.norm?", inputs=SEQUENCE)
    with torch.no_grad():
        centered[2].self_attn.out_proj.bias.add_(3.0)  # what is normalized has a mean now
        without = centered(SEQUENCE)
    torch.testing.assert_close(without, centered(SEQUENCE))


def test_an_encoder_calls_its_new_norms_on_padded_batches() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = randomise(nn.TransformerEncoder(layer, 2)).double().eval()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    inputs = {"src": x, "src_key_padding_mask": padding}
    changed = ns.convert(model, "rms_norm", include="*norm?", inputs=inputs)
    with torch.no_grad():
        without = changed(**inputs)
    torch.testing.assert_close(without[~padding], changed(**inputs)[~padding])


def test_a_layer_norm_whose_parameters_are_read_is_left() -> None:
    model: Any = made(
        lambda m, x: F.layer_norm(m.conv(x), m.ln.normalized_shape, m.ln.weight, m.ln.bias)
    )
    model.ln = nn.LayerNorm(7).double()
    with pytest.raises(ns.NormswapError, match="nothing was replaced: ln: ln also computes"):
        ns.convert(model, "rms_norm", include="ln", inputs=IMAGE)


def test_a_hand_fused_batch_norm_is_left() -> None:
    def fused(m: Net, x: Tensor) -> Tensor:
        scale = m.bn.weight / (m.bn.running_var + m.bn.eps).sqrt()
        return F.conv2d(x, m.conv.weight * scale.view(-1, 1, 1, 1), m.bn.bias)

    model = made(fused)
    with pytest.raises(ns.NormswapError, match="nothing was replaced: bn: bn also computes"):
        ns.convert(model, "group_norm", include="bn", inputs=IMAGE)
    with pytest.warns(UserWarning, match="1 normalization was left, for example bn"):
        folded = ns.fold(model, IMAGE)
    assert agree(folded, model, IMAGE)


def test_the_check_can_be_left_out() -> None:
    model = made(LOOKS["hasattr"])
    assert isinstance(ns.fold(model, IMAGE, check=False).bn, nn.Identity)


def test_a_refused_result_leaves_the_model_as_it_was() -> None:
    model = made(LOOKS["count"])
    before = {name: each.clone() for name, each in model.state_dict().items()}
    expected = model(IMAGE)
    with pytest.raises(ns.NormswapError):
        ns.fold(model, IMAGE, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    torch.testing.assert_close(model(IMAGE), expected)


def test_a_plan_without_examples_says_that_it_is_unchecked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assert "unchecked" in str(ns.plan(model, Fold()))
    checked = ns.plan(model, Fold(), inputs=IMAGE.float())
    assert "unchecked" not in str(checked)
    assert not ns.Plan.from_json(checked.to_json()).checked


def test_a_plan_from_json_is_checked_on_inputs_that_are_given() -> None:
    model = made(LOOKS["hasattr"])
    read = ns.Plan.from_json(ns.plan(model, Fold(), inputs=IMAGE).to_json())
    with pytest.raises(ns.NormswapError, match="differ"):
        read.apply(model, inputs=IMAGE)


def test_rounding_of_an_ill_conditioned_model_is_no_difference() -> None:
    # A logarithm near its pole tells float32 roundings of the fold apart, and float64 does not.
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x - x.amax()).abs() + 1e-7).log()

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Log())).eval()
    assert isinstance(ns.fold(model, IMAGE.float())[1], nn.Identity)


def test_nothing_that_could_be_replaced_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ns.NormswapError, match="nothing was replaced: 1: has no running"):
        ns.convert(model, "frozen_batch_norm", inputs=torch.randn(3, 4))


def test_many_sites_are_watched_by_one_mode() -> None:
    """A mode around each would be as many around each operator: quadratic in the sites."""
    depths: list[int] = []

    class Depth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            depths.append(torch._C._len_torch_dispatch_stack())
            return x

    blocks = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(6)]
    model = nn.Sequential(*blocks, Depth()).eval()
    ns.convert(model, "group_norm", groups=2, inputs=torch.randn(2, 4, 5, 5))
    assert len(depths) >= 5 and max(depths) <= 3
