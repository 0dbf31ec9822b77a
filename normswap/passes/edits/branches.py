"""Edits that merge parallel branches into one module, and take their sum out of the forward."""

import operator
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx, nn

from normswap.core.compat import ASSERT
from normswap.graph.branches.taps import CONVS, Taps, identity_taps, merged_taps, spread, taps_of
from normswap.graph.forward import forward_graph
from normswap.graph.norm_modules import norm_kind
from normswap.graph.operators import is_a
from normswap.norms.batch.frozen import scale_and_shift
from normswap.passes.edits.base import BaseEdit, Count, computing, set_tensor
from normswap.passes.edits.statistics import as_batch_norm, empty_statistics
from normswap.passes.edits.traced_forward import ForwardEdit

# What a forward looks at a shape with, to assert it. An assertion goes with the value it is about.
_CHECKING = frozenset(
    {
        getattr,
        *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        operator.getitem,
        ASSERT,
    }
)


class Constant(BaseModel):
    """A tensor that depends on parameters alone: an operand in the forward of a module."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    node: str
    operand: int

    def value(self, model: nn.Module) -> Tensor:
        """What it is now, one number or one per channel."""
        module = model.get_submodule(self.path)
        graph = forward_graph(module)
        user = next(node for node in graph.nodes if node.name == self.node)
        running = fx.Interpreter(module, garbage_collect_values=False, graph=graph)
        wanted = {user.args[self.operand]}
        for node in reversed(graph.nodes):
            if node in wanted:
                wanted.update(node.all_input_nodes)
        for node in graph.nodes:
            if node in wanted:
                running.env[node] = running.run_node(node)
        value = running.env[user.args[self.operand]]
        assert isinstance(value, Tensor)
        return value.flatten()


class Branch(BaseModel):
    """One addend: a conv or Linear, the shift of a norm, or the input itself, times its factors.

    Attributes:
        kernel: the conv or Linear.
        shift: the norm whose shift it is.
        factor: a number.
        scales: the norms whose scale it is multiplied with.
        constants: what else it is multiplied with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernel: str | None = None
    shift: str | None = None
    factor: float = 1.0
    scales: tuple[str, ...] = ()
    constants: tuple[Constant, ...] = ()

    def multiplier(self, model: nn.Module) -> Tensor:
        """The product of its factors, (1,) or one per channel."""
        scales = [_affine(model, path)[0] for path in self.scales]
        constants = [constant.value(model).double() for constant in self.constants]
        return prod([*scales, *constants], start=torch.tensor([self.factor], dtype=torch.float64))

    def has_bias(self, model: nn.Module) -> bool:
        """Whether it adds a constant."""
        if self.kernel is None:
            return self.shift is not None
        return model.get_submodule(self.kernel)._parameters["bias"] is not None


class MergeInto(BaseEdit):
    """Let one module compute the sum of branches: W' = sum of f_i W_i, b' = sum of f_i b_i.

    Attributes:
        branches: the addends, the module itself among them.
        channels: of the input; the output has as many where the input itself is a branch.
        passed: the norms between the module and the sum, each by all of its paths, which have
            nothing left to do.
    """

    edit: Literal["merge_into"] = "merge_into"
    branches: tuple[Branch, ...]
    channels: Count
    passed: tuple[tuple[str, ...], ...] = ()

    def apply(self, model: nn.Module) -> None:
        target = self.module(model)
        dtype = computing(target).dtype
        with torch.no_grad():
            kernel, bias, taps = self._sum(model)
            biased = True
            if isinstance(target, (*CONVS, nn.Linear)):
                self.require(len(kernel) == len(target.weight))
                biased = any(branch.has_bias(model) for branch in self.branches)
            else:
                self.require(kernel.numel() == len(bias) == self.channels)
                kernel = kernel.flatten()
            set_tensor(target, "weight", kernel.to(dtype))
            if biased:
                set_tensor(target, "bias", bias.to(dtype))
        if isinstance(target, CONVS):
            _set_taps(target, taps)
        elif norm_kind(target) == "batch":
            empty_statistics(target)
        for paths in self.passed:
            norm = self.module(model, paths[0])
            self.put(model, paths, norm, nn.Identity().train(norm.training))

    def _sum(self, model: nn.Module) -> tuple[Tensor, Tensor, Taps]:
        """The kernel (C_out, C_in / groups, ...), the bias (C_out,) and where the taps are."""
        target = self.module(model)
        device = next(iter([*target.parameters(), *target.buffers()])).device
        sizes = [taps_of(model.get_submodule(b.kernel)).size for b in self.branches if b.kernel]
        identity = identity_taps(len(sizes[0]) if sizes else 0, self.channels)
        ones = torch.ones(self.channels, 1, *identity.size, dtype=torch.float64, device=device)
        kernels: list[tuple[Tensor, Taps]] = []
        bias = torch.zeros(1, dtype=torch.float64, device=device)
        for branch in self.branches:
            times = branch.multiplier(model).to(device)
            weight, taps, own = ones, identity, None
            if branch.shift is not None:
                bias = bias + times * _affine(model, branch.shift)[1]
                continue
            if branch.kernel is not None:
                module = model.get_submodule(branch.kernel)
                weight, own = _parameter(module, "weight").double(), module._parameters["bias"]
                taps = taps_of(module)
            kernels.append((weight * times.view(-1, *[1] * (weight.dim() - 1)), taps))
            if own is not None:
                bias = bias + times * own.double()
        whole = merged_taps([taps for _, taps in kernels])
        kernel = torch.stack([spread(weight, taps, whole) for weight, taps in kernels]).sum(0)
        return kernel, bias.expand(len(kernel)).clone(), whole

    def __str__(self) -> str:
        branches = sum(branch.shift is None for branch in self.branches)
        return f"{branches} branches into {self.path}"


