"""Values that are linear in another value, read from a captured graph as trees of operators.

Convs and Linears, sums, products with constants and BatchNorms in eval mode make one linear value
of others. What something else uses as well is not looked into: that value must stay what it is.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from normswap.graph.aliases import AliasAnalysis
from normswap.graph.index import Region
from normswap.graph.operators import is_a
from normswap.graph.operators.operator import rule_of, sources_of
from normswap.graph.operators.pointwise import Product, Sum, is_same
from normswap.graph.operators.rule import argument, mutates, shape_of
from normswap.graph.operators.weights import is_transposed
from normswap.graph.sites import Call, NormSite

BranchKind = Literal["weighted", "norm", "sum", "scale", "same", "source"]


@dataclass(frozen=True, eq=False)
class Linear:
    """A value that is linear in another, but for a constant, and the operator that computes it.

    Attributes:
        node: the value.
        kind: the operator: a conv or Linear, a BatchNorm, a sum, a product with a constant, one
            that changes nothing; "source" where the value itself is as far as it goes.
        source: what it is linear in; None where its parts are linear in several.
        parts: what the operator computes it from; none for a conv and a source.
        norm: the BatchNorm and this call of it.
    """

    node: fx.Node
    kind: BranchKind
    source: fx.Node | None
    parts: tuple["Part", ...] = ()
    norm: tuple[NormSite, Call] | None = None

    @property
    def nodes(self) -> frozenset[fx.Node]:
        """The nodes of the operator."""
        if self.norm is not None:
            return self.norm[1].nodes
        return frozenset() if self.kind == "source" else frozenset({self.node})

    def tree(self) -> Iterator["Linear"]:
        """This value and all that it is computed from, down to the source."""
        yield self
        for part in self.parts:
            yield from part.value.tree()

    def leaves(self) -> list["Linear"]:
        """The convs, Linears and sources at the end of the tree."""
        return [value for value in self.tree() if not value.parts]


@dataclass(frozen=True, eq=False)
class Part:
    """An operand of an operator, and what it is multiplied with.

    Attributes:
        position: of the operand among the operator's arguments.
        factor: a number.
        constant: and a tensor that depends on parameters alone.
    """

    value: Linear
    position: int = 0
    factor: float = 1.0
    constant: fx.Node | None = None


class Reader:
    """Reads the values of one graph as linear ones.

    Args:
        norms: the calls of norms that are an affine per channel, by their output.
    """

    def __init__(
        self,
        region: Region,
        aliases: AliasAnalysis,
        norms: dict[fx.Node, tuple[NormSite, Call]],
    ) -> None:
        self._region, self._norms = region, norms
        self._constants = _constants(region, aliases.written)

    def roots(self) -> Iterator[Linear]:
        """The values that no other linear operator alone uses, in reverse order of execution."""
        done: set[fx.Node] = set()
        for node in reversed(self._region.graph.nodes):
            if node not in done:
                root = self._read(node)
                done |= {each for value in root.tree() for each in value.nodes}
                yield root

    def _read(self, node: fx.Node) -> Linear:
        value = node.meta.get("val")
        single = isinstance(value, torch.Tensor) and not value.is_complex()
        if not single or node.op != "call_function":  # of several values a getitem takes one
            return Linear(node, "source", node)
        if node in self._norms:
            site, call = self._norms[node]
            assert call.input is not None
            return self._combined(
                node, "norm", [self._operand(call.input, call.nodes)], (site, call)
            )
        if is_a(node, "convolution", "linear") and not is_transposed(node):
            return Linear(node, "weighted", _unchanged(argument(node, "input")))
        if is_same(node):
            (source,) = sources_of(node)
            return self._combined(node, "same", [self._operand(source, {node})])
        terms = self._terms(node)
        if not terms:
            return Linear(node, "source", node)
        kind: BranchKind = "sum" if len(terms) > 1 else "scale"
        return self._combined(node, kind, terms)

    def _combined(
        self,
        node: fx.Node,
        kind: BranchKind,
        parts: list[Part],
        norm: tuple[NormSite, Call] | None = None,
    ) -> Linear:
        if any(_type(part.value.node) != _type(node) for part in parts):
            return Linear(node, "source", node)  # an operand is broadcast or cast
        sources = {part.value.source for part in parts}
        source = sources.pop() if len(sources) == 1 else None
        return Linear(node, kind, source, tuple(parts), norm)

    def _operand(self, node: fx.Node, by: Any, position: int = 0, factor: float = 1.0) -> Part:
        """An operand, read on if the operator with the nodes `by` alone uses it."""
        alone = all(user in by or _asserts(user) for user in node.users)
        value = self._read(node) if alone else Linear(node, "source", _unchanged(node))
        return Part(value, position, factor)

    def _terms(self, node: fx.Node) -> list[Part]:
        """The operands of a sum or product that is linear in them; none for anything else."""
        rule = rule_of(node)
        if isinstance(rule, Sum):
            terms = rule.terms(node)
            if any(value for value, _ in terms if not isinstance(value, fx.Node)):
                return []  # a number other than zero is added
            return [
                self._operand(value, {node}, position, factor)
                for position, (value, factor) in enumerate(terms)
                if isinstance(value, fx.Node)
            ]
        if not isinstance(rule, Product):
            return []
        number = rule.number(node)
        if number is None:
            return [] if rule.divides else self._product(node)
        return [self._operand(x, {node}, node.args.index(x), number) for x in rule.numerators(node)]

    def _product(self, node: fx.Node) -> list[Part]:
        """One factor is a constant."""
        for position, other in ((0, 1), (1, 0)):
            value, constant = node.args[position], node.args[other]
            assert isinstance(value, fx.Node) and isinstance(constant, fx.Node)
            if constant in self._constants and value not in self._constants:
                part = self._operand(value, {node}, position)
                return [Part(part.value, position, constant=constant)]
        return []


def _constants(region: Region, written: Set[fx.Node]) -> set[fx.Node]:
    """The values that depend on parameters and buffers alone, none of which is written."""
    found: set[fx.Node] = set()
    for node in region.graph.nodes:
        own = node in region.tensors and node not in written
        sources = node.all_input_nodes
        computed = sources and mutates(node) is None and not _is_random(node)
        if own or (computed and all(each in found for each in sources)):
            found.add(node)
    return found


def _type(node: fx.Node) -> tuple[tuple[int, ...], torch.dtype] | None:
    value = node.meta.get("val")  # of a nested graph it is a tuple
    return (shape_of(node), value.dtype) if isinstance(value, torch.Tensor) else None


def _asserts(node: fx.Node) -> bool:
    """Whether an operator only asserts what the shape and dtype of a value are."""
    return is_a(node, "look") and not node.users


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _unchanged(node: fx.Node) -> fx.Node:
    """The value that `node` is, before operators that change nothing."""
    while is_same(node):
        (node,) = sources_of(node)
    return node
