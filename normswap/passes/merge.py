"""Merge parallel branches that are summed into one convolution, for inference.

Rules:
1. A sum whose branches are all linear in one value, as `graph.branches.sums` finds it, becomes
   one of its convs (or Linears), the one that changes least; the kernel is the sum of theirs, in
   float64 and cast back. Where there is none, it becomes one of the BatchNorms.
2. Convs agree in stride and pad with zeros; kernel sizes, dilations, paddings and groups may differ
   as long as one convolution computes the sum with no more multiplications than they take.
3. The additions, and products with constants, are taken out of the forwards that they are in, which
   a symbolic trace must show (`graph.alignment`); children that this leaves uncalled go.
4. Nobody may see the difference: every value between has one use, no module between has a hook, and
   whatever changes runs nowhere else.
5. A sum that cannot be merged is left, with the reason; the sums inside it are tried.

A forward that was rewritten is that of eval mode, in training mode too.

Source: Ding et al. 2021 (RepVGG, arXiv 2101.03697); Vasu et al. 2022 (MobileOne, 2206.04040).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.branches.linear import Linear, Part
from normswap.graph.branches.sums import Branches, BranchSum, sums_inside
from normswap.graph.capture import Capture
from normswap.graph.forward import aligned, forward_of
from normswap.graph.index import join
from normswap.graph.operators.rule import shape_of
from normswap.graph.propagation.unseen import Unseen
from normswap.graph.sites import find_sites
from normswap.passes.edits import BypassOperators, Edit, MergeInto
from normswap.passes.edits.branches import Branch, Constant, bypass
from normswap.passes.forwards import Forwards
from normswap.passes.plan import Skipped


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

    def __init__(self, seen: Capture, inputs: Any, *, assume_example: bool = False) -> None:
        self._seen, self._index = seen, seen.index
        self._unseen = Unseen(seen, find_sites(seen), assume_example=assume_example)
        self._forwards = Forwards(seen, inputs)
        self._hooked = [
            (name, module)
            for name, module in self._index.modules.items()
            if module._forward_hooks or module._forward_pre_hooks
        ]

    def merger(self, found: BranchSum, alike: set[fx.Node]) -> Merger:
        """What merges a sum.

        Args:
            alike: the nodes of all calls of its code.

        Raises:
            Unsupported: nothing does, for the reason that the message gives.
        """
        branches = Branches(found)
        self._check_hooks(found)
        # The sum itself stays; what it is made of changes.
        self._unseen.check(found.region, found.nodes - {found.value.node})
        assert found.value.source is not None
        self._index.aliases(found.region).check_computed(found.value.source, found.nodes)
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
        self._forwards.check(self._index.modules[path] for path in paths)

    def check(self, merger: Merger, sums: Iterable[BranchSum]) -> None:
        """Check that nothing but these sums runs what `merger` changes, in forwards as traced.

        Raises:
            Unsupported: something does.
        """
        inside = {node for each in sums for node in each.nodes}
        for path in (merger.target, *(paths[0] for paths in merger.passed)):
            self._check_reads(path, inside)
        for path, _, _ in merger.kept:
            runs = self._index.runs[self._index.modules[path]]
            if path in self._seen.called_outside or any(
                inside.isdisjoint(run.nodes) for run in runs
            ):
                raise Unsupported(f"{path or 'the model'} is called in other ways too")
        for path in merger.traced:
            self._forwards.graph(self._index.modules[path])

    def removable(
        self, path: str, children: Iterable[str], inside: set[fx.Node]
    ) -> tuple[str, ...]:
        """Those of the children of a module that run, and are read, in `inside` alone."""
        return tuple(
            child
            for child in children
            if all(
                below not in self._seen.called_outside and self._ran_in(below) <= inside
                for below, _ in self._index.modules[join(path, child)].named_modules(
                    prefix=join(path, child)
                )
            )
        )

    def _ran_in(self, path: str) -> set[fx.Node]:
        return self._index.ran_in(self._index.modules[path]).union(self._index.reads(path))

    def _check_reads(self, path: str, allowed: set[fx.Node]) -> None:
        self._seen.check_calls(path)
        if not allowed.issuperset(self._index.reads(path)):
            raise Unsupported(f"{path} is used elsewhere too")

    def _check_hooks(self, found: BranchSum) -> None:
        """No hook on a module may see a value that changes."""
        stacks = [[path for _, path in found.region.stack(node)] for node in found.nodes]
        common = [paths[0] for paths in zip(*stacks, strict=False) if len(set(paths)) == 1]
        around = common[-1] if common else found.region.path
        for name, module in self._hooked:
            if name == around or not f"{name}.".startswith(f"{around}." if around else ""):
                continue
            ran = self._index.ran_in(module)
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
                call = found.region.stack(value.node)[-1][0]
                self._check_dropped(found.region.ran[call], path, value, part)
                start = aligned(self._index, found.region, call, path).get(target.node)
                if start is not None:
                    _check_way(start, traced, operand)
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
        traced = aligned(self._index, region, call, path)[value.node]
        tensors = [isinstance(operand, fx.Node) for operand in value.node.args[:2]]
        given = [i for i, operand in enumerate(traced.args) if isinstance(operand, fx.Node)]
        if len(given) != sum(tensors) or len(given) != len(traced.all_input_nodes):
            raise Unsupported(f"the forward of {path or 'the model'} could not be followed")
        return path, traced, given[0] if len(given) == 1 else part.position

    def _check_dropped(
        self, inside: Iterable[fx.Node], path: str, value: Linear, kept: Part
    ) -> None:
        """What the other operands need must be computed where they are dropped."""
        for part in value.parts:
            nodes = frozenset[fx.Node]().union(*(each.nodes for each in part.value.tree()))
            if part is not kept and not nodes.issubset(inside):
                raise Unsupported(f"{path} adds what is computed outside of it")


def _check_way(start: fx.Node, traced: fx.Node, operand: int) -> None:
    """Check that the operand that is kept, and no other, comes from the target, at `start`."""
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


def merge(
    seen: Capture,
    inputs: Any,
    sums: Sequence[BranchSum],
    *,
    assume_example: bool = False,
) -> tuple[list[Edit], list[Skipped]]:
    """The edits that merge `sums` of a model captured with `inputs`, and the sums left."""
    mergers = Mergers(seen, inputs, assume_example=assume_example)
    done, failed = _decide(mergers, sums)
    edits: list[Edit] = [_into(merger, found) for merger, found in done.items()]
    edits += _bypassed(seen, mergers, done)
    # Once for the calls of the same code.
    why = {(found.code, reason): found for found, reason in reversed(failed.items())}
    left = [Skipped(site=_name(found), reason=reason) for (_, reason), found in why.items()]
    return edits, left[::-1]


def _decide(
    mergers: Mergers, sums: Sequence[BranchSum]
) -> tuple[dict[Merger, list[BranchSum]], dict[BranchSum, str]]:
    """What merges sums, each with those that it merges, and why the others are not merged."""
    done: dict[Merger, list[BranchSum]] = {}
    failed: dict[BranchSum, str] = {}
    alike: dict[Any, set[fx.Node]] = {}
    for found in sums:
        alike.setdefault(found.code, set()).update(found.nodes)
    for found in sums:
        try:
            done.setdefault(mergers.merger(found, alike[found.code]), []).append(found)
        except Unsupported as reason:
            failed[found] = str(reason)
    mergers.check_forwards(done)
    for merger, calls in list(done.items()):
        try:
            mergers.check(merger, calls)
        except Unsupported as reason:
            failed |= dict.fromkeys(done.pop(merger), str(reason))
    inside = [each for found in failed for each in sums_inside(found)]
    if inside:
        done |= _decide(mergers, inside)[0]
    return done, failed


def _into(merger: Merger, found: list[BranchSum]) -> MergeInto:
    return MergeInto(
        site=_name(found[0]),
        path=merger.target,
        reason="its branches are linear in one value",
        branches=merger.branches,
        channels=merger.channels,
        passed=merger.passed,
    )


def _bypassed(
    seen: Capture, mergers: Mergers, done: dict[Merger, list[BranchSum]]
) -> list[BypassOperators]:
    """One edit for each module whose forward changes."""
    modules = seen.index.modules
    kept: dict[str, dict[str, int]] = {}
    site: dict[str, str] = {}
    for merger, found in done.items():
        for path, node, operand in merger.kept:
            kept.setdefault(path, {})[node] = operand
            site.setdefault(path, _name(found[0]))
    inside = {node for found in done.values() for each in found for node in each.nodes}
    return [
        BypassOperators(
            site=site[path],
            path=path,
            reason="one module computes the sum",
            kept=each,
            removed=mergers.removable(
                path, bypass(copy.deepcopy(forward_of(seen.index, modules[path])), each), inside
            ),
        )
        for path, each in kept.items()
    ]


def _name(found: BranchSum) -> str:
    """As a functional call is named: where it is, and its node."""
    where, node = found.region.module_path(found.value.node), found.value.node.name
    return f"{where}:{node}" if where else node
