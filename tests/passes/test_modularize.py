"""Normalizations called as functions become modules that compute exactly the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, batch_norms, error, in_eval, randomise
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import normswap as ns
from normswap.graph.capture import capture
from normswap.graph.sites import NormSite, find_sites
from normswap.norms.batch.frozen import FixedStatistics
from normswap.passes import Fold, Freeze, Replace
from normswap.passes.modularize import Modularize, modularized_first
from normswap.source.program import module_of, opened

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Functional(nn.Module):
    """conv and a BatchNorm called as a function (pytorch issue 122070)."""

    def __init__(self, inputs: int = 3, outputs: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.gain = nn.Parameter(torch.rand(outputs) + 0.5)
        self.offset = nn.Parameter(torch.randn(outputs))
        self.register_buffer("mean", torch.randn(outputs))
        self.register_buffer("var", torch.rand(outputs) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.batch_norm(x, self.mean, self.var, self.gain, self.offset, self.training, eps=1e-3)
        return F.relu(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Functional(), nn.BatchNorm2d(4), Functional(4, 5))


def exported(how: str, model: nn.Module | None = None) -> fx.GraphModule:
    """Residual as the program that torch.export makes of it."""
    torch.manual_seed(0)
    program = torch.export.export((model or randomise(Residual())).eval(), (X,))
    return (program.run_decompositions() if how == "decomposed" else program).module()


def modularize(model: nn.Module, inputs: Any = X, **options: Any) -> nn.Module:
    return ns.plan(model, Modularize(**options), inputs=inputs).apply(model)


def sites(model: nn.Module, inputs: Any = X) -> dict[str, NormSite]:
    return {site.name: site for site in find_sites(capture(model, inputs))}


def why_left(model: nn.Module, inputs: Any = X) -> list[str]:
    plan = ns.plan(model, Modularize(), inputs=inputs)
    assert not plan.edits
    return [left.reason for left in plan.left]


# --- functional batch norm in a module's forward: pytorch issue 122070 --------------------------


def test_functional_batch_norm_becomes_a_module_of_the_same_name_and_function() -> None:
    model = network()
    before = sites(model)
    owned = modularize(model)
    after = sites(owned)
    assert list(after) == list(before) == ["0.batch_norm", "1", "2.batch_norm"]
    assert [site.owner for site in before.values()] == ["functional", "module", "functional"]
    assert all(site.owner == "module" and site.eps == before[n].eps for n, site in after.items())
    assert torch.equal(in_eval(owned, X), in_eval(model, X))
    assert isinstance(owned[0], Functional)
    assert set(model.state_dict()) <= set(owned.state_dict())
    assert owned[0].batch_norm.weight is owned[0].gain
    assert owned[0].batch_norm.running_var is owned[0].var


def test_functional_batch_norm_folds() -> None:
    model = network()
    folded = ns.fold(modularize(model), X)
    assert [type(folded[i].batch_norm) for i in (0, 2)] == [nn.Identity] * 2
    assert error(in_eval(folded, X), in_eval(model, X)) < 1e-6


def test_functional_batch_norm_is_replaced() -> None:
    model = network()
    plan = ns.plan(model, Modularize(), Replace("group_norm", groups=1), inputs=X)
    replaced = plan.apply(model).eval()
    part, x = model[0], in_eval(model[0].conv, X)
    expected = F.relu(F.group_norm(x, 1, part.gain, part.offset, eps=1e-3))
    assert error(replaced[0](X), expected) < 1e-6


def test_a_pass_may_own_first_what_it_selected() -> None:
    model, each = network(), Replace("group_norm", groups=1)
    seen = capture(model, X)
    whole, left = modularized_first(each, seen, find_sites(seen), X)
    assert whole is not None and not left
    two_passes = ns.plan(model, Modularize(), each, inputs=X)
    assert whole.edits == two_passes.edits
    left_alone = OfTheBatch()
    seen = capture(left_alone, X)
    whole, left = modularized_first(each, seen, find_sites(seen), X)
    assert whole is None
    assert "depends on the batch" in left[0].reason


def test_training_goes_on_as_before() -> None:
    model = network().double().train()
    owned = modularize(model, X.double())
    for _ in range(2):
        a, b = model(X.double()), owned(X.double())
        assert error(b, a) < 1e-12
    for name, tensor in model.state_dict().items():
        assert error(owned.state_dict()[name].double(), tensor.double()) < 1e-12, name
    a.square().sum().backward()
    b.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert error(owned.get_parameter(name).grad, parameter.grad) < 1e-9, name


def test_statistics_that_are_always_used_are_never_updated() -> None:
    class Fixed(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gain, self.offset)

    torch.manual_seed(0)
    model = Fixed()
    owned = modularize(model).train()
    assert isinstance(owned.batch_norm, FixedStatistics)
    assert torch.equal(owned(X), model(X))
    assert torch.equal(owned.mean, model.mean)


def test_statistics_may_be_parameters() -> None:
    model = network()
    for part in (model[0], model[2]):
        for name in ("mean", "var"):
            statistic = getattr(part, name)
            delattr(part, name)
            setattr(part, name, nn.Parameter(statistic, requires_grad=False))
    owned = modularize(model)
    assert owned[0].batch_norm.running_mean is owned[0].mean
    assert dict(owned.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert torch.equal(in_eval(owned, X), in_eval(model, X))
    assert batch_norms(ns.fold(model, X)) == []


class Dropped(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Noisy(Functional):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + torch.randn_like(x) if self.training else x


class OtherMomentum(Functional):
    def forward(self, x: Tensor) -> Tensor:
        momentum = 0.1 if self.training else 0.0
        return F.batch_norm(self.conv(x), self.mean, self.var, None, None, self.training, momentum)


class Counting(Functional):
    """As torch's own, which counts the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches.add_(1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Dropped, "Dropped.forward computes another dropout in training"),
        (Noisy, "Noisy.forward runs other code in training"),
        (OtherMomentum, "computes another batch_norm in training"),
    ],
)
def test_a_forward_that_trains_otherwise_is_rewritten_for_inference_only(
    make: Callable[[], nn.Module], words: str
) -> None:
    torch.manual_seed(0)
    model = make().train()
    for each in (Freeze("eval"), Freeze("tune"), Replace("batch_norm"), Modularize()):
        plan = ns.plan(model, each, inputs=X)
        assert not plan.edits and words in plan.left[0].reason
    folded = ns.fold(model, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) < 1e-6


