"""Normalization modules: which kind one is, and what it does besides normalizing.

A module is known by torch's classes, subclasses included, by the few that are not torch's but
everywhere (torchvision's FrozenBatchNorm2d), and by what its class declares: `norm_kind`, and
`channel_axis` where that is not 1, as those of `normswap.norms` do and third parties' may. A
subclass may hold more than a normalization: timm's BatchNormAct2d goes on with a drop and an
activation. `anatomy` reads that from a symbolic trace of the one module, so that a rewrite can keep
it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from normswap.errors import first_line

# "batch" for one affine per channel in eval mode, which can be folded and frozen; "group", "layer",
# "instance", "rms", "local_response", or what the class of a module declares.
Kind = str
Statistics = Literal["running", "batch", "frozen", "sample"]

_KINDS: tuple[tuple[type[nn.Module], Kind], ...] = (
    (_BatchNorm, "batch"),
    (_InstanceNorm, "instance"),
    (nn.GroupNorm, "group"),
    (nn.LayerNorm, "layer"),
    (nn.RMSNorm, "rms"),
    (nn.LocalResponseNorm, "local_response"),
)
# torch's own functional forms, by the kind of normalization they compute.
FUNCTIONAL = {
    F.batch_norm: "batch",
    F.instance_norm: "instance",
    F.group_norm: "group",
    F.layer_norm: "layer",
    F.rms_norm: "rms",
    F.local_response_norm: "local_response",
}


class Unsupported(Exception):
    """A site that a rewrite must leave as it is; the message is the reason in the plan."""


@dataclass(frozen=True)
class Anatomy:
    """What a normalization module consists of.

    Attributes:
        channel_axis: the axis of its channels, 1 or -1.
        tail: names of the children it applies to the normalized value, in order.
    """

    channel_axis: int
    tail: tuple[str, ...] = ()


def norm_kind(module: nn.Module) -> Kind | None:
    """The kind of normalization that `module` computes, None if it is not one we know."""
    declared = getattr(type(module), "norm_kind", None)
    if declared is not None:
        return str(declared)
    if is_frozen_batch_norm(module):
        return "batch"
    return next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """torchvision's FrozenBatchNorm2d and its copies: per-channel buffers, nothing that trains.

    Copies that keep their eps to themselves, or have none, are not known.
    """
    named = any(cls.__name__ == "FrozenBatchNorm2d" for cls in type(module).__mro__)
    buffers = dict(module.named_buffers(recurse=False))
    return (
        named
        and hasattr(module, "eps")
        and {"weight", "bias", "running_mean", "running_var"} <= buffers.keys()
    )


def statistics(module: nn.Module, kind: Kind) -> Statistics:
    """Where the statistics come from in eval mode."""
    if is_frozen_batch_norm(module) or getattr(module, "frozen_statistics", False):
        return "frozen"
    if any(name.startswith("running_") for name, _ in module.named_buffers(recurse=False)):
        return "running"
    return "batch" if kind == "batch" else "sample"


def torch_class(module: nn.Module) -> type[nn.Module]:
    """The nearest torch class that `module` is or derives from."""
    return next(cls for cls in type(module).__mro__ if cls.__module__.startswith("torch.nn"))


def anatomy(module: nn.Module) -> Anatomy:
    """What `module` computes around its normalization.

    Raises:
        Unsupported: its forward does something that cannot be kept as a chain of its children.
    """
    axis = -1 if norm_kind(module) in ("layer", "rms") else 1
    shape = getattr(module, "normalized_shape", ())
    if len(shape) > 1:
        raise Unsupported(f"normalizes over several axes at once, {tuple(shape)}")
    cls = getattr(type(module), "thawed", type(module))
    if "forward" in vars(module):
        raise Unsupported(f"the forward of {cls.__name__} was replaced on the instance")
    if cls.forward is torch_class(module).forward or is_frozen_batch_norm(module):
        return Anatomy(axis)
    if hasattr(cls, "norm_kind"):  # one of our own: exactly a normalization
        return Anatomy(getattr(module, "channel_axis", 1))
    tail: list[str] = []
    node = _result(_trace(module, cls))
    while node.op == "call_module" and len(node.all_input_nodes) == 1:
        tail.insert(0, str(node.target))
        node = node.all_input_nodes[0]
    if node.target in FUNCTIONAL and _is_its_own(module, node):
        return Anatomy(axis, tuple(tail))
    if not tail and _is_layer_norm_over_channels(node):
        return Anatomy(1)
    raise Unsupported(f"{cls.__name__}.forward does more than normalize: {node.format_node()}")


def _is_its_own(module: nn.Module, call: fx.Node) -> bool:
    """Whether `call` normalizes the input with the tensors and settings of `module` as they are."""
    function: Any = call.target
    given = signature(function).bind(*call.args, **call.kwargs)
    given.apply_defaults()
    for name, value in given.arguments.items():
        own = getattr(module, name, None)
        if name == "input":
            same = value.op == "placeholder"
        elif name in ("training", "use_input_stats"):
            same = bool(value) == (getattr(module, "running_mean", None) is None)
        elif isinstance(value, fx.Node):
            same = value.op == "get_attr" and value.target == name
        else:
            same = name == "momentum" or value == own
        if not same:
            return False
    return True


def _trace(module: nn.Module, cls: type[nn.Module]) -> fx.Graph:
    class ChildrenAreLeaves(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
            return True

    with _as_in_eval(module, cls):
        try:
            return ChildrenAreLeaves().trace(module)
        except Exception as error:
            raise Unsupported(
                f"{cls.__name__}.forward cannot be traced: {first_line(error)}"
            ) from error


@contextmanager
def _as_in_eval(module: nn.Module, cls: type[nn.Module]) -> Iterator[None]:
    before = dict(vars(module)), type(module)
    module.__class__ = cls
    module.training = False
    # torch's checks of the input's shape branch on it, which a symbolic trace cannot follow.
    for check in ("_check_input_dim", "_check_non_zero_input_channels"):
        vars(module)[check] = lambda _: None
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(before[0])
        module.__class__ = before[1]


def _result(graph: fx.Graph) -> fx.Node:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    value = output.args[0]
    if not isinstance(value, fx.Node):
        raise Unsupported("its forward returns more than one value")
    return value


def _is_layer_norm_over_channels(node: fx.Node) -> bool:
    """permute, layer_norm, permute back: a LayerNorm over the channels at axis 1."""

    def moves(node: fx.Node, order: tuple[int, ...]) -> bool:
        named = node.target in ("permute", torch.permute)
        rest = node.args[1:]
        given = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        return named and tuple(given) == order

    if not moves(node, (0, 3, 1, 2)):
        return False
    norm = node.all_input_nodes[0]
    if norm.target is not F.layer_norm:
        return False
    before = norm.all_input_nodes[0]
    return moves(before, (0, 2, 3, 1)) and before.all_input_nodes[0].op == "placeholder"
