"""Which normalization a module of anybody's computes, found by running it.

A normalization layer is a few lines that everybody writes in another way: `rsqrt` or `1 / sqrt`,
`pow(2)` or `x * x`, an eps inside the forward, a gain of `1 + weight`, a detour through float32. So
it is judged by its results. A twin of the module (`normswap.graph.twins`), with random float64
numbers in its tensors, runs on random inputs, and the one formula is looked for that explains what
comes out:

    y = gain (x - mean) / sqrt(variance + eps) + bias

Which tensor plays which part follows from the numbers, never from its name; eps is solved for where
it decides the result. What is found must then hold for other numbers and for inputs of any size, to
1e-9; otherwise nothing is said. The module itself neither runs nor changes.

The answer depends on the class, the settings and the shapes of the tensors alone, and is remembered
for these: a network has many normalizations, and few different ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from inspect import isfunction, signature
from itertools import permutations
from math import isclose
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from normswap.core.ambient import generators_kept, warnings_ignored
from normswap.graph.twins import NotIt, Numbers, Twins

_TOLERANCE = 1e-9
_MOST_CHILDREN = 4  # what has more is a part of a network, not one normalization
_SAMPLE = 64  # so many numbers decide whether a formula is worth a full comparison
_SIZES = (1e-3, 1.0, 30.0, 1e4)  # of the inputs for which it has to hold
# Parts of the names of operators and functions; code that normalizes calls something named so.
_WORDS = ("norm", "sqrt", "pow", "std", "var", "mean", "square", "apply")
_ROLES = ("variance", "mean", "gain", "bias")


@dataclass(frozen=True)
class Formula:
    """What a normalization module computes in eval mode.

        y = (gain_offset + gain) (x - mean) / sqrt(variance + eps) + bias

    Attributes:
        kind: "batch" where the statistics are tensors of the module, or are taken over the batch;
            "layer", "rms", "group" or "instance" where they are taken over a part of each sample.
        channel_axis: 1 or -1.
        eps: as it is computed, whatever attribute or constant it comes from.
        gain, bias, mean, variance: the names of the module's tensors; None where there is none.
        gain_offset: 1 where the tensor says how far the gain is from 1, otherwise 0.
        tail: the children that are applied to the normalized value, in order.
        frozen: the statistics are tensors of the module in training mode too.
        why_not: how it differs from this formula; then only the kind and the axis are known.
    """

    kind: str
    channel_axis: int
    eps: float = 0.0
    gain: str | None = None
    bias: str | None = None
    mean: str | None = None
    variance: str | None = None
    gain_offset: float = 0.0
    tail: tuple[str, ...] = ()
    frozen: bool = False
    why_not: str | None = None

    @property
    def fixed(self) -> bool:
        """Whether it is one affine per channel, whose statistics are tensors of the module."""
        return self.variance is not None


def recognized(module: nn.Module, cls: type[nn.Module]) -> Formula | None:
    """What `module` computes, if it is a normalization; None if it is not, or of an unknown kind.

    Args:
        cls: the class whose forward it is, without what was mixed in since.
    """
    if len(module._modules) > _MOST_CHILDREN or not _may_normalize(cls):
        return None
    twins = Twins(module, cls)
    if not twins.may_normalize():
        return None
    key = twins.key()
    found = _remembered.get(key)
    if found is None:
        if len(_remembered) >= _MOST_REMEMBERED:
            _remembered.clear()
        # The settings are kept with it, so that no other object gets the id of one in the key.
        with generators_kept(), warnings_ignored():
            found = _remembered[key] = twins.settings, _judged(twins)
    return found[1]


_remembered: dict[Any, tuple[Any, Formula | None]] = {}
_MOST_REMEMBERED = 4096
_may: dict[type[nn.Module], bool] = {}


def _may_normalize(cls: type[nn.Module]) -> bool:
    """Whether the code of `cls` names what a normalization has to call; a quick first look."""
    if cls not in _may:
        # What nn.Module itself does normalizes nothing; torch's own normalizations do.
        own = cls.__mro__[: cls.__mro__.index(nn.Module)]
        functions = [value for each in own for value in vars(each).values() if isfunction(value)]
        names = {name.lower() for each in functions for name in _names(each.__code__)}
        _may[cls] = not issubclass(cls, (fx.GraphModule, torch.jit.ScriptModule)) and any(
            word in name for name in names for word in _WORDS
        )
    return _may[cls]


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


# --- the judge ------------------------------------------------------------------------------------


def _judged(twins: Twins) -> Formula | None:
    given = list(signature(twins.cls.forward).parameters.values())[1:]
    given = [each for each in given if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    if not given or any(each.default is each.empty for each in given[1:]):
        return None
    found = _explained(twins)
    if found is not None and len(given) > 1:
        return replace(found, why_not="takes more than the value that it normalizes")
    return found


def _explained(twins: Twins) -> Formula | None:
    resembles: Formula | None = None
    with torch.device("cpu"):
        for shape in twins.shapes():
            try:
                found = _Judge(twins, shape).formula()
            except Exception:  # whatever a forward raises that takes no such input
                continue
            if found.why_not is None:
                return found
            resembles = resembles or found
    return resembles


@dataclass(frozen=True)
class _Statistics:
    """Where the mean and the variance come from, if not from tensors of the module.

    Attributes:
        over: the axes; those of x, or of x with axis 1 split into groups.
    """

    kind: str
    channel_axis: int
    over: tuple[int, ...]
    groups: int | None = None

    def of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x less its mean, and its variance."""
        parts = x if self.groups is None else x.view(len(x), self.groups, -1, *x.shape[2:])
        mean = 0.0 if self.kind == "rms" else parts.mean(self.over, keepdim=True)
        centered = parts - mean
        variance = centered.square().mean(self.over, keepdim=True).expand_as(parts)
        return centered.reshape(x.shape), variance.reshape(x.shape)


