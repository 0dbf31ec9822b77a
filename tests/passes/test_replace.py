"""Replace puts another normalization in the place of one, and carries over all that fits."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvBN, Detector, Residual, error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.norms.sample.group import LayerNormPerPosition, resolve_groups
from normswap.norms.sample.rms import RMSNorm
from normswap.passes import Replace

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def only(norm: nn.Module, to: str, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """The input in float64 and what the replacement of a single norm makes of it."""
    x = torch.randn(*shape, dtype=torch.float64)
    model = randomise(nn.Sequential(norm)).double()
    options.setdefault("include", "*")
    return x, ns.convert(model, to, inputs=x, **options)(x)


def affine(norm: nn.Module, x: Tensor, axis: int = 1) -> Tensor:
    """gamma * x + beta, of the norm that was replaced."""
    shape = [1] * x.dim()
    shape[axis] = -1
    bias = getattr(norm, "bias", None)
    x = x * norm.weight.view(shape)
    return x if bias is None else x + bias.view(shape)


RANKS = [
    (nn.BatchNorm1d, (3, 8, 5)),
    (nn.BatchNorm2d, (2, 8, 4, 5)),
    (nn.BatchNorm3d, (2, 8, 3, 4, 5)),
]


@pytest.mark.parametrize(("cls", "shape"), RANKS)
def test_layer_norm_is_over_channels_and_positions(cls: Any, shape: tuple[int, ...]) -> None:
    norm = cls(8, eps=1e-3)
    x, y = only(norm, "layer_norm", shape)
    assert error(y, affine(norm, F.layer_norm(x, x.shape[1:], eps=1e-3))) <= 1e-12
    grouped = ns.convert(nn.Sequential(norm), "group_norm", groups=1)(x)
    assert error(y, grouped) <= 1e-12


@pytest.mark.parametrize(("cls", "shape"), RANKS)
def test_instance_norm_is_over_positions_and_equals_one_channel_a_group(
    cls: Any, shape: tuple[int, ...]
) -> None:
    norm = cls(8, eps=1e-3)
    x, y = only(norm, "instance_norm", shape)
    expected = affine(norm, F.instance_norm(x, eps=1e-3))
    assert error(y, expected) <= 1e-12
    grouped = ns.convert(nn.Sequential(norm), "group_norm", inputs=x, groups=8)
    assert error(grouped(x), expected) <= 1e-12


@pytest.mark.parametrize(("cls", "shape"), [*RANKS, (nn.BatchNorm1d, (4, 8))])
def test_layer_norm_per_position_is_over_channels(cls: Any, shape: tuple[int, ...]) -> None:
    norm = cls(8, eps=1e-3)
    x, y = only(norm, "layer_norm", shape, per_position=True)
    expected = F.layer_norm(x.movedim(1, -1), (8,), eps=1e-3).movedim(-1, 1)
    assert error(y, affine(norm, expected)) <= 1e-12


@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize(("cls", "shape"), [*RANKS, (nn.BatchNorm1d, (4, 8))])
def test_rms_norm_is_the_published_formula(
    cls: Any, shape: tuple[int, ...], per_position: bool
) -> None:
    norm = cls(8, eps=1e-3)
    x, y = only(norm, "rms_norm", shape, per_position=per_position)
    axes = 1 if per_position else tuple(range(1, x.dim()))
    expected = x / (x.square().mean(axes, keepdim=True) + 1e-3).sqrt()
    assert error(y, affine(norm, expected)) <= 1e-12


@pytest.mark.parametrize(("cls", "shape"), [*RANKS, (nn.BatchNorm1d, (4, 8))])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm_is_the_published_formula(cls: Any, shape: tuple[int, ...], groups: int) -> None:
    norm = cls(8, eps=1e-3)
    x, y = only(norm, "group_norm", shape, groups=groups)
    split = x.reshape(shape[0], groups, -1)
    split = (split - split.mean(-1, keepdim=True)) / (
        split.var(-1, unbiased=False, keepdim=True) + 1e-3
    ).sqrt()
    assert error(y, affine(norm, split.reshape(shape))) <= 1e-12


@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 60)))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_default_groups_are_those_of_the_specification(channels: int, spatial: int | None) -> None:
    """The divisor nearest to 32 with >= 2 channels and, where known, >= 16 values a group."""
    good = [
        g
        for g in range(1, channels + 1)
        if channels % g == 0
        and channels / g >= 2
        and (spatial is None or channels / g * spatial >= 16)
    ]
    chosen = resolve_groups(channels, spatial)
    if not good:
        assert chosen == 1
    else:
        assert chosen in good
        assert all(abs(chosen - 32) <= abs(g - 32) for g in good)


def test_default_groups_use_the_size_of_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    assert ns.convert(model, "group_norm")[1].num_groups == 32
    assert ns.convert(model, "group_norm", inputs=torch.randn(2, 3, 8, 8))[1].num_groups == 32
    assert ns.convert(model, "group_norm", inputs=torch.randn(2, 3, 4, 4))[1].num_groups == 16
    assert ns.convert(model, "group_norm", inputs=torch.randn(2, 3, 3, 3))[1].num_groups == 4


def test_groups_of_a_shared_norm_suit_its_smallest_input() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x).mean() + self.bn(F.adaptive_avg_pool2d(x, 1)).mean()

    x = torch.randn(2, 64, 8, 8)
    assert ns.convert(Head(), "group_norm", inputs=x).bn.num_groups == 4
    with pytest.raises(ns.NormswapError, match="single value"):
        ns.convert(Head(), "instance_norm", inputs=x)


@pytest.mark.parametrize("asked", [{"groups": 5}, {"channels_per_group": 5}, {"groups": 0}])
def test_impossible_groups_list_the_possible(asked: dict[str, int]) -> None:
    with pytest.raises(ns.NormswapError, match=r"1, 2, 4, 8\b"):
        ns.convert(Residual(), "group_norm", **asked, exclude="head")


def test_groups_and_channels_per_group() -> None:
    convert = lambda **o: ns.convert(Residual(), "group_norm", exclude="head", **o)  # noqa: E731
    assert convert(groups=4).bn.num_groups == 4
    assert convert(channels_per_group=2).bn.num_groups == 4
    with pytest.raises(ns.NormswapError, match="not both"):
        convert(groups=4, channels_per_group=2)
    names = ("first.bn", "bn", "shortcut.1", "after")
    assert convert(groups={**dict.fromkeys(names, 1), "bn": 2}).bn.num_groups == 2
    with pytest.raises(ns.NormswapError, match="after"):
        convert(groups=dict.fromkeys(names[:-1], 1))


def test_groups_by_a_function_of_the_channels_and_at_most_so_many() -> None:
    model = nn.Sequential(*(nn.BatchNorm2d(c) for c in (4, 24, 40, 96))).eval()
    halves = ns.convert(model, "group_norm", groups=lambda channels: channels // 2)
    assert [norm.num_groups for norm in halves] == [2, 12, 20, 48]
    most = ns.convert(model, "group_norm", groups="at most 32")
    assert [norm.num_groups for norm in most] == [4, 24, 20, 32]
    with pytest.raises(ns.NormswapError, match="4 channels cannot be divided with groups=3"):
        ns.convert(model, "group_norm", groups=lambda channels: 3)
    with pytest.raises(ns.NormswapError, match="it is a number, auto, or at most a number"):
        ns.convert(model, "group_norm", groups="few")
    with pytest.raises(ns.NormswapError, match="groups"):
        ns.convert(model, "layer_norm", groups="at most 32")


@pytest.mark.parametrize(
    ("to", "options", "shape"),
    [
        ("instance_norm", {}, (3, 6)),
        ("group_norm", {"groups": 6}, (3, 6)),
        ("group_norm", {"channels_per_group": 1}, (3, 6)),
        ("instance_norm", {}, (3, 6, 1)),
        ("instance_norm", {}, (3, 6, 1, 1)),
        ("group_norm", {"groups": 6}, (3, 6, 1, 1)),
    ],
)
def test_normalizing_a_single_value_is_refused(
    to: str, options: dict[str, int], shape: tuple[int, ...]
) -> None:
    norm = nn.BatchNorm2d(6) if len(shape) == 4 else nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Identity(), norm)
    with pytest.raises(ns.NormswapError, match="single value") as raised:
        ns.convert(model, to, inputs=torch.randn(*shape), **options)
    assert "\n" not in str(raised.value)
    assert ns.convert(model, "layer_norm", inputs=torch.randn(*shape))


@pytest.mark.parametrize(("to", "options"), [("instance_norm", {}), ("group_norm", {"groups": 6})])
def test_normalizing_a_single_value_never_happens_silently_without_inputs(
    to: str, options: dict[str, int]
) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="single value"):
        ns.convert(model, to, **options)(torch.randn(3, 4))


def test_include_and_exclude_are_globs_on_names() -> None:
    plan = lambda **o: ns.plan(Residual(), Replace("group_norm", **o)).changed  # noqa: E731
    assert plan() == ("first.bn", "bn", "shortcut.1", "after", "head")
    assert plan(include="*bn") == ("first.bn", "bn")
    assert plan(include=["first*", "head"]) == ("first.bn", "head")
    assert plan(exclude="*.*") == ("bn", "after", "head")
    assert plan(include="*bn", exclude=["first.*"]) == ("bn",)
    for options in ({"include": "layer9.*"}, {"exclude": "Head"}):
        with pytest.raises(ns.NormswapError, match="matches none"):
            plan(**options)
    with pytest.raises(ns.NormswapError, match="include and exclude leave none of them"):
        plan(include="bn", exclude="bn")


def test_only_batch_norms_are_replaced_unless_named() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    assert ns.plan(model, Replace("group_norm")).changed == ("0",)
    assert ns.plan(model, Replace("group_norm", include="*")).changed == ("0", "1", "2")
    with pytest.raises(ns.NormswapError, match="this model has no normalization"):
        ns.convert(nn.Sequential(nn.Linear(2, 2)), "group_norm")


PER_POSITION, OVER_ALL = {"per_position": True}, {"per_position": False}
SOURCES = [
    (lambda: nn.BatchNorm2d(8), (2, 8, 4, 4), 1),
    (lambda: nn.SyncBatchNorm(8), (2, 8, 4, 4), 1),
    (lambda: nn.BatchNorm2d(8, affine=False), (2, 8, 4, 4), 1),
    (lambda: nn.BatchNorm2d(8, track_running_stats=False), (2, 8, 4, 4), 1),
    (lambda: nn.InstanceNorm2d(8), (2, 8, 4, 4), 1),
    (lambda: nn.InstanceNorm2d(8, affine=True), (2, 8, 4, 4), 1),
    (lambda: nn.GroupNorm(2, 8), (2, 8, 4, 4), 1),
    (lambda: nn.LayerNorm(8), (2, 5, 8), -1),
    (lambda: nn.LayerNorm(8), (2, 8, 8), -1),
    (lambda: nn.LayerNorm(8, bias=False), (2, 5, 8), -1),
    (lambda: nn.RMSNorm(8), (2, 5, 8), -1),
    (lambda: nn.RMSNorm(8), (2, 4, 4, 8), -1),
    (lambda: timm.layers.LayerNorm2d(8), (2, 8, 4, 4), 1),
    (lambda: nn.LocalResponseNorm(3), (2, 8, 4, 4), 1),
]


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("group_norm", {"groups": 4}),
        ("instance_norm", {}),
        *[(to, o) for to in ("layer_norm", "rms_norm") for o in ({}, PER_POSITION, OVER_ALL)],
    ],
)
@pytest.mark.parametrize(("source", "shape", "axis"), SOURCES)
def test_any_site_can_be_the_source(
    source: Any, shape: tuple[int, ...], axis: int, to: str, options: dict[str, Any]
) -> None:
    old = source()
    eps = getattr(old, "eps", None) or (1e-5 if "Local" in type(old).__name__ else 1.1920929e-07)
    x, y = only(old, to, shape, **options)
    values = x.movedim(axis, 1).flatten(2)  # (N, C, positions), in float64
    per_position = options.get("per_position", axis == -1)
    kept = {"group_norm": (2, 3), "instance_norm": 2}.get(to, 1 if per_position else (1, 2))
    if to == "group_norm":
        values = values.unflatten(1, (4, 2))
    if to != "rms_norm":
        values = values - values.mean(kept, keepdim=True)
    values = values / (values.square().mean(kept, keepdim=True) + eps).sqrt()
    expected = values.reshape(x.movedim(axis, 1).shape).movedim(1, axis)
    if getattr(old, "weight", None) is not None:
        expected = affine(old, expected, axis)
    assert error(y, expected) <= 1e-12


def test_layer_norm_over_several_axes_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.LayerNorm((8, 4, 4)))
    x = torch.randn(2, 8, 4, 4)
    for to in ("group_norm", "rms_norm"):
        plan = ns.plan(model, Replace(to, include="*"), inputs=x)
        assert not plan.edits
        assert plan.left[0].reason


@pytest.mark.parametrize("to", ["batch_norm", "frozen_batch_norm", "sync_batch_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_exact_methods_compute_the_same_in_eval_mode(to: str, training: bool) -> None:
    model = randomise(Residual()).train(training)
    state = copy.deepcopy(model.state_dict())
    new = ns.convert(model, to)
    assert list(new.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in new.state_dict().items())
    assert error(in_eval(new, X), in_eval(model, X)) <= 1e-6
    if to == "frozen_batch_norm":
        assert error(new.train()(X), in_eval(model, X)) <= 1e-6
    else:
        assert {m.training for m in new.modules()} == {training}
    if to == "sync_batch_norm":
        assert type(new.bn) is nn.SyncBatchNorm


def test_frozen_becomes_batch_norm_again() -> None:
    model = randomise(Residual()).train()
    frozen = ns.freeze(model)
    back = ns.convert(frozen, "batch_norm")
    assert {m.training for m in back.modules()} == {True}
    back(X)
    assert not torch.equal(back.bn.running_mean, model.bn.running_mean)


def test_sites_without_running_statistics_cannot_give_them() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    plan = ns.plan(model, Replace("frozen_batch_norm"))
    assert plan.changed == ("1",)
    assert "running statistics" in plan.left[0].reason


def test_identity_removes_a_norm() -> None:
    model = ns.convert(ConvBN(3, 4), "identity")
    assert isinstance(model.bn, nn.Identity)
    assert torch.equal(model(X), F.relu(model.conv(X)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("to", ["group_norm", "layer_norm", "instance_norm", "rms_norm"])
def test_eps_dtype_flags_and_parameters_are_carried(
    to: str, training: bool, dtype: torch.dtype
) -> None:
    model = randomise(ConvBN(3, 4)).to(dtype).train(training)
    model.bn.eps = 3e-4
    model.bn.weight.requires_grad_(False)
    new = ns.convert(model, to).bn
    assert new.eps == 3e-4
    assert new.training is training
    assert (new.weight.requires_grad, new.bias.requires_grad) == (False, True)
    for name in ("weight", "bias"):
        assert getattr(new, name).dtype == dtype
        assert torch.equal(getattr(new, name), getattr(model.bn, name))
        assert getattr(new, name) is not getattr(model.bn, name)


def test_device_is_carried() -> None:
    with torch.device("meta"):
        model = ConvBN(3, 4)
    for to in ("group_norm", "rms_norm", "instance_norm"):
        assert ns.convert(model, to).bn.weight.device.type == "meta"


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_without_affine_gets_none(affine: bool) -> None:
    for to in ("group_norm", "layer_norm", "instance_norm", "rms_norm", "frozen_batch_norm"):
        new = ns.convert(nn.Sequential(nn.BatchNorm2d(4, affine=affine)), to)[0]
        assert (new.weight is not None) is affine


def test_parametrized_norm_keeps_its_gain() -> None:
    model = randomise(ConvBN(3, 4))
    expected = ns.convert(model, "group_norm", groups=2)(X)
    parametrizations.weight_norm(model.bn)
    plan = ns.plan(model, Replace("group_norm", groups=2))
    assert not plan.edits or error(plan.apply(model)(X), expected) <= 1e-6


def test_norm_with_activation_keeps_it_and_its_hooks() -> None:
    fired: list[str] = []
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
    )
    randomise(model)
    model[1].register_forward_hook(lambda *_: fired.append("after"))
    model[1].register_forward_pre_hook(lambda *_: fired.append("before"))
    new = ns.convert(model, "group_norm", inputs=X, groups=2).eval()
    fired.clear()
    expected = F.silu(F.group_norm(model[0](X), 2, model[1].weight, model[1].bias, model[1].eps))
    assert error(new(X), expected) <= 1e-6
    assert fired == ["before", "after"]
    assert isinstance(new[1].drop, nn.Dropout)
    folded = ns.fold(model.eval(), X)
    assert error(folded(X), model(X)) <= 1e-5
    frozen = ns.freeze(model, X, mode="tune").eval()
    assert error(frozen(X), model(X)) <= 1e-5


def test_group_norm_act_is_a_source() -> None:
    model = randomise(nn.Sequential(timm.layers.GroupNormAct(8, num_groups=2, act_layer=nn.SiLU)))
    x = torch.randn(2, 8, 4, 4)
    new = ns.convert(model, "layer_norm", include="*", inputs=x)
    expected = F.silu(F.group_norm(x, 1, model[0].weight, model[0].bias, model[0].eps))
    assert error(new(x), expected) <= 1e-6


def test_norm_registered_twice_is_replaced_under_both_names() -> None:
    model = ConvBN(3, 4)
    model.alias = model.bn
    new = ns.convert(model, "group_norm")
    assert isinstance(new.bn, nn.GroupNorm)
    assert new.alias is new.bn


def test_functional_norm_is_left_with_the_reason() -> None:
    class Functional(ConvBN):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(super().forward(x), torch.zeros(4), torch.ones(4))

    plan = ns.plan(Functional(3, 4), Replace("group_norm"), inputs=X)
    assert plan.changed == ("bn",)
    assert "functional" in plan.left[0].reason


def test_transformer_layer_norms_become_rms_norms_where_they_are() -> None:
    torch.manual_seed(0)
    model = randomise(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    new = ns.convert(model, "rms_norm", include="norm*", inputs=x)
    assert isinstance(new.norm1, RMSNorm)
    with torch.no_grad():
        y = torch.randn(2, 5, 8)
        expected = y / (y.square().mean(-1, keepdim=True) + model.norm1.eps).sqrt()
        expected = expected * model.norm1.weight + model.norm1.bias
        assert error(new.norm1(y), expected) <= 1e-6


def test_conversion_works_where_nothing_can_be_captured() -> None:
    model = randomise(Detector())
    new = ns.convert(model, "group_norm")
    assert isinstance(new.heads[1].bn, nn.GroupNorm)
    assert new(torch.randn(2, 4, 6, 6)).shape == (2, 4, 6, 6)


def test_unknown_method_and_options_name_the_nearest() -> None:
    with pytest.raises(ns.NormswapError, match="did you mean 'group_norm'"):
        ns.convert(Residual(), "groupnorm")
    with pytest.raises(ns.NormswapError, match="did you mean 'layer_norm'"):
        ns.convert(Residual(), "Layer-Norm")
    with pytest.raises(ns.NormswapError, match="no option 'group'"):
        ns.convert(Residual(), "group_norm", group=2)


def test_random_numbers_are_not_used_up() -> None:
    model = Residual()
    state = torch.get_rng_state()
    ns.convert(model, "group_norm", inputs=X)
    ns.fold(model, X)
    ns.freeze(model, X, mode="tune")
    assert torch.equal(state, torch.get_rng_state())


def test_per_position_module_is_the_conv_next_one() -> None:
    new = ns.convert(ConvBN(3, 4), "layer_norm", per_position=True)
    assert isinstance(new.bn, LayerNormPerPosition)


def test_norm_in_tune_mode_is_left_with_the_reason() -> None:
    tuned = ns.freeze(randomise(Residual()), X, mode="tune")
    plan = ns.plan(tuned, Replace("group_norm"), inputs=X)
    assert plan.changed == ("after",)
    assert {left.site for left in plan.left} == {"first.bn", "bn", "shortcut.1", "head"}
    assert all("unfreeze" in left.reason for left in plan.left)
