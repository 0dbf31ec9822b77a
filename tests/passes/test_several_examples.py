"""What one example does not show is not touched; a list of examples holds for all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normswap as ns
from normswap.passes import Fold
from tests.networks import batch_norms, error, in_eval, randomise

X = torch.randn(2, 3, 9, 9, dtype=torch.float64)
SMALL = torch.randn(2, 3, 5, 5, dtype=torch.float64)


class Domains(nn.Module):
    """One convolution, a BatchNorm for each domain; subclasses choose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.conv = nn.Conv2d(3, 4, 3)
        self.bns = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.by_name = nn.ModuleDict({"a": self.bns[0], "b": self.bns[1]})
        self.domain = 0


class ByNumber(Domains):
    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.bns[domain](self.conv(self.stem(x)))


class ByName(Domains):
    def forward(self, x: Tensor, domain: str = "a") -> Tensor:
        return self.by_name[domain](self.conv(self.stem(x)))


class ByFlag(Domains):
    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bns[1](y) if second else self.bns[0](y)


class ByMask(Domains):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(self.stem(x))
        if mask is not None:
            y = y * mask
        return self.bns[0](y) + self.bns[1](y)


class BySize(Domains):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        return self.bns[0](y) if x.shape[-1] > 6 else self.bns[1](y)


class Features(Domains):
    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        features = self.conv(self.stem(x))
        y = self.bns[1](self.bns[0](features))
        return (y, features) if return_features else y


class PartByFlag(Domains):
    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        y = self.bns[0](self.conv(self.stem(x)))
        y = self.bns[1](y) if second else y
        return self.last(y[:, 1:])

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())


class SlicedByFlag(PartByFlag):
    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        y = self.bns[0](self.conv(self.stem(x)))
        return self.last[:1]((self.bns[1](y) if second else y)[:, 1:])


class ComputedNumber(Domains):
    def forward(self, x: Tensor, domain: int = 0) -> Tensor:
        return self.bns[int(domain)](self.conv(self.stem(x)))


class ByAttribute(Domains):
    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](self.conv(self.stem(x)))


CASES: dict[type[nn.Module], list[Any]] = {
    ByNumber: [(X, 0), (X, 1)],
    ByName: [(X, "a"), (X, "b")],
    ByFlag: [(X, False), (X, True)],
    ByMask: [{"x": X}, {"x": X, "mask": torch.rand(2, 1, 7, 7, dtype=torch.float64)}],
    BySize: [X, SMALL],
    Features: [(X,), (X, True)],
    PartByFlag: [(X, False), (X, True)],
    SlicedByFlag: [(X, True), (X, False)],
    ComputedNumber: [(X, 0), (X, 1)],
}


def outputs(model: nn.Module, example: Any) -> tuple[Tensor, ...]:
    if isinstance(example, dict):
        found = model(**example)
    else:
        found = model(*example) if isinstance(example, tuple) else model(example)
    return found if isinstance(found, tuple) else (found,)


