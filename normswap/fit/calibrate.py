"""Fit the normalizations that were put in a pretrained model, from data, without a gradient step.

A GroupNorm in the place of a BatchNorm computes another function: its statistics are the sample's.
The nearest it can come is to give every channel the mean and the standard deviation that it had.
With x̂ the normalized value of the new module on the student's own activations, and (m, s) the
moments per channel of the teacher's output at the same place, that is

    gain = ± s / std(x̂),    bias = m - gain mean(x̂),

the sign being that of the teacher's gain. A site's x̂ depends on the sites before it. To fit one
after the other takes a pass over the data for each. Here every sweep fits all of them as it goes,
each batch running into a site on the output that those before it were just fitted to give. In the
first sweep a fit knows only the batches so far; in the next ones the moments of each batch take the
place of those it had before. After k sweeps the first k sites in dataflow order are exact, so that
the depth bounds their number, and the error falls by 3 to 6 with each: 5 to 8 sweeps do for the 19
sites of a ResNet-20, where to update all sites only at the end of a sweep takes 17.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from normswap.errors import NormswapError
from normswap.fit.batch import run
from normswap.fit.moments import Moments
from normswap.graph.norm_modules import Unsupported, anatomy, norm_kind, torch_class
from normswap.graph.snapshot import evaluating
from normswap.terminal import stderr

# The sweeps stop when the last one moved no mean and no standard deviation by more, in units of the
# site's typical standard deviation. ResNet-20 has its final accuracy when they still move by 1e-2.
TOLERANCE = 1e-4


def calibrate(
    student: nn.Module, teacher: nn.Module, data: Iterable[Any], *, batches: int | None = None
) -> nn.Module:
    """Fit the gain and bias of each normalization that replaces one of `teacher`, in place.

    Args:
        student: a copy of `teacher` in which normalizations were replaced at their paths.
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`. They are read once per
            sweep, from the same random state; those of an iterator, which ends, are kept in memory.
        batches: how many batches of `data` to read, by default all.

    Returns:
        `student`. Whatever else the two models hold is as before, and so is the random state.

    Raises:
        NormswapError: nothing was replaced, `data` is empty, an activation is not finite, the model
            rejects a batch, or a gain has not one value per channel. The student is as before then.
    """
    sites = [Site(*pair) for pair in replaced_norms(student, teacher)]
    if not sites:
        raise NormswapError(
            "the student has no other normalization than the teacher; replace some, then calibrate"
        )
    if isinstance(data, Iterator):
        data = list(islice(data, batches))
    with _unit_affine(sites), _progress() as show:
        for sweep in range(len(sites) + 1):
            _sweep(student, teacher, sites, data, batches, sweep, show)
            moved = max([site.end_sweep() for site in sites])
            if moved <= max(TOLERANCE, *(site.rounding for site in sites)):
                break
    for site in sites:
        if problem := site.problem():
            warnings.warn(f"calibrate: {site.path!r} {problem}", stacklevel=2)
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


class Site:
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
        start = {name: p.detach().cpu().double().view(-1) for name, p in self.affine.items()}
        self.gain = start.get("weight", torch.ones(1, dtype=torch.float64))
        self.bias = start.get("bias", torch.zeros(1, dtype=torch.float64))
        self._before = self.gain, self.bias
        self.target, self.normalized = Moments(), Moments()
        # What the type of the activations can resolve of a mean or a standard deviation.
        self.rounding = 4 * max(torch.finfo(p.dtype).eps for p in self.affine.values())

    def see_teacher(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Forward hook of the original: take the moments of its normalized and scaled value."""
        value = torch_class(module).forward(module, *args) if self.anatomy.tail else output
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
        if "weight" in self.affine:
            weight = getattr(self.original, "weight", None)
            sign = torch.ones(1) if weight is None else weight.detach().cpu().view(-1)
            # A constant channel has no deviation to scale; take that of a normalized value, 1.
            std = torch.where(self._varies(), self.normalized.std, 1.0)
            self.gain = torch.where(sign < 0, -1.0, 1.0) * self.target.std / std
        if "bias" in self.affine:
            self.bias = self.target.mean - self.gain * self.normalized.mean

    def end_sweep(self) -> float:
        """How far the sweep moved the output, in units of its typical standard deviation."""
        self.target.end_sweep()
        self.normalized.end_sweep()
        if not self._seen():
            return 0.0
        self.fit()
        (gain, bias), self._before = self._before, (self.gain, self.bias)
        spread = (self.gain - gain).abs() * self.normalized.std
        centre = ((self.gain - gain) * self.normalized.mean + self.bias - bias).abs()
        unit = self.target.std.square().mean().sqrt()
        return float((torch.maximum(spread, centre) / unit).max()) if unit else 0.0

    def store(self) -> None:
        for name, value in (("weight", self.gain), ("bias", self.bias)):
            if name in self.affine and self._seen():
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

    def _varies(self) -> Tensor:
        """The channels of x̂ that are more than a constant with rounding errors, (C,)."""
        mean, std = self.normalized.mean, self.normalized.std
        return std > self.rounding * (mean.square() + std.square()).mean().sqrt()

    def _seen(self) -> bool:
        return self.target.seen and self.normalized.seen


def _sweep(
    student: nn.Module,
    teacher: nn.Module,
    sites: list[Site],
    data: Iterable[Any],
    batches: int | None,
    sweep: int,
    show: Callable[[str], None],
) -> None:
    """Run the data through the student, and through the teacher as well the first time.

    Each sweep leaves the random state as it found it, so that all of them see the same shuffles.
    """
    count = 0
    with evaluating(teacher, student), ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(site.original.register_forward_hook(site.see_teacher))
            hooks.enter_context(site.norm.register_forward_hook(site.see_student))
        for count, batch in enumerate(islice(data, batches), 1):
            show(f"calibrating {len(sites)} normalizations: sweep {sweep + 1}, batch {count}")
            if sweep == 0:
                run(teacher, batch)
            run(student, batch)
    if not count:
        raise NormswapError("no batch to calibrate on; pass data that yields at least one")


@contextmanager
def _unit_affine(sites: list[Site]) -> Iterator[None]:
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


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that goes away at the end; nothing elsewhere."""
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    quiet = not stderr.is_terminal
    with Progress(*columns, console=stderr, transient=True, disable=quiet) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda line: bar.update(task, description=line)
