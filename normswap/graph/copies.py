"""A deep copy of a model that is the model."""

import copy
import dis
import itertools
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, fx, nn

from normswap.core.ambient import warnings_ignored
from normswap.core.errors import NormswapError
from normswap.core.modes import set_modes
from normswap.graph.snapshot import held


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of `model`, hooks and attributes included.

    `copy.deepcopy` alone leaves several things behind:

    - of a GraphModule its hooks on forward and backward, methods replaced on the instance, every
      attribute that its graph does not read, its class's name, and the modes of all modules inside;
    - hooks on parameters;
    - what a function refers to: a lambda or a hook that is an attribute of the copy would go on
      using the original, and so would a forward that was replaced on the instance.

    And it refuses a tensor that was computed with gradients, as torch's older weight_norm leaves
    one on every layer.

    Args:
        share_parameters: the copy's parameters lie in the memory of those of `model`. What is given
            to them as a whole (a gradient, another device) stays theirs; what is written into them
            does not.

    Raises:
        NormswapError: a function of the model refers to it by the name of a global variable.
    """
    reached = list(held(model))
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for value in reached
        if isinstance(value, Tensor) and not value.is_leaf
    }
    if share_parameters:
        memo |= {
            id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in model.parameters()
            if type(parameter) is nn.Parameter
        }
    functions = _Functions(model, reached, memo)
    with warnings_ignored(FutureWarning):  # torch's own, on how a program's inputs are described
        result: nn.Module = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            _complete(module, memo[id(module)], memo)
    functions.rebind()
    if not share_parameters:
        _copy_parameter_hooks(model, functions, memo)
    return result


def _complete(module: fx.GraphModule, twin: fx.GraphModule, memo: dict[int, Any]) -> None:
    """Give the copy of a GraphModule what torch's copy of one leaves out."""
    lost = {
        name: value
        for name, value in vars(module).items()
        if name not in vars(twin) or "_hook" in name
    }
    vars(twin).update(copy.deepcopy(lost, memo))
    type(twin).__name__ = type(module).__name__  # a class that torch made for this instance
    twins = dict(twin.named_modules(remove_duplicate=False))
    set_modes(
        (twins[path], each.training)
        for path, each in module.named_modules(remove_duplicate=False)
        if path in twins
    )


def _copy_parameter_hooks(model: nn.Module, functions: "_Functions", memo: dict[int, Any]) -> None:
    for parameter in model.parameters():
        twin: Any = memo.get(id(parameter))
        if isinstance(twin, nn.Parameter):
            on_gradient, after_accumulation = _hooks(parameter)
            for hook in on_gradient:
                twin.register_hook(functions.twin_of(hook))  # type: ignore[no-untyped-call]
            for hook in after_accumulation:
                hook = functions.twin_of(hook)
                twin.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def _hooks(parameter: nn.Parameter) -> tuple[list[Any], list[Any]]:
    """The hooks on the gradient of `parameter`, and those that run once it is accumulated."""
    # torch has public functions to register hooks, and none to list them.
    each = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    before, after = (list((hooks or {}).values()) for hooks in each)
    return before, after


class _Functions:
    """The functions among what a model reaches that refer to a part of it, and their copies.

    A copy has the same code, and refers to the copy of that part; what else a function refers to is
    the same for both. It is announced in `memo` before the model is copied, and `rebind` fills in
    what it refers to.
    """

    def __init__(self, model: nn.Module, reached: list[Any], memo: dict[int, Any]) -> None:
        self._memo = memo
        self._parts = {id(each) for each in reached if not isinstance(each, FunctionType)}
        self._made: list[tuple[FunctionType, FunctionType]] = []
        for each in reached:
            self._announce(each)
        for parameter in model.parameters():
            for hook in itertools.chain(*_hooks(parameter)):
                self._announce(hook)

    def twin_of(self, value: Any) -> Any:
        """The same for the copy, of a value that a function refers to; itself where it is no part.

        Containers that are no part of the model, and have parts in them, are made anew.
        """
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.twin_of(value.__self__))
        if not self._refers(value):
            return value
        if type(value) is dict:
            return {key: self.twin_of(each) for key, each in value.items()}
        if type(value) in (list, tuple, set):
            return type(value)(map(self.twin_of, value))
        return copy.deepcopy(value, self._memo) if id(value) in self._parts else value

    def rebind(self) -> None:
        for function, twin in self._made:
            for cell, new in zip(function.__closure__ or (), twin.__closure__ or (), strict=True):
                if _is_filled(cell):
                    new.cell_contents = self.twin_of(cell.cell_contents)
            defaults = function.__defaults__
            twin.__defaults__ = None if defaults is None else tuple(map(self.twin_of, defaults))
            keywords = function.__kwdefaults__
            twin.__kwdefaults__ = keywords and {k: self.twin_of(v) for k, v in keywords.items()}

    def _announce(self, value: Any) -> None:
        if isinstance(value, MethodType):
            value = value.__func__
        if not isinstance(value, FunctionType) or id(value) in self._memo:
            return
        for name in set(_global_names(value.__code__)):
            if id(value.__globals__.get(name)) in self._parts and isinstance(
                value.__globals__[name], (nn.Module, Tensor)
            ):
                raise NormswapError(
                    f"the model cannot be copied: its function {value.__qualname__} refers to it "
                    f"by the global variable {name!r}; let it take what it needs as an argument, "
                    "or pass inplace=True"
                )
        if self._refers(value):
            cells = tuple(CellType() for _ in value.__closure__ or ())
            twin = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
            twin.__qualname__, twin.__doc__ = value.__qualname__, value.__doc__
            vars(twin).update(vars(value))
            self._memo[id(value)] = twin
            self._made.append((value, twin))
            for each in _references(value):
                self._announce(each)

    def _refers(self, value: Any, within: frozenset[int] = frozenset()) -> bool:
        """Whether `value` is a part of the model, or leads to one."""
        if id(value) in self._parts:
            return True
        if id(value) in within:
            return False
        return any(self._refers(each, within | {id(value)}) for each in _references(value))


def _references(value: Any) -> list[Any]:
    """What a function, a method or a container of Python's refers to."""
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if type(value) is dict:
        return list(value.values())
    return list(value) if type(value) in (list, tuple, set) else []


def _is_filled(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _global_names(code: CodeType) -> Iterator[str]:
    """The global variables that `code` reads, and that of functions defined in it."""
    for each in dis.get_instructions(code):
        if each.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield each.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
