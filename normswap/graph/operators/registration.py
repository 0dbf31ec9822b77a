"""Rows of the table that come from outside: of operators that others have written.

A package registers its own in a function, which an entry point of the group `normswap.rules` names:
it is called, without arguments, when a graph first has an operator that is not torch's own and that
the table lacks.
"""

from threading import RLock
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.compat import OpOverload, pytree
from normswap.core.errors import NormswapError, Unsupported, told
from normswap.core.plugins import entries, used
from normswap.graph.operators.judge import Judge, call_of
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import TABLE, Operator, name_of
from normswap.graph.operators.rule import Constraints, Context, Layouts, Rule

GROUP = "normswap.rules"  # of entry points
_TOLERANCE = 1e-10


def register_rule(target: OpOverload, like: OpOverload | Rule) -> None:
    """Say how the scale and shift of a normalization go through an operator of your own.

        normswap.register_rule(torch.ops.mine.shift.default, like=torch.ops.aten.roll.default)

    Args:
        target: an overload of an operator (`torch.library.custom_op`), which works on the CPU in
            float64.
        like: an operator of torch's that does the same with channels: of its kind, with arguments
            of the same names where the rule reads them. Or a rule of your own
            (`normswap.graph.operators.rule.Rule`).

    Raises:
        NormswapError: `target` is no overload or has a rule, or `like` has none.
    """
    if not isinstance(target, OpOverload):
        raise NormswapError(
            f"{target!r} is no overload of an operator; give torch.ops.NAMESPACE.NAME.default"
        )
    if isinstance(like, OpOverload):
        row = TABLE.get(like)
        if row is None or row.rule is None:
            raise NormswapError(
                f"{like} has no rule itself; give an operator that passes an affine"
            )
        new = Operator(**{**vars(row), "name": name_of(target)})
    elif isinstance(like, Rule):
        new = Operator(name_of(target), "registered", _Guarded(like))
    else:
        raise NormswapError(
            f"{like!r} is neither an operator nor a rule with propagate and constraints"
        )
    if [str(each.type) for each in target._schema.returns] != ["Tensor"]:
        raise NormswapError(f"{target} does not return one tensor, and no rule takes another")
    if target.namespace in _OWN:
        raise NormswapError(f"{target} is torch's own; its rule is in normswap.graph.operators")
    TABLE[target] = new


def check_rule(target: OpOverload, *args: Any, **kwargs: Any) -> int:
    """Check the rule of an operator on a call of it: the operator itself is the judge.

    For every tensor that the call takes or returns, with the channels along each of its axes, it is
    computed what the rule says of a random scale and shift.

    Args:
        args, kwargs: of a small call. Floating-point tensors are values that other layers compute,
            `nn.Parameter`s weights of the model; both are taken in float64.

    Returns:
        For how many of these an affine moves; for the others the rule refuses.

    Raises:
        NormswapError: the rule is wrong, or it refuses all; the message says of what.
    """
    row = TABLE.get(target)
    if row is None or row.rule is None:
        raise NormswapError(f"{target} has no rule; register one (normswap.register_rule)")

    def wide(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        double = value.detach().double()
        return nn.Parameter(double) if isinstance(value, nn.Parameter) else double

    with torch.no_grad():
        args, kwargs = pytree.tree_map_only(Tensor, wide, (args, kwargs))
        node, run, tensors = call_of(target, args, kwargs)
        constants = {
            n: t
            for n, t in tensors.items()
            if isinstance(t, nn.Parameter) or not t.is_floating_point()
        }
        judge = Judge(node, row.rule, run, tensors, constants)
        moved, refused = 0, "no layout of it has two channels"
        for value in (*(each for each in tensors if each not in constants), node):
            for axis, size in enumerate(value.meta["val"].shape):
                if size < 2:
                    continue
                seed = {value: along(value.meta["val"].dim(), axis, torch.arange(size))}
                try:
                    off, _ = judge.deviation(judge.propagate(seed))
                except Unsupported as reason:
                    refused = str(reason)
                    continue
                except Exception as error:
                    raise NormswapError(f"the rule of {target} fails: {told(error)}") from error
                if not off <= _TOLERANCE:
                    where = "its output" if value is node else f"its input {value.name[4:]}"
                    raise NormswapError(
                        f"the rule of {target} is wrong for channels along axis {axis} of {where}: "
                        f"it is off by {off:.1e}"
                    )
                moved += 1
    if not moved:
        raise NormswapError(f"the rule of {target} refuses this call: {refused}")
    return moved


class _Guarded:
    """A rule that is not ours: whatever it raises stops the affine, and is the reason."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def propagate(self, node: fx.Node, known: Layouts, context: Context) -> Layouts:
        try:
            return self._rule.propagate(node, known, context)
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"its registered rule raises {told(error)}") from error

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        try:
            return self._rule.constraints(node, known, context)
        except Unsupported:
            raise
        except Exception as error:
            raise Unsupported(f"its registered rule raises {told(error)}") from error


_OWN = ("aten", "prims", "prim", "quantized")
_LOADING = RLock()
_loading = _loaded = False


def load_registered(graph: fx.Graph) -> None:
    """Let installed packages register their rules, once, where `graph` has operators of theirs."""
    global _loaded, _loading
    if _loaded:
        return
    called = {node.target for node in graph.nodes if isinstance(node.target, OpOverload)}
    if all(target.namespace in _OWN for target in called):
        return
    with _LOADING:
        if _loaded or _loading:  # or a package captures a graph while it registers
            return
        _loading = True
        try:
            for entry in entries(GROUP):
                used(entry, "the rules", lambda each: each.load()())
            _loaded = True
        finally:
            _loading = False
