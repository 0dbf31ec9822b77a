"""A model's structure at one moment, to be put back.

Looking at a model must not change it, and a plan is carried out whole or not at all. Both rest on
the same thing: a shallow copy of what every module holds. Tensors are referenced, not copied, so a
snapshot costs a few dictionaries. The contents of buffers, and of tensors that are attributes, are
copied on request: many forwards write them, and torch.export does as they do. The parameters of a
large model would not fit into memory twice: each is copied when an operator is about to write into
it (`Watch`), and few forwards write any.
"""

import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from operator import is_, is_not
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.ambient import generators_kept
from normswap.core.compat import TorchDispatchMode, pytree
from normswap.core.interrupts import at_last, entered
from normswap.core.memory import address_of, has_memory
from normswap.core.modes import set_modes
from normswap.graph.supported import python_modules

# The dictionaries inside a module that are changed in place by registering something on it.
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_ATOMS = (int, float, complex, bool, str, bytes, type(None))
_LIBRARIES = sys.stdlib_module_names | {"torch"}  # their objects keep a state of their own


class Snapshot:
    """The class and attributes of every module of `model`; `restore` puts them back.

    So it does with the other objects, lists, sets and dictionaries that a module's attributes lead
    to, and with the memory of a tensor whose `.data` was assigned.

    What is as it was is not touched, and at every step of `restore` a module has all of its
    attributes, as another thread may use the model, and an exception may stop it. It can be called
    any number of times.
    """

    def __init__(self, model: nn.Module, *, contents: bool = False) -> None:
        reached = list(held(model))
        modules = [
            each
            for each in reached
            if isinstance(each, nn.Module) and not isinstance(each, torch.jit.ScriptModule)
        ]
        self._modules = [
            (module, type(module), dict(vars(module)), _registries(module)) for module in modules
        ]
        # A GraphModule has a class of its own, and its code there.
        self._code = [
            (type(module), type(module).forward)
            for module in modules
            if isinstance(module, fx.GraphModule)
        ]
        # The dictionaries themselves stay: a hook's handle refers to the one it is in.
        registries = {id(registry) for *_, held in self._modules for registry, _ in held.values()}
        self._mappings = [
            (each, dict(each))
            for each in reached
            if isinstance(each, dict) and id(each) not in registries
        ] + [
            (vars(each), dict(vars(each)))
            for each in reached
            if not isinstance(each, (nn.Module, Tensor, FunctionType, *_CONTAINERS))
        ]
        # What a forward appends to (features, losses) as well.
        self._lists = [(each, list(each)) for each in reached if isinstance(each, (list, deque))]
        self._sets = [(each, set(each)) for each in reached if isinstance(each, set)]
        self._tensors = [
            (tensor, tensor.data, tensor.requires_grad) for tensor in reached if has_memory(tensor)
        ]
        self._contents = (
            [
                (tensor, tensor.detach().clone())
                for tensor in reached
                if isinstance(tensor, Tensor)
                and not isinstance(tensor, nn.Parameter)
                and tensor.is_leaf  # not a weight that a hook computes from parameters
                and not (nn.parameter.is_lazy(tensor) or tensor.is_meta)  # those have no contents
            ]
            if contents
            else []
        )

    def restore(self) -> None:
        for module, cls, attributes, registries in self._modules:
            _restore_module(module, cls, attributes, registries)
        for graph_class, forward in self._code:
            if graph_class.forward is not forward:
                graph_class.forward = forward
        for mapping, content in self._mappings:
            _restore_mapping(mapping, content)
        for values, items in self._lists:
            if len(values) != len(items) or any(map(is_not, values, items)):
                if isinstance(values, list):
                    values[:] = items
                else:
                    values.clear()
                    values.extend(items)
        for members, present in self._sets:
            if members != present:
                members.update(present)
                members.intersection_update(present)
        for tensor, data, requires_grad in self._tensors:
            if not _same_memory(tensor, data):
                tensor.data = data
            if tensor.requires_grad is not requires_grad and tensor.is_leaf:
                tensor.requires_grad_(requires_grad)
        with torch.no_grad():
            for tensor, before in self._contents:
                if not torch.equal(tensor, before):
                    tensor.detach().copy_(before)


def held(model: nn.Module) -> Iterator[Any]:
    """Every module, object, container, tensor and function that attributes of `model` lead to."""
    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        value = stack.pop()
        if type(value) in _ATOMS or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            stack += value.values()
        elif isinstance(value, _CONTAINERS):
            stack += value
        elif isinstance(value, nn.Module) or _is_users_object(value):
            stack += vars(value).values()
        elif not isinstance(value, (Tensor, FunctionType)):
            continue
        yield value


def _is_users_object(value: Any) -> bool:
    if type(getattr(value, "__dict__", None)) is not dict or isinstance(value, Tensor):
        return False
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    return not library or isinstance(value, (SimpleNamespace, Namespace))


_Registries = dict[str, tuple[dict[str, Any], dict[str, Any]]]


