"""The index of a captured model: what ran where, who owns which tensor, and who reads it.

Built once for a capture, each part when it is first asked for, since it looks at every node; all
that decides about a captured model asks it. A module may have several paths and a tensor several
owners, a forward may run several times: what the graphs name by path, the index knows by identity.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.aliases import AliasAnalysis
from normswap.graph.operators.operator import reads_numbers

_PARAMETRIZATIONS = "parametrizations"


@dataclass(frozen=True)
class Region:
    """A captured part of the model.

    Attributes:
        path: the submodule captured, "" for the whole model.
        graph: its operators.
        tensors: the parameter or buffer, by its name in the whole model, behind each node that
            reads one.
        symbolic: nodes are modules (call_module) without shapes, instead of ATen operators.
        indices: the tensors of integers that the code makes out of numbers (`x[:, [2, 0, 1]]`).
        constants: all tensors that the code makes, those included.
        example: which of several examples it was captured with.
        nested: modules that run in a graph inside this one, where nothing is followed, each with
            the reason: torch.cond, say, or in training torch.no_grad, which no gradient passes.
        modes: what is switched around an operator, where something is: "no_grad", autocast.
    """

    path: str
    graph: fx.Graph
    tensors: Mapping[fx.Node, str]
    symbolic: bool
    nested: Mapping[str, str] = field(default_factory=dict)
    indices: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    constants: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    example: int = 0
    modes: Mapping[fx.Node, tuple[str, ...]] = field(default_factory=dict)

    def stack(self, node: fx.Node) -> list[tuple[str, str]]:
        """The modules that `node` ran in, outermost first, as (call, path in the whole model).

        `call` differs between two calls of one module.
        """
        if self.symbolic:
            return [(node.name, str(node.target))] if node.op == "call_module" else [("", "")]
        stack = node.meta.get("nn_module_stack", {})
        return [(call, join(self.path, path)) for call, (path, _) in stack.items()]

    @cached_property
    def ran(self) -> Mapping[str, list[fx.Node]]:
        """The nodes that ran in each call of a module, in order."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for call in dict.fromkeys(call for call, _ in self.stack(node)):
                found.setdefault(call, []).append(node)
        return found

    def module_path(self, node: fx.Node) -> str:
        """The innermost module that `node` ran in."""
        stack = self.stack(node)
        return stack[-1][1] if stack else self.path


@dataclass(frozen=True)
class Run:
    """One call of a module in a captured graph.

    Attributes:
        call: its name in the graph.
        nodes: what ran in it, its children included, in order.
    """

    region: Region
    call: str
    nodes: tuple[fx.Node, ...]

    @property
    def own(self) -> list[fx.Node]:
        """What ran in none of its children."""
        return [node for node in self.nodes if self.region.stack(node)[-1][0] == self.call]


