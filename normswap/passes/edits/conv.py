"""The edit that gives a module to convolutions called as functions, as in an exported program."""

from typing import Any, Literal

from torch import Tensor, fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.functional import argument
from normswap.passes.edits.functional import ForwardEdit, tensors_of

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
        read = {node.target for call in calls for node in call.all_input_nodes}
        module.set_submodule(self.holder, conv)
        for call in calls:
            with graph.inserting_before(call):
                value = graph.call_module(self.holder, (argument(call, "input"),))
            call.replace_all_uses_with(value)
            graph.erase_node(call)
        for node in graph.find_nodes(op="get_attr"):
            if node.target in read and not node.users:
                graph.erase_node(node)

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
