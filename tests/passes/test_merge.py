"""Merged branches compute what they did, and what cannot be merged is left with the reason."""

import copy
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch_norms, error, in_eval, randomise
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.graph.branches.sums import find_sums
from normswap.graph.capture import capture
from normswap.graph.snapshot import all_or_nothing
from normswap.passes.merge import merge
from normswap.passes.plan import Plan

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
INPUT = torch.randn(2, 8, 7, 7, dtype=torch.float64)


class MergeBranches:
    """A merge alone, without the fold that it is a part of."""

    def __str__(self) -> str:
        return "MergeBranches"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each sum of branches that one module can compute."""
        seen = capture(model, inputs)
        edits, left = merge(seen, inputs, find_sums(seen))
        return Plan(passes=(str(self),), edits=tuple(edits), left=tuple(left))


def convs(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, CONVS)]


def decide(model: nn.Module, x: Tensor = INPUT) -> Plan:
    return ns.plan(model, MergeBranches(), inputs=x)


def assert_merges(
    model: nn.Module, x: Tensor = INPUT, *, left: int = 1, norms: int = 0
) -> nn.Module:
    """With `left` convs and `norms` BatchNorms the merged model computes what `model` does."""
    randomise(model.double())
    plan = decide(model, x)
    merged = plan.apply(model)
    assert error(in_eval(merged, x), in_eval(model, x)) <= 1e-10
    assert len(convs(merged)) == left, plan.left
    assert len(batch_norms(merged)) == norms
    assert decide(merged, x).edits == ()  # nothing is left to merge
    return merged


def reason_left(model: nn.Module, x: Tensor = INPUT) -> str:
    """Why the only sum of `model` is left."""
    randomise(model.double())
    plan = decide(model, x)
    assert plan.edits == ()
    (left,) = plan.left
    return left.reason


def conv_bn(size: int, *, groups: int = 1, stride: int = 1, bias: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(8, 8, size, stride, size // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(8))


class RepVGG(nn.Module):
    """arXiv 2101.03697, figure 2; written in place, as timm does."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.identity = nn.BatchNorm2d(8)
        self.large, self.small = conv_bn(3, groups=groups), conv_bn(1, groups=groups)
        self.drop, self.act = nn.Dropout(0.2), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity(x)
        x = self.small(x) + self.large(x)
        x = self.drop(x)
        x += identity
        return self.act(x)


class MobileOne(nn.Module):
    """arXiv 2206.04040, figure 3: several convs in a list, summed up from zero."""

    def __init__(self, branches: int = 3, groups: int = 8, skip: bool = True) -> None:
        super().__init__()
        self.skip = nn.BatchNorm2d(8) if skip else None
        self.scale = conv_bn(1, groups=groups) if branches else None
        self.convs = nn.ModuleList([conv_bn(3, groups=groups) for _ in range(branches)])

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.skip is None else self.skip(x)
        out = (0 if self.scale is None else self.scale(x)) + skip
        for conv in self.convs:
            out += conv(x)
        return out


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class RepMixer(nn.Module):
    """arXiv 2303.14189, equation 3: a sum of sums, in three modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.scale = MobileOne(0), MobileOne(1), LayerScale()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.mixer(x) - self.norm(x))


class RepVit(nn.Module):
    """arXiv 2307.09283, figure 3: a BatchNorm after the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv1 = conv_bn(3, groups=8), nn.Conv2d(8, 8, 1, groups=8)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) + self.conv1(x) + x)


class Downsampling(nn.Module):
    """GhostNetV3's, arXiv 2404.11202: stride 2, where there is no identity."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = conv_bn(1, groups=8, stride=2)
        self.convs = nn.ModuleList([conv_bn(size, groups=8, stride=2) for size in (3, 5, 3)])

    def forward(self, x: Tensor) -> Tensor:
        out = self.scale(x)
        for conv in self.convs:
            out += conv(x)
        return out


class Gated(nn.Module):
    """EfficientViM's, arXiv 2411.15241: x + gate * (conv(x) - x), a constant from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.randn(2, 8))
        self.first, self.second = conv_bn(3, groups=8), conv_bn(5, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.sigmoid(self.alpha).view(2, 8, 1, 1)
        x = x + gates[0] * (self.first(x) - x)
        x = F.relu(x)
        return x + gates[1] * (self.second(x) - x)


class Crosses(nn.Module):
    """ACNet, arXiv 1908.03930: kernels that are not square, weighed and subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(8, 8, 3, padding=1)
        self.row = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
        self.column = nn.Conv2d(8, 8, (3, 1), padding=(1, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return -(self.square(x) - 2 * self.row(x)) / 4 + torch.add(x, self.column(x), alpha=3)


class Dilated(nn.Module):
    """UniRepLKNet, arXiv 2311.15599: a large kernel and small dilated ones."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.dilated = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(8, 8, 3, padding=d, dilation=d, groups=8), nn.BatchNorm2d(8)
                )
                for d in (1, 2, 3)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return sum((branch(x) for branch in self.dilated), self.large(x))


