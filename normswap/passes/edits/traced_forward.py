"""Let a module compute a changed torch.fx graph of its forward (`normswap.graph.forward`).

Most rewrites replace modules. Some need the code that calls them: a bare `F.batch_norm` in a
forward, or the operators of a GraphModule. `set_forward` lets the module compute a changed one. The
module stays the object it was; an instance gets a class of its own, below which its old one is.

Source: Reed et al. 2021, torch.fx (arXiv 2112.08429).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType, new_class
from typing import Any

from torch import fx, nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.core.interrupts import at_last
from normswap.graph.forward import CHANGED, forward_graph
from normswap.graph.parametrized import parametrized_tensors
from normswap.passes.edits.base import QUOTABLE, BaseEdit


def set_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Let `module`, in place, compute `graph` from now on: one of `forward_graph`, changed.

    Its class is a new subclass of the one it had, or of that below an earlier rewrite. All else is
    as before: identity, methods, attributes, hooks, parameters; it can be copied, pickled, exported
    and rewritten again. Its forward is the graph's in training mode also, which for a symbolic
    trace is that of eval mode; flags of its children still count. Of a GraphModule the graph is
    replaced, and the old one is not changed.
    """
    changed = CHANGED.get()
    if changed is not None:
        changed[module] = graph
    else:
        _write(module, graph)


@contextmanager
def rewriting_at_the_end() -> Iterator[None]:
    """Inside, `set_forward` only notes the graph: many changes of one forward are written once.

    Copying the graph of a program and generating its code takes as long as it has operators, and
    its BatchNorms are changed one after the other. If the body raises, nothing is written.
    """
    changed: dict[nn.Module, fx.Graph] = {}
    with at_last(partial(CHANGED.set, CHANGED.get())):
        CHANGED.set(changed)
        yield
    for module, graph in changed.items():
        _write(module, graph)


def _write(module: nn.Module, graph: fx.Graph) -> None:
    _check_names(graph)
    with below_parametrizations(module):
        cls: Any = type(module)
        if isinstance(module, fx.GraphModule):
            # Assigning a graph writes the forward into the class: the old class keeps its own, so
            # that a snapshot of the module can be restored.
            own: Any = new_class("GraphModuleImpl", cls.__bases__)
            for name in ("__name__", "__qualname__", "__module__"):
                setattr(own, name, getattr(cls, name))
            module.__class__ = own
            module.graph = graph
        else:
            code = graph.python_code("self")
            original = cls.original if issubclass(cls, RewrittenForward) else cls
            module.__class__ = _rewritten_class(original, code.src, code.globals)


def _check_names(graph: fx.Graph) -> None:
    """Raise unless the code for `graph` is nothing but its operators.

    torch.fx writes the names of modules and tensors into it between quotes, as they are.
    """
    for node in graph.nodes:
        name = str(node.target)
        if node.op in ("call_module", "get_attr") and not QUOTABLE.fullmatch(name):
            raise NormswapError(f"no code can be generated for the name {name!r}; rename that")


def rewrite_forward(
    module: nn.Module, path: str, change: Callable[[nn.Module, fx.Graph], object]
) -> None:
    """Let `change` change the forward of the module at `path`, a fixed graph from then on.

    Raises:
        NormswapError: it cannot be traced, or changed as the plan says.
    """
    try:
        graph = forward_graph(module)
        change(module, graph)
    except Unsupported as reason:
        raise NormswapError(
            f"the plan rewrites the forward of {path!r}, but: {reason}; plan it anew"
        ) from reason
    set_forward(module, graph)


class ForwardEdit(BaseEdit):
    """An edit of the forward of the module at `path`, which is a fixed graph from then on."""

    def apply(self, model: nn.Module) -> None:
        rewrite_forward(self.module(model), self.path, self.change)

    def change(self, module: nn.Module, graph: fx.Graph) -> None:
        raise NotImplementedError

    def call(self, graph: fx.Graph, name: str) -> fx.Node:
        found: list[fx.Node] = [node for node in graph.nodes if node.name == name]
        self.require(len(found) == 1 and found[0].op == "call_function")
        return found[0]


class RewrittenForward:
    """Mixed into the class of one module, whose forward is generated code.

    Attributes:
        original: the class without it.
        source: the code.
        names: what the code refers to.
    """

    original: type[nn.Module]
    source: str
    names: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle and deepcopy are told how to make it again;
        # Python modules (torch) can only be referred to by name.
        modules = {n: v.__name__ for n, v in self.names.items() if isinstance(v, ModuleType)}
        others = {n: v for n, v in self.names.items() if n not in modules}
        state = super().__reduce_ex__(protocol)[2:]
        return _rewritten_instance, (self.original, self.source, modules, others), *state


def _rewritten_class(
    original: type[nn.Module], source: str, names: dict[str, Any]
) -> type[nn.Module]:
    scope = dict(names)
    exec(source, scope)  # what torch.fx generated from a graph
    body = {
        "forward": scope["forward"],
        "original": original,
        "source": source,
        "names": names,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (RewrittenForward, original), body)


def _rewritten_instance(
    original: type[nn.Module], source: str, modules: dict[str, str], others: dict[str, Any]
) -> nn.Module:
    names = {name: import_module(module) for name, module in modules.items()} | others
    return object.__new__(_rewritten_class(original, source, names))


@contextmanager
def below_parametrizations(module: nn.Module) -> Iterator[None]:
    """Inside, the class of `module` is the one below what torch's parametrizations put on top."""
    cls = type(module)
    if not parametrized_tensors(module):
        yield
        return
    module.__class__ = cls.__bases__[0]
    yield
    module.__class__ = type(cls.__name__, (type(module),), dict(vars(cls)))
