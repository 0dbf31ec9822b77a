"""The projection that takes the mean off passes exactly the operators that commute with it.

Random streams, in float64: what is freed computes what it did, to rounding, and RMSNorms receive
values whose mean is 0, so that no LayerNorm hides in one.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import error, in_eval, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.norms.sample.rms import RMSNorm
from normswap.passes import Center

C = 6
Step = tuple[Callable[[Tensor], Tensor], int]  # what it does, and where the channels are after it


class Constant(nn.Module):
    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(shape))


class Stream(nn.Module):
    """A value of four axes, one of them the channels, changed step by step; then a LayerNorm."""

    def __init__(self, draw: st.DrawFn, names: list[str]) -> None:
        super().__init__()
        self.draw, self.names = draw, names
        self.embed, self.parts = nn.Linear(3, C), nn.ModuleList()
        self.steps, self.axis = [], 3
        x = torch.randn(2, 4, 5, C)
        for name in names:
            self.shape, self.other = x.shape, draw(st.sampled_from(self.without_channels()))
            step, self.axis = getattr(self, name)()
            self.steps.append(step)
            x = step(x)
        self.end = self.own(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for step in self.steps:
            x = step(x)
        return self.end(x.movedim(self.axis, -1))

    def extra_repr(self) -> str:
        return ", ".join(self.names)

    def without_channels(self) -> list[int]:
        return [axis for axis in range(4) if axis != self.axis]

    def own(self, part: Any) -> Any:
        self.parts.append(part)
        return part

    def sizes(self, *full: int) -> list[int]:
        """The shape of the value with 1 on all axes but these."""
        return [size if i in full else 1 for i, size in enumerate(self.shape)]

    def one_of(self, *steps: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return self.draw(st.sampled_from(steps))

    # --- what commutes with it --------------------------------------------------------------------

    def branch(self) -> Step:
        part, axis = self.own(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C))), self.axis

        def mapped(x: Tensor) -> Tensor:
            return part(x.movedim(axis, -1)).movedim(-1, axis)

        return self.one_of(
            lambda x: x + mapped(x), lambda x: x - mapped(x), lambda x: x.add_(mapped(x), alpha=0.3)
        ), axis

    def gained_branch(self) -> Step:
        part, axis = self.own(nn.Sequential(nn.LayerNorm(C), nn.Linear(C, C))), self.axis
        gain = self.own(Constant(C))
        return lambda x: x + (gain.value * part(x.movedim(axis, -1))).movedim(-1, axis), axis

    def convolution(self) -> Step:
        part, axis = self.own(nn.Sequential(nn.LayerNorm(C), nn.Tanh())), self.axis
        conv = self.own(nn.Conv2d(C, C, 3, padding=1, bias=self.draw(st.booleans())))
        return lambda x: x.movedim(axis, 1) + conv(part(x.movedim(axis, -1)).movedim(-1, 1)), 1

    def permute(self) -> Step:
        order = self.draw(st.permutations(range(4)))
        return lambda x: x.permute(order), order.index(self.axis)

    def constants(self) -> Step:
        added = self.own(Constant(self.sizes(self.axis, self.other)))
        joined = self.own(Constant([1 if i == self.other else n for i, n in enumerate(self.shape)]))
        dim = self.other
        return self.one_of(
            lambda x: x - added.value, lambda x: torch.cat([joined.value, x], dim)
        ), self.axis

    def move(self) -> Step:
        dim = self.other
        return self.one_of(
            lambda x: x.roll(1, dim),
            lambda x: x.flip(dim),
            lambda x: x.narrow(dim, 0, 1),
            lambda x: torch.stack(x.unbind(dim)[::-1], dim),
            lambda x: F.pad(x.movedim(dim, -1), (1, 2)).movedim(-1, dim),
            lambda x: x.mean(dim, keepdim=True),
        ), self.axis

    def windows(self) -> Step:
        axis = self.axis
        return lambda x: x.movedim(axis, -1).flatten(0, 1).unsqueeze(0), 3

    def scale(self) -> Step:
        gate = self.own(Constant(self.sizes(self.other)))
        return self.one_of(
            lambda x: -x / 3, lambda x: x * gate.value, lambda x: gate.value.sigmoid() * x
        ), self.axis

    def images(self) -> Step:
        axis = self.axis
        return self.one_of(
            lambda x: F.adaptive_avg_pool2d(x.movedim(axis, 1), 3),
            lambda x: F.avg_pool2d(x.movedim(axis, 1), 3, 1, padding=1),
            lambda x: F.interpolate(x.movedim(axis, 1), size=(4, 3)),
            lambda x: F.dropout(x.movedim(axis, 1), 0.5, training=False),
        ), 1

    def mix(self) -> Step:
        layer = self.own(nn.Linear(self.shape[self.other], 3, bias=self.draw(st.booleans())))
        scores, axes = self.own(Constant((5, self.shape[self.other]))), (self.other, self.axis)
        return self.one_of(
            lambda x: layer(x.movedim(axes, (-1, -2))).transpose(-1, -2),
            lambda x: scores.value.softmax(-1) @ x.movedim(axes, (-2, -1)),
        ), 3

    # --- what does not ----------------------------------------------------------------------------

    def activation(self) -> Step:
        return self.one_of(torch.tanh, lambda x: x * x, lambda x: 1 / (2 + x.sigmoid())), self.axis

    def across_channels(self) -> Step:
        axis, dim = self.axis, self.other

        def shifted(x: Tensor) -> Tensor:  # as in shift networks: some channels move
            return torch.cat([x.narrow(axis, 0, 2).roll(1, dim), x.narrow(axis, 2, C - 2)], axis)

        return self.one_of(
            shifted,
            lambda x: x.narrow(axis, 1, 1) * x,
            lambda x: x + x.amax(axis, keepdim=True),
            lambda x: x + 1.0,
            lambda x: x.cumsum(axis),
        ), axis

    def per_channel(self) -> Step:
        gain, axis = self.own(Constant(self.sizes(self.axis, self.other))), self.axis
        conv, axes = self.own(nn.Conv2d(C, C, 3, padding=1, groups=C)), (axis, self.other)
        mixing = self.own(Constant((C, self.shape[self.other], 3)))
        return self.one_of(
            lambda x: x.movedim(axes, (1, -1)) @ mixing.value,
            lambda x: (x * gain.value).movedim(axis, 1),
            lambda x: conv(x.movedim(axis, 1)),
            lambda x: F.max_pool2d(x.movedim(axis, 1), 2, 1, padding=1),
        ), 1


COMMUTE = [
    "branch",
    "gained_branch",
    "convolution",
    "permute",
    "constants",
    "move",
    "windows",
    "scale",
    "images",
    "mix",
]
NOT = ["activation", "across_channels", "per_channel"]


def check(model: Stream, x: Tensor) -> int:
    """That Center keeps the function and that RMSNorms see means of 0; how many are left."""
    randomise(model).double()
    expected = in_eval(model, x)
    plan = ns.plan(model, Center(), inputs=x)
    plan.apply(model, inplace=True)  # steps refer to the parts, not to those of a copy
    means: list[float] = []
    for each in model.modules():
        if isinstance(each, RMSNorm):
            each.register_forward_pre_hook(
                lambda _, args: means.append((args[0].mean(-1).abs().max()).item())
            )
    assert error(in_eval(model, x), expected) <= 1e-10
    assert max(means, default=0.0) <= 1e-10
    return len(plan.left)


@st.composite
def commuting(draw: st.DrawFn) -> Stream:
    names = draw(st.lists(st.sampled_from(COMMUTE), min_size=1, max_size=6))
    return Stream(draw, names)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(commuting())
def test_what_commutes_with_it_leaves_no_layer_norm(model: Stream) -> None:
    assert check(model, torch.randn(2, 4, 5, 3, dtype=torch.float64)) == 0


@st.composite
def interrupted(draw: st.DrawFn) -> Stream:
    names = draw(st.lists(st.sampled_from(COMMUTE), min_size=1, max_size=4))
    names.insert(draw(st.integers(0, len(names))), draw(st.sampled_from(NOT)))
    return Stream(draw, ["branch", *names])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(interrupted())
def test_what_does_not_commute_is_never_passed(model: Stream) -> None:
    assert check(model, torch.randn(2, 4, 5, 3, dtype=torch.float64)) > 0


@pytest.mark.parametrize("name", COMMUTE)
def test_each_step_alone_is_passed(name: str) -> None:
    @settings(max_examples=4, deadline=None, derandomize=True)
    @given(st.data())
    def alone(data: st.DataObject) -> None:
        model = Stream(data.draw, [name])
        assert check(model, torch.randn(2, 4, 5, 3, dtype=torch.float64)) == 0

    alone()


@pytest.mark.parametrize("name", NOT)
def test_each_step_alone_stops_it(name: str) -> None:
    @settings(max_examples=7, deadline=None, derandomize=True)
    @given(st.data())
    def alone(data: st.DataObject) -> None:
        model = Stream(data.draw, [name, "permute"])
        assert check(model, torch.randn(2, 4, 5, 3, dtype=torch.float64)) == 1

    alone()