class _Judge:
    """Looks for the formula that explains what twins make of inputs of one shape."""

    def __init__(self, twins: Twins, shape: tuple[int, ...]) -> None:
        self._twins, self._shape = twins, shape
        self._generator = torch.Generator().manual_seed(0)
        self._numbers = twins.random(self._generator)
        _, self._tail = twins.run(self._numbers, self._x())
        self._used = self._read()

    def formula(self) -> Formula:
        for found in (*self._fixed(), *self._taken()):
            if self._holds(found, None if found.variance else self._statistics[found]):
                return replace(found, tail=self._tail, frozen=self._is_frozen(found))
        return self._resembled()

    # --- hypotheses -------------------------------------------------------------------------------

    def _fixed(self) -> Iterator[Formula]:
        """The formulas by which it is one affine per channel, with statistics among its tensors."""
        if not 1 <= len(self._used) <= len(_ROLES):
            return
        scale, shift = self._affine(self._numbers)
        axis = self._axis_of(scale)
        if axis is None:
            return
        scale, shift = _along(scale, axis), _along(shift, axis)
        for roles in permutations(_ROLES, len(self._used)):
            given: dict[str, Any] = dict(zip(roles, self._used, strict=True))
            if "variance" not in given:
                continue
            held = {role: self._numbers[name].flatten() for role, name in given.items()}
            for offset in (0.0, 1.0) if "gain" in given else (0.0,):
                gain = held.get("gain", 1.0) + offset
                eps = (gain / scale).square() - held["variance"]
                expected = held.get("bias", 0.0) - held.get("mean", 0.0) * scale
                if _near(eps, eps.median(), 1e-6) and _near(shift, expected, 1e-6):
                    found = Formula("batch", axis, gain_offset=offset, **given)
                    yield replace(found, eps=self._eps_of(found))

    def _affine(self, numbers: Numbers) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(self._shape, dtype=torch.float64)
        shift, _ = self._twins.run(numbers, zero)
        y, _ = self._twins.run(numbers, zero + 1)
        return y - shift, shift

    def _axis_of(self, scale: Tensor) -> int | None:
        """The axis of the channels, if `scale` is the same along all others."""
        for axis in (1, -1):
            per_channel = scale.movedim(axis, 0).flatten(1)
            if bool((per_channel == per_channel[:, :1]).all()):
                return axis
        return None

    def _eps_of(self, found: Formula) -> float:
        """Solved for with variances so small that it decides."""
        assert found.variance is not None
        numbers = {**self._numbers, found.variance: self._numbers[found.variance] * 1e-8}
        scale = _along(self._affine(numbers)[0], found.channel_axis)
        gain = _gain(found, numbers)
        return _rounded((gain / scale).square() - numbers[found.variance].flatten(), 1e-8)

    def _taken(self) -> Iterator[Formula]:
        """The formulas by which it takes the statistics of its input."""
        self._statistics: dict[Formula, _Statistics] = {}
        x = self._x() * 1e-4  # the variance, 1e-8, and eps both matter
        y, _ = self._twins.run(self._numbers, x)
        for statistics in self._ways():
            centered, variance = statistics.of(x)
            for affine in self._affines(statistics):
                gain, bias = self._applied(affine)
                n = (y - bias).flatten()[self._chosen()]
                n = (centered * gain).flatten()[self._chosen()] / n
                v = variance.flatten()[self._chosen()]
                eps = n.square() - v
                if _near(eps, eps.median(), 1e-6 * float(v.median()) + 1e-10 * eps.median().abs()):
                    found = replace(affine, eps=_rounded(eps, 1e-8))
                    self._statistics[found] = statistics
                    yield found

    def _ways(self) -> Iterator[_Statistics]:
        rank = len(self._shape)
        axes = (-1,) if rank == 2 else (-1, 1)
        for axis in axes:
            yield _Statistics("layer", axis, (axis,))
            yield _Statistics("rms", axis, (axis,))
        if rank > 2:
            yield _Statistics("instance", 1, tuple(range(2, rank)))
            for groups in dict.fromkeys((1, *self._twins.told())):
                if 1 <= groups < self._shape[1] and self._shape[1] % groups == 0:
                    yield _Statistics("group", 1, tuple(range(2, rank + 1)), groups)
        yield _Statistics("batch", 1, (0, *range(2, rank)))

    def _affines(self, statistics: _Statistics) -> Iterator[Formula]:
        channels = self._shape[statistics.channel_axis]
        if len(self._used) > 2 or (self._used and self._twins.channels != channels):
            return
        for roles in permutations(("gain", "bias"), len(self._used)):
            given: dict[str, Any] = dict(zip(roles, self._used, strict=True))
            for offset in (0.0, 1.0) if "gain" in given else (0.0,):
                yield Formula(statistics.kind, statistics.channel_axis, gain_offset=offset, **given)

    def _resembled(self) -> Formula:
        """A formula that it is near to for large inputs, up to a factor.

        Raises:
            NotIt: there is none.
        """
        x = self._x() * 100
        y, _ = self._twins.run(self._numbers, x)
        for statistics in self._ways():
            centered, variance = statistics.of(x)
            for affine in self._affines(statistics):
                gain, bias = self._applied(affine)
                ratio = (y - bias) / (centered * torch.rsqrt(variance) * gain)
                ratio = ratio.flatten()[self._chosen()]
                if _near(ratio, ratio.median(), 1e-3) and ratio.median().abs() > 1e-3:
                    differs = "has another eps or factor than (x - mean) / sqrt(variance + eps)"
                    return replace(affine, tail=self._tail, why_not=differs)
        raise NotIt

    # --- proof ------------------------------------------------------------------------------------

    def _holds(self, found: Formula, statistics: _Statistics | None) -> bool:
        """Whether the formula gives what a twin does, for other numbers and inputs of any size."""
        for size in _SIZES:
            numbers, x = self._twins.random(self._generator), self._x() * size + size
            y, tail = self._twins.run(numbers, x, child=_bend)
            gain, bias = self._applied(found, numbers)
            if statistics is None:
                mean = self._spread(numbers.get(found.mean or ""), found.channel_axis, 0.0)
                centered = x - mean
                variance = self._spread(numbers.get(found.variance or ""), found.channel_axis, 0.0)
            else:
                centered, variance = statistics.of(x)
            expected = gain * centered * torch.rsqrt(variance + found.eps) + bias
            for name in self._tail:
                expected = _bend(name, expected)
            if tail != self._tail or not _near(
                y, expected, _TOLERANCE * float(expected.abs().max())
            ):
                return False
        return True

    def _is_frozen(self, found: Formula) -> bool:
        if found.variance is None:
            return False
        x = self._x()
        try:
            in_training, _ = self._twins.run(self._numbers, x, training=True)
        except Exception:  # it may well need more values there
            return False
        return torch.equal(in_training, self._twins.run(self._numbers, x)[0])

    # --- numbers ----------------------------------------------------------------------------------

    def _x(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator, dtype=torch.float64)

    def _chosen(self) -> slice:
        total = torch.Size(self._shape).numel()
        return slice(0, None, max(1, total // _SAMPLE))

    def _read(self) -> tuple[str, ...]:
        """The tensors that the result depends on."""
        x = self._x()
        y, _ = self._twins.run(self._numbers, x)
        return tuple(
            name
            for name, tensor in self._numbers.items()
            if not torch.equal(self._twins.run({**self._numbers, name: tensor * 1.1}, x)[0], y)
        )

    def _applied(self, found: Formula, numbers: Numbers | None = None) -> tuple[Tensor, Tensor]:
        """The gain and the bias, in the shape of the input."""
        numbers = self._numbers if numbers is None else numbers
        gain = self._spread(numbers.get(found.gain or ""), found.channel_axis, 1.0)
        bias = self._spread(numbers.get(found.bias or ""), found.channel_axis, 0.0)
        return gain + found.gain_offset, bias

    def _spread(self, vector: Tensor | None, axis: int, default: float) -> Tensor:
        if vector is None:
            return torch.tensor(default, dtype=torch.float64)
        if vector.numel() != self._shape[axis]:
            raise NotIt
        shape = [1] * len(self._shape)
        shape[axis] = -1
        return vector.reshape(shape)


def _gain(found: Formula, numbers: Numbers) -> Tensor:
    if found.gain is None:
        return torch.ones((), dtype=torch.float64)
    return numbers[found.gain].flatten() + found.gain_offset


def _along(value: Tensor, axis: int) -> Tensor:
    return value.movedim(axis, 0).flatten(1)[:, 0]


def _near(value: Tensor, expected: Tensor | float, tolerance: Any) -> bool:
    return bool(((value - expected).abs() <= tolerance).all())


def _rounded(eps: Tensor, beside: float) -> float:
    """What the solutions for eps agree on; they are differences to variances near `beside`."""
    value = float(eps.median())
    if isclose(value, torch.finfo(torch.float64).eps, rel_tol=1e-3):
        return torch.finfo(torch.float32).eps  # eps=None in F.rms_norm: that of the type it is in
    return 0.0 if abs(value) < 1e-9 * beside else float(f"{value:.9g}")


def _bend(name: str, value: Tensor) -> Tensor:
    """Something that no normalization undoes, another for each child."""
    return torch.sin(value + sum(map(ord, name)) % 7)
