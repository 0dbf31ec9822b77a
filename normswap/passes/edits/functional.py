"""Edits of single calls in a module's forward: they give one a module, or an argument."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.functional_norms import functional_kind, returns_several
from normswap.graph.operators.rule import argument
from normswap.graph.parametrized import parametrized_tensors
from normswap.norms.batch.frozen import freeze_statistics
from normswap.norms.batch.plain import BatchNorm
from normswap.passes.edits.base import Count, Effect, NewName, computing
from normswap.passes.edits.traced_forward import ForwardEdit

ROLES = ("weight", "bias", "running_mean", "running_var")


def tensors_of(module: nn.Module, call: fx.Node, roles: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that a call in the forward of `module` is given, by their role.

    Raises:
        Unsupported: one of them is computed.
    """
    found = {}
    for role in roles:
        value = argument(call, role)
        if value is None:
            continue
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            raise Unsupported(f"computes its {role} in forward")
        path, _, name = str(value.target).rpartition(".")
        owner = module.get_submodule(path)
        if name in parametrized_tensors(owner):
            raise Unsupported(f"its {role} is parametrized")
        found[role] = getattr(owner, name)
    return found


def result_of(call: fx.Node) -> fx.Node:
    """The normalized value that a functional batch norm gives.

    Raises:
        Unsupported: the statistics that it returns beside it are used as well.
    """
    if not returns_several(call):
        return call
    used = [item for item in call.users if item.users]
    if any(item.args[1:] != (0,) for item in used):
        raise Unsupported("its statistics are used as well")
    (result,) = used
    return result


class ModularizeNorm(ForwardEdit):
    """Let a module compute what a functional normalization in a forward computes.

    Its tensors are those of the call, which stay where they are as well. Only where a bare module
    holds those of a batch norm, as in an exported program, does the new one take its place.

    Attributes:
        node: the call in the `forward_graph` of the module at `path`.
        child: where the new module goes, below `path`.
        kind: what it computes.
        sizes: the normalized shape; the number of channels of a batch, instance or group norm.
        groups: of a group norm.
        rank: how many axes its input has.
        eps: None where that of the dtype is used, as torch's rms_norm does.
        momentum: of a batch norm.
        frozen: a batch norm uses its running statistics in training too.
    """

    edit: Literal["modularize_norm"] = "modularize_norm"
    effect: ClassVar[Effect] = "prepares"
    node: str
    child: NewName
    kind: Literal["batch", "layer", "rms", "group", "instance"]
    sizes: Annotated[tuple[Count, ...], Field(min_length=1)]
    groups: Count = 1
    rank: Count
    eps: float | None
    momentum: float = 0.1
    frozen: bool = False

    def change(self, module: nn.Module, graph: fx.Graph) -> None:
        call = self.call(graph, self.node)
        self.require(functional_kind(call) == self.kind)
        tensors = tensors_of(module, call, roles_of(self.kind))
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if self.kind == "batch":
            shapes = {(tensor.numel(),) for tensor in tensors.values()}
        self.require(shapes <= {self.sizes})
        held = dict(module.named_modules()).get(self.child)
        if isinstance(held, BatchNorm):  # by the edit of another call with the same tensors
            self.require(all(getattr(held, role) is t for role, t in tensors.items()))
        elif held is None or self.kind == "batch":
            norm = self._made(tensors)
            if held is not None:
                norm.register_buffer("num_batches_tracked", self._counter(held, tensors))
            norm.training = module.training
            if self.frozen:
                freeze_statistics(norm)
            module.set_submodule(self.child, norm)
        _call_module(graph, call, self.child)

    def _counter(self, holder: nn.Module, tensors: dict[str, Tensor]) -> Tensor | None:
        """The count of batches of the bare module that holds the tensors, and nothing else."""
        self.require(type(holder) is nn.Module and not holder._modules)
        own = {**holder._parameters, **holder._buffers}
        counter = own.pop("num_batches_tracked", None)
        self.require(all(tensors.get(role) is tensor for role, tensor in own.items()))
        return counter

    def _made(self, tensors: dict[str, Tensor]) -> nn.Module:
        norm: nn.Module
        sizes, eps, flag = self.sizes, self.eps or 0.0, "affine"
        if self.kind == "batch":
            device = next((tensor.device for tensor in tensors.values()), None)
            tracks = "running_mean" in tensors
            norm = BatchNorm(sizes[0], eps, self.momentum, False, tracks, device=device)
        elif self.kind == "layer":
            norm, flag = nn.LayerNorm(sizes, eps, elementwise_affine=False), "elementwise_affine"
        elif self.kind == "rms":
            norm = nn.RMSNorm(sizes, self.eps, elementwise_affine=False)
            flag = "elementwise_affine"
        elif self.kind == "group":
            norm = nn.GroupNorm(self.groups, sizes[0], eps, affine=False)
        else:
            classes = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d}
            norm = classes.get(self.rank, nn.InstanceNorm3d)(sizes[0], eps, affine=False)
        setattr(norm, flag, "weight" in tensors)
        for role, tensor in tensors.items():
            delattr(norm, role)
            if role in ("weight", "bias") and isinstance(tensor, nn.Parameter):
                norm.register_parameter(role, tensor)
            else:  # statistics are buffers, even if the model holds them as parameters
                norm.register_buffer(role, tensor)
        return norm

    def __str__(self) -> str:
        return "give it a module"


