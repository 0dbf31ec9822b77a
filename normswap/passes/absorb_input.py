"""Move the normalization of the input into the first layers, for inference.

Images come as numbers from 0 to 255, and a model is trained on (x / 255 - mean) / std per channel:
an affine y = s x + t, which the first convolution or Linear can compute as well,

    W' = W s,    b' = b + W t.

Rules:
1. The affine moves *downstream*, by the table that moves a frozen BatchNorm's (`graph.operators`),
   into every layer that the input reaches.
2. A zero that a convolution pads with was the mean before. So where one pads, its layers take the
   weight W' alone and subtract from their input the number that the normalization maps to zero,
   255 mean, before they pad: s (x - 255 mean) = s x + t. Padding with that number instead is as
   exact and as fast, but not possible where the padding is in the layer's code.
3. These layers cast integers to the dtype of their weight. Before them, integers may only be moved
   (slice, concatenate, flatten, space to depth), since arithmetic on them would overflow.
4. If one layer cannot fold it in, the model stays as it is: NormswapError says what stops it. So it
   does where a forward asks for the dtype and scales integers itself, which no graph shows: the
   result is run once on each kind of pixels.

The arithmetic is in float64 and cast back to the weight's own dtype.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.ambient import alone
from normswap.core.calls import cloned
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError, Unsupported, first_line
from normswap.graph.capture import capture, examples_of
from normswap.graph.index import Region
from normswap.graph.operators import is_a, operator_of
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import MOVES, reads_numbers
from normswap.graph.operators.rule import is_tensor, shape_of
from normswap.graph.propagation.absorbers import Absorber
from normswap.graph.propagation.affines import Affines
from normswap.graph.propagation.scale_shift import ScaleShift
from normswap.graph.running import as_call
from normswap.graph.sites import describe, find_sites
from normswap.graph.snapshot import evaluating
from normswap.graph.supported import check_numbers, check_supported
from normswap.passes.bake import bake_edits
from normswap.passes.edits import Edit
from normswap.passes.edits.affine import (
    GivenAffine,
    RawInput,
    TakeRawInput,
    is_floating_point,
)
from normswap.passes.folding import Writer, carrying
from normswap.passes.plan import Plan

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AbsorbInput:
    """Let a model take raw pixels in its first tensor; see the module's docstring for the rules.

    Args:
        mean, std: of each channel (axis 1 of the input), of values from 0 to 1.
        scale: the largest raw value.
        assume_example: the model is called in no other way than in the example.

    Raises:
        NormswapError: mean and std do not fit each other, are not finite, or std or scale is not
            above 0.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale: float = 255.0,
        assume_example: bool = False,
    ) -> None:
        try:
            mean, std = tuple(map(float, mean)), tuple(map(float, std))
        except (TypeError, ValueError) as error:
            raise NormswapError(
                "mean and std are lists of numbers; give one per channel"
            ) from error
        if len(mean) != len(std) or not mean:
            raise NormswapError(
                f"mean has {len(mean)} numbers and std {len(std)}; give one of both per channel"
            )
        if not all(map(isfinite, (*mean, *std, scale))):
            raise NormswapError("mean, std and scale must be finite; give other numbers")
        if min(*std, scale) <= 0:
            raise NormswapError(
                "std and scale are what values are divided by; give numbers above 0"
            )
        self.mean, self.std, self.scale = mean, std, scale
        self.assume_example = assume_example

    def __str__(self) -> str:
        return "AbsorbInput"

    def plan(self, model: nn.Module, inputs: Any = None) -> Plan:
        """The edits that move the normalization.

        Args:
            inputs: example inputs as the model takes them now, normalized.

        Raises:
            NormswapError: it cannot move; the message says what stops it.
        """
        if inputs is None:
            raise NormswapError("this needs example inputs, which show where the input goes")
        check_supported(model, numbers=True)
        check_numbers(inputs)
        try:
            decided = Plan(passes=(str(self),), edits=tuple(self._edits(model, inputs)))
            for example in examples_of(inputs):
                _check_treats_integers_alike(decided, model, example)
        except Unsupported as reason:
            raise NormswapError(
                f"the normalization of the input cannot move into the model: {reason}; "
                "keep it before the model"
            ) from reason
        return decided

    def _edits(self, model: nn.Module, inputs: Any) -> list[Edit]:
        seen = capture(model, inputs)
        if seen.how != "export":
            raise Unsupported(f"the whole model cannot be captured ({seen.unseen.get('')})")
        values = {
            self._value(region, example): region
            for region, example in zip(seen.regions, examples_of(inputs), strict=True)
        }
        sites = find_sites(seen)
        affines = Affines(seen, sites, assume_example=self.assume_example)
        scale = tuple(1 / (self.scale * std) for std in self.std)
        shift = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        channels = torch.arange(len(scale))
        seeds = {value: along(len(shape_of(value)), 1, channels) for value in values}
        own: dict[fx.Node, fx.Node | None] = dict.fromkeys(values)
        numbers = ScaleShift(_float64(scale), _float64(shift), invertible=False)
        offsets: dict[str, tuple[float, ...]] = {}
        try:
            found = affines.folds(seeds, own, numbers, upstream=False)
        except Unsupported:

            def subtracts(node: fx.Node) -> bool:
                return isinstance(seen.index.module_of(node), _CONVS)

            found = affines.folds(seeds, own, numbers, upstream=False, subtracts=subtracts)
            offsets = {
                each.path: self._offset(each)
                for each in found
                if isinstance(model.get_submodule(each.path), _CONVS)
            }
            found = tuple(
                replace(each, bias=None, gives_bias=False) if each.path in offsets else each
                for each in found
            )
        if not found:
            raise Unsupported("no layer of the model takes the input")
        for each in found:
            _check_layer(model, each)
        for value, region in values.items():
            _check_integers(region, value, {each.path for each in found})

        name = f"input_{next(iter(values)).target}"
        layers = list(dict.fromkeys(each.path for each in found))
        why = "it takes raw pixels, and its weight the mean and std"
        affine = GivenAffine(scale=scale, shift=shift)
        edits = Writer(seen).folding(name, found, {"numbers": affine})
        edits += bake_edits(carrying(edits), name)
        for path in layers:
            conv = model.get_submodule(path)
            edits.append(
                TakeRawInput(
                    site=name,
                    path=path,
                    reason=why,
                    offset=offsets.get(path),
                    spatial=conv.weight.dim() - 2 if isinstance(conv, _CONVS) else 0,
                )
            )
        return edits

    def _value(self, region: Region, example: Any) -> fx.Node:
        """The input that is normalized.

        Raises:
            NormswapError: there is none, or it does not have the channels.
        """
        given = [node for node in region.graph.nodes if node.op == "placeholder"]
        count = len(pytree.tree_leaves(as_call(example)))  # parameters and constants come before
        value: fx.Node | None = next((node for node in given[-count:] if is_tensor(node)), None)
        if value is None:
            raise NormswapError("the model takes no floating-point input that could be normalized")
        shape = shape_of(value)
        if len(shape) < 2 or shape[1] != len(self.mean):
            raise NormswapError(
                f"mean and std are of {len(self.mean)} channels, but the input {value.target} has "
                f"the shape {'x'.join(map(str, shape))}; give one number per channel (axis 1)"
            )
        return value

    def _offset(self, absorber: Absorber) -> tuple[float, ...]:
        """What the normalization maps to zero, for each channel that a convolution takes."""
        channels = absorber.channel_index.channels or range(prod(absorber.channel_index.shape))
        return tuple(0.0 if c < 0 else self.scale * self.mean[c] for c in channels)