def test_a_call_beside_another_that_follows_the_flag_is_not_changed_alone() -> None:
    class Both(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(super().forward(x), self.mean, self.var, None, None, self.training)

    torch.manual_seed(0)
    model = Both().train()
    plan = ns.plan(model, Modularize(include="batch_norm"), inputs=X)
    assert not plan.edits and "another batch_norm" in plan.left[-1].reason
    owned = modularize(model)
    assert error(owned(X), model(X)) < 1e-6


def test_a_counter_of_batches_does_not_stand_against_it() -> None:
    torch.manual_seed(0)
    model = Counting().train()
    owned = modularize(model)
    assert error(owned(X), model(X)) < 1e-6
    assert error(owned.mean, model.mean) < 1e-6


def test_a_forward_that_runs_twice_has_one_module_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Functional(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(self.part(x))

    torch.manual_seed(0)
    model = Twice()
    plan = ns.plan(model, Modularize(), inputs=X)
    assert len(plan.edits) == 1
    owned = plan.apply(model)
    for each in (model, owned):
        assert [(name, site.calls) for name, site in sites(each).items()] == [
            ("part.batch_norm", 2)
        ]
    assert torch.equal(in_eval(owned, X), in_eval(model, X))
    folded = ns.fold(owned, X)
    assert batch_norms(folded) == []
    assert error(in_eval(folded, X), in_eval(model, X)) < 1e-6


def test_several_calls_in_one_forward_are_told_apart() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            for index in range(3):
                self.register_buffer(f"mean{index}", torch.randn(4))
                self.register_buffer(f"var{index}", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            a, b, c = ((getattr(self, f"mean{i}"), getattr(self, f"var{i}")) for i in range(3))
            x = torch.batch_norm(x, None, None, *b, False, 0.1, 1e-5, False) - x
            return F.batch_norm(x, *c, eps=0.1) * F.batch_norm(x, *a)

    torch.manual_seed(0)
    model = Several()
    some = modularize(model, exclude="batch_norm_1")
    assert len([m for m in some.children() if isinstance(m, nn.modules.batchnorm._BatchNorm)]) == 2
    for owned in (some, modularize(some)):
        assert torch.equal(in_eval(owned, X), in_eval(model, X))
    assert all(site.owner == "module" for site in sites(modularize(some)).values())


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.floats(1e-6, 1.0),
)
def test_a_call_of_any_rank_and_any_tensors_is_computed_exactly(
    space: list[int], gain: bool, offset: bool, dtype: torch.dtype, eps: float
) -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(3)) if gain else None
            self.register_buffer("offset", torch.randn(3) if offset else None)
            self.register_buffer("mean", torch.randn(3))
            self.register_buffer("var", torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.mean, self.var, self.gain, self.offset, eps=eps)

    torch.manual_seed(0)
    model, x = Only().to(dtype), torch.randn(2, 3, *space).to(dtype)
    owned = modularize(model, x)
    assert batch_norms(owned) == ["batch_norm"]
    assert torch.equal(owned(x), model(x))


# --- exported programs and GraphModules: pytorch issue 141116 -----------------------------------


@pytest.mark.parametrize("how", ["program", "decomposed", "symbolic", "nested"])
def test_every_batch_norm_of_a_graph_module_becomes_one(how: str) -> None:
    model: nn.Module = exported(how)
    if how == "symbolic":
        model = fx.symbolic_trace(network().eval())
    if how == "nested":
        model = nn.Sequential(model, nn.Identity())
    owned = modularize(model)
    before, after = sites(model), sites(owned)
    assert list(after) == list(before)
    assert all(site.owner == "module" for site in after.values())
    assert torch.equal(owned(X), model(X))
    if how != "symbolic":
        assert set(owned.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("how", ["program", "decomposed"])
def test_the_sites_of_a_program_are_named_as_those_of_its_source(how: str) -> None:
    source = sites(randomise(Residual()))
    program = sites(exported(how))
    assert list(program) == list(source)
    for name, site in program.items():
        assert (site.kind, site.statistics) == ("batch", "running")
        assert (site.num_features, site.eps, site.input_shape, site.affine) == (
            source[name].num_features,
            source[name].eps,
            source[name].input_shape,
            source[name].affine,
        )


def test_batch_norm_of_an_exported_program_folds() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.fc, self.head = nn.Linear(4, 2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3))))

    model = exported("program", randomise(Biased()))
    folded = ns.fold(modularize(model), X)
    assert batch_norms(folded) == []
    assert not sites(folded)
    assert error(folded(X), model(X)) < 1e-6
    assert set(folded.state_dict()) == {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}


