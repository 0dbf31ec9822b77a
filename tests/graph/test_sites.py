"""Every normalization of a model is found, seen as what it is, with its place in the dataflow."""

import copy
import json
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import ConvBN, Detector, Residual, randomise
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.graph.norm_modules import norm_kind

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sites(model: nn.Module, inputs: Any = None) -> dict[str, ns.NormSite]:
    return {site.name: site for site in ns.inspect(model, inputs).sites}


KINDS = [
    (lambda: nn.BatchNorm1d(6), "batch", 1, "running", (2, 6, 4)),
    (lambda: nn.BatchNorm2d(6), "batch", 1, "running", (2, 6, 4, 4)),
    (lambda: nn.BatchNorm3d(6), "batch", 1, "running", (2, 6, 2, 4, 4)),
    (lambda: nn.SyncBatchNorm(6), "batch", 1, "running", (2, 6, 4, 4)),
    (lambda: nn.BatchNorm2d(6, track_running_stats=False), "batch", 1, "batch", (2, 6, 4, 4)),
    (lambda: FrozenBatchNorm2d(6), "batch", 1, "frozen", (2, 6, 4, 4)),
    (lambda: timm.layers.BatchNormAct2d(6), "batch", 1, "running", (2, 6, 4, 4)),
    (lambda: nn.InstanceNorm2d(6, affine=True), "instance", 1, "sample", (2, 6, 4, 4)),
    (lambda: nn.GroupNorm(2, 6), "group", 1, "sample", (2, 6, 4, 4)),
    (lambda: timm.layers.GroupNormAct(6, 2), "group", 1, "sample", (2, 6, 4, 4)),
    (lambda: nn.LayerNorm(6), "layer", -1, "sample", (2, 5, 6)),
    (lambda: timm.layers.LayerNorm2d(6), "layer", 1, "sample", (2, 6, 4, 4)),
    (lambda: nn.RMSNorm(6, eps=1e-5), "rms", -1, "sample", (2, 5, 6)),
    (lambda: nn.LocalResponseNorm(3), "local_response", 1, "sample", (2, 6, 4, 4)),
]


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize(("build", "kind", "axis", "statistics", "shape"), KINDS)
def test_each_kind_is_seen_as_what_it_is(
    build: Any, kind: str, axis: int, statistics: str, shape: tuple[int, ...], given: bool
) -> None:
    norm = build()
    if hasattr(norm, "eps"):
        norm.eps = 3e-4
    model = nn.Sequential(nn.Identity(), norm)
    (site,) = sites(model, torch.randn(*shape) if given else None).values()
    lrn = kind == "local_response"
    assert (site.name, site.kind, site.owner) == ("1", kind, "module")
    assert site.cls == type(norm).__name__
    assert site.channel_axis == axis
    assert site.statistics == statistics
    assert site.num_features == (None if lrn and not given else 6)
    assert site.eps == (0.0 if lrn else 3e-4)
    assert site.affine is not lrn
    assert site.parameters == sum(p.numel() for p in norm.parameters())
    assert site.paths == ("1",)
    assert site.why_not is None
    if given:
        assert site.calls == 1
        assert site.input_shape == shape
        assert site.spatial == torch.Size(shape).numel() // shape[0] // 6
        assert site.produced_by == ("input input",)
        assert site.used_by == ("output",)


def test_dataflow_names_producers_and_users() -> None:
    found = sites(randomise(Residual()), X)
    assert list(found) == ["first.bn", "bn", "shortcut.1", "after", "head"]
    assert found["first.bn"].produced_by[0].startswith("first.conv")
    assert "conv" in " ".join(found["bn"].produced_by)
    assert "relu" in found["after"].produced_by[0]
    assert "add" in found["bn"].used_by[0]
    assert found["head"].used_by == ("output",)
    assert found["bn"].calls == 1


def test_shared_norms_count_calls_and_know_their_paths() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.bn, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.other = self.bn

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.a(x))) + self.other(self.b(x))

    found = sites(Shared(), X)
    assert list(found) == ["bn", "unused"]
    assert found["bn"].calls == 2
    assert found["bn"].paths == ("bn", "other")
    assert [name.split(" ")[0] for name in found["bn"].produced_by] == ["a", "b"]
    assert len(found["bn"].used_by) == 2
    assert found["unused"].calls == 0
    assert found["unused"].input_shape is None


