"""Which module an operator's weight and bias belong to, and whether they may be changed there.

`SizeDependence` says which numbers of a captured graph are written in the code, and which are
computed from a size. In `y / x.shape[-1]` the captured graph has the number of the example's size.
The forward, traced without an example, shows where it comes from.
"""

import dis
import inspect
from collections.abc import Iterable, Set

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from normswap.core.compat import pytree
from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.forward import aligned
from normswap.graph.functional_norms import functional_kind
from normswap.graph.index import Index, Region, join, own_tensors
from normswap.graph.operators.operator import sources_of
from normswap.graph.operators.rule import Context, Folding
from normswap.graph.sites import Call, NormSite, describe


class SizeDependence:
    """Tells of an operator of a captured model whether its numbers are the same for every input."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __call__(self, node: fx.Node) -> bool:
        """Whether it is known that the numbers `node` is given are; False where no trace tells."""
        region = self._index.region_of[node]
        stack = region.stack(node)
        if region.symbolic or not stack:
            return False
        call, path = stack[-1]
        try:
            written = aligned(self._index, region, call, path).get(node)
        except Unsupported:
            return False
        return written is not None and _tensors(written) == _tensors(node)


def _tensors(node: fx.Node) -> int:
    """How many of the operands are computed; a literal is not, nor is a list of them."""
    operands = pytree.tree_leaves(tuple(node.args[:2]))
    return sum(isinstance(operand, fx.Node) for operand in operands)


# What runs when a layer is called; on an instance it takes the place of the class's own.
CALLED = frozenset({"forward", "_conv_forward"})


class Owners:
    """The owners of the parameters of a captured model."""

    def __init__(self, seen: Capture) -> None:
        self._seen, self._index = seen, seen.index
        self._literals = SizeDependence(self._index)

    def context(self, *, training: bool) -> Context:
        """What a rule may ask about this model."""
        return Context(training, self.constant, self._literals, computed=self.is_computed)

    def is_computed(self, weight: fx.Node) -> bool:
        """Whether a forward computes `weight` from tensors of modules, and from nothing else."""
        region = self._index.region_of[weight]
        if weight in region.tensors or "parametrizations" in region.module_path(weight).split("."):
            return False
        queue, seen = [weight], {weight}
        while queue:
            node = queue.pop()
            if node.op == "placeholder" and node not in region.tensors:
                return False
            queue += [source for source in sources_of(node) if source not in seen]
            seen.update(sources_of(node))
        return True

    def constant(self, node: fx.Node) -> Tensor | None:
        """The parameter, buffer or constant index that `node` reads; None for anything else."""
        region = self._index.region_of[node]
        name = region.tensors.get(node)
        return region.indices.get(node) if name is None else self._index.tensor(name)

    def weight_and_bias(self, each: Folding) -> tuple[str, str, str | None, bool]:
        """Where the weight and bias are that fold in: module, weight, bias, and whether it is new.

        The bias is None where there is none and none can be given.

        Raises:
            Unsupported: they are not the parameters of one module.
        """
        region = self._index.region_of[each.node]
        path = region.module_path(each.node)
        if each.bias_alone:
            gives = _takes_bias(self._index.modules[path])
            return path, "bias", "bias" if gives else None, gives
        owner, weight = self.of(region, path, each.weight)
        if each.bias is not None:
            bias_owner, bias = self.of(region, path, each.bias)
            if bias_owner != owner:
                raise Unsupported(f"the bias of {path} belongs to another module, {bias_owner}")
            return owner, weight, bias, False
        module = self._index.modules[owner]
        if each.gives_bias and owner == path and _takes_bias(module):
            return owner, weight, "bias", True
        # The calls of a graph take any argument; the bare module with the weight can hold a bias.
        in_graph = isinstance(self._index.modules[path], fx.GraphModule)
        bare = type(module) is nn.Module and not hasattr(module, "bias")
        gives = each.gives_bias and in_graph and bare
        return owner, weight, "bias" if gives else None, gives

    def of(self, region: Region, path: str, value: fx.Node) -> tuple[str, str]:
        """The module and attribute that `value`, read by an operator inside `path`, comes from."""
        if value in region.tensors:
            name = region.tensors[value]
            tensor = self._index.tensor(name)
            for attribute, own in own_tensors(self._index.modules[path]):
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

    def check_reads(self, path: str, names: Iterable[str], allowed: Set[fx.Node]) -> None:
        """Every read of the named tensors through the module at `path` must be one of `allowed`.

        Raises:
            Unsupported: something else reads one of them.
        """
        self._seen.check_calls(path)
        for node in self._index.reads(path, names):
            if node not in allowed:
                where = describe(node, self._index.region_of[node])
                raise Unsupported(f"{path} also computes {where} without it")

    def check_seen(self, site: NormSite) -> None:
        """Whether all that reads the parameters of `site` is one of its calls in the graphs.

        Raises:
            Unsupported: it is not.
        """
        if site.why_not is not None:
            raise Unsupported(site.why_not)
        if self._seen.how == "module tree":
            why = self._seen.why_unseen("")
            raise Unsupported(f"the dataflow is unknown ({why}); give example inputs")
        for path in site.paths:
            self._seen.check_calls(path, "")
        if not site.executions:
            raise Unsupported(
                "is never called with these inputs"
                if site.calls == 0
                else f"could not be captured: {self._seen.why_unseen(site.name)}"
            )
        norm = self._index.modules[site.name]
        inside = {node for call in site.executions for node in call.nodes}
        self.check_reads(site.name, dict(own_tensors(norm)), inside)

    def is_alone(self, path: str) -> bool:
        """Whether the module at `path` runs only where it was captured."""
        return path not in self._seen.called_outside


def check_hooks(norm: nn.Module, call: Call) -> None:
    """A hook may change what the BatchNorm receives, or what it returns.

    Raises:
        Unsupported: it does, or it is not known.
    """
    returned = call.output is None or functional_kind(call.output) == "batch"
    if norm._forward_hooks and not call.region.symbolic and not returned:
        raise Unsupported("a hook changes its output")
    if not norm._forward_pre_hooks:
        return
    if call.region.symbolic:
        raise Unsupported("has a hook, and without example inputs its effect is not known")
    users = call.nodes.intersection(call.input.users) if call.input is not None else set()
    if any(functional_kind(user) != "batch" for user in users):
        raise Unsupported("a hook changes its input")


def tensor_names(module: nn.Module) -> set[str]:
    """The parameters of a module, parametrized ones included."""
    names = set(module._parameters)
    if parametrize.is_parametrized(module):
        names.update(module.parametrizations)  # type: ignore[arg-type]
    return names


def _takes_bias(module: nn.Module) -> bool:
    """Whether `module` has a place for a bias, and its forward just passes it on.

    A forward that reads it twice asks whether there is one, and may then do more than add it. One
    that was replaced on the instance, or a convolution's own way to convolve, may leave it out.
    """
    if module._parameters.get("bias", module) is not None or CALLED & vars(module).keys():
        return False
    forward, convolve = type(module).forward, getattr(type(module), "_conv_forward", None)
    if convolve is not None and not convolve.__module__.startswith("torch."):
        return False
    reads = [op for op in dis.get_instructions(inspect.unwrap(forward)) if op.argval == "bias"]
    return len(reads) == 1