def _registries(module: nn.Module) -> _Registries:
    """The registries of `module` by name, each with a copy."""
    return {name: (vars(module)[name], dict(vars(module)[name])) for name in _REGISTRIES}


def _restore_module(
    module: nn.Module, cls: type, attributes: dict[str, Any], registries: _Registries
) -> None:
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)
    for name, (registry, content) in registries.items():
        if not _same(registry, content):
            # A new one: no step turns one dictionary into another and leaves it whole meanwhile.
            attributes[name] = dict(content)
            registries[name] = attributes[name], content
    if not _same(vars(module), attributes):
        object.__setattr__(module, "__dict__", dict(attributes))


def _restore_mapping(mapping: dict[Any, Any], content: dict[Any, Any]) -> None:
    if _same(mapping, content):
        return
    mapping.update(content)
    for key in mapping.keys() - content.keys():
        del mapping[key]
    if list(mapping) != list(content):  # hooks run in their order
        for key, value in content.items():
            del mapping[key]
            mapping[key] = value


def _same(mapping: Mapping[Any, Any], content: Mapping[Any, Any]) -> bool:
    """Whether the two hold the same objects, in the same order."""
    if len(mapping) != len(content):
        return False
    if not mapping:  # most of torch's registries
        return True
    return list(mapping) == list(content) and all(map(is_, mapping.values(), content.values()))


def _same_memory(tensor: Tensor, data: Tensor) -> bool:
    return (
        tensor.data_ptr() == data.data_ptr()
        and tensor.shape == data.shape
        and tensor.stride() == data.stride()
        and tensor.dtype == data.dtype
    )


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, an operator that writes into a tensor of `model` copies its memory first.

    `restore` gives the contents back. Writes through `.data` and through views are seen too, since
    they are writes into the same memory. It takes no memory unless something is written.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {address_of(each) for each in held(model) if has_memory(each)}
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def written(self) -> bool:
        """Whether any was written into."""
        return bool(self._copies)

    def restore(self) -> None:
        for storage, before in self._copies.values():
            storage.copy_(before)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        schema = getattr(func, "_schema", None)
        if schema is not None and schema.is_mutable:
            arguments = schema.arguments
            given = dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
            for each in arguments:
                if each.alias_info is not None and each.alias_info.is_write:
                    self._keep(pytree.tree_leaves(given.get(each.name)))
        return func(*args, **kwargs)

    def _keep(self, values: Iterable[Any]) -> None:
        for value in values:
            if has_memory(value):
                memory = address_of(value)
                if memory in self._watched and memory not in self._copies:
                    storage = value.untyped_storage()
                    self._copies[memory] = storage, storage.clone()


@contextmanager
def contents_kept(model: nn.Module) -> Iterator[Watch]:
    """What the operators inside write into the tensors of `model` is put back at the end.

    For code that really runs the model. Not around torch.export, whose operators run on tensors
    without contents, and whose graph of a torch.cond is another one inside a dispatch mode.
    """
    watch = Watch(model)
    with at_last(watch.restore), entered(watch):
        yield watch


@contextmanager
def untouched(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Whatever happens inside, `model` and the random number generators end as they began.

    Covers each module's class, attributes, training flag and hooks, the objects and containers that
    attributes lead to, the contents of the buffers, and the generators of torch (all devices),
    numpy and the standard library. Whoever runs the model inside also needs `contents_kept`.

    Args:
        training: the mode in which the model is inside; by default the one it is in.
    """
    before = Snapshot(model, contents=True)
    with generators_kept(), at_last(before.restore):
        if training is None:
            yield
            return
        watch = Watch(model)  # some merge weights in their train()
        with at_last(watch.restore):
            with entered(watch):
                set_modes([(module, training) for module in python_modules(model)])
            yield


@contextmanager
def own_forwards_kept(module: nn.Module) -> Iterator[None]:
    """What is set as the `forward` of an instance at or below `module` inside is gone after it.

    A forward that wraps those of its children while it runs, to record what they return, leaves the
    wrappers there where it raises, as one that is traced may.
    """
    before = [(each, vars(each).get("forward")) for each in python_modules(module)]
    try:
        yield
    finally:
        for each, forward in before:
            if vars(each).get("forward") is forward:
                continue
            vars(each).pop("forward")
            if forward is not None:
                vars(each)["forward"] = forward


@contextmanager
def evaluating(*models: nn.Module, contents: bool = True) -> Iterator[None]:
    """Inside, `models` are in eval mode and record no gradients; after it they are `untouched`.

    Args:
        contents: put back what a forward writes into its weights. That costs some microseconds for
            each operator, which a measurement of time has to do without.
    """
    together = nn.ModuleList(models)
    with (
        entered(torch.no_grad()),
        untouched(together, training=False),
        contents_kept(together) if contents else nullcontext(),
    ):
        yield


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the body raises, Ctrl-C included, `model` is put back as it was before."""
    before: Snapshot | None = Snapshot(model)

    def restore() -> None:
        if before is not None:
            before.restore()

    with at_last(restore):
        yield
        before = None  # all is done
