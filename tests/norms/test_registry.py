"""Methods are found by name, built for any rank, and third parties can add theirs."""

import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import normswap as ns
from normswap.core import plugins
from normswap.norms import registry
from normswap.norms.registry import Method
from normswap.passes.replace import Replace

ACTIVATION = sorted(name for name, m in ns.methods().items() if m.kind == "activation")
# Of unit size by their definition; the others keep, limit or compare sizes.
NORMALIZING = sorted(
    set(ACTIVATION)
    - {
        "dynamic_tanh",
        "filter_response_norm",
        "global_response_norm",
        "identity",
        "local_response_norm",
    }
    - {"evonorm_b0", "evonorm_s0", "mean_only_batch_norm", "sync_batch_norm"}
)
SHAPES = [(3, 6), (3, 6, 5), (3, 6, 4, 5), (3, 6, 2, 4, 5), (3, 6, 2, 2, 2, 2)]


@pytest.fixture
def fresh() -> Iterator[None]:
    """What a test registers is forgotten."""
    before = dict(registry._METHODS)
    registry._third_party.cache_clear()
    yield
    registry._METHODS.clear()
    registry._METHODS.update(before)
    registry._third_party.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ACTIVATION)
def test_every_method_takes_any_rank(name: str, shape: tuple[int, ...]) -> None:
    module = ns.create(name, 6).eval()
    x = torch.randn(*shape)
    if name == "instance_norm" and len(shape) == 2:
        with pytest.raises(ValueError, match="single value"):
            module(x)
        return
    assert module(x).shape == x.shape


@pytest.mark.parametrize("name", NORMALIZING)
def test_created_modules_normalize(name: str) -> None:
    """With its start values a method maps a shifted, scaled input to about unit size."""
    x = torch.randn(64, 8, 16) * 5
    y = ns.create(name, 8).train()(x)
    frozen = name == "frozen_batch_norm"
    assert (y.std() - (5 if frozen else 1)).abs() < (0.2 if frozen else 0.05)


@pytest.mark.parametrize("name", sorted(ns.methods()))
def test_every_method_says_what_it_is(name: str) -> None:
    method = ns.methods()[name]
    assert method.name == name
    assert method.summary
    assert method.source or name == "identity"
    assert "num_features" not in method.options


def test_eps_affine_and_options_reach_the_module() -> None:
    assert ns.create("group_norm", 6, groups=2, eps=1e-3).num_groups == 2
    assert ns.create("group_norm", 6, eps=1e-3).eps == 1e-3
    assert ns.create("layer_norm", 6, affine=False).weight is None
    assert ns.create("batch_norm", 6, momentum=None).momentum is None
    assert ns.create("rms_norm", 6, bias=True).bias is not None
    assert ns.create("rms_norm", 6).bias is None


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("grup_norm", {}, "did you mean 'group_norm'"),
        ("InstanceNorm", {}, "did you mean 'instance_norm'"),
        ("xyz", {}, "known: .*batch_norm"),
        ("", {}, "known: "),
        ("group_norm", {"group": 1}, "takes .*groups"),
        ("group_norm", {"groups": 4}, "possible: 1, 2, 3, 6"),
        ("batch_norm", {"groups": 4}, "no option 'groups'"),
    ],
)
def test_bad_requests_name_the_remedy_in_one_line(
    name: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        ns.create(name, 6, **options)
    assert "\n" not in str(raised.value)


def test_a_method_is_known_as_papers_and_torch_call_it() -> None:
    """By their short names, and group_norm's `groups` as torch.nn.GroupNorm's `num_groups`."""
    named = {short: registry.method_named(short).name for short in ("gn", "LN", "frn")}
    assert named == {"gn": "group_norm", "LN": "layer_norm", "frn": "filter_response_norm"}
    x = torch.randn(2, 8, 5, 5)
    expected = nn.GroupNorm(4, 8)(x)
    torch.testing.assert_close(ns.create("gn", 8, num_groups=4)(x), expected)
    model = nn.Sequential(nn.BatchNorm2d(8))
    converted = ns.convert(model, "gn", num_groups=4, inputs=x)
    torch.testing.assert_close(converted.eval()(x), expected)
    for swap in (ns.create, ns.Replace):
        with pytest.raises(ns.NormswapError, match="the same option"):
            swap("gn", *[8] * (swap is ns.create), groups=2, num_groups=4)


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("name", ACTIVATION)
def test_impossible_number_of_channels_is_refused(name: str, count: int) -> None:
    with pytest.raises(ns.NormswapError, match="num_features"):
        ns.create(name, count)


def _double(num_features: int, *, eps: float = 0.0, affine: bool = True) -> nn.Module:
    return nn.Identity()


def test_a_registered_method_can_be_asked_for(fresh: None) -> None:
    ns.register("mine", _double, summary="does nothing")
    assert isinstance(ns.create("mine", 3), nn.Identity)
    model = ns.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), "mine")
    assert isinstance(model[1], nn.Identity)


