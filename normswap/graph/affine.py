"""How the affine of a BatchNorm moves backward until a weight absorbs it.

The affine y = s * x + t of a frozen BatchNorm sits on the output of some operator. It moves
backward by the rows of `normswap.graph.rules` until it meets an operator that absorbs it; one in
neither table stops it, and its name is the reason in the plan.

Moving is exact only if nobody else sees the value that changes: every value on the way has a single
user, and every read of the absorbing weight through its module feeds the same site.
"""

import dis
from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap.graph.capture import Capture, Region, join
from normswap.graph.norm_modules import Unsupported
from normswap.graph.reads import Reads, own_tensors
from normswap.graph.rules import (
    CONVS,
    PRODUCERS,
    THROUGH,
    THROUGH_MODULES,
    TRANSPOSED_CONVS,
    aten,
)
from normswap.graph.sites import Call, NormSite, describe


@dataclass(frozen=True)
class Absorber:
    """A module whose weight and bias can take up a per-channel affine of its output.

    Attributes:
        path: the module.
        weight: the name of its weight.
        bias: the name of its bias.
        gives_bias: the bias does not exist yet.
        groups: 0 where output channels are axis 0 of the weight (conv, Linear); for a transposed
            conv, whose weight is (C_in, C_out / groups, ...), its groups.
    """

    path: str
    weight: str
    bias: str
    gives_bias: bool
    groups: int