@pytest.mark.parametrize(
    "block",
    [RepVGG, lambda: RepVGG(4), MobileOne, RepMixer, RepVit, Downsampling, Crosses, Dilated],
)
def test_block_becomes_one_conv(block: Callable[[], nn.Module]) -> None:
    assert_merges(nn.Sequential(block(), nn.ReLU()))


def test_folded_blocks_become_one_conv_each() -> None:
    """After a fold the BatchNorms on the identity are the only ones left."""
    model = nn.Sequential(RepVGG(), MobileOne(), RepMixer(), RepVit(), Downsampling())
    folded = ns.fold(randomise(model.double()), INPUT)
    assert_merges(folded, left=5)


def test_two_sums_of_one_forward_are_merged() -> None:
    assert_merges(Gated(), left=2)


def test_forward_loses_its_additions_and_unused_children() -> None:
    merged = assert_merges(RepVGG())
    assert [path for path, _ in merged.named_children()] == ["large", "drop", "act"]
    assert merged.identity is None and isinstance(merged, RepVGG)
    assert convs(assert_merges(MobileOne(3))) == ["convs.0.0"]


def test_identities_become_one_norm_where_there_is_no_conv() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, eps=0.1)

        def forward(self, x: Tensor) -> Tensor:
            return x - self.first(x) + 0.5 * self.second(x)

    assert_merges(Norms(), left=0, norms=1)


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 6)])
def test_linears_are_merged_like_convs(shape: tuple[int, ...]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.distilled = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.head(x) + self.distilled(x)) / 2 - x

    merged = assert_merges(Heads(), torch.randn(shape, dtype=torch.float64), left=0)
    assert sum(isinstance(each, nn.Linear) for each in merged.modules()) == 1