def roles_of(kind: str) -> tuple[str, ...]:
    """The tensors that a functional normalization of this kind is given."""
    return {"batch": ROLES, "rms": ("weight",)}.get(kind, ("weight", "bias"))


def _call_module(graph: fx.Graph, call: fx.Node, child: str) -> None:
    """Let the module at `child` compute what `call` does."""
    result, read = result_of(call), [node.target for node in call.all_input_nodes]
    with graph.inserting_before(call):
        value = graph.call_module(child, (argument(call, "input"),))
    result.replace_all_uses_with(value)
    for node in (*call.users, call):
        graph.erase_node(node)
    _drop_counter(graph, f"{child}.num_batches_tracked")
    # Reading what a later edit removes would fail, even if nothing uses it.
    gone = {*read, f"{child}.num_batches_tracked"}
    for node in graph.find_nodes(op="get_attr"):
        if node.target in gone and not node.users:
            graph.erase_node(node)


def _drop_counter(graph: fx.Graph, counter: str) -> None:
    """Erase what counts batches in the buffer `counter`: a module does that itself."""
    counting: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "get_attr" and node.target == counter) or (
            node.all_input_nodes and counting.issuperset(node.all_input_nodes)
        ):
            counting.add(node)
    if not any(node.op == "output" for node in counting):
        for node in reversed([node for node in graph.nodes if node in counting]):
            if not node.users:
                graph.erase_node(node)


class GiveBias(ForwardEdit):
    """Give a convolution or linear map a bias of zeros, which nothing trains.

    Attributes:
        channels: how long the bias is.
        nodes: the calls that take the weight, in the `forward_graph` of the module at `path`, where
            it is called as a function; none where it is that module.
        owner: the module below `path` that holds the weight, and will hold the bias.
    """

    edit: Literal["give_bias"] = "give_bias"
    is_step: ClassVar[bool] = True
    channels: Count
    nodes: tuple[str, ...] = ()
    owner: str = ""

    def apply(self, model: nn.Module) -> None:
        if self.nodes:
            super().apply(model)
        else:
            module = self.module(model)
            self.require("bias" in module._parameters)
            self._give(module)

    def change(self, module: nn.Module, graph: fx.Graph) -> None:
        self.require(self.owner in dict(module.named_modules()))
        self._give(module.get_submodule(self.owner))
        for name in self.nodes:
            call = self.call(graph, name)
            # Of every one of these operators it is the third argument.
            self.require((*call.args, None, None)[2] is call.kwargs.get("bias") is None)
            with graph.inserting_before(call):
                bias = graph.get_attr(f"{self.owner}.bias" if self.owner else "bias")
            if len(call.args) > 2:
                call.update_arg(2, bias)
            else:
                call.update_kwarg("bias", bias)

    def _give(self, owner: nn.Module) -> None:
        self.require(owner._parameters.get("bias") is None and "bias" not in owner._buffers)
        like = computing(owner)
        zeros = torch.zeros(self.channels, dtype=like.dtype, device=like.device)
        owner.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))

    def __str__(self) -> str:
        return f"give {', '.join(self.nodes) or self.path} a bias"


_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ATTRIBUTES = ("stride", "padding", "dilation", "groups")


class ModularizeConv(ForwardEdit):
    """Let a convolution module compute what functions compute in a forward.

    It takes the place of the bare module that holds the weight, with the very same tensors, so that
    no state-dict key changes.

    Attributes:
        nodes: all calls that take the weight, in the `forward_graph` of the module at `path`.
        holder: the bare module, below `path`.
    """

    edit: Literal["modularize_conv"] = "modularize_conv"
    nodes: tuple[str, ...]
    holder: str

    def change(self, module: nn.Module, graph: fx.Graph) -> None:
        calls = [self.call(graph, name) for name in self.nodes]
        conv = conv_of(module, calls, self.holder)
        module.set_submodule(self.holder, conv)
        for call in calls:
            _call_module(graph, call, self.holder)

    def __str__(self) -> str:
        return "give it a module"


def conv_of(module: nn.Module, calls: list[fx.Node], path: str) -> nn.Module:
    """The convolution with the tensors of the bare module at `path` that computes all `calls`.

    Raises:
        Unsupported: there is none.
    """
    holder, tensors = module.get_submodule(path), tensors_of(module, calls[0], ("weight", "bias"))
    if type(holder) is not nn.Module or holder._modules or holder._buffers:
        raise Unsupported(f"{path} is more than the weight of a convolution")
    held: dict[str, Tensor | None] = dict(holder._parameters)
    if held.keys() != tensors.keys() or any(held[role] is not t for role, t in tensors.items()):
        raise Unsupported(f"{path} holds other tensors than its convolution takes")
    weight = tensors["weight"]
    settings = [_settings(call, weight.dim() - 2) for call in calls]
    if any(each != settings[0] for each in settings):
        raise Unsupported(f"{path} is the weight of different convolutions")
    out_channels, in_channels, *kernel = weight.shape
    conv = _CLASSES[len(kernel) - 1](
        in_channels * settings[0]["groups"],
        out_channels,
        tuple(kernel),  # type: ignore[arg-type]
        bias="bias" in tensors,
        device="meta",
        **settings[0],
    )
    for role, tensor in tensors.items():
        setattr(conv, role, tensor)
    conv.training = holder.training
    return conv


def _settings(call: fx.Node, axes: int) -> dict[str, Any]:
    settings = {name: argument(call, name) for name in _ATTRIBUTES}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            settings[name] = tuple(value) * (axes // len(value))
    return settings
