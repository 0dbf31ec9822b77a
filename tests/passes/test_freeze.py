"""Frozen statistics stay fixed, and tune mode has the function and the gradients of eval mode."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from networks import ConvBN, Residual, batch_norms, error, in_eval, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import normswap as ns
from normswap.graph.copies import copied
from normswap.passes import Freeze

Mode = Literal["eval", "tune"]
MODES = ["eval", "tune"]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "tracked" in n}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("mode", MODES)
def test_statistics_stay_fixed_in_training(mode: Mode) -> None:
    model = randomise(Residual())
    expected = in_eval(model, X)
    frozen = ns.freeze(model, X, mode=mode)
    before = _statistics(frozen)
    assert before
    for use in (frozen, copy.deepcopy(frozen), copy.deepcopy(copy.deepcopy(frozen))):
        for training in (True, False, True):
            use.train(training)
            assert use.training is training
            assert error(use(X), expected) <= 1e-5
        for module in use.modules():
            module.training = True
        assert error(use(X), expected) <= 1e-5
        assert _same(_statistics(use), before)


@pytest.mark.parametrize("mode", MODES)
def test_deep_copies_do_not_share_anything(mode: Mode) -> None:
    frozen = ns.freeze(randomise(Residual()), X, mode=mode)
    expected = in_eval(frozen, X)
    other = copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
        for module in other.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.add_(1)
    assert torch.equal(in_eval(frozen, X), expected)
    assert error(in_eval(other, X), expected) > 1e-2
    assert error(in_eval(ns.unfreeze(frozen), X), expected) <= 1e-5
    assert torch.equal(in_eval(frozen, X), expected)  # unfreezing a copy leaves the original


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_round_trip(mode: Mode) -> None:
    frozen = ns.freeze(randomise(Residual(), 0), X, mode=mode)
    other = ns.freeze(randomise(Residual(), 1), X, mode=mode)
    other.load_state_dict(frozen.state_dict())
    assert torch.equal(other.train()(X), frozen.train()(X))


def test_ordinary_checkpoint_loads_into_an_eval_mode_frozen_model() -> None:
    model = randomise(Residual())
    frozen = ns.freeze(randomise(Residual(), 1))
    assert list(frozen.state_dict()) == list(model.state_dict())
    frozen.load_state_dict(model.state_dict())
    assert torch.equal(frozen.train()(X), in_eval(model, X))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_eval_mode_frozen_model_pickles(protocol: int) -> None:
    frozen = ns.freeze(randomise(Residual()))
    loaded = pickle.loads(pickle.dumps(frozen, protocol))
    assert torch.equal(loaded.train()(X), in_eval(frozen, X))
    assert [type(m) for m in loaded.modules()] == [type(m) for m in frozen.modules()]


@pytest.mark.parametrize("mode", MODES)
def test_ddp_wrap_keeps_statistics_and_gradients(mode: Mode, tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        frozen = ns.freeze(randomise(Residual()), X, mode=mode)
        before = _statistics(frozen)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(frozen).train())
        wrapped(X).square().sum().backward()
        frozen.train()(X).square().sum().backward()
        assert _same(_statistics(wrapped.module), before)
        for a, b in zip(wrapped.module.parameters(), frozen.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert a.grad is None or error(a.grad, b.grad) <= 1e-5
    finally:
        torch.distributed.destroy_process_group()


def _gradients(model: nn.Module, x: Tensor, width: int = 6) -> dict[str, Tensor]:
    """Of a loss that is not symmetric, by the tensors' original names, and of the input."""
    x = x.clone().requires_grad_()
    output = model(x).movedim(1, -1)
    (output * torch.linspace(-1, 2, width, dtype=x.dtype)).square().sum().backward()
    names = {
        name.replace("parametrizations.", "").removesuffix(".original"): p.grad
        for name, p in model.named_parameters()
    }
    return {"input": x.grad, **{n: g for n, g in names.items() if g is not None}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_training_gradients_are_those_of_eval_mode(
    mode: Mode, dtype: torch.dtype, bound: float
) -> None:
    model = randomise(Residual()).double()
    expected = _gradients(copy.deepcopy(model).eval(), X.double())
    frozen = ns.freeze(model.to(dtype), X.to(dtype), mode=mode)
    actual = _gradients(frozen.train(), X.to(dtype))
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        assert error(gradient.double(), expected[name]) <= bound, name


def test_tune_mode_moves_the_affines_and_gives_no_trainable_parameter() -> None:
    model = randomise(Residual())
    tuned = ns.freeze(model, X, mode="tune")
    carried = {n.split(".parametrizations")[0] for n in tuned.state_dict() if "parametriz" in n}
    assert carried == {"first.conv", "conv", "shortcut.0", "fc"}
    trainable = [p.numel() for p in tuned.parameters() if p.requires_grad]
    assert sum(trainable) == sum(p.numel() for p in model.parameters())


def test_tune_mode_steps_equal_eval_mode_steps() -> None:
    model = randomise(Residual())
    outputs = []
    for mode in MODES:
        frozen = ns.freeze(model, X, mode=mode).train()
        optimizer = torch.optim.SGD(frozen.parameters(), lr=1e-3, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            frozen(X).square().sum().backward()
            optimizer.step()
        outputs.append(in_eval(ns.unfreeze(frozen), X))
    assert error(outputs[1], outputs[0]) <= 1e-5
    assert error(outputs[0], in_eval(model, X)) > 1e-3  # the steps did something


class Between(nn.Module):
    """A conv and a BatchNorm, with something between them that is active in training."""

    def __init__(self, between: Callable[["Between", Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.between(self, self.conv(x))).mean((2, 3))


class StochasticDepth(nn.Module):
    """Drops whole samples in training; in eval mode no trace of it is in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.5)) if self.training else x


def _auxiliary(model: Between, x: Tensor) -> Tensor:
    if model.training:
        model.loss = x.square().sum()
    return x


@pytest.mark.parametrize(
    "between",
    [
        lambda m, x: F.dropout(x, 0.5, m.training),
        lambda m, x: F.dropout2d(x, 0.5, m.training),
        lambda m, x: StochasticDepth().train(m.training)(x),
        lambda m, x: x + torch.ones(6, 1, 1) if m.training else x,
        lambda m, x: x if m.training else 2 * x,
        lambda m, x: x.detach(),
        _auxiliary,
    ],
    ids=["dropout", "dropout2d", "depth", "train only", "eval only", "detach", "auxiliary"],
)
def test_what_acts_in_training_is_not_moved_through(
    between: Callable[[Between, Tensor], Tensor],
) -> None:
    model = randomise(Between(between))
    plan = ns.plan(model, Freeze("tune"), inputs=X)
    assert not any(edit.edit == "fold_into_tensor" for edit in plan.edits)
    assert [edit.edit for edit in plan.edits] == ["freeze"]
    assert plan.edits[0].reason

    def run(frozen: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return _gradients(frozen, X)

    reference = copy.deepcopy(model).train()
    reference.bn.eval()
    expected, actual = run(reference), run(plan.apply(model).train())
    assert expected.keys() == actual.keys()
    assert all(error(actual[name], expected[name]) <= 1e-6 for name in expected if "conv" in name)


@pytest.mark.parametrize("with_inputs", [True, False])
def test_dropout_module_is_not_moved_through_in_tune_mode(with_inputs: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout(0.5), nn.BatchNorm2d(6))
    plan = ns.plan(model, Freeze("tune"), inputs=X if with_inputs else None)
    assert [edit.edit for edit in plan.edits] == ["freeze"]


@pytest.mark.parametrize("mode", MODES)
def test_unfreeze_restores_classes_keys_flags_and_function(mode: Mode) -> None:
    model = randomise(Residual()).train()
    model.conv.weight.requires_grad_(False)
    model.bn.bias.requires_grad_(False)
    back = ns.unfreeze(ns.freeze(model, X, mode=mode))
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in back.state_dict().items())
    assert [p.requires_grad for p in back.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert {m.training for m in back.modules()} == {True}
    before = _statistics(back)
    assert torch.equal(back(X), copy.deepcopy(model)(X))
    assert not _same(_statistics(back), before)  # it trains again


def test_unfreeze_keeps_what_was_learnt() -> None:
    tuned = ns.freeze(randomise(Residual()), X, mode="tune").train()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert error(in_eval(ns.unfreeze(tuned), X), in_eval(tuned, X)) <= 1e-5


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("second", MODES)
def test_freezing_twice_is_freezing_once(first: Mode, second: Mode) -> None:
    model = randomise(Residual())
    once = ns.freeze(model, X, mode=first)
    twice = ns.freeze(once, X, mode=second)
    assert error(twice.train()(X), in_eval(model, X)) <= 1e-5
    if first == second:
        assert not ns.plan(once, Freeze(second), inputs=X).edits
    back = ns.unfreeze(twice)
    assert list(back.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
def test_frozen_model_compiles_and_exports(mode: Mode, training: bool) -> None:
    model = randomise(Residual())
    expected = in_eval(model, X)
    frozen = ns.freeze(model, X, mode=mode).train(training)
    torch._dynamo.reset()
    assert error(torch.compile(frozen, backend="eager", fullgraph=True)(X), expected) <= 1e-5
    assert error(torch.export.export(frozen, (X,)).module()(X), expected) <= 1e-5


def test_freeze_leaves_the_original_alone_and_inplace_does_not_copy() -> None:
    model = randomise(Residual())
    classes, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    for mode in MODES:
        assert ns.freeze(model, X, mode=mode) is not model
    assert [type(m) for m in model.modules()] == classes
    assert _same(dict(model.state_dict()), dict(state))
    assert ns.freeze(model, X, mode="tune", inplace=True) is model
    assert ns.unfreeze(model, inplace=True) is model
    assert _same(dict(model.state_dict()), dict(state))


def test_batch_norm_without_statistics_is_left_and_the_rest_is_frozen() -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(6)
        )
    )
    plan = ns.plan(model, Freeze(), inputs=X)
    assert plan.changed == ("2",)
    assert "no running statistics" in plan.left[0].reason


def test_tune_mode_without_inputs_is_what_a_trace_shows() -> None:
    model = randomise(Residual())
    tuned = ns.freeze(model, mode="tune")
    assert error(tuned.train()(X), in_eval(model, X)) <= 1e-5
    assert "parametrizations.weight.original" in "".join(tuned.state_dict())


def test_sync_batch_norm_and_parametrized_norms_freeze() -> None:
    model = randomise(nn.SyncBatchNorm.convert_sync_batchnorm(Residual()))
    for mode in MODES:
        assert error(ns.freeze(model, X, mode=mode).train()(X), in_eval(model, X)) <= 1e-5
    normed = randomise(ConvBN(3, 6))
    parametrizations.weight_norm(normed.conv)
    for mode in MODES:
        tuned = ns.freeze(normed, X, mode=mode).train()
        assert error(tuned(X), in_eval(normed, X)) <= 1e-5
        back = ns.unfreeze(tuned)
        assert list(back.state_dict()) == list(normed.state_dict())


def test_frozen_batch_norm_of_torchvision_tunes_and_thaws() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    model = nn.Sequential(nn.Conv2d(3, 6, 3), FrozenBatchNorm2d(6))
    randomise(model)
    tuned = ns.freeze(model, X, mode="tune")
    assert error(in_eval(tuned, X), in_eval(model, X)) <= 1e-5
    assert [type(m) for m in ns.unfreeze(tuned).modules()] == [type(m) for m in model.modules()]
    folded = ns.fold(model, X)
    assert error(in_eval(folded, X), in_eval(model, X)) <= 1e-5
    assert isinstance(folded[1], nn.Identity)


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(ns.NormswapError, match="'eval' or 'tune'"):
        ns.freeze(Residual(), mode="deploy")  # type: ignore[arg-type]


def test_bake_after_tune_mode_is_a_fold() -> None:
    model = randomise(Residual())
    baked = ns.bake(ns.freeze(model, X, mode="tune"))
    folded = ns.fold(model, X)
    assert batch_norms(baked) == ["after"]
    kept = [name for name in baked.state_dict() if not name.startswith("after.")]
    assert kept == [name for name in folded.state_dict() if not name.startswith("after.")]
    assert error(in_eval(baked, X), in_eval(model, X)) <= 1e-5


def test_unfreeze_takes_its_own_affine_off_a_weight_parametrized_since() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    tuned = ns.freeze(randomise(ConvBN(3, 6)), X, mode="tune")
    nn.utils.parametrize.register_parametrization(tuned.conv, "weight", Doubled())
    assert error(in_eval(ns.unfreeze(tuned), X), in_eval(tuned, X)) <= 1e-5


class Split(nn.BatchNorm2d):
    """Keeps the statistics of two halves of the batch, and gathers them when it leaves training."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("running_mean", torch.randn(2 * channels))
        self.register_buffer("running_var", torch.rand(2 * channels) + 0.5)
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> "Split":
        if self.training and not mode:
            for name in ("running_mean", "running_var"):
                setattr(self, name, getattr(self, name).view(2, -1).mean(0).repeat(2))
        super().train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        count = self.num_features
        mean, var = self.running_mean[:count], self.running_var[:count]
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_subclass_leaves_training_by_its_own_train(mode: Mode, inside: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Split(6)) if inside else Split(3)
    model.train()
    frozen = ns.freeze(model, X, mode=mode)
    expected = copy.deepcopy(model).eval()(X)
    assert error(frozen(X), expected) <= 1e-6
    split = frozen[1] if inside else frozen
    assert split.drop.training  # what is not a statistic stays in training
    assert (model[1] if inside else model).training


@pytest.mark.parametrize("amount", ["conv and norm", "norm twice", "linear"])
def test_tune_mode_uses_the_masked_gain_of_the_step_itself(amount: str) -> None:
    """torch.nn.utils.prune computes it in a hook of the BatchNorm, which runs after the weight."""
    model = randomise(Residual()).double()
    if "conv" in amount:
        prune.random_unstructured(model.conv, "weight", 0.3)
        prune.l1_unstructured(model.conv, "bias", 0.3)
    if "norm" in amount:
        prune.random_unstructured(model.first.bn, "weight", 0.3)
        prune.random_unstructured(model.bn, "bias", 0.3)
    if "twice" in amount:
        prune.l1_unstructured(model.first.bn, "weight", 0.4)
    if amount == "linear":
        prune.random_unstructured(model.fc, "weight", 0.3)
    x = X.double()
    trained = []
    for mode in MODES:
        frozen = ns.freeze(model, x, mode=mode).train()
        optimizer = torch.optim.SGD(frozen.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            frozen(x).square().mean().backward()
            optimizer.step()
        trained.append(frozen)
    expected = trained[0](x)
    assert error(trained[1](x), expected) <= 1e-10
    for back in (ns.unfreeze(trained[1]), ns.bake(trained[1]), copied(trained[1])):
        assert error(in_eval(back, x), expected) <= 1e-10


class Softplus(nn.BatchNorm2d):
    """A gain that its own hook computes from another parameter."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.weight
        self.raw = nn.Parameter(torch.randn(channels))
        self.weight = F.softplus(self.raw).detach()
        self.register_forward_pre_hook(
            lambda norm, _: setattr(norm, "weight", F.softplus(norm.raw))
        )


def test_a_gain_that_an_unknown_hook_computes_stays_where_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Softplus(6)).double()
    plan = ns.plan(model, Freeze("tune"), inputs=X.double())
    assert [edit.edit for edit in plan.edits] == ["freeze"]
    assert "its weight is set by a hook" in plan.edits[0].reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_of_a_tuned_model_has_a_gradient(dtype: torch.dtype) -> None:
    model = randomise(nn.Sequential(ConvBN(3, 6), ConvBN(6, 4))).to(dtype)
    tuned = ns.freeze(model, X.to(dtype), mode="tune").train()
    assert {p.requires_grad for p in tuned.parameters()} == {True}
    gradients = torch.autograd.grad(tuned(X.to(dtype)).float().sum(), [*tuned.parameters()])
    assert len(gradients) == len([*model.parameters()])
    assert any(name.endswith("bias.original") for name, _ in tuned.named_buffers())
    back = ns.unfreeze(tuned)
    assert [name for name, _ in back.named_parameters()] == [n for n, _ in model.named_parameters()]
    for gone in (ns.bake(tuned), ns.fold(model, X.to(dtype))):
        assert isinstance(gone[0].conv.bias, nn.Parameter)
        assert gone[0].conv.bias.requires_grad


class SavesByName(nn.Linear):
    """As torch_geometric's Linear."""

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        for name in ("weight", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()


@pytest.mark.parametrize("bias", [True, False])
def test_a_tuned_state_dict_loads_strictly(bias: bool) -> None:
    def build(seed: int) -> nn.Module:
        return randomise(nn.Sequential(SavesByName(5, 4, bias=bias), nn.BatchNorm1d(4)), seed)

    x = torch.randn(6, 5)
    first, second = (ns.freeze(build(seed), x, mode="tune") for seed in (0, 1))
    second.load_state_dict(copy.deepcopy(first).state_dict())
    assert error(second(x), first(x)) <= 1e-6
    thawed = ns.unfreeze(first)
    assert list(thawed.state_dict()) == list(build(0).state_dict())
    build(1).load_state_dict(thawed.state_dict())


class Checkpointed(nn.Module):
    """Two residual blocks, of which backward computes the activations again."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(ConvBN(4, 4), nn.Dropout(0.0), ConvBN(4, 4))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).tanh()
        return self.run(self.blocks, x) if self.training else self.blocks(x)


def _around(blocks: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(lambda x: blocks(x) + x, x, use_reentrant=True) - x


@pytest.mark.parametrize(
    "run",
    [
        lambda blocks, x: checkpoint(blocks, x, use_reentrant=True),
        lambda blocks, x: checkpoint(blocks, x, use_reentrant=False),
        lambda blocks, x: checkpoint(blocks, input=x, use_reentrant=False),
        lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=True),
        lambda blocks, x: checkpoint_sequential(blocks, 2, x, use_reentrant=False),
        _around,
    ],
    ids=["reentrant", "not reentrant", "keyword", "sequential", "sequential, not", "function"],
)
def test_tune_mode_reaches_what_is_checkpointed(run: Callable[..., Tensor]) -> None:
    model, x = randomise(Checkpointed(run)).double(), X.double()
    plan = ns.plan(model, Freeze("tune"), inputs=x)
    assert {edit.site for edit in plan.edits if edit.edit == "fold_into_tensor"} == set(
        plan.changed
    )
    assert len(plan.changed) == 3
    tuned = plan.apply(model).train()
    expected = _gradients(copy.deepcopy(model).eval(), x, width=4)
    actual = _gradients(tuned, x, width=4)
    assert actual.keys() == expected.keys()
    assert max(error(actual[name], expected[name]) for name in expected) <= 1e-10


class Shared(nn.Module):
    """Two BatchNorms on what one convolution gives in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv(x)) * self.bn2(self.conv(x + 1)).relu()
        return (first + self.bn1(self.conv(x - 1)).relu() + self.bn2(self.conv(2 * x))).mean((2, 3))


def test_batch_norms_that_share_a_convolution_are_frozen_with_the_reason() -> None:
    """Its weight can carry one affine only, in all of its calls."""
    model, x = randomise(Shared()).double(), X.double()
    plan = ns.plan(model, Freeze("tune"), inputs=x)
    assert [edit.edit for edit in plan.edits] == ["freeze", "freeze"]
    assert all("conv" in edit.reason for edit in plan.edits)
    expected, actual = (
        _gradients(each, x) for each in (copy.deepcopy(model).eval(), plan.apply(model).train())
    )
    assert max(error(actual[name], expected[name]) for name in expected) <= 1e-10


def test_a_whole_frozen_model_scripts_saves_and_loads_in_another_process(tmp_path: Path) -> None:
    model = randomise(Residual())
    expected, frozen = in_eval(model, X), ns.freeze(model)
    scripted = torch.jit.script(frozen)
    assert error(scripted.train()(X), expected) <= 1e-6
    torch.jit.save(scripted, tmp_path / "scripted.pt")
    assert error(torch.jit.load(tmp_path / "scripted.pt").train()(X), expected) <= 1e-6
    torch.save(nn.Sequential(frozen.bn), tmp_path / "whole.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False).train();"
        "import normswap as ns; print(type(m[0]).__name__, m[0].training, type(ns.unfreeze(m)[0]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "whole.pt")], capture_output=True, text=True
    )
    assert ran.stdout.split()[:2] == ["FrozenBatchNorm2d", "False"], ran.stderr
    assert "torch.nn.modules.batchnorm.BatchNorm2d" in ran.stdout
    torch.save(frozen, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=False)
    assert torch.equal(loaded.train()(X), frozen.train()(X))


def test_tune_mode_saves_by_state_dict_and_whole_once_it_is_baked() -> None:
    tuned = ns.freeze(randomise(Residual()), X, mode="tune").train()
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(tuned)
    assert torch.equal(pickle.loads(pickle.dumps(ns.bake(tuned)))(X), ns.bake(tuned)(X))
