"""How far the outputs of two models are apart, at the end and at each site on the way."""

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from normswap.core.calls import cloned, floating, recorded, running_on
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.graph.running import as_call
from normswap.graph.snapshot import evaluating

TOLERANCE = 1e-5  # of an exact rewrite in float32, relative to the largest output
ROUNDING = 3.0  # or this many times what rounding alone does to the original
OUTPUT = ""  # the path of the model itself


class SiteOutput(BaseModel):
    """How much of a site's output in the original is left in the other model.

    Attributes:
        site: the module path, or "" for the output of the model.
        snr_db: the signal-to-noise ratio in decibels, 10 log10(sum a^2 / sum (a - b)^2) of the
            original's values a and the other's b: 20 is an error of a tenth, 0 one as large as the
            values; infinite where they are the same. None where the two cannot be compared.
        note: why they cannot.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    site: str
    snr_db: float | None
    note: str = ""


def signal_to_noise(
    original: nn.Module,
    changed: nn.Module,
    inputs: Any,
    sites: Iterable[str],
    *,
    inside: str = "",
) -> tuple[SiteOutput, ...]:
    """The outputs of the modules at `sites`, and of the models themselves, in eval mode.

    A module that is called several times is compared over all its calls. Both models are as before.

    Args:
        inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        inside: the path, in `original`, of the module whose paths `sites` are.
    """
    paths = {site: site for site in (*dict.fromkeys(sites), OUTPUT)}
    there = {site: f"{inside}.{site}" if site and inside else site for site in paths}
    with evaluating(original, changed):
        before = _recorded(original, inputs, there)
        after = _recorded(changed, inputs, paths)
    return tuple(_compared(site, before.get(site), after.get(site)) for site in paths)


def _recorded(model: nn.Module, inputs: Any, paths: dict[str, str]) -> dict[str, list[Tensor]]:
    """The floating-point outputs of the modules at `paths`, of one call after the other."""
    modules = dict(model.named_modules(remove_duplicate=False))
    present = {site: modules[path] for site, path in paths.items() if path in modules}
    # Copied, as what follows may work in place.
    with recorded(present, lambda output: cloned(floating(output))) as found:
        args, kwargs = cloned(as_call(inputs))
        model(*args, **kwargs)
    return found


def _compared(site: str, before: list[Tensor] | None, after: list[Tensor] | None) -> SiteOutput:
    if before is None or after is None:
        whose = "the original" if before is None else "the result"
        return SiteOutput(site=site, snr_db=None, note=f"no module that {whose} calls")
    if [a.shape for a in before] != [b.shape for b in after]:
        return SiteOutput(site=site, snr_db=None, note="outputs of another shape or number")
    pairs = list(zip(before, after, strict=True))
    if not any(a.numel() for a in before):
        return SiteOutput(site=site, snr_db=None, note="no floating-point output")
    signal = sum(float(a.double().square().sum()) for a, _ in pairs)
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return SiteOutput(site=site, snr_db=_decibels(signal, noise))


def _decibels(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def compare_outputs(
    original: nn.Module, changed: nn.Module, inputs: Any
) -> tuple[float, float] | None:
    """How far `changed` is from `original` on `inputs` in eval mode, and how far it may be.

    Returns:
        The deviation max|a - b| / max|b| of the floating-point output where it is largest, and what
        counts as rounding: 1e-5, or 3 times the distance of the original from itself in float64.
        None where there is nothing to compare: a detector that found nothing.
    """
    expected = _outputs(original, inputs)
    if not any(output.numel() for output in expected):
        return None
    deviation = _distance(_outputs(changed, inputs), expected)
    if deviation <= TOLERANCE:
        return deviation, TOLERANCE
    exact = _outputs(_double(original), _double(inputs))
    return deviation, max(TOLERANCE, ROUNDING * _distance(expected, exact))


def output_deviation(original: nn.Module, changed: nn.Module, inputs: Any) -> float | None:
    """The first of what `compare_outputs` returns.

    Raises:
        NormswapError: a model rejects the inputs; the outputs are of different shapes, or not as
            many.
    """
    with running_on(inputs, "this is model A; give inputs that both take"):
        expected = _outputs(original, inputs)
    with running_on(inputs, "this is model B; give inputs that both take"):
        actual = _outputs(changed, inputs)
    if [a.shape for a in actual] != [b.shape for b in expected]:
        raise NormswapError(
            f"the outputs cannot be compared: A gives {_shapes(expected)}, B gives "
            f"{_shapes(actual)}; compare models of one task, with the same number of classes"
        )
    if not any(output.numel() for output in expected):
        return None
    return _distance(actual, expected)


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, each.shape)) or "a number" for each in outputs) or "none"


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = cloned(as_call(inputs))  # the next model needs them as they were
    with evaluating(model):
        return floating(model(*args, **kwargs))


def _distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [a.shape for a in actual] != [b.shape for b in expected]:
        return math.inf
    pairs = [(a.double(), b.double()) for a, b in zip(actual, expected, strict=True) if b.numel()]
    # torch's maximum, unlike Python's, is NaN if one of the values is.
    distances = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in pairs]
    return float(torch.stack(distances).max())


def _double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, value)