@pytest.mark.parametrize("how", ["program", "decomposed"])
def test_folding_a_program_never_changes_what_it_computes(how: str) -> None:
    model = exported(how)
    folded = ns.fold(modularize(model), X)
    assert error(folded(X), model(X)) < 1e-6


def test_batch_norm_that_a_program_calls_twice_is_one_module() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.a(x)) - self.bn(self.b(x))

    torch.manual_seed(0)
    model = exported("program", randomise(Shared()))
    assert [(name, site.calls) for name, site in sites(model).items()] == [("bn", 2)]
    owned = modularize(model)
    assert [(name, site.calls) for name, site in sites(owned).items()] == [("bn", 2)]
    assert torch.equal(owned(X), model(X))
    folded = ns.fold(owned, X)
    assert batch_norms(folded) == []
    assert error(folded(X), model(X)) < 1e-6


def test_tensors_that_are_read_elsewhere_too_stay_where_they_are() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) * self.bn.weight.sum()

    model = exported("program", randomise(Reading()))
    owned = modularize(model)
    assert batch_norms(owned) == ["batch_norm"]
    assert type(owned.bn) is nn.Module
    assert torch.equal(owned(X), model(X))


def test_a_program_is_replaced_and_its_copy_keeps_what_torch_forgets() -> None:
    model = exported("program")
    plan = ns.plan(model, Modularize(), Replace("group_norm", groups=2), inputs=X)
    replaced = plan.apply(model)
    assert [type(replaced.get_submodule(n)).__name__ for n in sites(model)] == ["GroupNorm"] * 5
    reference = ns.convert(randomise(Residual()).eval(), "group_norm", inputs=X, groups=2)
    reference.load_state_dict(replaced.state_dict())
    assert error(replaced(X), reference(X)) < 1e-6


def test_a_program_is_opened_with_its_example_inputs_in_the_mode_it_was_exported_in() -> None:
    program = torch.export.export(randomise(Residual()).eval(), (X,))
    model, inputs = opened(program)
    assert torch.equal(inputs[0], X)
    assert not any(module.training for module in model.modules())
    assert opened(program, inputs=1)[1] == 1
    assert opened(model, None) == (model, None)
    keywords = torch.export.export(nn.Linear(2, 2), (), {"input": torch.ones(1, 2)})
    assert list(opened(keywords)[1]) == ["input"]
    assert torch.equal(module_of(program)(X), program.module()(X))


