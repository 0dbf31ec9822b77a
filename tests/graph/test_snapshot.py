"""Looking changes nothing, and a mode is what a module's own train() makes of it."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule, create_feature_extractor

import normswap as ns
from normswap.core.modes import flags_kept
from normswap.graph.snapshot import contents_kept, evaluating, untouched


class Writing(nn.Module):
    """conv, bn, and a forward that first writes in the way called `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.bn, self.how = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), how
        self.features: list[Tensor] = []
        self.seen = {"count": [0], "names": set()}
        self.state = SimpleNamespace(steps=0)
        self.meter = Meter()
        self.scale = torch.ones(4)  # neither a parameter nor a buffer
        self.register_buffer("total", torch.zeros(4))
        with torch.no_grad():
            self.conv.weight.mul_(5)
            self.bn.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, f"_{self.how}")()
        return self.bn(self.conv(x))

    def _max_norm(self) -> None:
        self.conv.weight.data = torch.renorm(self.conv.weight.data, 2, 0, 1.0)

    def _clamped(self) -> None:
        self.bn.weight.data.clamp_(0, 1)

    def _view(self) -> None:
        self.conv.weight.data.view(-1)[:5].zero_()

    def _out(self) -> None:
        torch.mul(self.bn.bias.data, 0.5, out=self.bn.weight.data)

    def _foreach(self) -> None:
        torch._foreach_mul_([self.bn.weight.data, self.conv.weight.data], 0.5)

    def _no_grad(self) -> None:
        with torch.no_grad():
            self.conv.weight.mul_(0.9)

    def _copied(self) -> None:
        self.conv.weight.data.copy_(self.conv.weight.data / self.conv.weight.data.norm())

    def _replaced(self) -> None:
        self.conv.weight = nn.Parameter(self.conv.weight.detach() * 0.5)

    def _plain_tensor(self) -> None:
        self.scale.mul_(0.5)

    def _buffer(self) -> None:
        self.total.data = self.total.data.new_ones(7)

    def _flag(self) -> None:
        self.conv.weight.requires_grad_(False)

    def _objects(self) -> None:
        self.features.append(self.conv.weight)
        self.seen["count"][0] += 1
        self.seen["names"].add("bn")
        self.state.steps += 1
        self.meter.updates += 1
        self.meter.history.append(1)


class Meter:
    def __init__(self) -> None:
        self.updates, self.history = 0, [0]


HOW = [name[1:] for name in vars(Writing) if name.startswith("_") and name[1] != "_"]
X = torch.randn(2, 3, 6, 6)


def _all(model: Writing) -> list[Any]:
    return [
        [(name, p, p.clone(), p.data_ptr(), p.requires_grad) for name, p in _tensors(model)],
        len(model.features),
        copy.deepcopy((model.seen, vars(model.state), vars(model.meter))),
    ]


def _tensors(model: Writing) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers(), ("scale", model.scale)]


def _assert_as_before(model: Writing, before: list[Any]) -> None:
    tensors, *others = before
    now, *others_now = _all(model)
    assert others_now == others
    for (name, p, value, memory, flag), (_, q, now_value, now_memory, now_flag) in zip(
        tensors, now, strict=True
    ):
        assert p is q, name
        assert torch.equal(value, now_value), name
        assert (memory, flag) == (now_memory, now_flag), name


@pytest.mark.parametrize("how", HOW)
def test_looking_at_a_model_whose_forward_writes_changes_nothing(how: str) -> None:
    model = Writing(how).eval()
    before = _all(model)
    for inputs in (X, None):
        ns.inspect(model, inputs)
        _assert_as_before(model, before)
    ns.plan(model, ns.Freeze("tune"), inputs=X)
    _assert_as_before(model, before)
    with evaluating(model):
        model(X)
    _assert_as_before(model, before)


def test_an_embedding_with_a_largest_norm_is_as_before() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, max_norm=0.1), nn.BatchNorm1d(4)).eval()
    before = copy.deepcopy(model.state_dict())
    ns.inspect(model, torch.arange(10))
    with evaluating(model):
        model(torch.arange(10))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_only_memory_that_is_written_is_copied() -> None:
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
    with contents_kept(model) as watch:
        model[0](torch.randn(2, 8))
        assert not watch.written
        model[3].weight.data.view(-1)[0] = 7.0
        model[3].weight.data.add_(1)
        assert len(watch._copies) == 1
    assert 7.0 not in model[3].weight and 8.0 not in model[3].weight


def test_a_model_with_control_flow_operators_runs_while_it_is_watched() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    model, x = Chosen(), torch.ones(3)
    with evaluating(model):
        assert torch.equal(model(x), x.sin())


# --- modes ----------------------------------------------------------------------------------------


class Merging(nn.Linear):
    """As loralib's Linear: eval() merges an update into the weight, train() takes it out."""

    merged = False

    def __init__(self, size: int) -> None:
        super().__init__(size, size)
        self.a, self.b = nn.Parameter(torch.randn(2, size)), nn.Parameter(torch.randn(size, 2))

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.b.data @ self.a.data
            self.merged = not mode
        return self

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if self.merged else y + input @ self.a.t() @ self.b.t()


class Heads(nn.Module):
    """train() chooses which forward there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.head = self.a

    def train(self, mode: bool = True) -> "Heads":
        object.__setattr__(self, "used", "a" if mode else "b")
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(getattr(self, self.used)(x))


def _dual() -> fx.GraphModule:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.bn(self.conv(x))
            return {"y": F.dropout(y, training=self.training) + (2 if self.training else 0)}

    net = Net()
    net.bn.running_mean.normal_()
    net.bn.running_var.uniform_(0.5, 2)
    return create_feature_extractor(net, ["bn", "add"]).double()


VERBS = {
    "fold": lambda model, x: ns.fold(model, x),
    "freeze": lambda model, x: ns.freeze(model, x),
    "tune": lambda model, x: ns.freeze(model, x, mode="tune"),
    "unfreeze": lambda model, x: ns.unfreeze(ns.freeze(model, x)),
    "convert": lambda model, x: ns.convert(model, "batch_renorm", inputs=x),
    "bake": lambda model, x: ns.bake(ns.parametrize(model, "weight_norm")),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("verb", VERBS)
def test_a_feature_extractor_keeps_its_mode_and_the_graph_of_it(verb: str, training: bool) -> None:
    model, x = _dual().train(training), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    result = VERBS[verb](model, x)
    for each in (model, result):
        assert isinstance(each, DualGraphModule) and each.training is training
        assert each.graph is (each.train_graph if training else each.eval_graph)
        assert all(m.training is training for m in each.modules() if isinstance(m, nn.Conv2d))
    model.eval()
    result.eval()
    assert " + 0" in result.code and " + 2" not in result.code
    for name, value in model(x).items():
        torch.testing.assert_close(result(x)[name], value, rtol=1e-10, atol=1e-12)


def test_a_feature_extractor_in_training_mode_is_captured_in_eval_mode() -> None:
    from normswap.graph.capture import capture

    model = _dual().train()
    code = model.code
    seen = capture(model, X.double())
    graph = str(seen.regions[0].graph)
    assert "0.5, False)" in graph and "0.5, True)" not in graph
    assert model.code == code and model.graph is model.train_graph
    torch.manual_seed(0)
    before = model(X.double())["add"]
    torch.manual_seed(0)
    assert torch.equal(type(model).forward(model, X.double())["add"], before)


def test_a_model_that_switches_in_train_is_seen_in_eval_mode() -> None:
    model, x = Heads().double().train(), torch.randn(3, 4, dtype=torch.float64)
    result = ns.fold(model, x)
    assert model.used == result.used == "a" and result.training
    torch.testing.assert_close(result.eval()(x), model.eval()(x), rtol=1e-10, atol=1e-12)


def test_weights_that_a_train_of_its_own_merges_are_given_back() -> None:
    model = nn.Sequential(Merging(4), nn.BatchNorm1d(4)).train()
    before = copy.deepcopy(model.state_dict())
    ns.inspect(model, torch.randn(3, 4))
    with evaluating(model):
        model(torch.randn(3, 4))
    assert not model[0].merged and model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_flags_that_are_kept_are_set_back_by_the_module_itself() -> None:
    model = _dual().eval()
    with flags_kept(model):
        model.train()
    assert not model.training and model.graph is model.eval_graph


def test_a_train_that_refuses_leaves_the_flags() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.ones(2, 4),))
    model = nn.Sequential(program.module())
    with untouched(model, training=False):
        assert not any(module.training for module in model.modules())
