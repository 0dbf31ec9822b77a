"""Equalize the ranges of neighbouring layers, channel by channel, exactly.

A quantizer with one scale for a weight loses the small channels beside a large one. Where what lies
between two layers is positively homogeneous, f(s x) = s f(x), a channel may be s times as large
after the first and be divided by s in the second: W1' = s W1, b1' = s b1, W2' = W2 / s. Both have
the same range with

    s = sqrt(max |W2| / max |W1|)  of the channel

(Nagel et al. 2019, arXiv 1906.04721, equation 11), which is rounded to a power of two here, so that
no digit changes. Every layer has two neighbours, and so all are gone through until none changes.

What is equalized is whatever is connected: all layers that write a residual stream and all that
read it have one factor for each channel.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.errors import NormswapError, Unsupported
from normswap.graph.capture import Capture, capture
from normswap.graph.index import join
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import WEIGHTED
from normswap.graph.operators.rule import ChannelIndex, shape_of
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.scale_shift import ScaleShift
from normswap.graph.sites import find_sites
from normswap.passes.edits import Edit, RescaleChannels
from normswap.passes.edits.rescaling import RescaledChannels
from normswap.passes.plan import Plan, Skipped
from normswap.passes.selection import Globs, listed, matches

_SWEEPS = 20  # far more than it takes
_MOST = 24  # doublings of one channel


@dataclass
class _Pair:
    """Layers whose outputs meet, and those that take them.

    Attributes:
        name: of the layer that was begun with.
        absorbers: all of them.
        exponents: of the factor of each channel, (C,).
    """

    name: str
    absorbers: tuple[Absorber, ...]
    exponents: Tensor


class Equalize:
    """Equalize ranges between layers; see the module's docstring for the rules.

    Args:
        include, exclude: globs on the names of layers whose output is scaled; by default all.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self,
        *,
        include: Globs | None = None,
        exclude: Globs = (),
        assume_example: bool = False,
    ) -> None:
        self.include, self.exclude, self.assume_example = include, exclude, assume_example

    def __str__(self) -> str:
        return "Equalize"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits for each set of layers that can be.

        Raises:
            NormswapError: a glob matches no module.
        """
        for glob in (*listed(self.include), *listed(self.exclude)):
            if not any(matches(path, glob) for path, _ in model.named_modules()):
                raise NormswapError(f"{glob!r} matches no module of the model")
        seen = capture(model, inputs)
        pairs, left = self._pairs(seen)
        weights: dict[tuple[str, str], Tensor] = {}
        with torch.no_grad():
            for _ in range(_SWEEPS):
                changed = [_equalized(pair, seen, weights) for pair in pairs]
                if not any(changed):
                    break
        edits = tuple(_edit(pair) for pair in pairs if pair.exponents.any())
        return Plan(passes=(str(self),), edits=edits, left=tuple(left))

    def _pairs(self, seen: Capture) -> tuple[list[_Pair], list[Skipped]]:
        affines = Affines(seen, find_sites(seen), assume_example=self.assume_example)
        pairs: list[_Pair] = []
        left: list[Skipped] = []
        done: set[fx.Node] = set()
        for node, name, layout in _outputs(seen):
            if node in done or any(each.site == name for each in left):
                continue
            if matches(name, self.exclude) or not (
                self.include is None or matches(name, self.include)
            ):
                continue
            ones = torch.ones(layout.numel(), dtype=torch.float64)
            numbers = ScaleShift(ones, torch.zeros_like(ones), invertible=True)
            try:
                found = affines.folds(
                    {node: layout}, {}, numbers, upstream=True, inverse=True, scale_alone=True
                )
                if any(each.normalization or each.side == "value" for each in found):
                    raise Unsupported("a normalization or a constant fixes its range")
                if {each.side for each in found} != {"in", "out"}:
                    raise Unsupported("no layer takes it")
            except Unsupported as reason:
                left.append(Skipped(site=name, reason=str(reason)))
                continue
            done |= {
                each for absorber in found for each in absorber.nodes if absorber.side == "out"
            }
            pairs.append(_Pair(name, found, torch.zeros(layout.numel(), dtype=torch.float64)))
        return pairs, left


def _outputs(seen: Capture) -> Iterator[tuple[fx.Node, str, Tensor]]:
    """The output of each layer with a weight: the operator, the layer, the layout of channels."""
    for node, region in seen.index.region_of.items():
        if region.symbolic or not is_a(node, *WEIGHTED):
            continue
        shape = shape_of(node)
        weights = [each for each in node.all_input_nodes if len(shape_of(each)) > 1]
        spatial = max(len(shape_of(each)) - 2 for each in weights) if weights else 0
        matrices = is_a(node, "linear", "addmm", "matmul", "grouped matmul")
        axis = len(shape) - 1 if matrices else len(shape) - 1 - spatial
        layout = along(len(shape), axis, torch.arange(shape[axis]))
        yield node, region.module_path(node), layout


def _equalized(pair: _Pair, seen: Capture, weights: dict[tuple[str, str], Tensor]) -> bool:
    """Scale the `weights` of a pair so that both sides have one range; whether any changed."""
    reach = {side: torch.zeros_like(pair.exponents) for side in ("out", "in")}
    for each in pair.absorbers:
        key = each.path, each.weight
        if key not in weights:
            tensor = seen.index.tensor(join(*key))
            assert tensor is not None
            weights[key] = tensor.detach().cpu().double().clone()
        channels, rows = _by_channel(weights[key], each.channel_index)
        largest = rows.abs().amax(1)
        reach[each.side].scatter_reduce_(0, channels, largest, "amax")
    known = (reach["out"] > 0) & (reach["in"] > 0)
    ratio = torch.where(known, reach["in"] / reach["out"].clamp_min(1e-300), 1.0)
    step = (torch.log2(ratio) / 2).round()
    step = (pair.exponents + step).clamp(-_MOST, _MOST) - pair.exponents
    if not step.any():
        return False
    pair.exponents += step
    for each in pair.absorbers:
        weight, index = weights[each.path, each.weight], each.channel_index
        factors = _taken(each).factors(step)
        weight.view(index.view or weight.shape).mul_(factors)
    return True


def _by_channel(weight: Tensor, index: ChannelIndex) -> tuple[Tensor, Tensor]:
    """For each slot its channel, and the weights that belong to it, one row each."""
    view = index.view or tuple(weight.shape)
    shape = (1,) * (len(view) - len(index.shape)) + index.shape
    slots = prod(shape)
    channels = torch.arange(slots) if index.channels is None else torch.tensor(index.channels)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    others = [axis for axis in range(len(view)) if axis not in axes]
    return channels, weight.view(view).permute(*axes, *others).reshape(slots, -1)


def _taken(each: Absorber) -> RescaledChannels:
    return RescaledChannels(
        path=each.path,
        tensor=each.weight,
        channel_index=each.channel_index,
        inverse=each.side == "in",
    )


def _edit(pair: _Pair) -> Edit:
    tensors = [_taken(each) for each in pair.absorbers]
    for each in pair.absorbers:
        if each.side == "out" and each.bias is not None:
            assert each.bias_index is not None
            tensors.append(
                RescaledChannels(path=each.path, tensor=each.bias, channel_index=each.bias_index)
            )
    takers = dict.fromkeys(each.path for each in pair.absorbers if each.side == "in")
    return RescaleChannels(
        site=pair.name,
        path=pair.name,
        reason=f"gets the ranges of {', '.join(takers)}, and they get its",
        exponents=tuple(int(each) for each in pair.exponents),
        tensors=tuple(tensors),
    )
