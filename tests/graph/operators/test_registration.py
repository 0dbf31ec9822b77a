"""Rules for operators that others have written: registered, checked, and used by a fold."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import error, in_eval, randomise
from torch import Tensor, fx, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.graph.operators import registration
from normswap.graph.operators.operator import TABLE
from normswap.graph.operators.rule import Constraints, Context, Equation
from normswap.norms.pointwise.channel_affine import ChannelAffine

aten = torch.ops.aten


@torch.library.custom_op("normswaptest::shift", mutates_args=())
def shift(x: Tensor, by: int) -> Tensor:
    """A quarter of the channels moves by some rows."""
    out = x.clone()
    out[:, : x.shape[1] // 4] = x[:, : x.shape[1] // 4].roll(by, -1)
    return out


@torch.library.custom_op("normswaptest::halve", mutates_args=())
def halve(x: Tensor) -> Tensor:
    return x * 0.5


@torch.library.custom_op("normswaptest::conv", mutates_args=())
def conv(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    return torch.conv2d(input, weight, bias, groups=groups)


@torch.library.custom_op("normswaptest::two", mutates_args=())
def two(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clone(), x.clone()


for each in (shift, halve):
    each.register_fake(lambda x, *_: torch.empty_like(x))
conv.register_fake(
    lambda input, weight, bias, groups: torch.conv2d(input, weight, bias, groups=groups)
)
two.register_fake(lambda x: (torch.empty_like(x), torch.empty_like(x)))
SHIFT, HALVE = torch.ops.normswaptest.shift.default, torch.ops.normswaptest.halve.default
CONV = torch.ops.normswaptest.conv.default
LIKE_CONV = aten.conv2d.default


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in (SHIFT, HALVE, CONV):
        monkeypatch.delitem(TABLE, target, raising=False)
        monkeypatch.setitem(TABLE, target, None)  # so that it is taken out again
        monkeypatch.delitem(TABLE, target)


class Between(nn.Module):
    """A BatchNorm behind an operator behind a convolution."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.call = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), call

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.call(self.conv(x)))


class Halved:
    """A rule of one's own: y = x / 2, so the scale passes, and half of the shift."""

    def propagate(self, node: fx.Node, known: Any, context: Context) -> Any:
        (source,) = node.all_input_nodes
        layout = known[source] if source in known else known[node]
        return {source: layout, node: layout}

    def constraints(self, node: fx.Node, known: Any, context: Context) -> Constraints:
        return Constraints([Equation({node: 1.0, node.all_input_nodes[0]: -0.5}, "is halved")])


def left(model: nn.Module) -> int:
    """How many normalizations, or scales and shifts in their place, there are."""
    return sum(isinstance(each, (nn.BatchNorm2d, ChannelAffine)) for each in model.modules())


CASES = {
    "moves": (SHIFT, aten.roll.default, lambda x: torch.ops.normswaptest.shift(x, 2)),
    "own rule": (HALVE, Halved(), torch.ops.normswaptest.halve),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_batch_norm_folds_through_it_once_it_is_registered(name: str) -> None:
    target, like, call = CASES[name]
    torch.manual_seed(0)
    model, x = randomise(Between(call)).double().eval(), torch.randn(2, 3, 9, 9).double()
    assert left(ns.fold(model, x)) == 1
    ns.register_rule(target, like=like)
    folded = ns.fold(model, x)
    assert left(folded) == 0
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


def test_a_layer_of_ones_own_takes_it_in() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3, 3, 3))
            self.bias, self.bn = nn.Parameter(torch.randn(8)), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(torch.ops.normswaptest.conv(x, self.weight, self.bias, 1))

    ns.register_rule(CONV, like=LIKE_CONV)
    model, x = randomise(Own()).double().eval(), torch.randn(2, 3, 9, 9).double()
    # It has no padding that a rule could ask for, so only what comes after it is known to go in.
    folded = ns.fold(model, x)
    assert left(folded) == 0
    assert error(in_eval(folded, x), in_eval(model, x)) <= 1e-10


def test_the_judge_finds_what_is_wrong() -> None:
    ns.register_rule(SHIFT, like=aten.roll.default)
    assert ns.check_rule(SHIFT, torch.randn(2, 8, 5, 6), 2) >= 2
    ns.register_rule(HALVE, like=Halved())
    assert ns.check_rule(HALVE, torch.randn(2, 3, 4)) >= 2
    ns.register_rule(HALVE, like=aten.clone.default)
    with pytest.raises(NormswapError, match="wrong for channels along axis 0"):
        ns.check_rule(HALVE, torch.randn(2, 3, 4))
    ns.register_rule(SHIFT, like=aten.linear.default)
    with pytest.raises(NormswapError, match="refuses this call"):
        ns.check_rule(SHIFT, torch.randn(2, 8, 5, 6), 2)


def test_a_rule_that_fails_stops_the_fold_with_the_reason() -> None:
    class Fails(Halved):
        def constraints(self, *_: Any) -> Constraints:
            raise RuntimeError("no numbers")

    ns.register_rule(HALVE, like=Fails())
    model, x = Between(torch.ops.normswaptest.halve).eval(), torch.randn(2, 3, 9, 9)
    folded = ns.fold(model, x)
    assert left(folded) == 1
    assert "its registered rule raises RuntimeError: no numbers" in str(ns.plan_of(folded))
    with pytest.raises(NormswapError, match="no numbers"):
        ns.check_rule(HALVE, torch.randn(2, 3, 4))


PACKAGE = """
import torch, normswap

def register():
    normswap.register_rule(torch.ops.normswaptest.shift.default, like=torch.ops.aten.roll.default)
"""


@pytest.mark.parametrize("broken", [False, True])
def test_an_installed_package_registers_its_rules(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "normswap_shift-1.0.dist-info"
    info.mkdir()
    name = f"normswap_shift_{broken}"
    (tmp_path / f"{name}.py").write_text("raise SystemExit" if broken else PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: normswap-shift\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[normswap.rules]\nshift = {name}:register\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "_loaded", False)
    model = Between(lambda x: torch.ops.normswaptest.shift(x, 2)).eval()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert left(ns.fold(model, torch.randn(2, 3, 9, 9))) == broken
    told = [str(each.message) for each in said if "is left out" in str(each.message)]
    assert len(told) == broken
    assert all("the rules 'shift'" in each and "normswap-shift" in each for each in told)


@pytest.mark.parametrize(
    ("target", "like", "message"),
    [
        (torch.ops.normswaptest.shift, aten.roll.default, "is no overload"),
        (SHIFT, aten.cumsum.default, "has no rule itself"),
        (SHIFT, "roll", "neither an operator nor a rule"),
        (aten.cumsum.default, aten.roll.default, "torch's own"),
        (torch.ops.normswaptest.two.default, aten.roll.default, "does not return one tensor"),
    ],
)
def test_what_cannot_be_registered_is_refused(target: Any, like: Any, message: str) -> None:
    before = dict(TABLE)
    with pytest.raises(NormswapError, match=message):
        ns.register_rule(target, like=like)
    assert before == TABLE
    if target is not SHIFT:
        return
    with pytest.raises(NormswapError, match="has no rule; register one"):
        ns.check_rule(SHIFT, torch.randn(2, 8, 5, 6), 2)
