"""Fit the normalizations that were put in a pretrained model, from data, without a gradient step.

A GroupNorm in the place of a BatchNorm computes another function: its statistics are the sample's.
The nearest it can come is to give every channel the mean and the standard deviation that it had.
With x̂ the normalized value of the new module on the student's own activations, and (m, s) the
moments per channel of the teacher's output at the same place, that is

    gain = ± s / std(x̂),    bias = m - gain mean(x̂),

the sign being that of the teacher's gain. A BatchNorm that took the place of a LayerNorm, say, is
given the moments of its input as running statistics as well (`CalibratedSite.store`). A site's x̂
depends on the sites before it, so all are fitted together, in sweeps over the data
(`normswap.fit.sweeps`). The slope of a DynamicTanh is chosen before (`normswap.fit.slopes`).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, Unsupported, warn
from normswap.core.types import Batches
from normswap.fit.batch import run
from normswap.fit.reading import repeatable
from normswap.fit.site_moments import Moments
from normswap.fit.slopes import slopes
from normswap.fit.sweeps import settle
from normswap.graph.norm_modules import (
    anatomy,
    before_tail,
    fixed_statistics,
    formula,
    gain_of,
    norm_kind,
)
from normswap.graph.supported import check_trainable
from normswap.norms.calling import input_of
from normswap.norms.pointwise.dynamic_tanh import DynamicTanh
from normswap.passes.selection import Globs, select_paths

# Accuracy does not change any more where the moments move by less (tools/bench_calibrate.py).
TOLERANCE = 0.1
SWEEPS = 5  # nor after so many of them, if that tolerance is enough


@usual_settings()
def calibrate(
    student: nn.Module,
    teacher: nn.Module,
    data: Batches,
    *,
    batches: int | None = None,
    tolerance: float = TOLERANCE,
    include: Globs | None = None,
    exclude: Globs = (),
) -> nn.Module:
    """Fit the gain and bias of each normalization that replaces one of `teacher`, in place.

    Args:
        student: a copy of `teacher` in which normalizations were replaced at their paths.
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`. They are read once per
            sweep, from the same random state; those of an iterator, which ends, are kept in memory.
        batches: how many batches of `data` to read, by default all.
        tolerance: the sweeps end where the last one moved no mean and no standard deviation of an
            output by more, in units of the site's typical standard deviation; with the default, or
            more, after five. 1e-7 goes on until nothing moves but by rounding, which takes about a
            sweep for each two sites.
        include, exclude: globs on the paths of what was replaced; by default all of it is fitted.

    Returns:
        `student`. Whatever else the two models hold is as before, and so is the random state.

    Raises:
        NormswapError: nothing was replaced, a glob matches nothing, `data` is empty, an activation
            is not finite, the model rejects a batch, or a gain has not one value per channel. The
            student is as before then.

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> student = normswap.convert(model, "layer_norm", inputs=images[:2])
        >>> student = normswap.calibrate(student, model, images[:200].split(50))
    """
    for model in (student, teacher):
        check_trainable(model)
    pairs = replaced_norms(student, teacher)
    selected = select_paths([path for path, _, _ in pairs], include, exclude)
    sites = [CalibratedSite(*pair) for pair in pairs if pair[0] in selected]
    if not sites:
        raise NormswapError(
            "student and teacher have the same normalization layers; convert the student first"
        )

    def run_both(batch: Any, first: bool) -> None:
        if first:
            run(teacher, batch)
        run(student, batch)

    data = repeatable(data, batches)
    alphas = slopes(teacher, [(site.norm, site.original) for site in sites], data)
    title = f"calibrating {len(sites)} normalizations"
    with _with_slopes(alphas), _unit_affine(sites), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(
                site.original.register_forward_hook(site.see_teacher, with_kwargs=True)
            )
            hooks.enter_context(site.norm.register_forward_hook(site.see_student))
        most = SWEEPS if tolerance >= TOLERANCE else None
        settle(sites, data, batches, (teacher, student), run_both, title, tolerance, most)
    for site in sites:
        if problem := site.problem():
            warn(f"calibrate: {site.path!r} {problem}", stacklevel=2)
    return student


def replaced_norms(
    student: nn.Module, teacher: nn.Module
) -> list[tuple[str, nn.Module, nn.Module]]:
    """(path, student's normalization, teacher's) wherever the student has another one, with affine.

    Where a replacement keeps the rest of the original (an activation, a layout), the normalization
    is its child named `norm`. A BatchNorm in another form (frozen, synchronized) is the same
    function in eval mode, and has nothing to fit.
    """
    modules = dict(student.named_modules())
    pairs = []
    for path, original in teacher.named_modules():
        norm = modules.get(path)
        kind = norm_kind(original)
        if kind is None or norm is None or repr(norm) == repr(original):
            continue
        while not _affine(norm) and isinstance(getattr(norm, "norm", None), nn.Module):
            norm = norm.norm
        if _affine(norm) and not kind == norm_kind(norm) == "batch":
            pairs.append((path, norm, original))
    return pairs


def _affine(norm: nn.Module) -> dict[str, nn.Parameter]:
    own = norm.named_parameters(recurse=False)
    return {name: parameter for name, parameter in own if name in ("weight", "bias")}


class CalibratedSite:
    """A replaced normalization: the moments to reach, those of x̂, and the affine between them."""

    def __init__(self, path: str, norm: nn.Module, original: nn.Module) -> None:
        try:
            self.anatomy = anatomy(original)
        except Unsupported as error:
            raise NormswapError(f"{path!r} cannot be calibrated: {error}; exclude it") from error
        self.path, self.norm, self.original = path, norm, original
        last = isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
        self.channel_axis: int = getattr(norm, "channel_axis", -1 if last else 1)
        self.affine = _affine(norm)
        held = formula(norm)
        self.eps = 0.0 if held is None else held.eps
        start = {name: p.detach().cpu().double().view(-1) for name, p in self.affine.items()}
        self.gain = start.get("weight", torch.ones(1, dtype=torch.float64))
        self.bias = start.get("bias", torch.zeros(1, dtype=torch.float64))
        self._before = self.gain, self.bias
        channels = max(parameter.numel() for parameter in self.affine.values())
        self.target, self.normalized = Moments(channels), Moments(channels)
        self.moments: tuple[Moments, ...] = self.target, self.normalized
        # What the type of the activations can resolve of a mean or a standard deviation.
        self.rounding = 4 * max(torch.finfo(p.dtype).eps for p in self.affine.values())

    def see_teacher(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Forward hook of the original: take the moments of its normalized and scaled value."""
        tail = self.anatomy.tail
        value = output
        if tail:
            value = before_tail(module, tail, (input_of(module, args, kwargs),))
        self._add(self.target, value, self.anatomy.channel_axis, "teacher")

    def see_student(self, module: nn.Module, args: tuple[Any, ...], normalized: Tensor) -> Tensor:
        """Forward hook of the new module, whose affine is 1 and 0: apply the fitted one to x̂.

        The moments are taken at once: the model may write into the value that a hook returns.
        """
        self._add(self.normalized, normalized, self.channel_axis, "student")
        if self._seen():
            self.fit()
        shape = [1] * normalized.dim()
        shape[self.channel_axis] = -1
        wide = torch.promote_types(normalized.dtype, torch.float32)
        gain, bias = (p.to(normalized.device, wide).view(shape) for p in (self.gain, self.bias))
        return torch.addcmul(bias, normalized, gain).to(normalized.dtype)

    def _add(self, moments: Moments, value: Tensor, axis: int, model: str) -> None:
        channels = value.shape[axis]
        if any(parameter.numel() != channels for parameter in self.affine.values()):
            raise NormswapError(
                f"{self.path!r}: the {model} has {channels} channels there, and the new gain or "
                "bias not as many values; exclude it"
            )
        try:
            moments.add(value, axis)
        except FloatingPointError as error:
            raise NormswapError(
                f"{self.path!r}: the {model}'s activations there are not finite; "
                "check its weights and the data"
            ) from error

    def fit(self) -> None:
        """The gain and bias that give x̂ the target's moments, as far as both are known by now."""
        mean, std = self.normalized.mean, self.normalized.std
        if "weight" in self.affine:
            sign = gain_of(self.original).cpu()
            # A channel that is constant but for rounding has no deviation to scale; take 1, that of
            # a normalized value.
            varies = std > self.rounding * (mean.square() + std.square()).mean().sqrt()
            scale = self.target.std / torch.where(varies, std, 1.0)
            self.gain = torch.where(sign < 0, -scale, scale)
        if "bias" in self.affine:
            self.bias = self.target.mean - self.gain * mean

    def end_sweep(self) -> float:
        """Fit; how far that moved the output, in units of its typical standard deviation."""
        if not self._seen():
            return 0.0
        self.fit()
        (gain, bias), self._before = self._before, (self.gain, self.bias)
        spread = (self.gain - gain).abs() * self.normalized.std
        centre = ((self.gain - gain) * self.normalized.mean + self.bias - bias).abs()
        unit = self.target.std.square().mean().sqrt()
        return float((torch.maximum(spread, centre) / unit).max()) if unit else 0.0

    def store(self) -> None:
        """Give the new module what was fitted.

        Where the original had no running statistics and it has, these become the moments of its
        input, and gain and bias such that the function is the one that was fitted.
        """
        if not self._seen():
            return
        gain, bias = self.gain, self.bias
        fixed = fixed_statistics(self.norm)
        if fixed is not None and fixed_statistics(self.original) is None:
            mean, variance = fixed
            root = (variance.cpu().double() + self.eps).sqrt()
            of_input = self.normalized.variance * root.square()
            bias = gain * self.normalized.mean + bias
            gain = gain / root * (of_input + self.eps).sqrt()
            mean.copy_(mean.cpu().double() + self.normalized.mean * root)
            variance.copy_(of_input)
        for name, value in (("weight", gain), ("bias", bias)):
            if name in self.affine:
                self.affine[name].copy_(value.view_as(self.affine[name]))

    def problem(self) -> str | None:
        """Why the moments could not all be matched."""
        if not self._seen():
            return "was never called and is as it was"
        if "bias" not in self.affine:
            return "has no bias: its channels have the right deviation, but not the mean"
        if "weight" not in self.affine:
            return "has no gain: its channels have the right mean, but not the deviation"
        return None

    def _seen(self) -> bool:
        return self.target.seen and self.normalized.seen


@contextmanager
def _with_slopes(alphas: Mapping[DynamicTanh, float]) -> Iterator[None]:
    """Inside, and after it unless it fails, each of these has its slope."""
    before = {norm: norm.alpha.detach().clone() for norm in alphas}
    try:
        for norm, alpha in alphas.items():
            norm.alpha.detach().fill_(alpha)
        yield
    except BaseException:
        for norm, old in before.items():
            norm.alpha.detach().copy_(old)
        raise


@contextmanager
def _unit_affine(sites: list[CalibratedSite]) -> Iterator[None]:
    """Inside, gain 1 and bias 0, so that a site's output is x̂; then the fitted, or the old ones."""
    before = [(p, p.detach().clone()) for site in sites for p in site.affine.values()]
    with torch.no_grad():
        try:
            for site in sites:
                for name, parameter in site.affine.items():
                    parameter.fill_(name == "weight")
            yield
        finally:
            for parameter, value in before:
                parameter.copy_(value)
        for site in sites:
            site.store()
