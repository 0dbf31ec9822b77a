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
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.branches.sums import BranchSum, sums_inside
from normswap.graph.capture import Capture
from normswap.graph.forward import forward_of
from normswap.passes.edits import BypassOperators, Edit, MergeInto
from normswap.passes.edits.branches import bypass
from normswap.passes.merging import Merger, Mergers
from normswap.passes.plan import Skipped


def merge(
    model: nn.Module,
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