class Backward:
    """The affines of a captured model's BatchNorms, moved backward one after the other.

    Args:
        training: what is found must hold in training mode too (dropout no longer commutes).
    """

    def __init__(self, model: nn.Module, seen: Capture, *, training: bool = False) -> None:
        self._model, self._seen, self._training = model, seen, training
        self._reads = Reads(model, seen.regions)
        # The outputs of BatchNorms that were absorbed: each equals the input of its call now.
        self._moved: dict[fx.Node, Call] = {}

    def absorbers(self, site: NormSite) -> tuple[Absorber, ...]:
        """The modules that can together absorb the affine of `site`.

        Raises:
            Unsupported: it cannot be absorbed exactly; the message says what stops it.
        """
        if site.statistics not in ("running", "frozen") or site.kind != "batch":
            raise Unsupported(
                "has no running statistics, so it depends on the batch in eval mode too"
            )
        if site.why_not is not None:
            raise Unsupported(site.why_not)
        if self._seen.how == "module tree":
            raise Unsupported("the dataflow is unknown; give example inputs")
        if self._seen.called_outside.intersection(site.paths):
            raise Unsupported("is called where its dataflow could not be captured")
        if not site.executions:
            raise Unsupported(
                "is never called with these inputs" if site.calls == 0 else "could not be captured"
            )
        norm = self._model.get_submodule(site.name)
        for call in site.executions:
            _check_hooks(norm, call)
        producers = [self._walk(call) for call in site.executions]
        found = tuple(dict.fromkeys(self._absorber(*producer) for producer in producers))
        inside = {node for call in site.executions for node in call.nodes}
        self._check_reads(site.name, dict(own_tensors(norm)), inside)
        for absorber in found:
            linear = {node for node, _, _ in producers}
            self._check_reads(absorber.path, (absorber.weight, absorber.bias), linear)
        return found

    def moved(self, site: NormSite) -> None:
        """Note that `site` is absorbed, so that an affine behind it moves on through it."""
        if not site.tail:  # through a BatchNorm that goes on with an activation nothing moves
            self._moved |= {
                call.output: call for call in site.executions if call.output is not None
            }

    def _walk(self, call: Call) -> tuple[fx.Node, int, Region]:
        """From the input of `call` back to the operator that absorbs its affine."""
        if call.input is None:
            raise Unsupported("takes more than one value")
        node, axis, region = call.input, 1, call.region
        users = call.nodes
        while True:
            others = [user for user in node.users if user not in users]
            if others:
                names = ", ".join(dict.fromkeys(describe(user, region) for user in others))
                raise Unsupported(f"{describe(node, region)} is also used by {names}")
            before = self._moved[node].input if node in self._moved and axis == 1 else None
            if before is not None:
                node, users = before, self._moved[node].nodes
            elif region.symbolic:
                through = self._symbolic_step(node)
                if through is None:
                    return node, axis, region
                node, users = through, frozenset({node})
            elif node.target in PRODUCERS:
                return node, axis, region
            elif node.target in THROUGH:
                after = node
                node, axis = THROUGH[node.target](node, axis, self._training)
                users = frozenset({after})
            else:
                raise Unsupported(f"its input comes from {describe(node, region)}")

    def _symbolic_step(self, node: fx.Node) -> fx.Node | None:
        """The value before `node`, None where `node` is a conv; modules instead of operators."""
        if node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            if module._forward_hooks:
                raise Unsupported(
                    f"{node.target} has a hook, and without example inputs its effect is not known"
                )
            if isinstance(module, (*CONVS, *TRANSPOSED_CONVS)):
                return None
            active = self._training and getattr(module, "p", False)
            if isinstance(module, THROUGH_MODULES) and not active:
                return node.all_input_nodes[0]
        raise Unsupported(
            f"its input comes from {node.target}, and without example inputs no shape is known"
        )

    def _absorber(self, node: fx.Node, axis: int, region: Region) -> Absorber:
        path = region.module_path(node)
        module = self._model.get_submodule(path)
        if region.symbolic:
            if not {"weight", "bias"} <= _tensor_names(module):
                raise Unsupported(f"{path} computes its weight in a hook")
            groups = module.groups if isinstance(module, TRANSPOSED_CONVS) else 0
            return Absorber(path, "weight", "bias", module.bias is None, groups)
        produced = PRODUCERS[node.target](node)
        if produced.axis != axis:
            raise Unsupported(f"normalizes another axis than the output channels of {path}")
        owner, weight = self._owner(region, path, produced.weight)
        if produced.bias is not None:
            bias_owner, bias = self._owner(region, path, produced.bias)
            if bias_owner != owner:
                raise Unsupported(f"the bias of {path} belongs to another module, {bias_owner}")
            return Absorber(owner, weight, bias, False, produced.groups)
        if owner != path or not _takes_bias(module):
            raise Unsupported(f"{path} cannot be given a bias")
        return Absorber(owner, weight, "bias", True, produced.groups)

    def _owner(self, region: Region, path: str, value: fx.Node) -> tuple[str, str]:
        """The module and attribute that `value`, read by an operator inside `path`, comes from."""
        if value in region.tensors:
            name = region.tensors[value]
            tensor = self._reads.tensor(name)
            for attribute, own in own_tensors(self._model.get_submodule(path)):
                if own is tensor and tensor is not None:
                    return path, attribute
            owner, _, attribute = name.rpartition(".")
            if tensor is not None and not owner.endswith("parametrizations"):
                return owner, attribute
            raise Unsupported(f"{path} takes a tensor that no module owns")
        scope = join(path, "parametrizations.")
        inner = region.module_path(value)
        if inner.startswith(scope):
            return path, inner.removeprefix(scope).partition(".")[0]
        raise Unsupported(f"{path} computes its weight in forward ({describe(value, region)})")

    def _check_reads(self, path: str, names: Iterable[str], allowed: set[fx.Node]) -> None:
        """Every read of the named tensors through the module at `path` must be one of `allowed`."""
        if path in self._seen.called_outside:
            raise Unsupported(f"{path} is called where its dataflow could not be captured")
        for region, node in self._reads.through(path, names):
            if node not in allowed:
                raise Unsupported(f"{path} also computes {describe(node, region)} without it")


def _check_hooks(norm: nn.Module, call: Call) -> None:
    """A forward pre-hook may change what the BatchNorm receives."""
    if not norm._forward_pre_hooks:
        return
    if call.region.symbolic:
        raise Unsupported("has a hook, and without example inputs its effect is not known")
    users = call.nodes.intersection(call.input.users) if call.input is not None else set()
    if any(user.target is not aten.batch_norm.default for user in users):
        raise Unsupported("a hook changes its input")


def _tensor_names(module: nn.Module) -> set[str]:
    names = set(module._parameters)
    if parametrize.is_parametrized(module):
        names.update(module.parametrizations)  # type: ignore[arg-type]
    return names


def _takes_bias(module: nn.Module) -> bool:
    """Whether `module` has a place for a bias, and its forward just passes it on.

    A forward that reads it twice asks whether there is one, and may then do more than add it.
    """
    vacant = module._parameters.get("bias", module) is None
    reads = [op for op in dis.get_instructions(type(module).forward) if op.argval == "bias"]
    return vacant and len(reads) == 1