@pytest.mark.parametrize("name", ["mine", "group_norm"])
def test_a_name_is_taken_once(name: str, fresh: None) -> None:
    with pytest.raises(ns.NormswapError, match="registered already"):
        for _ in range(2):
            ns.register(name, _double)


class _EntryPoint:
    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value = name, "package.module:attribute"
        self._loaded = value

    def load(self) -> Any:
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def _install(monkeypatch: pytest.MonkeyPatch, *entries: _EntryPoint) -> None:
    def entry_points(*, group: str) -> list[_EntryPoint]:
        return list(entries) if group == "normswap.methods" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    monkeypatch.setattr(plugins, "entry_points", entry_points)


def test_third_parties_register_by_entry_point(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, _EntryPoint("theirs", Method("theirs", _double, "exact", "", "")))
    assert "theirs" in ns.methods()
    assert isinstance(ns.create("theirs", 3), nn.Identity)


@pytest.mark.parametrize(
    "entry",
    [
        _EntryPoint("theirs", _double),
        _EntryPoint("theirs", ImportError("no module named nothing")),
        _EntryPoint("theirs", Method("another", _double, "exact", "", "")),
        _EntryPoint("group_norm", Method("group_norm", _double, "exact", "", "")),
    ],
    ids=["no method", "import fails", "other name", "taken name"],
)
def test_a_broken_plugin_is_named_and_left_out(
    entry: _EntryPoint, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _EntryPoint("whole", Method("whole", _double, "exact", "", ""))
    before = ns.methods()
    registry._third_party.cache_clear()
    _install(monkeypatch, entry, whole)
    with pytest.warns(UserWarning, match=entry.name) as warned:
        assert ns.methods() == {**before, "whole": whole.load()}
    assert len(warned) == 1
    assert "package.module" in str(warned[0].message)
    assert "\n" not in str(warned[0].message)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("batch_renorm", {"r_max": "abc"}, "r_max='abc': it should be a valid number"),
        ("batch_norm", {"affine": 1}, "affine=1: it should be a valid boolean"),
        ("ghost_batch_norm", {"ghost_batch_size": 1.5}, "it should be a valid integer"),
        ("adaptive_batch_norm", {"domains": "a"}, "not allowed as a Sequence"),
        ("batch_norm", {"eps": -1.0}, "greater than or equal to 0"),
        ("batch_norm", {"eps": float("nan")}, "finite"),
        ("batch_norm", {"momentum": 2.0}, "less than or equal to 1"),
        ("local_response_norm", {"size": 0}, "size must be at least 1"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(
    method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ns.NormswapError, match=words) as raised:
        ns.create(method, 4, **options)
    assert "\n" not in str(raised.value)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(ns.NormswapError, match=words):
        ns.plan(model, Replace(method, **options), inputs=torch.randn(2, 3, 4, 4))
