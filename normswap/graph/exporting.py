"""One module exported by torch.export, as a capture needs it.

torch.export (non-strict) follows the Python code of the module and its hooks. What it does for a
program that is to run alone is undone here, because a capture has to lead back to the model: the
names it gives to modules, graphs inside the graph for torch.no_grad and autocast, its refusal of
outputs that are objects. Where that takes a private name of torch, there is no public one.

torch.export and torch.fx trace for the whole process: `tracing` lets one thread do so at a time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import partial
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import checkpoint

from normswap.core.ambient import alone, loggers_silent, warnings_ignored
from normswap.core.compat import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SET_GRAD_ENABLED,
    DispatchKey,
    FakeTensor,
    ModuleStackTracer,
    Patcher,
    buffer_hooks,
    export_pass,
    pytree,
)
from normswap.core.interrupts import at_last, entered, patched

_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
# What torch.export takes as a leaf of an output, and what else cannot hold a tensor.
_LEAVES = (Tensor, str, type(None), *_NUMBERS)
_PLAIN = (str, bytes, type(None), *_NUMBERS, Enum, np.ndarray, np.generic)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout)


def exported(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool
) -> ExportedProgram:
    """The program of one call of `module`.

    Args:
        training: of training mode, in which it matters where gradients end.
    """
    # torch warns of attributes set in forward, which `untouched` puts back, and logs why a module
    # cannot be exported, at a length of pages; the error that it raises says it too.
    with (
        tracing(),
        warnings_ignored(),
        loggers_silent("torch._subclasses", "torch.fx", "torch.export", "torch._export"),
        _hooked(module),
        # A node does not carry the line of code that made it: that takes a tenth of the time.
        patched(fx.config, do_not_emit_stack_traces=True),
        _no_hook_left(),
        _without_checkpoints(),
        _distributions_unchecked(),
        _named_by_identity(),
        _quick_batch_norms(),
        _modes_as_nodes(training=training),
    ):
        return torch.export.export(module, args, kwargs, strict=False)


@contextmanager
def tracing() -> Iterator[None]:
    """Inside, no other thread traces, and what this one traces is seen by no other.

    torch.fx, and so torch.export, replaces `nn.Module.__call__` and `__getattr__` while it traces:
    the forward of another thread would run into this one's graph.
    """
    thread = get_ident()
    replace = Patcher.patch_method

    def replace_here(
        self: Patcher, cls: type, name: str, new: Callable[..., Any], deduplicate: bool = True
    ) -> None:
        elsewhere = getattr(cls, name)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (new if get_ident() == thread else elsewhere)(*args, **kwargs)

        replace(self, cls, name, chosen, deduplicate)

    with alone(), patched(Patcher, patch_method=replace_here):
        yield


@contextmanager
def _hooked(module: nn.Module) -> Iterator[None]:
    hook = module.register_forward_hook(_only_tensors)
    with at_last(hook.remove):
        yield


def _only_tensors(module: nn.Module, inputs: Any, output: Any) -> list[Tensor] | None:
    """A forward hook: of an output that torch.export would refuse, the tensors in it.

    Of one that may hide tensors (a generator, a function) it changes nothing, and torch refuses it.
    """
    if all(isinstance(leaf, _LEAVES) for leaf in pytree.tree_leaves(output)):
        return None
    try:
        return tensors_in(output)
    except Hidden:
        return None


class Hidden(Exception):
    """An object that cannot be looked into."""


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in what a module returns, and in what the attributes of objects in it refer to.

    Raises:
        Hidden: an object may hold some that nobody can see.
    """
    return list(_tensors(output, set()))


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type, *_PLAIN, *_PLAIN_OF_TORCH)):
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, Mapping):
        inside += value.values()
    elif isinstance(value, Collection):
        inside += value
    else:
        slots = [name for cls in type(value).__mro__ for name in vars(cls).get("__slots__", ())]
        if (
            callable(value)
            or isinstance(value, Iterator)
            or not (slots or hasattr(value, "__dict__"))
        ):
            raise Hidden
        inside += [getattr(value, name, None) for name in slots]
    inside += getattr(value, "__dict__", {}).values()
    for each in inside:
        yield from _tensors(each, seen)


@contextmanager
def _named_by_identity() -> Iterator[None]:
    """Let torch.export name every module by its own path, whatever the way to it in the forward.

    And let it print nothing: where it fails on control flow, it prints the graph so far.

    Where a module is registered twice, torch hands out proxies that name a module by how it was
    reached: `layers[1:]` makes "layers.slice(1, None, None).0", which is no path of the model. A
    proxy is neither the module itself nor of its class, so code that asks for these would be
    captured wrongly. Without proxies the tracer looks the module up.
    """
    make, trace = ModuleStackTracer.__init__, ModuleStackTracer.trace

    def make_without_proxies(self: ModuleStackTracer, scope_root: fx.GraphModule) -> None:
        make(self, scope_root)
        self.enable_attr_proxy = False

    def trace_in_silence(self: ModuleStackTracer, *args: Any, **kwargs: Any) -> fx.Graph:
        try:
            return trace(self, *args, **kwargs)
        except RuntimeError as error:
            vars(error).pop("partial_fx_graph", None)
            raise

    with patched(ModuleStackTracer, __init__=make_without_proxies, trace=trace_in_silence):
        yield


