"""Fold decorrelated batch normalizations into the layers before them, for inference.

In eval mode one is y = D (x - mean) per group of channels, then gamma and beta: one 1x1 convolution
(Huang et al. 2018, arXiv 1804.08450, section 3.3). The convolution or Linear that computes x takes
it in, W' = D W, b' = D b + t (`normswap.norms.batch.whitening`).

Rules:
1. Between the two lies nothing but what keeps the channels as they are: reshape, permute, cast,
   dropout. Every element of a channel must stay in it, and channels in their order.
2. Nothing else takes what lies between, or reads the layer's weight.
3. The channels of a group of D belong to one group of a grouped convolution.
4. A weight that is parametrized is baked first.
"""

from collections.abc import Sequence

from normswap.core.errors import Unsupported
from normswap.graph.capture import Capture
from normswap.graph.operators.rule import Folding, argument, has_argument
from normswap.graph.parametrized import parametrized_tensors
from normswap.graph.propagation.block_matrix import BlockMatrix
from normswap.graph.propagation.owners import Owners
from normswap.graph.sites import Call, NormSite
from normswap.norms.batch.frozen import check_statistics
from normswap.norms.batch.whitening import DecorrelatedBatchNorm
from normswap.passes.bake import bake_edits, in_order
from normswap.passes.edits import Edit, GiveBias
from normswap.passes.edits.parametrizations import FoldWhitening


def fold_whitening(
    seen: Capture, sites: Sequence[NormSite]
) -> tuple[list[Edit], list[tuple[NormSite, str]]]:
    """The edits that fold the decorrelated batch norms among `sites`; the others with a reason.

    Args:
        seen: a capture of a model in eval mode.
        sites: of the model, as `find_sites` gives them.
    """
    owners = Owners(seen)
    edits: list[Edit] = []
    left: list[tuple[NormSite, str]] = []
    for site in sites:
        if site.kind != "decorrelated_batch":
            continue
        try:
            owners.check_seen(site)
            edits += _edits(seen, owners, site)
        except Unsupported as reason:
            left.append((site, str(reason)))
    return edits, left


def _edits(seen: Capture, owners: Owners, site: NormSite) -> list[Edit]:
    model = seen.model
    norm = model.get_submodule(site.name)
    assert isinstance(norm, DecorrelatedBatchNorm)
    if site.statistics != "running":
        raise Unsupported("has no running statistics, so it depends on the batch in eval mode too")
    check_statistics(norm, site.name)
    if norm._forward_pre_hooks:
        raise Unsupported("a hook may change its input")
    found = [_producer(seen, owners, site, call) for call in site.executions]
    each = found[0]
    path, weight, bias, gives = owners.weight_and_bias(each)
    if any(owners.weight_and_bias(other)[:2] != (path, weight) for other in found):
        raise Unsupported("follows several layers")
    if bias is None:
        raise Unsupported(f"{path} cannot be given a bias")
    owners.check_reads(path, [weight, bias], {other.node for other in found})
    for other in found:
        groups = argument(other.node, "groups") if has_argument(other.node, "groups") else 1
        if each.channel_index.view is not None or norm.num_features // groups % norm.group_size:
            raise Unsupported(f"{path} has groups of channels that it would mix")

    reason, layer = f"computes {site.name} as well", model.get_submodule(path)
    names = [(path, name) for name in (bias, weight) if name in parametrized_tensors(layer)]
    edits: list[Edit] = [*bake_edits(in_order(model, names), site.name)]
    if gives:
        channels = norm.num_features
        edits.append(GiveBias(site=site.name, path=path, reason=reason, channels=channels))
    fold = FoldWhitening(
        site=site.name,
        path=path,
        reason=reason,
        aliases=site.paths,
        tensor=weight,
        bias=bias,
        channel_index=each.channel_index,
    )
    return [*edits, fold]


def _producer(seen: Capture, owners: Owners, site: NormSite, call: Call) -> Folding:
    """The operator whose output `call` normalizes, with the channels in their order."""
    if call.input is None:
        raise Unsupported("takes more than one value")
    if call.region.symbolic:
        raise Unsupported("no shape is known; give example inputs")
    if call.output is None:
        raise Unsupported("what it takes is used elsewhere as well")
    assert site.num_features is not None
    matrix = BlockMatrix(seen.index, owners.context(training=False), call)
    return matrix.propagate_from(call.input, site.num_features)