class BypassOperators(ForwardEdit):
    """Take operators out of the forward of a module: each gives one of its operands instead.

    Attributes:
        kept: by the name of an operator in `forward_graph`, the position of the operand it gives.
        removed: paths, from the module, of the children that nothing calls any more.
    """

    edit: Literal["bypass"] = "bypass"
    is_step: ClassVar[bool] = True
    kept: dict[str, int]
    removed: tuple[str, ...]

    def apply(self, model: nn.Module) -> None:
        self.require(bool(self.kept or self.removed))  # the graph is traced for something
        super().apply(model)
        module = self.module(model)
        for path in self.removed:
            owner, _, name = path.rpartition(".")
            parent = module.get_submodule(owner)
            self.require(name in parent._modules)
            if isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
                del parent._modules[name]
            else:  # the class may ask whether it is there
                setattr(parent, name, None)

    def change(self, module: nn.Module, graph: fx.Graph) -> None:
        self.require({node.name for node in graph.nodes} >= self.kept.keys())
        bypass(graph, self.kept)

    def __str__(self) -> str:
        return f"{', '.join(self.kept)} out of {self.path or 'the forward'}"


def bypass(graph: fx.Graph, kept: dict[str, int]) -> list[str]:
    """Let each named node be one of its operands, and erase what only computed the others.

    Returns:
        The children that were called for that alone, by their path.
    """
    unused: list[fx.Node] = []
    for node in [node for node in graph.nodes if node.name in kept]:
        operand = node.args[kept[node.name]]
        assert isinstance(operand, fx.Node)
        node.replace_all_uses_with(operand)
        unused += [source for source in node.all_input_nodes if source is not operand]
        graph.erase_node(node)
    erased: dict[fx.Node, None] = {}
    for node in unused:  # which grows on the way
        checks = _checks(node)
        if node in erased or checks is None or node.op == "placeholder":
            continue
        for each in (*checks, node):
            unused += each.all_input_nodes
            erased[each] = None
            graph.erase_node(each)
    children = {str(node.target): None for node in erased if node.op == "call_module"}
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    return [path for path in children if path not in called]


def _checks(node: fx.Node) -> list[fx.Node] | None:
    """What only asserts something of `node`, users first; None if anything else uses it."""
    found = list(node.users)
    for user in found:  # which grows on the way
        if user.target not in _CHECKING and not is_a(user, "look"):
            return None
        found += user.users
    return sorted(set(found), reverse=True)


def _parameter(module: nn.Module, name: str) -> Tensor:
    value = module._parameters[name]
    assert value is not None
    return value


def _affine(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    norm = model.get_submodule(path)
    if norm_kind(norm) == "affine":
        return _parameter(norm, "weight").double(), _parameter(norm, "bias").double()
    as_batch_norm(norm)
    return scale_and_shift(norm, torch.float64)


def _set_taps(conv: nn.Module, taps: Taps) -> None:
    assert isinstance(conv, CONVS)
    conv.kernel_size, conv.dilation, conv.groups = taps.size, taps.dilation, taps.groups
    conv.padding = taps.padding
    # torch has it from the padding, for modes other than zeros.
    conv._reversed_padding_repeated_twice = [p for p in reversed(taps.padding) for _ in range(2)]
