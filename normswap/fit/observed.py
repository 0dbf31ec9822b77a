"""What each BatchNorm of a model really normalizes, seen while a copy of the model runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.core.errors import NormswapError, Unsupported, first_line
from normswap.fit.batch import run
from normswap.fit.site_moments import Moments
from normswap.graph.copies import copied
from normswap.graph.index import own_tensors
from normswap.graph.norm_modules import anatomy, fixed_statistics, norm_kind
from normswap.graph.operators.operator import TABLE
from normswap.graph.operators.rule import argument_of
from normswap.graph.supported import check_supported, check_trainable
from normswap.norms.batch.adaptive import AdaptiveBatchNorm
from normswap.norms.batch.plain import BatchNorm
from normswap.passes.freeze import Unfreeze
from normswap.passes.plan import plan


def running_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the modules of `model` that normalize with running statistics, by path.

    Raises:
        NormswapError: there is none, or the model is none whose statistics can be written.
    """
    if any(nn.parameter.is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        check_supported(model)  # which says where
    check_trainable(model)
    found = {path: norm for path, norm in model.named_modules() if is_running(norm)}
    if not found:
        check_supported(model)  # inside a scripted or quantized one there may be some
        raise NormswapError("the model has no BatchNorm with running statistics; nothing to do")
    return found


def is_running(norm: nn.Module) -> bool:
    """Whether it is a BatchNorm that normalizes with running statistics."""
    known = norm_kind(norm) == "batch" or isinstance(norm, BatchNorm)  # or mixed with another kind
    return known and (_named_as_torchs(norm) or fixed_statistics(norm) is not None)


def _named_as_torchs(norm: nn.Module) -> bool:
    return {"running_mean", "running_var"} <= {name for name, _ in own_tensors(norm)}


def statistics_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The mean and the variance that `norm` normalizes with: those of the current domain."""
    if isinstance(norm, AdaptiveBatchNorm):
        own: Any = norm.statistics(norm.current)
        return own.running_mean, own.running_var
    if _named_as_torchs(norm):  # a subclass may do more than normalize, and has no known formula
        tensors = dict(own_tensors(norm))
        return tensors["running_mean"], tensors["running_var"]
    held = fixed_statistics(norm)
    assert held is not None
    return held


def statistics_of_domains(norm: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The mean and the variance of each domain of `norm`, of which most have one."""
    if isinstance(norm, AdaptiveBatchNorm):
        held = [norm.statistics(name) for name in norm.domains]
        return [(each.running_mean, each.running_var) for each in held]
    return [statistics_of(norm)]


def observable(model: nn.Module) -> nn.Module:
    """A copy with its own statistics, in which every BatchNorm computes its affine itself.

    Raises:
        NormswapError: the model cannot be copied.
    """
    try:
        twin = copied(model, share_parameters=True)
    except Exception as error:
        raise NormswapError(
            f"the model cannot be copied ({first_line(error)}), and its statistics are taken from "
            "a copy, so that nothing else changes; remove what cannot be copied"
        ) from error
    if any(getattr(module, "folded", False) for module in twin.modules()):
        twin = plan(twin, Unfreeze()).apply(twin, inplace=True)
    for module in twin.modules():  # statistics that are parameters lie in the memory of the model's
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name.startswith("running_"):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), False)
    return twin