class Drawn(nn.Module):
    """A sum of branches, each with a sign, a conv, a BatchNorm and a scale, or without."""

    def __init__(self, axes: int, stride: int, branches: list[dict[str, int]]) -> None:
        super().__init__()
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1]
        self.branches, self.signs = nn.ModuleList(), []
        self.scales = nn.ParameterList()
        for each in branches:
            parts = nn.Sequential()
            if each["conv"] or stride > 1:
                size, dilation = each["size"], each["dilation"]
                padding = dilation * (size - 1) // 2
                options = {"groups": each["groups"], "bias": bool(each["bias"])}
                parts.append(CONVS[axes - 1](8, 8, size, stride, padding, dilation, **options))
            if each["norm"]:
                parts.append(norm(8))
            self.branches.append(parts)
            self.signs.append(each["sign"])
            self.scales.append(torch.rand(8, *[1] * axes) + 0.5 if each["scale"] else torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for branch, sign, scale in zip(self.branches, self.signs, self.scales, strict=True):
            value = branch(x) * scale
            total = total + value if sign else total - value
        return total

    def work(self, axes: int) -> tuple[int, int]:
        """Multiplications for a number of the output: of one conv, and of the branches."""
        groups, several, taps = 8, 0, set()
        for branch in self.branches:
            conv = next(
                (part for part in branch if isinstance(part, CONVS)), nn.Conv1d(8, 8, 1, groups=8)
            )
            groups = gcd(groups, conv.groups)
            several += 8 // conv.groups * conv.kernel_size[0] ** axes
            size, dilation = conv.kernel_size[0], conv.dilation[0]
            taps |= {dilation * (tap - size // 2) for tap in range(size)}
        step = gcd(*(tap - min(taps) for tap in taps)) or 1
        return 8 // groups * ((max(taps) - min(taps)) // step + 1) ** axes, several


@st.composite
def sums(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    axes, stride = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    branches = [
        {
            "conv": draw(st.sampled_from([1, 1, 0])),
            "size": draw(st.sampled_from([1, 3, 5])),
            "dilation": draw(st.sampled_from([1, 1, 2])),
            "groups": draw(st.sampled_from([8, 8, 2, 1])),
            **{name: draw(st.integers(0, 1)) for name in ("bias", "norm", "scale", "sign")},
        }
        for _ in range(draw(st.integers(2, 4)))
    ]
    x = torch.randn(2, 8, *[6] * axes, dtype=torch.float64)
    return randomise(Drawn(axes, stride, branches).double()), x


@settings(max_examples=13, deadline=None, derandomize=True)
@given(sums())
def test_any_sum_keeps_its_value(drawn: tuple[nn.Module, Tensor]) -> None:
    model, x = drawn
    plan = decide(model, x)
    merged = Plan.from_json(plan.to_json()).apply(model)
    assert error(in_eval(merged, x), in_eval(model, x)) <= 1e-10
    one, several = model.work(x.dim() - 2)
    if one <= several and convs(model):
        assert (len(convs(merged)), batch_norms(merged)) == (1, [])
    elif convs(model):
        assert "multiplications" in plan.left[0].reason


# --- what is left ---------------------------------------------------------------------------------


def test_ordinary_residual_is_not_mentioned() -> None:
    class Residual(Two):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.second(F.relu(self.first(x)))

    plan = decide(Residual().double())
    assert (plan.edits, plan.left) == ((), ())


class Two(nn.Module):
    """Two convs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


NOTHING = {
    "alpha dropout": lambda y: torch.alpha_dropout(y, 0.5, False),
    "feature alpha dropout": lambda y: torch.feature_alpha_dropout(y, 0.5, False),
    "dropout": lambda y: torch.dropout(y, 0.5, False),
    "to its dtype": lambda y: y.to(y.dtype),
    "to its device": lambda y: y.to("cpu"),
    "contiguous": lambda y: y.contiguous(),
    "clone": lambda y: y.clone(),
    "detach": lambda y: y.detach(),
}


@pytest.mark.parametrize("name", list(NOTHING))
def test_a_branch_through_what_does_nothing_is_merged(name: str) -> None:
    class Through(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + NOTHING[name](self.second(x))

    assert_merges(Through())


def test_a_branch_through_a_cast_is_left_where_it_casts() -> None:
    class Cast(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x).float()

    x, model = INPUT.float(), Cast()
    merged = ns.plan(model, MergeBranches(), inputs=x).apply(model)
    assert len(convs(merged)) == 1
    assert error(in_eval(merged, x), in_eval(model, x)) <= 1e-6

    plan = decide(Cast().double())
    assert (plan.edits, plan.left) == ((), ())


def test_denser_conv_than_its_branches_is_refused() -> None:
    model = Two()
    model.first = nn.Conv2d(8, 8, 3, padding=1, groups=8)
    assert "72 multiplications" in reason_left(model)


def test_parametrized_weight_is_left_until_it_is_baked() -> None:
    model = Two()
    parametrizations.weight_norm(model.first)
    assert "bake" in reason_left(model)
    assert_merges(ns.bake(model))


def test_padding_with_other_values_is_left() -> None:
    model = Two()
    model.first = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    plan = decide(model.double())
    assert plan.edits == ()


@pytest.mark.parametrize("path", ["large.0", "large", "small", "identity", "drop"])
@pytest.mark.parametrize("before", [False, True])
def test_hook_sees_what_it_saw(path: str, before: bool) -> None:
    """What is summed before it may be merged; the whole sum may not."""
    model, seen = randomise(RepVGG().double()), []
    hooked = model.get_submodule(path)
    if before:
        hooked.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        hooked.register_forward_hook(lambda *args: seen.append(args[-1]))
    plan = decide(model)
    assert f"{path} has a hook" in plan.left[0].reason
    merged = plan.apply(model)
    expected, actual = in_eval(model, INPUT), in_eval(merged, INPUT)
    assert error(actual, expected) <= 1e-10
    assert error(seen[-1], seen[-2]) <= 1e-10  # the copy has the same hooks


def test_hook_on_the_block_itself_survives() -> None:
    model, seen = RepVGG(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    merged = assert_merges(model)
    seen.clear()
    in_eval(merged, INPUT)
    assert seen == [1]


def test_conv_that_is_used_elsewhere_is_not_changed() -> None:
    class Shared(Two):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.first(x) + self.second(x)) + self.first(-x)

    merged = assert_merges(Shared(), left=2)
    assert convs(merged) == ["first", "second"]  # which computes the sum, and `first` stays


def test_sum_of_shared_convs_is_left() -> None:
    class Shared(Two):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.first(x) + self.second(x)) * self.first(-x) * self.second(-x)

    assert "used elsewhere" in reason_left(Shared())


def test_shared_weight_stays_what_it_is_elsewhere() -> None:
    class Tied(Two):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Conv2d(8, 8, 3, padding=1)
            self.third.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.third(F.relu(super().forward(x)))

    assert_merges(Tied(), left=2)


def test_block_that_is_called_twice_is_merged_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = RepVGG()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x)[..., :5])

    assert_merges(Twice())


def test_block_with_two_names_is_merged_once() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = RepMixer()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    assert_merges(Named())


def test_block_that_is_also_taken_apart_is_left() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Two()

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x)) * self.block.first(x) * self.block.second(x)

    assert "used elsewhere" in reason_left(Apart())  # one reason for the two calls


def test_input_that_is_overwritten_between_the_branches_is_left() -> None:
    class Overwritten(Two):
        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.5
            rows = x[:, :, 1:]
            first = self.first(x)
            rows.relu_()
            return first + self.second(x)

    assert "overwritten" in reason_left(Overwritten())


def test_sum_that_is_written_into_the_callers_value_is_left() -> None:
    class Writes(Two):
        def forward(self, x: Tensor) -> Tensor:
            x += self.first(x)
            return x

    model = Writes().double()
    assert "others see" in reason_left(model)


def test_value_with_two_names_is_written_as_it_was() -> None:
    class Alias(Two):
        def forward(self, x: Tensor) -> Tensor:
            out = self.first(x)
            same = out
            out += self.second(x)
            return out * torch.sigmoid(same)

    assert_merges(Alias())


def test_forward_with_an_optional_argument_is_left() -> None:
    class Optional(Two):
        def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
            return self.first(x) + self.second(x) if more is None else more

    assert "optional argument" in reason_left(Optional())


def test_addend_that_the_caller_computes_is_left() -> None:
    class Add(nn.Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return first + second

    class Outside(Two):
        def __init__(self) -> None:
            super().__init__()
            self.add = Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.first(x), self.second(x))

    assert "outside" in reason_left(Outside())


def test_factor_that_depends_on_the_input_is_left() -> None:
    class Sized(Two):
        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) / x.shape[-1]

    reason_left(Sized())


def test_scale_that_is_not_per_channel_is_left() -> None:
    class Positions(Two):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(7))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) * self.scale

    assert "per channel" in reason_left(Positions())


def test_without_inputs_nothing_is_decided() -> None:
    plan = ns.plan(Two(), MergeBranches())
    assert (plan.edits, plan.left) == ((), ())


def test_sums_inside_one_that_is_left_are_merged() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.dense = MobileOne(), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + self.dense(x)

    model = randomise(Partly().double())
    plan = decide(model)
    assert ["multiplications" in left.reason for left in plan.left] == [True]
    merged = plan.apply(model)
    assert error(in_eval(merged, INPUT), in_eval(model, INPUT)) <= 1e-10
    assert len(convs(merged)) == 2


# --- what stays as it was -------------------------------------------------------------------------


def test_flags_precision_and_layout_survive() -> None:
    model = Two().to(memory_format=torch.channels_last)
    model.first.weight.requires_grad_(False)
    plan = decide(model.eval(), INPUT.float())
    merged = plan.apply(model)
    weight = merged.first.weight
    assert weight.dtype == torch.float32 and not weight.requires_grad
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert merged.first.bias.requires_grad and not merged.training
    assert error(in_eval(merged, INPUT.float()), in_eval(model, INPUT.float())) <= 1e-5


def test_failing_plan_puts_the_model_back() -> None:
    model = randomise(nn.Sequential(RepMixer(), RepVit()).double())
    before, state = in_eval(model, INPUT), copy.deepcopy(model.state_dict())
    plan = decide(model)
    with pytest.raises(RuntimeError), all_or_nothing(model):
        for edit in plan.edits:
            edit.apply(model)
        raise RuntimeError
    assert torch.equal(in_eval(model, INPUT), before)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, state[name])


def blocks() -> nn.Module:
    return nn.Sequential(RepVGG(), RepMixer(), RepVit(), Gated(), MobileOne(2)).double()


def test_merged_model_is_saved_and_loaded(tmp_path: Path) -> None:
    merged = decide(randomise(blocks())).apply(randomise(blocks()))
    ns.save(merged, tmp_path / "merged")
    loaded = ns.load(tmp_path / "merged", source=blocks)
    assert torch.equal(in_eval(loaded, INPUT), in_eval(merged, INPUT))
    assert loaded.state_dict().keys() == merged.state_dict().keys()


def test_plan_holds_for_other_weights() -> None:
    plan, other = decide(randomise(blocks())), randomise(blocks(), seed=1)
    merged = Plan.from_json(plan.to_json()).apply(other)
    assert error(in_eval(merged, INPUT), in_eval(other, INPUT)) <= 1e-10


# --- real architectures ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("repvgg_a0", {}), ("fastvit_t8", {"layers": (1, 1, 1, 1)}), ("lcnetv2_small", {})],
)
def test_real_architecture_has_no_more_convs_than_timm_leaves(
    name: str, options: dict[str, Any]
) -> None:
    model = randomise(timm.create_model(name, **options).double().eval())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    merged = decide(model, x).apply(model)
    assert error(in_eval(merged, x), in_eval(model, x)) <= 1e-10
    assert len(convs(merged)) <= len(convs(reparameterize_model(model)))
