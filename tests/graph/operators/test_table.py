"""What the rows say of an operator beside its rule, held against torch."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import CASES, RULES, Value, cases
from torch import Tensor, fx, nn
from torch._ops import OpOverload

import normswap
from normswap.graph.operators.operator import MOVES, TABLE, is_a, reads_numbers

aten = torch.ops.aten
EACH = pytest.mark.parametrize("target", list(CASES), ids=str)
few = settings(max_examples=4, deadline=None, derandomize=True)
PACKAGE = Path(normswap.__file__).parent


def numbers(leaf: Any) -> Tensor:
    return leaf.sample() if isinstance(leaf, Value) else leaf.tensor


def memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


@EACH
@few
@given(data=st.data())
def test_what_may_return_its_input_says_so(target: Any, data: st.DataObject) -> None:
    case = data.draw(cases(target))
    given = {leaf: leaf.sample() for leaf in case.leaves() if isinstance(leaf, Value)}
    output = case.run(lambda leaf: given.get(leaf, getattr(leaf, "tensor", None)))
    shares = {memory(each) for each in given.values()}
    called = case.inner or target
    if memory(output) in shares:
        declared = any(each.alias_info is not None for each in called._schema.returns)
        assert declared or TABLE[called].may_alias


@EACH
@few
@given(data=st.data())
def test_what_moves_integers_is_said_of_it(target: Any, data: st.DataObject) -> None:
    row = TABLE[target]
    if row.kind not in (*MOVES, "same") or row.floating:
        return
    case = data.draw(cases(target))

    def integers(leaf: Any) -> Tensor:
        if isinstance(leaf, Value):
            return torch.randint(0, 9, leaf.shape, dtype=torch.uint8)
        return leaf.tensor

    if "dropout" in row.name or "dtype" in repr(case) or target in (aten.to.dtype, aten.to.device):
        return  # these are given a floating-point dtype in the case, or refuse integers in training
    output = case.run(integers)
    assert output.dtype == torch.uint8 or row.name == "pad"


LOOKS: dict[Any, tuple[Any, ...]] = {
    aten.zeros_like.default: (),
    aten.ones_like.default: (),
    aten.full_like.default: (3.0,),
    aten.new_zeros.default: ([2],),
    aten.new_ones.default: ([2],),
    aten.new_full.default: ([2], 3.0),
    aten.expand_as.default: (),
    aten.view_as.default: (),
    aten.reshape_as.default: (),
    aten.type_as.default: (),
}


@pytest.mark.parametrize("target", list(LOOKS), ids=str)
def test_what_does_not_read_numbers_computes_the_same_of_others(target: Any) -> None:
    x, y, first = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    shaped = TABLE[target].looks_at is not None
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    node = graph.call_function(target, (a, b) if shaped else (b, *LOOKS[target]))
    assert not reads_numbers(node, b)
    of = [target(first, each) if shaped else target(each, *LOOKS[target]) for each in (x, y)]
    assert torch.equal(*of)
    if shaped:
        assert reads_numbers(node, a)


def test_what_fills_fills_with_that() -> None:
    like = torch.randn(2, 3)
    filling = {t: row.fills for t, row in TABLE.items() if row.fills is not None}
    assert len(filling) >= 6
    for target, number in filling.items():
        first = {"zeros": ([2],), "ones": ([2],)}.get(TABLE[target].name, (like,))
        shape = ([2],) if TABLE[target].name.startswith("new_") else ()
        assert (target(*first, *shape) == number).all()


FORWARDS = {
    "add": lambda x, y: (x + y, torch.add(x, y), x.add(y), x.add_(y)),
    "sub": lambda x, y: (x - y, torch.sub(x, y), x.sub(y), torch.rsub(y, x)),
    "mul": lambda x, y: (x * y, torch.mul(x, y), x.mul(y), x.mul_(y)),
    "div": lambda x, y: (x / y, torch.div(x, y), x.div(y), x.div_(y)),
    "neg": lambda x, y: (-x, torch.neg(x), x.neg(), x.neg_()),
}


@pytest.mark.parametrize("name", list(FORWARDS))
def test_the_ways_to_write_arithmetic_are_one_operator(name: str) -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return FORWARDS[name](x, y)

    traced = fx.symbolic_trace(Written()).graph
    written = [TABLE[n.target].name for n in traced.nodes if n.op.startswith("call")]
    x = torch.randn(3)
    seen = torch.export.export(Written(), (x, x + 1)).graph
    ran = [TABLE[n.target].name for n in seen.nodes if n.op == "call_function"]
    assert written == ran == [name] * 4


@pytest.mark.parametrize("target", [t for t in CASES if TABLE[t].along], ids=str)
@few
@given(data=st.data())
def test_what_works_along_one_axis_keeps_the_others(target: Any, data: st.DataObject) -> None:
    case = data.draw(cases(target))
    first = next(leaf for leaf in case.leaves() if isinstance(leaf, Value))
    shape = case.run(numbers).shape
    changed = {axis for axis, (a, b) in enumerate(zip(first.shape, shape, strict=True)) if a != b}
    assert len(changed) <= 1


def test_every_row_is_torchs_or_pythons() -> None:
    for target in TABLE:
        assert isinstance(target, (OpOverload, str)) or callable(target)
        if isinstance(target, str) and "." not in target:  # or of a package, by its name
            assert callable(getattr(Tensor, target))


def named_outside(path: Path) -> list[str]:
    """Where a file names an ATen operator other than to call it."""
    tree = ast.parse(path.read_text())
    called = {
        id(each)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for each in ast.walk(node.func)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and id(node) not in called:
            text = ast.unparse(node)
            if text.startswith(("torch.ops.aten.", "aten.", "ops.aten.")):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {text}")
    return found


def test_no_operator_is_named_outside_the_table() -> None:
    """Calling one, as a method's kernel does, is no list of what operators do."""
    assert named_outside(PACKAGE / "graph" / "operators" / "pointwise.py")
    files = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE / "graph" / "operators"]
    assert len(files) > 100
    named = [line for path in files for line in named_outside(path)]
    # Kernels of methods, and how torch works out the shapes of one while it captures.
    allowed = ("norms/", "graph/exporting.py")
    assert [line for line in named if not line.startswith(allowed)] == []


def test_a_value_of_an_unknown_operator_is_read() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.cumsum.default, (x, 0))
    assert reads_numbers(node, x) and not is_a(node, "move")
    assert aten.cumsum.default not in RULES


def test_kinds_hold_of_every_case() -> None:
    """What keeps all elements, keeps them: reshapes in order, permutations by axes."""
    for target in CASES:
        if TABLE[target].kind not in ("reshape", "permute"):
            continue

        @few
        @given(case=cases(target))
        def check(case: Any) -> None:
            leaves = [leaf for leaf in case.leaves() if isinstance(leaf, Value)]
            x = torch.arange(float(torch.Size(leaves[0].shape).numel())).view(leaves[0].shape)
            given = {leaf: x if leaf is leaves[0] else numbers(leaf) for leaf in leaves}
            output = case.run(lambda leaf: given[leaf])
            if TABLE[case.target].kind == "reshape":
                assert torch.equal(output.flatten(), x.flatten())
            else:
                assert torch.equal(output.flatten().sort().values, x.flatten())
                assert sorted(output.shape) == sorted(x.shape)

        check()