class ObservedSite:
    """A BatchNorm of the copy, with statistics that follow from what it is given to normalize.

    Attributes:
        held: the mean and the variance that it had, (C,) in float64.
        seen: the moments of what it was given.
        positions: how many values of a sample each channel has.
        by_formula: it does not call `F.batch_norm`, and normalizes its input.
        input: of the call that is running.
    """

    def __init__(self, path: str, norm: nn.Module) -> None:
        self.path, self.norm = path, norm
        self.by_formula, self.channel_axis = False, 1
        self.input: Tensor | None = None
        mean, variance = (
            each.detach().cpu().double().flatten().clone() for each in statistics_of(norm)
        )
        self.held = mean, variance
        self.seen = Moments(mean.numel())
        self.moments: tuple[Moments, ...] = (self.seen,)
        self.rounding = 4 * torch.finfo(statistics_of(norm)[0].dtype).eps
        self.positions = 1.0
        self._before: tuple[Tensor, Tensor] | None = None

    def statistics(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance to normalize with, after what was seen."""
        raise NotImplementedError

    def take_input(self) -> None:
        """Take the input of the call for what is normalized, from here on.

        Raises:
            NormswapError: it is not known to be that.
        """
        try:
            self.channel_axis = anatomy(self.norm).channel_axis
        except Unsupported as reason:
            raise NormswapError(
                f"what {self.path!r} normalizes cannot be seen: {reason}; let its forward call "
                "F.batch_norm with its running_mean"
            ) from reason
        self.by_formula = True
        assert self.input is not None
        self.see(self.input)

    def see(self, x: Tensor) -> None:
        """Take the moments of `x`, and normalize with what follows from all that was seen."""
        if not x.numel():
            return
        try:
            self.seen.add(x, self.channel_axis)
        except FloatingPointError as error:
            raise NormswapError(
                f"{self.path!r}: the activations there are not finite; check weights and data"
            ) from error
        self.positions = x.numel() / (x.shape[0] * x.shape[self.channel_axis])
        self.store(self.norm)

    def store(self, norm: nn.Module) -> None:
        """Give `norm` the statistics."""
        with torch.no_grad():
            for tensor, value in zip(statistics_of(norm), self.statistics(), strict=True):
                tensor.copy_(value.view_as(tensor))

    def end_sweep(self) -> float:
        """Give the copy the statistics; how far that moved them, in typical standard deviations."""
        if not self.seen.seen:
            return 0.0
        self.store(self.norm)
        mean, std = self.seen.mean, self.seen.std
        before, self._before = self._before, (mean, std)
        unit = std.square().mean().sqrt()
        if before is None or not unit:
            return float("inf") if before is None else 0.0
        moved = torch.maximum((mean - before[0]).abs(), (std - before[1]).abs())
        return float((moved / unit).max())


class ObservedInputs(TorchFunctionMode):
    """Shows each of the `sites` what it really normalizes, while a model runs.

    That is what is given to `F.batch_norm` together with the site's running mean, whatever its
    forward did before. Where a forward computes its affine by a formula instead, as torchvision's
    FrozenBatchNorm2d does, it is the input, if its forward is known to do nothing else.
    """

    def __init__(self, sites: Sequence[ObservedSite]) -> None:
        super().__init__()
        self._sites = sites
        self._by_mean: dict[int, ObservedSite] = {}
        self._seen: set[ObservedSite] = set()  # in the innermost call that is running
        for site in sites:
            site.norm.register_forward_pre_hook(self._enter(site), with_kwargs=True)
            site.norm.register_forward_hook(self._leave(site))

    def run(self, model: nn.Module, batch: Any) -> None:
        """Run `model`, whose modules the sites are, on `batch`."""
        self._by_mean = {id(statistics_of(site.norm)[0]): site for site in self._sites}
        with torch.compiler.set_stance("force_eager"), self:  # compiled code shows no calls
            run(model, batch)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        row = TABLE.get(func)
        if row is not None and row.normalizes == "batch":
            mean = argument_of(func, args, kwargs or {}, "running_mean")
            site = self._by_mean.get(id(mean))
            if site is not None and not site.by_formula:
                self._seen.add(site)
                site.see(argument_of(func, args, kwargs or {}, "input"))
        return func(*args, **(kwargs or {}))

    def _enter(self, site: ObservedSite) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen.discard(site)
            site.input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if site.by_formula and site.input is not None:
                site.see(site.input)

        return hook

    def _leave(self, site: ObservedSite) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if site not in self._seen and not site.by_formula and site.input is not None:
                site.take_input()
            site.input = None

        return hook
