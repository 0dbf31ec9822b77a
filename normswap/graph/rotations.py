"""Which streams of a model an orthogonal matrix can rotate, and which tensors it goes into.

A rotation is found around the input of a normalization (`propagation.rotation`), or, with heads,
around the values of an attention. All that writes a stream and all that reads it is rotated, or
none of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from normswap.core.errors import Unsupported
from normswap.graph.index import join, own_tensors
from normswap.graph.operators import is_a
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import operator_of
from normswap.graph.operators.rule import argument, shape_of
from normswap.graph.propagation.engine import Operators
from normswap.graph.propagation.rotation import Rotation
from normswap.graph.sites import describe
from normswap.graph.streams import Streams


@dataclass(frozen=True)
class Rotated:
    """A tensor that the matrix is applied to along one axis.

    Attributes:
        owners: the modules that own it, with its name in each.
        axis: that of the channels.
        starts: where each block of channels begins along it.
        gain: the gain per channel that it is multiplied by first, as (path, name).
    """

    owners: tuple[tuple[str, str], ...]
    axis: int
    starts: tuple[int, ...]
    gain: tuple[str, str] | None = None


@dataclass(frozen=True)
class Rotating:
    """A stream that a matrix of `size` rotates.

    Attributes:
        norms: the normalizations on it, whose gains have to be 1, and where each block of channels
            begins in what they normalize.
        tensors: what computes it and what reads it.
        size: the channels of a block.
        keeps_ones: the matrix has to keep the vector of ones.
    """

    norms: Mapping[str, tuple[int, ...]]
    tensors: tuple[Rotated, ...]
    size: int
    keeps_ones: bool


class Rotations(Streams):
    """The streams of a captured model that a matrix can rotate.

    The `wanted` are the normalizations that may be on one.
    """

    def around(self, name: str) -> Rotating:
        """The stream that the normalization `name` is on.

        Raises:
            Unsupported: it cannot be rotated; the message says what stops it.
        """
        site = self._sites[name]
        self._check_seen(site)
        rotation = self._rotation()
        self._follow(rotation, site)
        return self._rotating(rotation)

    def heads(self) -> Iterator[tuple[str, Rotating | Unsupported]]:
        """Of each module with an attention the path, and what rotates the heads of its values."""
        seeds: dict[str, dict[fx.Node, Tensor]] = {}
        for node, region in self._index.region_of.items():
            values = None if region.symbolic else self._values(node)
            if values is not None:
                rank, size = len(shape_of(values)), shape_of(values)[-1]
                of_module = seeds.setdefault(region.module_path(node), {})
                of_module[values] = along(rank, rank - 1, torch.arange(size))
        for path, values_of in seeds.items():
            rotation = self._rotation()
            try:
                self._spread(rotation, values_of)
                yield path, self._rotating(rotation)
            except Unsupported as reason:
                yield path, reason

    def _values(self, node: fx.Node) -> fx.Node | None:
        """The values that `node`, if it is an attention, sums up by the weights of a softmax."""
        if is_a(node, "attention"):
            found = argument(node, "value")
        elif is_a(node, "matmul") and _is_softmax(node.args[0]):
            found = node.args[1]
        else:
            return None
        return found if isinstance(found, fx.Node) and shape_of(found)[-1] > 1 else None

    def _rotation(self) -> Rotation:
        return Rotation(
            Operators(()), self._index, self._context, self._takers_of_gain, self._norm_calls
        )

    def _rotating(self, rotation: Rotation) -> Rotating:
        norms = {}
        for output in rotation.norms:
            name = self._norm_of(output)
            if name is not None:
                layout = rotation.known[output].flatten()
                norms[name] = tuple((layout == 0).nonzero().flatten().tolist())
        tensors = self._tensors(rotation)
        for name in norms:
            if name not in self._on(rotation):
                raise Unsupported(f"{name} also normalizes what is not on its stream")
        return Rotating(norms, tensors, rotation.size, rotation.keeps_ones)

    def _norm_of(self, output: fx.Node) -> str | None:
        """The normalization that computes `output`; None for a call without gain and bias.

        Raises:
            Unsupported: it is a call with a gain or bias that no module owns.
        """
        for name, site in self._sites.items():
            if output in self._nodes(site):
                return name
        row = operator_of(output)
        assert row is not None
        affine = [argument(output, "weight")]
        affine += [argument(output, "bias")] if row.normalizes == "layer" else []
        if any(each is not None for each in affine):
            raise Unsupported(
                f"{describe(output, self._index.region_of[output])} has a gain that no module owns"
            )
        return None

    # --- tensors ----------------------------------------------------------------------------------

    def _tensors(self, rotation: Rotation) -> tuple[Rotated, ...]:
        """Every tensor once for each axis that is rotated, though several modules may own it.

        Raises:
            Unsupported: something else reads one, or it would be rotated in two ways.
        """
        found: dict[tuple[tuple[tuple[str, str], ...], int], Rotated] = {}
        readers: dict[tuple[str, str, int], set[fx.Node]] = {}
        for node, mapped in [*rotation.producers.items(), *rotation.readers.items()]:
            product = rotation.gains.get(node) if node in rotation.producers else None
            gain = None if product is None else self._gain(product)
            for tensor, axis in ((mapped.weight, mapped.axis), (mapped.bias, 0)):
                if tensor is None:
                    continue
                owners = self._owners_of(node, tensor)
                each = Rotated(owners, axis, mapped.starts, gain)
                if found.setdefault((owners, axis), each) != each:
                    raise Unsupported(f"{join(*owners[0])} would be rotated in two ways")
                for path, name in owners:
                    readers.setdefault((path, name, axis), set()).update(mapped.reads)
        for (path, name, _), nodes in readers.items():
            self._owners.check_reads(path, [name], nodes)
        return tuple(found.values())

    def _owners_of(self, node: fx.Node, tensor: fx.Node) -> tuple[tuple[str, str], ...]:
        """The modules that own a `tensor` that `node` reads, each with its name there."""
        region = self._index.region_of[node]
        path, name = self._owners.of(region, region.module_path(node), tensor)
        read = self._index.tensor(join(path, name))
        if read is None:
            raise Unsupported(f"{join(path, name)} is computed")
        return tuple(
            (self._index.paths[module][0], own)
            for module in self._index.paths
            if module in self._index.owners(read)
            for own, held in own_tensors(module)
            if held is read
        )


def _is_softmax(weights: Any) -> bool:
    """Whether these are weights of a softmax, be it cast to another dtype."""
    while isinstance(weights, fx.Node) and is_a(weights, "same"):
        weights = weights.args[0]
    return isinstance(weights, fx.Node) and is_a(weights, "softmax")
