"""What travels: one positive number s for a whole tensor, y' = s y.

Every value of a model may be multiplied by a number of its own, if those of the values that an
operator connects fit together. An operator

1. gives its output the number of its inputs, where it moves, adds or averages elements, takes a
   maximum, or is positively homogeneous (ReLU, LeakyReLU, PReLU);
2. takes the numbers of both sides into a weight, W' = s_y W / s_x and b' = s_y b: convolutions,
   Linears, embeddings, parameters that are added or multiplied;
3. takes that of its input into eps, eps' = s^2 eps, and that of its output into gain and bias, if
   it is a normalization; running statistics are multiplied as well;
4. multiplies the numbers of two computed factors, of which one has to be 1;
5. asks for 1 otherwise: what it gives is not f(s x) = s f(x).

So the values fall into *groups* with one number each; `Factors` finds them in one pass over the
graphs. With a power of two nothing is rounded, as long as no number leaves the range of its type.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.formula import normalizing
from normswap.graph.functional_norms import functional_kind
from normswap.graph.index import join, own_tensors
from normswap.graph.norm_modules import eps_name, formula
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.functions import Homogeneous
from normswap.graph.operators.operator import MOVES, WEIGHTED, sources_of
from normswap.graph.operators.pointwise import Product
from normswap.graph.operators.rule import (
    argument,
    has_argument,
    is_tensor,
    mutates,
)
from normswap.graph.operators.weights import transposed_by
from normswap.graph.propagation.owners import Owners
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import Call, NormSite, describe

Owned = tuple[str, str]  # of a tensor or an attribute: the module, and the name there
Terms = tuple[tuple[fx.Node, int], ...]  # values, and how often the number of each comes in


@dataclass
class Group:
    """Values that have one number.

    Attributes:
        values: those of all graphs.
        pinned: why the number has to be 1; None where it may be another.
        squared: a normalization takes the mean square of one of them.
        tensors: the weights that take it in, and how often: tensor' = s^times tensor.
        eps: the normalizations whose eps does, eps' = s^2 eps, by path and name.
    """

    values: list[fx.Node] = field(default_factory=list)
    pinned: str | None = None
    squared: bool = False
    tensors: dict[Owned, int] = field(default_factory=dict)
    eps: dict[Owned, None] = field(default_factory=dict)


class Factors:
    """The groups of a captured model.

    Args:
        sites: all normalizations of the model.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(self, seen: Capture, sites: Sequence[NormSite], *, assume_example: bool) -> None:
        self._index, self._owners = seen.index, Owners(seen)
        self._context = self._owners.context(training=False)
        self._unseen = Unseen(seen, sites, assume_example=assume_example)
        self._parent: dict[fx.Node, fx.Node] = {}
        self._pinned: dict[fx.Node, str] = {}  # by the root of its group
        self._squared: set[fx.Node] = set()
        self._products: list[tuple[fx.Node, fx.Node, fx.Node]] = []
        self._takers: dict[Owned, Terms] = {}
        self._reads: dict[Owned, set[fx.Node]] = {}
        self._eps: dict[Owned, fx.Node] = {}
        self._inside: set[fx.Node] = set()
        for site in sites:
            for call in () if site.owner == "functional" else site.executions:
                self._norm(site, call)
        for region in seen.regions:
            for node in () if region.symbolic else region.graph.nodes:
                if node not in self._inside:
                    self._node(node)
        self._check_reads()
        self._multiply()

    def groups(self) -> list[Group]:
        """The groups with what takes their numbers in, in order of execution."""
        found: dict[fx.Node, Group] = {}
        for node in self._index.position_of:
            if node in self._parent:
                group = found.setdefault(self._root(node), Group())
                group.values.append(node)
                group.squared |= node in self._squared
        for root, group in found.items():
            group.pinned = self._pinned.get(root)
        for tensor, terms in self._takers.items():
            for value, times in terms:
                tensors = found[self._root(value)].tensors
                tensors[tensor] = tensors.get(tensor, 0) + times
        for tensor, value in self._eps.items():
            found[self._root(value)].eps[tensor] = None
        return list(found.values())

    def check_seen(self, group: Group) -> None:
        """Raise Unsupported unless the example shows all that takes a value of `group`."""
        for value in group.values:
            self._unseen.check(self._index.region_of[value], [value])

    def tensor(self, path: str, name: str) -> Tensor | None:
        """The parameter or buffer `name` of the module at `path`."""
        return self._index.tensor(join(path, name))

    # --- groups -----------------------------------------------------------------------------------

    def _root(self, node: fx.Node) -> fx.Node:
        parent = self._parent.setdefault(node, node)
        while parent is not self._parent[parent]:
            parent = self._parent[parent]
        self._parent[node] = parent
        return parent

    def _join(self, *nodes: fx.Node) -> None:
        """Give all of `nodes` one number."""
        first = self._root(nodes[0])
        for node in nodes[1:]:
            other = self._root(node)
            if other is not first:
                self._parent[other] = first
                if other in self._pinned:
                    self._pinned.setdefault(first, self._pinned[other])

    def _pin(self, nodes: Iterable[fx.Node], why: str) -> None:
        for node in nodes:
            self._pinned.setdefault(self._root(node), why)

    # --- operators --------------------------------------------------------------------------------

    def _node(self, node: fx.Node) -> None:
        values = [each for each in sources_of(node) if is_tensor(each)]
        if node.op == "output":
            self._pin(values, "the model returns it")
        elif node.op == "placeholder":
            if is_tensor(node) and self._context.constant(node) is None:
                self._pin([node], "it is an input of the model, or a constant in its code")
        elif values or is_tensor(node):
            try:
                self._operator(node, values)
                written = mutates(node)
                if written is not None:  # what reads it later reads the output
                    self._join(node, written)
            except Unsupported as reason:
                touched = [*values, *([node] if is_tensor(node) else [])]
                self._pin(touched, f"{reason} ({self._named(node)})")

    def _operator(self, node: fx.Node, values: list[fx.Node]) -> None:
        row, out = operator_of(node), [node] if is_tensor(node) else []
        if row is None:
            raise Unsupported("it meets an operator that is not in the table")
        if not values and row.kind == "move" and not is_a(node.args[0], "split"):  # type: ignore[arg-type]
            raise Unsupported("it is one of several outputs")
        if row.kind in ("look", "fill"):
            if out and row.fills != 0:
                raise Unsupported("a number is filled in")
        elif row.kind == "split":
            self._join(*values, *(user for user in node.users if is_tensor(user)))
        elif self._transposes(node):
            pass  # a weight, whose reader says what becomes of it
        elif is_a(node, *MOVES, "same", "window", "pick", "scatter", "sum"):
            self._check_adds_nothing(node)
            self._constants([node, *values])
            self._join(*out, *values)
        elif isinstance(row.scale_rule, Homogeneous):
            self._join(*out, values[0])
            self._pin(values[1:], "a slope is not scaled")
        elif row.kind == "product":
            self._product(node, values)
        elif row.kind == "embedding":
            self._takes(node, argument(node, "weight"), ((node, 1),))
        elif is_a(node, *WEIGHTED) or row.kind == "contraction":
            self._weighted(node, values)
        elif row.kind == "attention":
            summed = argument(node, "value")
            given = [*node.args, *node.kwargs.values()]
            taken = [each for each in given if isinstance(each, fx.Node) and is_tensor(each)]
            taken.remove(summed)  # once: it may be the keys as well
            self._join(node, summed)
            self._pin(taken, "a softmax takes it")
        else:
            raise Unsupported(f"{row.name} is not f(s x) = s f(x)")

    def _check_adds_nothing(self, node: fx.Node) -> None:
        """Raise Unsupported where a number that is written in the code is added, or padded with."""
        numbers = [each for each in node.args[:2] if isinstance(each, (int, float))]
        if is_a(node, "sum") and any(numbers):
            raise Unsupported("a number is added to it")
        if is_a(node, "pad") and has_argument(node, "value") and argument(node, "value"):
            raise Unsupported("it is padded with a number")

    def _constants(self, values: Iterable[fx.Node]) -> None:
        """The parameters among `values`, which take in a number themselves."""
        for value in values:
            if self._context.constant(value) is not None:
                self._takes(value, value, ((value, 1),), reads=value.users)

    def _product(self, node: fx.Node, values: list[fx.Node]) -> None:
        row, first = operator_of(node), node.args[0]
        assert row is not None and isinstance(row.rule, Product)
        if len(values) == 1:  # by a number, or by integers
            if node.args[0] is node.args[1]:
                raise Unsupported("it is squared")
            if row.rule.divides and values[0] is not first:
                raise Unsupported("something is divided by it")
            self._join(node, values[0])
            return
        left, right = values
        for value, other in ((left, right), (right, left)):
            if isinstance(self._context.constant(other), nn.Parameter):
                if row.rule.divides:
                    raise Unsupported("it is divided by a parameter")
                self._takes(node, other, ((node, 1), (value, -1)))
                return
        self._constants(values)
        if row.rule.divides:
            self._pin([right], "something is divided by it")
            self._join(node, left)
        else:
            self._products.append((node, left, right))

    def _weighted(self, node: fx.Node, values: list[fx.Node]) -> None:
        names = ("self", "mat1", "mat2") if is_a(node, "addmm") else ("bias", "input", "weight")
        named = all(has_argument(node, name) for name in names)
        bias, value, weight = (argument(node, name) for name in names) if named else (None,) * 3
        if not named and len(values) == 2:
            value, weight = values
            if self._constant(value):
                value, weight = weight, value
        if not (isinstance(weight, fx.Node) and value is not None and self._constant(weight)):
            if named or len(values) != 2:
                raise Unsupported("its weight is computed, or there are more than two factors")
            self._constants(values)
            self._products.append((node, values[0], values[1]))
            return
        matrix = transposed_by(weight)
        reads = [node] if matrix is weight else [node, weight]
        self._takes(node, matrix, ((node, 1), (value, -1)), reads=reads)
        if isinstance(bias, fx.Node):
            self._takes(node, bias, ((node, 1),))

    def _constant(self, node: fx.Node) -> bool:
        return self._context.constant(transposed_by(node)) is not None

    def _transposes(self, node: fx.Node) -> bool:
        """Whether `node` transposes a weight for matrix products."""
        if not is_a(node, "permute") or not self._constant(node):
            return False
        return all(is_a(user, *WEIGHTED, "contraction") for user in node.users)

    def _takes(
        self, node: fx.Node, tensor: fx.Node, terms: Terms, reads: Iterable[fx.Node] = ()
    ) -> None:
        """A `tensor` that `node` reads takes in the numbers of `terms`."""
        region = self._index.region_of[node]
        owner = self._owners.of(region, region.module_path(node), tensor)
        self._taken(owner, terms, reads or [node])

    def _taken(self, owner: Owned, terms: Terms, reads: Iterable[fx.Node]) -> None:
        owner = self._owners_of(owner)[0]
        before = self._takers.setdefault(owner, terms)
        self._reads.setdefault(owner, set()).update(reads)
        if [times for _, times in before] == [times for _, times in terms]:
            for (value, _), (other, _) in zip(before, terms, strict=True):
                self._join(value, other)
        else:
            self._pin((value for value, _ in (*before, *terms)), "its weight is used in two ways")

    def _multiply(self) -> None:
        """Of two computed factors one keeps its number."""
        waiting = self._products
        while waiting:
            later = []
            for node, left, right in waiting:
                if self._root(left) in self._pinned:
                    self._join(node, right)
                elif self._root(right) in self._pinned:
                    self._join(node, left)
                elif self._root(node) in self._pinned or self._root(left) is self._root(right):
                    self._pin([node, left, right], "it is multiplied by another value")
                else:
                    later.append((node, left, right))
            if len(later) == len(waiting):
                node, left, right = later.pop(0)
                self._pin([right], "it is multiplied by another value")
                self._join(node, left)
            waiting = later

    # --- normalizations ---------------------------------------------------------------------------

    def _norm(self, site: NormSite, call: Call) -> None:
        norm = self._index.modules[site.name]
        try:
            self._owners.check_seen(site)
            given, output, inside = self._call(site, call)
            eps, found = eps_name(norm), formula(norm)
            if found is None or eps is None:
                raise Unsupported("its eps is no attribute")
        except Unsupported:
            return  # its operators are looked at one by one
        self._inside |= inside
        self._squared.add(given)
        self._root(output)
        key = site.name, eps
        self._join(given, self._eps.setdefault(key, given))
        for name, times in ((found.mean, 1), (found.variance, 2)):
            if name is not None:
                self._taken((site.name, name), ((given, times),), inside)
        if found.gain is None or found.gain_offset:
            self._pin([output], f"{site.name} has no gain that can take a number in")
        else:
            self._taken((site.name, found.gain), ((output, 1),), inside)
        if found.bias is not None:
            self._taken((site.name, found.bias), ((output, 1),), inside)

    def _call(self, site: NormSite, call: Call) -> tuple[fx.Node, fx.Node, set[fx.Node]]:
        """What a call of a normalization is given, what it returns, and what runs inside."""
        if site.has_fixed_affine:
            found = [node for node in call.nodes if functional_kind(node) == site.kind]
            output = found[0] if len(found) == 1 else call.output
        else:
            output, _ = normalizing(self._index.model, site, call)
        if output is None or call.region.symbolic:
            raise Unsupported("it returns no one value")
        if is_a(output, "normalization"):
            given = output.args[0]
            inside = {output, *(each for each in output.all_input_nodes if each is not given)}
            if not is_tensor(output):
                raise Unsupported("it returns its statistics as well")
        else:
            given, inside = call.input, set(call.nodes)
        if not isinstance(given, fx.Node):
            raise Unsupported("it takes no one value")
        return given, output, inside

    def _check_reads(self) -> None:
        """Where something else reads what takes numbers in, these have to be 1."""
        for first, nodes in self._reads.items():
            for path, name in self._owners_of(first):
                try:
                    self._owners.check_reads(path, [name], nodes)
                except Unsupported as reason:
                    self._pin((value for value, _ in self._takers[first]), str(reason))

    def _owners_of(self, owner: Owned) -> list[Owned]:
        """All modules that own a tensor, in order, each with its name there."""
        tensor = self.tensor(*owner)
        return [
            (self._index.paths[module][0], name)
            for module in self._index.paths
            if tensor is not None and module in self._index.owners(tensor)
            for name, held in own_tensors(module)
            if held is tensor
        ] or [owner]

    def _named(self, node: fx.Node) -> str:
        return describe(node, self._index.region_of[node])
