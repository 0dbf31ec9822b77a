"""Who reads the parameters and buffers of each module: an index over a captured model.

A tensor is read *through* a module if changing that module's attribute (by a parametrization, say)
changes what is read. A module that shares the tensor (tied weights) reads it as its own; any other
code that reads it does so through every module that owns it.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from normswap.graph.capture import Region

_PARAMETRIZATIONS = "parametrizations"
Read = tuple[Region, fx.Node]


class Reads:
    """The index; made once for a capture, since it looks at every node."""

    def __init__(self, model: nn.Module, regions: Iterable[Region]) -> None:
        self._model = model
        self._owners: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            for _, tensor in own_tensors(module):
                self._owners.setdefault(id(tensor), set()).add(module)
        self._tensors: dict[tuple[nn.Module, int], list[Read]] = {}
        self._whole: dict[nn.Module, list[Read]] = {}  # reads of the module as such
        for region in regions:
            for node in region.graph.nodes:
                self._note(region, node)

    def through(self, path: str, names: Iterable[str]) -> Iterator[Read]:
        """The nodes that read one of the named tensors of the module at `path` through it."""
        module = self._model.get_submodule(path)
        yield from self._whole.get(module, ())
        own = dict(own_tensors(module))
        for name in names:
            if name in own:
                yield from self._tensors.get((module, id(own[name])), ())

    def tensor(self, name: str) -> torch.Tensor | None:
        """The model's parameter or buffer `name`; None for a constant that the export lifted."""
        owner, _, attribute = name.rpartition(".")
        try:
            return dict(own_tensors(self._model.get_submodule(owner))).get(attribute)
        except AttributeError:
            return None

    def _note(self, region: Region, node: fx.Node) -> None:
        if region.symbolic and node.op == "call_module":
            module = self._model.get_submodule(str(node.target))
            self._whole.setdefault(module, []).append((region, node))
            return
        if node in region.tensors:
            tensor = self.tensor(region.tensors[node])
            owners = self._owners.get(id(tensor), set())
            for user in node.users:
                reader = self._model.get_submodule(region.module_path(user))
                for owner in {reader} if reader in owners else owners:
                    self._tensors.setdefault((owner, id(tensor)), []).append((region, user))
        parametrized = _parametrized(region, node)
        if parametrized is not None:
            module = self._model.get_submodule(parametrized)
            self._whole.setdefault(module, []).extend(
                (region, user) for user in node.users if _parametrized(region, user) != parametrized
            )


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters and buffers of `module` itself, by name."""
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _parametrized(region: Region, node: fx.Node) -> str | None:
    """The module one of whose tensors `node` computes, inside a parametrization."""
    parts = region.module_path(node).split(".")
    if _PARAMETRIZATIONS not in parts:
        return None
    return ".".join(parts[: parts.index(_PARAMETRIZATIONS)])