def same(changed: nn.Module, model: nn.Module, examples: list[Any]) -> None:
    for example in examples:
        for a, b in zip(outputs(changed, example), outputs(model, example), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def made(cls: type[nn.Module]) -> nn.Module:
    return randomise(cls()).double().eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", CASES)
@pytest.mark.parametrize("mode", ["fold", "tune"])
@pytest.mark.parametrize("shown", [0, None])
def test_what_is_folded_for_some_examples_is_right_for_all(
    cls: type[nn.Module], mode: str, shown: int | None
) -> None:
    model, examples = made(cls), CASES[cls]
    inputs = examples if shown is None else examples[shown]
    changed = (
        ns.fold(model, inputs) if mode == "fold" else ns.freeze(model, inputs, mode="tune").eval()
    )
    same(changed, model, examples)
    if mode == "fold":  # what only one path leads to is folded all the same
        assert isinstance(changed.stem[1], nn.Identity)


@pytest.mark.filterwarnings("ignore")
def test_an_attribute_that_chooses_may_be_changed_afterwards() -> None:
    model = made(ByAttribute)
    folded = ns.fold(model, X)
    for domain in range(2):
        model.domain = folded.domain = domain
        torch.testing.assert_close(folded(X), model(X), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [ByNumber, Features])
def test_assume_example_folds_what_the_example_shows(cls: type[nn.Module]) -> None:
    model = made(cls)
    folded = ns.fold(model, X, assume_example=True)
    assert isinstance(folded.bns[0], nn.Identity)
    same(folded, model, [X])


def test_the_reason_names_what_the_example_does_not_show() -> None:
    class OneMasked(ByMask):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            y = self.conv(self.stem(x))
            if mask is not None:
                y = y * mask
            return self.bns[0](y)

        def __init__(self) -> None:
            super().__init__()
            self.bns, self.by_name = nn.ModuleList([nn.BatchNorm2d(4)]), None

    model: type[nn.Module] = OneMasked
    for cls, reason in {
        ByFlag: "bns.1, which the example does not call, may take conv",
        ByNumber: "bns.1, which the example does not call, may take conv",
        ComputedNumber: "may choose by an argument where it is called",
        model: "decides by arguments, sizes or attributes what takes conv",
    }.items():
        plan = ns.plan(made(cls), Fold(), inputs=X)
        (edit,) = [
            e for e in plan.edits if e.site == "bns.0" and e.edit == "reduce" and e.to == "affine"
        ]
        assert reason in edit.reason
        assert "assume_example=True" in edit.reason


def test_an_auxiliary_head_does_not_stop_the_trunk() -> None:
    class WithHead(Domains):
        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.head(y) if self.training else y

    model = WithHead()
    model.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    plan = ns.plan(model.eval(), Fold(), inputs=X.float())
    assert "stem.1" in [edit.site for edit in plan.edits if edit.effect == "removes"]


def test_two_sizes_are_two_examples() -> None:
    model = made(ByNumber)
    folded = ns.fold(model, [(X, 0), (SMALL, 0), (X, 1)])
    same(folded, model, [(X, 0), (SMALL, 0), (X, 1), (SMALL, 1)])


def test_an_empty_list_of_examples_is_refused() -> None:
    with pytest.raises(ns.NormswapError, match="list of example inputs is empty"):
        ns.fold(made(ByNumber), [])


def test_every_example_is_checked() -> None:
    class Looks(Domains):
        def forward(self, x: Tensor, loud: bool = False) -> Tensor:
            y = self.stem(x)
            return y * 2 if loud and isinstance(self.stem[1], nn.BatchNorm2d) else y

    model = made(Looks)
    quiet = ns.fold(model, (X, False), exclude="bns*")
    assert isinstance(quiet.stem[1], nn.Identity)
    with pytest.raises(ns.NormswapError, match=r"differ by 0\.5"):
        ns.fold(model, [(X, False), (X, True)], exclude="bns*")


class Skips(nn.Module):
    """What the second layer takes depends on an argument."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.conv, self.bn = order, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, mode: str = "a") -> Tensor:
        if self.order == "late":
            return self.last((self.bn(x.relu()) if mode == "a" else x).flip(3))
        y = self.conv(x) if mode == "a" else x.flip(3)
        return self.bn(y).relu()


@pytest.mark.parametrize("order", ["late", "early"])
def test_a_layer_that_takes_another_value_for_another_argument_folds_in_nothing(order: str) -> None:
    torch.manual_seed(0)
    model = randomise(Skips(order).double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for result in (ns.fold(model, x), ns.freeze(model, x, mode="tune")):
        for mode in ("a", "b"):
            assert error(in_eval(result, x, mode), in_eval(model, x, mode)) <= 1e-12
    assert batch_norms(ns.fold(model, x)) == ["bn"]
    assert batch_norms(ns.fold(model, x, assume_example=True)) == []


class Masked(nn.Module):
    """Blocks that are called as one, or one by one with one argument more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop, self.pre = nn.Conv2d(3, 3, 1), nn.Dropout(), nn.Identity()
        self.blocks = nn.Sequential(nn.Identity(), Gated(), Gated())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.pre(self.drop(self.conv(x)))
        if mask is None:
            return self.blocks(x)
        for block in self.blocks[1:]:
            x = block(x, mask)
        return x


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.conv(self.bn(x))
        return y if mask is None else y * mask


def test_an_argument_more_is_no_other_value() -> None:
    torch.manual_seed(0)
    model = randomise(Masked().double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = ns.fold(model, x)
    assert batch_norms(result) == []
    for mask in (None, torch.rand_like(x)):
        assert error(in_eval(result, x, mask), in_eval(model, x, mask)) <= 1e-12


class Configured(nn.Module):
    """What the first convolution's output is for depends on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.flag, self.number, self.name = True, 0, "a"
        self.conv, self.bn, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)


class SkipsByFlag(Configured):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.last((self.bn(y) if self.flag else y).relu())


class SkipsByName(Configured):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.name == "a":
            y = self.bn(y)
        return self.last(y.relu())


class SkipsInAMethod(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.conv(x)).relu())

    def middle(self, y: Tensor) -> Tensor:
        return self.bn(y) if self.number != 1 else y


class ReturnsFeatures(Configured):
    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        z = self.last(self.bn(y).relu())
        return z if self.flag else (z, y)


class ChoosesItsInput(Configured):
    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.bn(x.relu()) if self.flag else x).flip(3))


CHANGED = {"flag": False, "number": 1, "name": "b"}


@pytest.mark.parametrize(
    "cls", [SkipsByFlag, SkipsByName, SkipsInAMethod, ReturnsFeatures, ChoosesItsInput]
)
def test_another_attribute_finds_the_same_values(cls: type[Configured]) -> None:
    torch.manual_seed(0)
    model = randomise(cls().double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for result in (ns.fold(model, x), ns.freeze(model, x, mode="tune")):
        for changed in ({}, CHANGED):
            vars(model).update(changed)
            vars(result).update(changed)
            for mine, theirs in zip(in_eval(result, x), in_eval(model, x), strict=True):
                assert error(mine, theirs) <= 1e-12
        vars(model).update({"flag": True, "number": 0, "name": "a"})
    assert batch_norms(ns.fold(model, x, assume_example=True)) == []


class Patches(Configured):
    """An attribute decides about shapes on the way to the same layers."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x).contiguous() if self.flag else self.conv(x))
        return self.last(y.relu() if self.number == 0 else y.tanh())


def test_an_attribute_that_changes_no_layer_s_input_stops_nothing() -> None:
    torch.manual_seed(0)
    model = randomise(Patches().double()).eval()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    result = ns.fold(model, x)
    assert batch_norms(result) == []
    for changed in ({}, CHANGED):
        vars(model).update(changed)
        vars(result).update(changed)
        assert error(in_eval(result, x), in_eval(model, x)) <= 1e-12


class Block(nn.Module):
    """As many libraries write it: what a flag of the constructor leaves out does not exist."""

    def __init__(self, use_bn: bool = True, norm: str = "bn") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.use_bn = use_bn
        self.norm_type = norm
        if self.use_bn:
            self.bn = nn.BatchNorm2d(4)
        self.second = nn.BatchNorm2d(4) if norm == "bn" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.use_bn:
            y = self.bn(y)
        return self.second(y) if self.norm_type == "bn" else y


def test_a_flag_by_which_a_module_was_built_stops_nothing() -> None:
    model = made(Block)
    folded = ns.fold(model, X)
    same(folded, model, [X])
    assert isinstance(folded.bn, nn.Identity)
    assert isinstance(folded.second, nn.Identity)


def test_stages_that_are_not_called_stop_nothing() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
            self.first = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.last = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            self.depth = 2

        def stages(self) -> list[nn.Module]:
            return [self.stem, self.first, self.last]

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            features = []
            stages = self.stages()
            for i in range(self.depth):
                x = stages[i](x)
                features.append(x)
            return tuple(features)

    model = made(Encoder)
    with pytest.warns(UserWarning, match="1 normalization was left, for example last.1: is never"):
        folded = ns.fold(model, X)
    same(folded, model, [X])
    assert not [m for m in (folded.stem[1], folded.first[1]) if not isinstance(m, nn.Identity)]