class Index:
    """The index of a model and of the graphs that were captured of it."""

    def __init__(self, model: nn.Module, regions: Iterable[Region]) -> None:
        self.model, self.regions = model, tuple(regions)
        # What `normswap.graph.forward` has traced, and aligned with a call.
        self.traces: dict[nn.Module, fx.Graph | Unsupported] = {}
        self.alignments: dict[tuple[fx.Graph, str], dict[fx.Node, fx.Node] | Unsupported] = {}

    # --- modules ----------------------------------------------------------------------------------

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """Every module, by each of its paths, in the order of the module tree."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def paths(self) -> Mapping[nn.Module, tuple[str, ...]]:
        """All paths of each module, in the order of the module tree."""
        found: dict[nn.Module, list[str]] = {}
        for path, module in self.modules.items():
            found.setdefault(module, []).append(path)
        return {module: tuple(paths) for module, paths in found.items()}

    def first_path(self, path: str) -> str:
        """The first path of the module at `path`."""
        return self.paths[self.modules[path]][0]

    @cached_property
    def runs(self) -> Mapping[nn.Module, tuple[Run, ...]]:
        """The calls of each module, in order of execution."""
        found: dict[nn.Module, dict[tuple[int, str], Run]] = {}
        for number, region in enumerate(self.regions):
            for node in region.graph.nodes:
                for call, path in region.stack(node):
                    runs = found.setdefault(self.modules[path], {})
                    if (number, call) not in runs:
                        runs[number, call] = Run(region, call, tuple(region.ran[call]))
        return {module: tuple(runs.values()) for module, runs in found.items()}

    def ran_in(self, module: nn.Module) -> set[fx.Node]:
        """The nodes that ran in any call of `module`, its children included."""
        return {node for run in self.runs.get(module, ()) for node in run.nodes}

    # --- nodes ------------------------------------------------------------------------------------

    @cached_property
    def region_of(self) -> Mapping[fx.Node, Region]:
        """The graph that each node is in."""
        return {node: region for region in self.regions for node in region.graph.nodes}

    @cached_property
    def position_of(self) -> Mapping[fx.Node, int]:
        """The place of each node in the order of execution, over all graphs."""
        return {node: position for position, node in enumerate(self.region_of)}

    def module_of(self, node: fx.Node) -> nn.Module:
        """The innermost module that `node` ran in."""
        return self.modules[self.region_of[node].module_path(node)]

    @cached_property
    def _aliases(self) -> Mapping[fx.Graph, AliasAnalysis]:
        return {region.graph: AliasAnalysis(region.graph) for region in self.regions}

    def aliases(self, region: Region) -> AliasAnalysis:
        """Which values of `region` share memory, as captured."""
        return self._aliases[region.graph]

    # --- tensors ----------------------------------------------------------------------------------

    @cached_property
    def _owners(self) -> Mapping[int, frozenset[nn.Module]]:
        found: dict[int, set[nn.Module]] = {}
        for module in self.model.modules():
            for _, tensor in own_tensors(module):
                found.setdefault(id(tensor), set()).add(module)
        return {tensor: frozenset(owners) for tensor, owners in found.items()}

    def owners(self, tensor: Tensor) -> frozenset[nn.Module]:
        """The modules that have `tensor` as a parameter or buffer of their own."""
        return self._owners.get(id(tensor), frozenset())

    def tensor(self, name: str) -> Tensor | None:
        """The model's parameter or buffer `name`; None for a constant that the export lifted."""
        owner, _, attribute = name.rpartition(".")
        module = self.modules.get(owner)
        return None if module is None else dict(own_tensors(module)).get(attribute)

    def reads(self, path: str, names: Iterable[str] | None = None) -> Iterator[fx.Node]:
        """The nodes that read a tensor of the module at `path` *through* it.

        That is, changing the attribute of that module (by a parametrization, say) changes what they
        read. A module that shares the tensor (tied weights) reads it as its own; any other code
        that reads it does so through every module that owns it.

        Args:
            names: those of its tensors; by default all that are its own.
        """
        module = self.modules[path]
        yield from self._read_whole.get(module, ())
        own = dict(own_tensors(module))
        for name in own if names is None else names:
            if name in own:
                yield from self._read_tensors.get((module, id(own[name])), ())

    @cached_property
    def _read_tensors(self) -> Mapping[tuple[nn.Module, int], list[fx.Node]]:
        found: dict[tuple[nn.Module, int], list[fx.Node]] = {}
        for region in self.regions:
            for node, name in region.tensors.items():
                tensor = self.tensor(name)
                owners = frozenset() if tensor is None else self.owners(tensor)
                for user in node.users:
                    reader = self.module_of(user)
                    if reader in owners and not reads_numbers(user, node):
                        continue  # a module may ask for the dtype of a tensor of its own
                    for owner in {reader} if reader in owners else owners:
                        found.setdefault((owner, id(tensor)), []).append(user)
        return found

    @cached_property
    def _read_whole(self) -> Mapping[nn.Module, list[fx.Node]]:
        """The reads of modules as such: in a symbolic trace, and of what is parametrized."""
        found: dict[nn.Module, list[fx.Node]] = {}
        for node, region in self.region_of.items():
            if region.symbolic and node.op == "call_module":
                found.setdefault(self.module_of(node), []).append(node)
                continue
            path = _parametrized(region, node)
            if path is not None:
                found.setdefault(self.modules[path], []).extend(
                    user for user in node.users if _parametrized(region, user) != path
                )
        return found


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of `module` itself, by name."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _parametrized(region: Region, node: fx.Node) -> str | None:
    """The module one of whose tensors `node` computes, inside a parametrization."""
    parts = region.module_path(node).split(".")
    if _PARAMETRIZATIONS not in parts:
        return None
    return ".".join(parts[: parts.index(_PARAMETRIZATIONS)])


def join(path: str, name: str) -> str:
    """The dotted path of `name` below `path`; either may be empty."""
    return f"{path}.{name}" if path and name else path or name
