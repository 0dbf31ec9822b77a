"""Redundant normalizations: how far the outputs of a model move without them, and their removal.

Where all that reads an RMSNorm is normalized again (`graph.redundancies`), what it divides by
cancels, up to the eps of what follows: a value with the mean square v is there divided by the root
of v + eps, and without the RMSNorm, which had divided it by r, by that of v + eps / r^2. How much
that is depends on v and r, so it is measured: the model runs on the examples without the RMSNorm,
in float64 where it can.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.core.errors import Unsupported, first_line
from normswap.graph.capture import Capture, examples_of
from normswap.graph.copies import copied
from normswap.graph.operators.layout import along
from normswap.graph.operators.operator import TABLE
from normswap.graph.operators.rule import argument_of
from normswap.graph.redundancies import Redundancies
from normswap.graph.running import as_call
from normswap.graph.sites import NormSite
from normswap.passes.edits.affine import is_bare
from normswap.passes.edits.base import gain_and_bias_of
from normswap.passes.edits.modules import Reduce
from normswap.passes.runs import Call, as_parameters, deviation, in_double, largest_rounding, run

# Of the largest output: what removes a normalization may move the outputs by so much. Rounding to
# bfloat16 moves each value by up to 4e-3.
LARGEST_DEVIATION = 1e-3


class Redundant:
    """The redundant normalizations of a captured model, and the edits that remove them.

    Args:
        sites: all normalizations of the model.
        inputs: the examples of the capture.
        assume_example: the model is called in no other way than in the example.
    """

    def __init__(
        self, seen: Capture, sites: Sequence[NormSite], inputs: Any, *, assume_example: bool
    ) -> None:
        self._seen, self._examples = seen, examples_of(inputs)
        self._redundancies = Redundancies(seen, sites, assume_example=assume_example)
        self._without: _Without | None = None

    def ends(self, site: NormSite) -> tuple[str, ...]:
        """The normalizations that make `site` redundant; none where it is not."""
        try:
            return self._redundancies.ends(site)
        except Unsupported:
            return ()

    def is_bare(self, site: NormSite) -> bool:
        """Whether `site` has no gain and bias, or a gain of 1 and a bias of 0."""
        return is_bare(self._seen.model.get_submodule(site.name))

    def removed(self, site: NormSite, why: str) -> Reduce:
        """The edit that removes `site`, which has the gain 1 by then, and is redundant as `why`.

        Raises:
            Unsupported: that would move the outputs by more than `LARGEST_DEVIATION` of the
                largest; the message says how far.
        """
        if self._without is None:
            self._without = _Without(self._seen.model, self._examples)
        moved = self._without.leave_out(site)
        self._redundancies.removed(site)
        return Reduce(
            site=site.name,
            path=site.name,
            reason=f"removing it moves the outputs by {moved:.2g} of their largest value on the "
            f"example, as {why}",
            to="identity",
            aliases=site.paths,
            deviation=moved,
        )


class _Scaled(nn.Module):
    """What an RMSNorm computes, but for the statistics: its gain times its input."""

    def __init__(self, norm: nn.Module, axis: int) -> None:
        super().__init__()
        gain = gain_and_bias_of(norm).get("weight")
        self._gain, self._axis = None if gain is None else gain.detach(), axis

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())
        if self._gain is None:
            return x
        return x * along(x.dim(), self._axis, self._gain).to(x.dtype)


class _EpsOfFloat32(TorchFunctionMode):
    """Inside, an RMSNorm that is given no eps takes that of float32, as in all narrower types."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        row, kwargs = TABLE.get(func), kwargs or {}
        is_rms = row is not None and row.normalizes == "rms"
        if is_rms and argument_of(func, args, kwargs, "eps") is None:
            args, kwargs = args[:3], {**kwargs, "eps": torch.finfo(torch.float32).eps}
        return func(*args, **kwargs)


class _Without:
    """Measures how far the outputs of a model move as more of its normalizations are left out.

    Raises:
        Unsupported: the model does not run, or returns nothing to measure it by.
    """

    def __init__(self, model: nn.Module, examples: Sequence[Any]) -> None:
        self._left_out: tuple[NormSite, ...] = ()
        self._moved = 0.0
        self._own = _Runs(model, [as_parameters(model, as_call(each)) for each in examples])
        narrow = any(each.dtype != torch.float64 for each in self._own.original)
        try:
            wide = copied(model).double(), [as_call(in_double(each)) for each in examples]
            self._wide = _Runs(*wide, eps_of_float32=narrow)
        except Exception:  # whatever a forward raises that does not compute in float64
            self._wide = self._own
        self._before = self._wide.original

    def leave_out(self, site: NormSite) -> float:
        """Leave `site` out from now on.

        Returns:
            How far that moves the outputs, relative to the largest value of each.

        Raises:
            Unsupported: that is too far, and it stays.
        """
        without = (*self._left_out, site)
        now = self._wide.outputs(without)
        moved = max(map(deviation, now, self._before, self._wide.original))
        if not moved <= LARGEST_DEVIATION:
            raise Unsupported(
                f"without it the outputs would move by {moved:.2g} of their largest value on the "
                f"example, which is more than {LARGEST_DEVIATION:g}"
            )
        total = self._moved + moved
        for own, original in zip(self._own.outputs(without), self._own.original, strict=True):
            if not deviation(own, original) <= total + largest_rounding(original.dtype):
                raise Unsupported(
                    f"without it the outputs would move by {deviation(own, original):.2g} of their "
                    f"largest value on the example in {original.dtype}, which is no rounding"
                )
        self._left_out, self._before, self._moved = without, now, total
        return moved


class _Runs:
    """What a model returns on the examples, with some of its normalizations left out.

    Args:
        eps_of_float32: an RMSNorm without an eps of its own takes that of float32.

    Attributes:
        original: the floating-point numbers that it returns with all of them.
    """

    def __init__(
        self, model: nn.Module, calls: Sequence[Call], *, eps_of_float32: bool = False
    ) -> None:
        self._model, self._calls = model, calls
        self._around = _EpsOfFloat32 if eps_of_float32 else nullcontext
        self.original = self.outputs(())

    def outputs(self, without: Sequence[NormSite]) -> list[Tensor]:
        """The floating-point numbers that it returns.

        Raises:
            Unsupported: it does not run, or returns none, or others in number or shape.
        """
        forwards = {
            site.name: _Scaled(self._model.get_submodule(site.name), site.channel_axis)
            for site in without
        }
        outputs: list[Tensor] = []
        for call in self._calls:
            with self._around():
                each = run(self._model, call, forwards=forwards)
            if each.outputs is None:
                assert each.error is not None
                how = "without it" if without else "on the example"
                raise Unsupported(f"the model does not run {how} ({first_line(each.error)})")
            outputs += [tensor for tensor in each.outputs if tensor.is_floating_point()]
        if not outputs:
            raise Unsupported("the model returns no floating-point numbers to measure it by")
        if without and [x.shape for x in outputs] != [x.shape for x in self.original]:
            raise Unsupported("without it the model returns other shapes on the example")
        return outputs
