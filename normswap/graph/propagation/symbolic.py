"""The affine of a BatchNorm in a symbolic trace, where a node is a module and no shape is known.

Only what holds for every shape: a convolution folds it in, and what does nothing lies between. A
Linear does not, since its channels are at axis 1 only of a (N, C) value.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from torch import fx, nn

from normswap.core.errors import Unsupported
from normswap.graph.index import Region
from normswap.graph.operators.rule import ChannelIndex
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.owners import CALLED, tensor_names
from normswap.graph.sites import Call, describe

_THROUGH = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def producer(
    model: nn.Module, call: Call, moved: Mapping[fx.Node, Call], *, training: bool
) -> tuple[fx.Node, str]:
    """The convolution whose output `call` normalizes: its node and its path.

    Args:
        moved: the outputs of BatchNorms that are folded; nothing is computed there any more.

    Raises:
        Unsupported: another module lies between, or another one takes the value.
    """
    if call.input is None:
        raise Unsupported("takes more than one value")
    node, users = call.input, call.nodes
    while True:
        _check_users(node, users, call.region)
        before = moved[node].input if node in moved else None
        if before is not None:
            node, users = before, moved[node].nodes
            continue
        if node.op != "call_module":
            raise Unsupported(
                f"its input comes from {node.target}, and without example inputs no shape is known"
            )
        module = model.get_submodule(str(node.target))
        if module._forward_hooks:
            raise Unsupported(
                f"{node.target} has a hook, and without example inputs its effect is not known"
            )
        if not CALLED.isdisjoint(vars(module)):
            raise Unsupported(f"the forward of {node.target} was replaced on the instance")
        if isinstance(module, (*_CONVS, *TRANSPOSED_CONVS)):
            if not {"weight", "bias"} <= tensor_names(module):
                raise Unsupported(f"{node.target} computes its weight in a hook")
            return node, str(node.target)
        if not isinstance(module, _THROUGH) or (training and getattr(module, "p", False)):
            raise Unsupported(
                f"its input comes from {node.target}, and without example inputs no shape is known"
            )
        node, users = node.all_input_nodes[0], frozenset({node})


def _check_users(node: fx.Node, users: frozenset[fx.Node], region: Region) -> None:
    others = [user for user in node.users if user not in users]
    if others:
        names = ", ".join(dict.fromkeys(describe(user, region) for user in others))
        raise Unsupported(f"{describe(node, region)} is also used by {names}")


def absorber_of(conv: Any, path: str, has_given_bias: bool) -> Absorber:
    """What a convolution folds in on its output side.

    Args:
        has_given_bias: it will have a bias, if it has none yet.
    """
    weight, ones = conv.weight, (1,) * (conv.weight.dim() - 2)
    if not isinstance(conv, TRANSPOSED_CONVS):
        channel_index = ChannelIndex((weight.shape[0], 1, *ones))
    elif conv.groups == 1:
        channel_index = ChannelIndex((1, weight.shape[1], *ones))
    else:
        view = (conv.groups, weight.shape[0] // conv.groups, *weight.shape[1:])
        channel_index = ChannelIndex((conv.groups, 1, weight.shape[1], *ones), None, view)
    gives = conv.bias is None and not has_given_bias
    return Absorber(
        path,
        "weight",
        "bias",
        gives,
        "out",
        channel_index,
        ChannelIndex((prod(channel_index.shape),)),
    )