# --- a plan is data ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, lambda: exported("program")], ids=["module", "program"])
@pytest.mark.parametrize("then", [(), (Replace("group_norm"),)], ids=["own", "replace"])
def test_saved_and_loaded_it_is_built_again(
    make: Callable[[], nn.Module], then: tuple[Any, ...], tmp_path: Path
) -> None:
    model = make()
    plan = ns.plan(model, Modularize(), *then, inputs=X)
    assert ns.Plan.from_json(plan.to_json()) == plan
    rewritten = plan.apply(model)
    with torch.no_grad():
        for tensor in rewritten.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1
    ns.save(rewritten, tmp_path / "saved")
    again = ns.load(tmp_path / "saved", source=make)
    for module in (rewritten, again):
        for each in module.modules():
            each.training = False
    assert torch.equal(again(X), rewritten(X))


def test_planning_changes_nothing() -> None:
    model = network().train()
    before = {path: (type(m), dict(vars(m))) for path, m in model.named_modules()}
    assert ns.plan(model, Modularize(), inputs=X).edits
    assert {path: (type(m), dict(vars(m))) for path, m in model.named_modules()} == before


def test_a_plan_for_another_model_is_refused_in_one_line() -> None:
    plan = ns.plan(network(), Modularize(), inputs=X)
    other = nn.Sequential(Functional(3, 6), nn.BatchNorm2d(6), nn.ReLU())
    with pytest.raises(ns.NormswapError, match="plan it anew") as raised:
        plan.apply(other, inplace=True)
    assert "\n" not in str(raised.value)
    assert type(other[0]) is Functional
    assert not hasattr(other[0], "batch_norm")


# --- what is left, with the reason ---------------------------------------------------------------


class Computed(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gain.abs())


class OfTheBatch(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.mean, self.var, training=True)


class OnTheMask(Functional):
    """Calls without a mask, where a trace believes there is one."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var)
        return x if mask is None else x * mask


class WithOption(Functional):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * F.batch_norm(self.conv(x), self.mean, self.var)


def _parametrized() -> nn.Module:
    model = Functional()
    parametrizations.weight_norm(model, "gain", dim=None)
    return model


@pytest.mark.parametrize(
    ("make", "inputs", "words"),
    [
        (Computed, X, "computes its weight in forward"),
        (_parametrized, X, "its weight is parametrized"),
        (OfTheBatch, X, "depends on the batch"),
        (OnTheMask, (X, None), "does more than a trace shows"),
        (WithOption, X, "optional argument, scale"),
        (Functional, None, "give example inputs"),
    ],
)
def test_what_cannot_be_a_module_is_left_with_the_reason(
    make: Callable[[], nn.Module], inputs: Any, words: str
) -> None:
    (reason,) = why_left(make(), inputs)
    assert words in reason


# --- a conv that is called elsewhere too: pytorch issues 104593 and 197539 -----------------------


class SharedConv(nn.Module):
    """conv(x) + bn(conv(y))."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.conv(x) + self.bn(self.conv(y))


class SharedConvApart(SharedConv):
    """bn(conv(x)), conv(y)."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.bn(self.conv(x)), self.conv(y)


@pytest.mark.parametrize("how", ["module", "symbolic", "program"])
@pytest.mark.parametrize("make", [SharedConv, SharedConvApart])
def test_a_conv_called_elsewhere_without_its_batch_norm_is_never_changed(
    make: Callable[[], nn.Module], how: str
) -> None:
    torch.manual_seed(0)
    inputs = (X, X.flip(0))
    model = randomise(make()).eval()
    if how == "symbolic":
        model = fx.symbolic_trace(model)
    if how == "program":
        model = modularize(torch.export.export(model, inputs).module(), inputs)
    plan = ns.plan(model, Fold(), inputs=inputs)
    (reason,) = (each.reason for each in (*plan.edits, *plan.left))
    assert "conv also computes" in reason
    folded = ns.fold(model, inputs)
    assert torch.equal(folded.conv.weight, model.conv.weight)
    for ours, theirs in zip(folded(*inputs), model(*inputs), strict=True):
        assert error(ours, theirs) < 1e-6
