"""Whether a normalization module computes what its class says, from its own gain and bias.

A subclass may read them otherwise, as a gain of weight + 1, and only the captured graph shows that.
"""

from operator import attrgetter
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from normswap.graph.functional import argument, functional_kind
from normswap.graph.norm_modules import Unsupported
from normswap.graph.sites import Call, NormSite


def normalizing(model: nn.Module, site: NormSite, call: Call) -> fx.Node:
    """The operator in `call` that takes the statistics and applies the gain and bias of `site`.

    Raises:
        Unsupported: there is not one such operator, or it is given other tensors.
    """
    norm = model.get_submodule(site.name)
    if parametrize.is_parametrized(norm):
        raise Unsupported("its gain or bias is parametrized; bake it first")
    found = [node for node in call.nodes if functional_kind(node) == site.kind]
    if len(found) != 1 or not _reads_its_own(model, norm, found[0], call):
        raise Unsupported(f"{site.cls} does more than take statistics, then a gain and a bias")
    return found[0]


def _reads_its_own(model: nn.Module, norm: nn.Module, node: fx.Node, call: Call) -> bool:
    held = {**norm._parameters, **norm._buffers}
    for role in ("weight", "bias"):
        has_role = role == "weight" or functional_kind(node) != "rms"
        read: Any = argument(node, role) if has_role else None
        name = call.region.tensors.get(read)
        if (read if name is None else attrgetter(name)(model)) is not held.get(role):
            return False
    return True