@contextmanager
def _quick_batch_norms() -> Iterator[None]:
    """Let a BatchNorm in eval mode tell the shape of its output from that of its input.

    torch works it out by decomposing the operator into a dozen others, all without contents, which
    is two fifths of the time that a capture takes. The graph holds the operator itself either way.
    """
    operator = torch.ops.aten.native_batch_norm.default
    decomposed = operator.py_kernels[DispatchKey.CompositeImplicitAutograd]

    def batch_norm(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        *rest: float,
    ) -> Any:
        given = (input, weight, bias, running_mean, running_var)
        fixed = not training and running_mean is not None and running_var is not None
        if not fixed or not all(each is None or _has_no_contents(each) for each in given):
            return decomposed(*given, training, *rest)
        output = input
        for each in (weight, bias):  # the output requires a gradient where one of them does
            output = output * (1.0 if each is None else each.sum())
        unused = input.new_empty(0)
        return output, unused, unused

    keys = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
    before = {key: operator.py_kernels[key] for key in keys if key in operator.py_kernels}

    def restore() -> None:
        for key in keys:
            if key not in before:
                operator.py_kernels.pop(key, None)
        operator.py_kernels.update(before)
        operator._dispatch_cache.clear()

    with at_last(restore):
        operator.py_kernels.update(dict.fromkeys(keys, batch_norm))
        operator._dispatch_cache.clear()
        yield


def _has_no_contents(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.constant is None


@contextmanager
def _modes_as_nodes(*, training: bool) -> Iterator[None]:
    """Let torch.export leave what runs in autocast or no_grad in the graph itself.

    It would move that to graphs of their own, and drop one that returns nothing, whatever it writes
    in place. In training the graphs for no_grad stay: an affine that moved across their border
    would begin or cease to have a gradient.
    """

    def unchanged(*graph_and_signature: Any) -> Any:
        return graph_and_signature

    modes = ("autocast",) if training else ("autocast", "set_grad")
    names = [f"replace_{mode}_with_hop_pass" for mode in modes]
    modules = [export_pass(name) for name in names]
    with entered(
        *(patched(module, **{name: unchanged}) for module, name in zip(modules, names, strict=True))
    ):
        yield


def taken_out_modes(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """What each operator runs in, from the calls that switch it, which are taken out of `graph`."""
    found: dict[fx.Node, tuple[str, ...]] = {}
    gradients, autocasts, switches = True, dict[fx.Node, str](), list[fx.Node]()
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            gradients = bool(node.args[0])
        elif node.target is ENTER_AUTOCAST:
            device, dtype, enabled, _ = node.args
            autocasts[node] = (
                f"autocast({device}, {dtype})" if enabled else f"no autocast({device})"
            )
        elif node.target is EXIT_AUTOCAST:
            del autocasts[node.args[0]]
        else:
            modes = (*(() if gradients else ("no_grad",)), *autocasts.values())
            if modes and node.op == "call_function":
                found[node] = modes
            continue
        switches.append(node)
    for node in reversed(switches):
        graph.erase_node(node)
    return found


@contextmanager
def _distributions_unchecked() -> Iterator[None]:
    """Let torch.distributions not check its arguments: a graph cannot branch on their values."""
    distribution = torch.distributions.Distribution
    with at_last(partial(distribution.set_default_validate_args, distribution._validate_args)):
        distribution.set_default_validate_args(False)
        yield


@contextmanager
def _no_hook_left() -> Iterator[None]:
    """Remove torch.export's hook on assigned buffers: torch 2.9 leaves it when an export fails.

    The model could then not assign a buffer any more, whoever runs it.
    """
    hooks = buffer_hooks()
    before = set(hooks)

    def remove() -> None:
        for hook in set(hooks) - before:
            del hooks[hook]

    with at_last(remove):
        yield


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint.checkpoint` just calls the function that it is given.

    It computes the same. But to keep nothing for backward it runs under no_grad, or with hooks on
    what autograd saves, of which a graph shows no dataflow. torch has no switch for that. A model
    may hold `checkpoint` under any name; these two private names it looks up in every call.
    Other threads, which may be training, go on as before.
    """

    thread = get_ident()
    function_class: Any = checkpoint.CheckpointFunction
    around: Any = checkpoint._checkpoint_without_reentrant_generator

    class Direct:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            if get_ident() != thread:
                return function_class.apply(function, preserve_rng_state, *args)
            return function(*args)

    def nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
        if get_ident() != thread:
            yield from around(*args, **kwargs)
        else:
            yield

    with patched(
        checkpoint,
        CheckpointFunction=Direct,
        _checkpoint_without_reentrant_generator=nothing_around,
    ):
        yield
