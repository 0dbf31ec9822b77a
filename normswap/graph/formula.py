"""Whether a normalization module computes what its class says, from its own gain and bias.

A subclass may read them otherwise, as a gain of weight + 1, and only the captured graph shows that.
"""

from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap.core.errors import Unsupported
from normswap.graph.functional_norms import functional_kind
from normswap.graph.norm_modules import formula, is_as_in_torch
from normswap.graph.operators.rule import argument
from normswap.graph.sites import Call, NormSite


def normalizing(model: nn.Module, site: NormSite, call: Call) -> tuple[fx.Node, int]:
    """The value in `call` that the gain and bias of `site` give, and the axis of its channels.

    Where torch's operator takes the statistics and applies both, that is what it returns; where a
    module writes the arithmetic out, or casts around the operator, what the module returns.

    Raises:
        Unsupported: it is neither.
    """
    norm = model.get_submodule(site.name)
    if parametrize.is_parametrized(norm):
        raise Unsupported("its gain or bias is parametrized; bake it first")
    found = [node for node in call.nodes if functional_kind(node) == site.kind]
    if len(found) == 1 and _reads_its_own(model, norm, found[0], call):
        return found[0], _AXIS.get(site.kind, 1)
    if site.why_not is not None or call.output is None or is_as_in_torch(norm):
        raise Unsupported(f"{site.cls} does more than take statistics, then a gain and a bias")
    if site.tail:
        raise Unsupported(f"{site.cls} goes on with {', '.join(site.tail)}")
    return call.output, site.channel_axis


# The axis of the channels in what torch's operator of each kind takes.
_AXIS = {"layer": -1, "rms": -1}


def _reads_its_own(model: nn.Module, norm: nn.Module, node: fx.Node, call: Call) -> bool:
    own = formula(norm)
    if own is None or own.gain_offset:
        return False
    held = {**norm._parameters, **norm._buffers}
    for role, name in (("weight", own.gain), ("bias", own.bias)):
        has_role = role == "weight" or functional_kind(node) != "rms"
        read: Any = argument(node, role) if has_role else None
        path = call.region.tensors.get(read)
        mine = None if name is None else held.get(name)
        if (read if path is None else attrgetter(path)(model)) is not mine:
            return False
    return True
