"""What a model does when it really runs: what its modules receive, and what no graph shows."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.core.calls import cloned, running_on
from normswap.core.compat import pytree
from normswap.core.interrupts import entered
from normswap.graph.index import Index
from normswap.graph.snapshot import contents_kept, evaluating
from normswap.graph.supported import python_modules


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    args, kwargs = cloned((args, kwargs))
    # A forward that fails half-way has still shown the inputs of what ran before.
    with contents_kept(model), torch.no_grad():
        try:
            model(*args, **kwargs)
        except Exception:
            return


def received(
    model: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The inputs of the first call of each module that `path` itself calls, in order of execution.

    Not simply its children: one may be a container that is only indexed, and never called.
    """
    parent = model.get_submodule(path)
    found: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    running: list[str] = []

    def enter(child: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not running and child not in found:
                found[child] = cloned((args, kwargs))
            running.append(child)

        return hook

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    for name, module in parent.named_modules():
        if module is not parent and not isinstance(module, torch.jit.ScriptModule):
            hook = enter(f"{path}.{name}" if path else name)
            # First of all, because a hook of the user's may change what the module receives.
            handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    _run(parent, args, kwargs)
    for handle in handles:
        handle.remove()
    return found


class Observed(TorchFunctionMode):
    """One run of a model of which some modules are captured, the `regions`.

    Attributes:
        calls: how often each module ran.
        ways: for each of the `regions`, what it was called with, but for the numbers in tensors.
        read: modules with a parameter or buffer that code outside of every region computed with,
            unless that code was the module's own, or that of another that shares the tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        regions: Iterable[nn.Module],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        super().__init__()
        self.calls: Counter[nn.Module] = Counter()
        self.read: set[nn.Module] = set()
        self.ways: dict[nn.Module, list[Any]] = {}
        self._regions, self._running = set(regions), [model]
        self._index = Index(model, ())
        handles = []
        for module in python_modules(model):
            enter = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
            handles.append(enter)
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        with entered(self):
            _run(model, args, kwargs)
        for handle in handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[module] += 1
        if module in self._regions:
            way = pytree.tree_map_only(Tensor, lambda each: each.dtype, (args, kwargs))
            self.ways.setdefault(module, []).append(way)
        self._running.append(module)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # What gives no tensor (a dtype, a shape) does not depend on the values.
        if isinstance(result, Tensor) and self._regions.isdisjoint(self._running):
            for value in pytree.tree_leaves((args, kwargs)):
                owners = self._index.owners(value)
                if self._running[-1] not in owners:
                    self.read |= owners
        return result


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`inputs` as the positional and keyword arguments of a call.

    Tensors that were made under torch.inference_mode() are copied, since autograd refuses them.
    """
    inputs = pytree.tree_map_only(
        Tensor, lambda each: each.clone() if each.is_inference() else each, inputs
    )
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def check_runs(model: nn.Module, inputs: Any) -> None:
    """Call `model` once, in eval mode and without gradients, and leave no trace of it.

    Raises:
        NormswapError: the model rejects `inputs`, with the model's own words.
    """
    args, kwargs = cloned(as_call(inputs))
    remedy = "give inputs it takes, with --input a shape such as 1x3x224x224"
    with evaluating(model), running_on(inputs, remedy):
        model(*args, **kwargs)