def _float64(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _check_layer(model: nn.Module, absorber: Absorber) -> None:
    """Whether the module that folds in can be told to take raw pixels: it does nothing else.

    Raises:
        Unsupported: it cannot.
    """
    path, layer = absorber.path, model.get_submodule(absorber.path)
    cls = type(layer).__name__
    if absorber.normalization:
        where = path or "the model itself"
        raise Unsupported(f"its first layer is {where}, a BatchNorm; fold the model first")
    if isinstance(layer, RawInput):
        raise Unsupported(f"{path} takes raw pixels already")
    children = {name for name, _ in layer.named_children()} - {"parametrizations"}
    if children or len(inspect.signature(layer.forward).parameters) != 1:
        raise Unsupported(f"{path or cls} is more than a layer that takes one value")


def _check_integers(region: Region, value: fx.Node, layers: set[str]) -> None:
    """Whether integers reach the layers, where they are cast.

    Raises:
        Unsupported: an operator before them computes with them.
    """
    queue = [value]
    while queue:
        value = queue.pop()
        here = region.module_path(value)
        for user in value.users:
            there, name = region.module_path(user), describe(user, region)
            if here in layers and there != here:
                raise Unsupported(f"{name} takes what {here} has of its input")
            if not reads_numbers(user, value):
                continue
            passes = is_a(user, "same", "split", *MOVES)
            row = operator_of(user)
            exact = passes and row is not None and not row.floating
            if there not in layers and not exact:
                raise Unsupported(f"{name} comes first, and raw pixels are integers there")
            if passes:
                queue.append(user)


def _check_treats_integers_alike(decided: Plan, model: nn.Module, example: Any) -> None:
    """Whether the model gives the same for integers as for the same floating-point numbers.

    Raises:
        Unsupported: it does not, as it divides by 255 where the dtype is uint8.
    """
    leaves, spec = pytree.tree_flatten(as_call(example))
    first = next(i for i, each in enumerate(leaves) if is_floating_point(each))
    outputs: list[list[Tensor]] = []
    with alone(), evaluating(model):
        raw = torch.randint_like(leaves[first], 256)
        decided.apply(model, inplace=True)
        for leaves[first] in (raw, raw.to(torch.uint8)):
            args, kwargs = cloned(pytree.tree_unflatten(leaves, spec))
            torch.manual_seed(0)
            try:
                output = model(*args, **kwargs)
            except Exception as error:
                raise Unsupported(f"it does not run on raw pixels: {first_line(error)}") from error
            outputs.append([each for each in pytree.tree_leaves(output) if is_floating_point(each)])
    of_numbers, of_integers = outputs
    if len(of_numbers) != len(of_integers) or not all(map(_agree, of_numbers, of_integers)):
        raise Unsupported("its forward does something else with integers")


def _agree(a: Tensor, b: Tensor) -> bool:
    same_kind = a.shape == b.shape and a.dtype == b.dtype
    return same_kind and torch.allclose(a, b, equal_nan=True)