class Functional(nn.Module):
    """Normalizations that no module owns."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        mean, var = (None, None) if self.options.get("training") else (self.mean, self.var)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, eps=1e-3, **self.options)
        return F.group_norm(x, 3)


@pytest.mark.parametrize("given", [True, False], ids=["inputs", "no inputs"])
@pytest.mark.parametrize(("training", "statistics"), [(False, "running"), (True, "batch")])
def test_functional_norms_are_sites(given: bool, training: bool, statistics: str) -> None:
    batch, group = sites(Functional(training=training), X if given else None).values()
    assert (batch.kind, batch.owner, batch.eps) == ("batch", "functional", 1e-3)
    assert batch.statistics == statistics
    assert batch.affine
    assert (group.kind, group.owner, group.affine) == ("group", "functional", False)
    assert batch.why_not is not None
    if given:
        assert batch.num_features == 3


def test_uninitialised_lazy_norm_is_listed_without_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d())
    found = sites(model)
    assert [site.kind for site in found.values()] == ["batch", "instance"]
    assert found["1"].num_features is None
    assert json.dumps(ns.inspect(model).to_dict())
    model(X)
    assert sites(model)["1"].num_features == 4
    assert sites(model)["1"].cls == "BatchNorm2d"


def test_subclass_with_activation_and_drop_has_a_tail() -> None:
    norm = timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout, act_layer=nn.SiLU)
    (site,) = sites(nn.Sequential(nn.Conv2d(3, 4, 3), norm), X).values()
    assert site.tail == ("drop", "act")
    assert site.why_not is None


def test_subclass_that_does_more_says_so() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    (site,) = sites(nn.Sequential(Doubled(3)), X).values()
    assert "Doubled" in site.why_not
    assert site.kind == "batch"


@pytest.mark.parametrize(
    "changed", [{"weight": "more"}, {"eps": 1e-2}, {"training": True}, {"running_mean": "more"}]
)
def test_subclass_that_normalizes_with_other_numbers_says_so(changed: dict[str, Any]) -> None:
    class Other(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            given = {"weight": self.weight, "bias": self.bias, "training": False, "eps": self.eps}
            given |= {"running_mean": self.running_mean, "running_var": self.running_var}
            for name, value in changed.items():
                given[name] = given[name] + 1 if value == "more" else value
            return F.batch_norm(x, **given)

    (site,) = sites(nn.Sequential(Other(3)), X).values()
    assert "Other.forward does more than normalize" in site.why_not


def test_a_forward_that_was_replaced_on_the_instance_says_so() -> None:
    norm = nn.BatchNorm2d(3)
    norm.forward = lambda x: 2 * F.batch_norm(x, norm.running_mean, norm.running_var)
    (site,) = sites(nn.Sequential(norm), X).values()
    assert site.why_not == "the forward of BatchNorm2d was replaced on the instance"


def test_what_a_forward_appends_to_is_as_before() -> None:
    class Keeps(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.BatchNorm2d(3))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            return super().forward(x)

    model = Keeps()
    assert list(sites(model, X)) == ["0"]
    assert model.seen == []


def test_a_name_alone_makes_no_normalization() -> None:
    cls = type("FrozenBatchNorm2d", (nn.Module,), {"forward": lambda self, x: x + self.weight})
    module = cls()
    for name in ("weight", "bias", "running_mean", "running_var"):
        module.register_buffer(name, torch.ones(3))
    module.eps = 1e-5
    assert norm_kind(module) is None


def test_sites_of_a_model_that_cannot_be_exported() -> None:
    x = torch.randn(2, 4, 6, 6)
    inspection = ns.inspect(Detector(), x)
    assert inspection.how == "submodules"
    assert [site.calls for site in inspection.sites] == [1, 1, 1]
    assert inspection.foldable == {"body.bn", "heads.0.bn", "heads.1.bn"}
    tree = ns.inspect(Detector())
    assert tree.how == "module tree"
    assert [site.name for site in tree.sites] == ["body.bn", "heads.0.bn", "heads.1.bn"]
    assert all(site.calls is None for site in tree.sites)
    assert not tree.foldable
    assert "give example inputs" in tree.folds["body.bn"]


@pytest.mark.parametrize("inputs", [X, None])
def test_inspection_is_json_and_counts(inputs: Any) -> None:
    model = nn.Sequential(Residual())
    found = json.loads(json.dumps(ns.inspect(model, inputs).to_dict()))
    summary = found["summary"]
    assert summary["sites"] == 5
    assert summary["by_kind"] == {"batch": 5}
    assert summary["parameters"] == 2 * (8 + 8 + 8 + 8 + 6)
    assert summary["depend_on_the_batch"] == []
    assert len(found["sites"]) == 5
    if inputs is not None:
        assert summary["foldable"] == 4
        assert [s["fold"] for s in found["sites"] if not s["foldable"]] == [
            "cannot fold backward (its input comes from 0 (relu)) or forward (its output goes to "
            "0 (relu))"
        ]


def test_inspection_prints_every_site() -> None:
    text = str(ns.inspect(Residual(), X))
    assert all(name in text for name in ("first.bn", "shortcut.1", "after", "head"))


def test_inspecting_changes_nothing() -> None:
    model = randomise(Residual()).train()
    state = copy.deepcopy(model.state_dict())
    modules = {path: (m, type(m), m.training) for path, m in model.named_modules()}
    ns.inspect(model, X)
    ns.inspect(model)
    assert {path: (m, type(m), m.training) for path, m in model.named_modules()} == modules
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_fold_column_tells_where_an_affine_goes() -> None:
    inspection = ns.inspect(nn.Sequential(ConvBN(3, 4), nn.BatchNorm2d(4)), X)
    assert inspection.folds["0.bn"] == "0.conv"
    assert "relu" in inspection.folds["1"]


def test_inspect_refuses_a_scripted_model_in_one_line() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(NormswapError, match="scripted"):
        ns.inspect(scripted)
