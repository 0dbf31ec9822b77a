"""How one sum of branches is merged: which module computes it, and what goes for that."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.alignment import align
from normswap.graph.branches.linear import Linear, Part
from normswap.graph.branches.sums import Branches, BranchSum
from normswap.graph.capture import Capture, Region, join
from normswap.graph.forward import forward_graph
from normswap.graph.operators.rule import shape_of
from normswap.graph.propagation.aliases import AliasAnalysis
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.reads import Reads, own_tensors
from normswap.graph.sites import find_sites
from normswap.passes.edits.branches import Branch, Constant
from normswap.passes.forwards import Forwards


@dataclass(frozen=True)
class Merger:
    """What merges a sum; equal for every call of the same code.

    Attributes:
        target: the module that computes the sum.
        branches: what it adds up.
        channels: of the input.
        passed: the norms between it and the sum, each by all of its paths.
        kept: the operators between it and the sum, as (module, name in its forward), with the
            position of the operand that each gives from now on.
    """

    target: str
    branches: tuple[Branch, ...]
    channels: int
    passed: tuple[tuple[str, ...], ...]
    kept: tuple[tuple[str, str, int], ...]

    @property
    def traced(self) -> set[str]:
        """The modules whose forward is read or changed."""
        constants = (each.path for branch in self.branches for each in branch.constants)
        return {*constants, *(path for path, _, _ in self.kept)}


class Mergers:
    """Finds what merges the sums of a captured model.

    Args:
        inputs: what the model was captured with.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self, model: nn.Module, seen: Capture, inputs: Any, *, assume_example: bool = False
    ) -> None:
        self._model, self._seen = model, seen
        sites = find_sites(model, seen)
        self._unseen = Unseen(model, seen, sites, assume_example=assume_example)
        self._reads = Reads(model, seen.regions)
        self._forwards = Forwards(model, seen, inputs)
        self._aligned: dict[tuple[int, str], dict[fx.Node, fx.Node]] = {}  # by region and call
        self._aliases = {id(region): AliasAnalysis(region) for region in seen.regions}
        # For each module, the nodes that ran in it, by region and call.
        self._ran: dict[nn.Module, dict[tuple[int, str], set[fx.Node]]] = {}
        for region in seen.regions:
            for node in region.graph.nodes:
                for call, path in region.stack(node):
                    calls = self._ran.setdefault(model.get_submodule(path), {})
                    calls.setdefault((id(region), call), set()).add(node)
        self._traces: dict[nn.Module, fx.Graph] = {}
        self._hooked = [
            (name, module)
            for name, module in model.named_modules(remove_duplicate=False)
            if module._forward_hooks or module._forward_pre_hooks
        ]

    def forward(self, path: str) -> fx.Graph:
        """The forward of a module, as traced.

        Raises:
            Unsupported: it cannot be traced.
        """
        module = self._model.get_submodule(path)
        if module not in self._traces:
            self._traces[module] = forward_graph(module)
        return self._traces[module]

    def merger(self, found: BranchSum, alike: set[fx.Node]) -> Merger:
        """What merges a sum.

        Args:
            alike: the nodes of all calls of its code.

        Raises:
            Unsupported: nothing does, for the reason that the message gives.
        """
        branches = Branches(self._model, found)
        self._check_hooks(found)
        # The sum itself stays; what it is made of changes.
        self._unseen.check(found.region, found.nodes - {found.value.node})
        assert found.value.source is not None
        self._aliases[id(found.region)].check_computed(found.value.source, found.nodes)
        why: Unsupported | None = None
        for target in branches.able():
            try:
                self._check_reads(branches.path(target), alike)
                return self._toward(target, branches)
            except Unsupported as reason:
                why = why or reason
        raise why or Unsupported("none of its branches can compute it")

    def check_forwards(self, mergers: Iterable[Merger]) -> None:
        """Compare what was traced with what was captured, all at once, for `check`."""
        paths = {path for merger in mergers for path in merger.traced}
        self._forwards.check(self._model.get_submodule(path) for path in paths)

    def check(self, merger: Merger, sums: Iterable[BranchSum]) -> None:
        """Check that nothing but these sums runs what `merger` changes, in forwards as traced.

        Raises:
            Unsupported: something does.
        """
        inside = {node for each in sums for node in each.nodes}
        for path in (merger.target, *(paths[0] for paths in merger.passed)):
            self._check_reads(path, inside)
        for path, _, _ in merger.kept:
            calls = self._ran[self._model.get_submodule(path)].values()
            if path in self._seen.called_outside or any(not ran & inside for ran in calls):
                raise Unsupported(f"{path or 'the model'} is called in other ways too")
        for path in merger.traced:
            self._forwards.graph(self._model.get_submodule(path))

    def removable(
        self, path: str, children: Iterable[str], inside: set[fx.Node]
    ) -> tuple[str, ...]:
        """Those of the children of a module that run, and are read, in `inside` alone."""
        return tuple(
            child
            for child in children
            if all(
                each not in self._seen.called_outside and self._ran_in(each) <= inside
                for each in self._paths(join(path, child))
            )
        )

    def _paths(self, path: str) -> list[str]:
        module = self._model.get_submodule(path)
        return [name for name, _ in module.named_modules(prefix=path)]

    def _ran_in(self, path: str) -> set[fx.Node]:
        module = self._model.get_submodule(path)
        names = [name for name, _ in own_tensors(module)]
        reads = {node for _, node in self._reads.through(path, names)}
        return reads.union(*self._ran.get(module, {}).values())

    def _check_reads(self, path: str, allowed: set[fx.Node]) -> None:
        self._seen.check_calls(path)
        names = [name for name, _ in own_tensors(self._model.get_submodule(path))]
        for _, node in self._reads.through(path, names):
            if node not in allowed:
                raise Unsupported(f"{path} is used elsewhere too")

    def _check_hooks(self, found: BranchSum) -> None:
        """No hook on a module may see a value that changes."""
        stacks = [[path for _, path in found.region.stack(node)] for node in found.nodes]
        common = [paths[0] for paths in zip(*stacks, strict=False) if len(set(paths)) == 1]
        around = common[-1] if common else found.region.path
        for name, module in self._hooked:
            if name == around or not f"{name}.".startswith(f"{around}." if around else ""):
                continue
            ran = set().union(*self._ran.get(module, {}).values())
            # What runs no operator, an Identity, may be between them.
            if not ran or ran & found.nodes:
                raise Unsupported(f"{name} has a hook, which would see another value")

    def _toward(self, target: Linear, branches: Branches) -> Merger:
        found = branches.sum
        kept: list[tuple[str, str, int]] = []
        passed: list[tuple[str, ...]] = []
        for value, part in _way(found.value, target):
            if value.norm is not None:
                if branches.path(target) in value.norm[0].paths:
                    raise Unsupported(f"{branches.path(target)} is called on its own output")
                passed.append(value.norm[0].paths)
            elif value.kind in ("sum", "scale"):
                path, traced, operand = self._traced(found, value, part)
                call = id(found.region), found.region.stack(value.node)[-1][0]
                self._check_dropped(path, call, value, part)
                self._check_way(found.region, value, target, traced, operand)
                kept.append((path, traced.name, operand))
        return Merger(
            branches.path(target),
            tuple(self._addends(branches, found.value, Branch())),
            branches.channels,
            tuple(passed),
            tuple(kept),
        )

    def _addends(self, branches: Branches, value: Linear, times: Branch) -> list[Branch]:
        """What a value adds up, everything multiplied with the factors of `times`."""
        if value.kind in ("weighted", "source"):
            kernel = branches.path(value) if value.kind == "weighted" else None
            return [times.model_copy(update={"kernel": kernel})]
        found: list[Branch] = []
        if value.norm is not None:
            norm = value.norm[0].name
            found = [times.model_copy(update={"shift": norm})]
            times = times.model_copy(update={"scales": (*times.scales, norm)})
        for part in value.parts:
            each = times
            if part.constant is not None:
                constant = self._constant(branches, value, part)
                each = times.model_copy(update={"constants": (*times.constants, constant)})
            elif part.factor not in (1.0, -1.0):
                self._traced(branches.sum, value, part)  # it is the same for every input
            each = each.model_copy(update={"factor": each.factor * part.factor})
            found += self._addends(branches, part.value, each)
        return found

    def _constant(self, branches: Branches, value: Linear, part: Part) -> Constant:
        path, traced, operand = self._traced(branches.sum, value, part)
        other = traced.args[1 - operand]
        assert isinstance(other, fx.Node) and part.constant is not None
        if any(node.op in ("placeholder", "call_module") for node in _ancestors(other)):
            raise Unsupported(f"{path} is given what it multiplies with")
        shape = shape_of(part.constant)
        axis = branches.axis - len(shape_of(value.node)) + len(shape)
        if any(size > 1 and position != axis for position, size in enumerate(shape)):
            raise Unsupported(f"{path} multiplies with more than one number per channel")
        return Constant(path=path, node=traced.name, operand=1 - operand)

    def _traced(self, found: BranchSum, value: Linear, part: Part) -> tuple[str, fx.Node, int]:
        """Where a sum or product is written: the module, the node, and the operand in it."""
        region, path = found.region, found.path(value.node)
        call = region.stack(value.node)[-1][0]
        trace = self.forward(path)
        if (id(region), call) not in self._aligned:
            self._aligned[id(region), call] = align(self._model, region, call, trace, path)
        traced = self._aligned[id(region), call][value.node]
        tensors = [isinstance(operand, fx.Node) for operand in value.node.args[:2]]
        given = [i for i, operand in enumerate(traced.args) if isinstance(operand, fx.Node)]
        if len(given) != sum(tensors) or len(given) != len(traced.all_input_nodes):
            raise Unsupported(f"the forward of {path or 'the model'} could not be followed")
        return path, traced, given[0] if len(given) == 1 else part.position

    def _check_dropped(self, path: str, call: tuple[int, str], value: Linear, kept: Part) -> None:
        """What the other operands need must be computed where they are dropped."""
        inside = self._ran[self._model.get_submodule(path)][call]
        for part in value.parts:
            if part is not kept and any(not each.nodes <= inside for each in part.value.tree()):
                raise Unsupported(f"{path} adds what is computed outside of it")

    def _check_way(
        self, region: Region, value: Linear, target: Linear, traced: fx.Node, operand: int
    ) -> None:
        """The operand that is kept, and no other, comes from the target."""
        call = region.stack(value.node)[-1][0]
        start = self._aligned[id(region), call].get(target.node)
        if start is None:
            return
        for position, each in enumerate(traced.args):
            comes = isinstance(each, fx.Node) and start in _ancestors(each)
            if comes != (position == operand):
                raise Unsupported("its forward could not be followed")


def _way(value: Linear, target: Linear) -> list[tuple[Linear, Part]]:
    """The operators from a value down to one that it is computed from."""
    for part in value.parts:
        if any(each is target for each in part.value.tree()):
            return [(value, part), *_way(part.value, target)] if value is not target else []
    return []


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found = {node}
    waiting = [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found
