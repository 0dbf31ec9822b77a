"""The statistics that a model's BatchNorms have on other data, with the weights as they are.

The running statistics of training are a moving average of the last batches, under weights that were
moving; and data from elsewhere have others. The *population* statistics are those of all the data
at once, each BatchNorm seeing what those before it give with theirs. They depend neither on how the
data are cut into batches nor on their order.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, sections 3 (population statistics) and 5 (domain shift).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, Unsupported, first_line, warn
from normswap.fit.batch import run
from normswap.fit.site_moments import Moments
from normswap.fit.sweeps import settle
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
from normswap.passes.selection import Globs, select_paths


@usual_settings()
def reestimate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    batches: int | None = None,
    prior: float = 0.0,
    include: Globs | None = None,
    exclude: Globs = (),
) -> nn.Module:
    """Give every BatchNorm with running statistics those of all `data`, in place, at the end.

    A frozen BatchNorm gets them too: asking for it is asking. In tune mode they are those of what
    it would normalize if it computed its affine itself, with the weights as they are. One that is
    called several times gets those of all its calls together; one whose forward transposes, masks
    or casts first, those of what it then normalizes. As torch has it, the running variance is that
    of a sample, divided by the count less one.

    Args:
        data: batches of inputs, as for `normswap.fit.batch.inputs_of`; no labels are needed. They
            are read once per sweep (`normswap.fit.sweeps`), from the same random state; those of an
            iterator, which ends, are kept in memory. Under torch.distributed each process reads its
            own, and all get the same statistics; one may have none.
        batches: how many batches of `data` to read, by default all.
        prior: how many samples the statistics that the model has count as, N. With n samples in
            `data` a mean and a variance become N / (N + n) of the old and n / (N + n) of the new
            one, for a shift of domain of which there are few samples (Schneider et al. 2020, arXiv
            2006.16971, equation 2).
        include, exclude: globs on the names of the BatchNorms; by default all of them. The others
            normalize by the statistics that they have.

    Returns:
        `model`; all but the running means and variances is as before, and so is the random state.

    Raises:
        NormswapError: there is no such BatchNorm, a glob matches nothing, `data` is empty, an
            activation is not finite, the model rejects a batch or cannot be copied, or what a
            BatchNorm normalizes cannot be seen. The model is as before then.
    """
    if not 0 <= prior < float("inf"):
        raise NormswapError(f"prior is {prior}; give a number of samples, 0 or more")
    if any(nn.parameter.is_lazy(each) for each in (*model.parameters(), *model.buffers())):
        check_supported(model)  # which says where
    check_trainable(model)
    twin = _twin(model)  # what it sees changes no buffer of the model
    norms = dict(model.named_modules())
    running = {path: norm for path, norm in twin.named_modules() if _is_running(norm)}
    selected = select_paths(list(running), include, exclude)
    sites = [ReestimatedSite(path, running[path], norms[path], prior) for path in selected]
    if not sites:
        check_supported(model)  # inside a scripted or quantized one there may be some
        raise NormswapError("the model has no BatchNorm with running statistics; nothing to do")
    observed = ObservedInputs(sites)
    title = f"re-estimating {len(sites)} BatchNorms"
    settle(sites, data, batches, (twin,), lambda batch, _: observed.run(twin, batch), title)
    for site in sites:
        if site.seen.seen:
            site.store(site.original)
        else:
            warn(f"reestimate: {site.path!r} was never called and is as it was", stacklevel=2)
    return model


def _twin(model: nn.Module) -> nn.Module:
    """A copy with its own statistics, in which every BatchNorm computes its affine itself."""
    try:
        twin = copied(model, share_parameters=True)
    except Exception as error:
        raise NormswapError(
            f"the model cannot be copied ({first_line(error)}), and reestimate runs a copy, so "
            "that nothing but the statistics changes; remove what cannot be copied"
        ) from error
    if any(getattr(module, "folded", False) for module in twin.modules()):
        twin = plan(twin, Unfreeze()).apply(twin, inplace=True)
    for module in twin.modules():  # statistics that are parameters lie in the memory of the model's
        for name, parameter in list(module.named_parameters(recurse=False)):
            if name.startswith("running_"):
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), False)
    return twin


def _is_running(norm: nn.Module) -> bool:
    known = norm_kind(norm) == "batch" or isinstance(norm, BatchNorm)  # or mixed with another kind
    return known and (_named_as_torchs(norm) or fixed_statistics(norm) is not None)


def _named_as_torchs(norm: nn.Module) -> bool:
    return {"running_mean", "running_var"} <= {name for name, _ in own_tensors(norm)}


class ObservedInputs(TorchFunctionMode):
    """Sees what each of the `sites` really normalizes, while a model runs.

    That is what is given to `F.batch_norm` together with the site's running mean, whatever its
    forward did before. Where a forward computes its affine by a formula instead, as torchvision's
    FrozenBatchNorm2d does, it is the input, if its forward is known to do nothing else.
    """

    def __init__(self, sites: list["ReestimatedSite"]) -> None:
        super().__init__()
        self._sites = sites
        self._by_mean: dict[int, ReestimatedSite] = {}
        self._seen: set[ReestimatedSite] = set()  # in the innermost call that is running
        for site in sites:
            site.norm.register_forward_pre_hook(self._enter(site), with_kwargs=True)
            site.norm.register_forward_hook(self._leave(site))

    def run(self, model: nn.Module, batch: Any) -> None:
        """Run `model`, whose modules the sites are, on `batch`."""
        self._by_mean = {id(_statistics(site.norm)[0]): site for site in self._sites}
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

    def _enter(self, site: "ReestimatedSite") -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen.discard(site)
            site.input = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if site.by_formula and site.input is not None:
                site.see(site.input)

        return hook

    def _leave(self, site: "ReestimatedSite") -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if site not in self._seen and not site.by_formula and site.input is not None:
                site.take_input()
            site.input = None

        return hook


class ReestimatedSite:
    """A BatchNorm of the copy, which normalizes with the moments of what it has seen so far.

    Args:
        prior: the number of samples that the statistics of `original` count as.

    Attributes:
        by_formula: it does not call `F.batch_norm`, and normalizes its input.
        input: of the call that is running.
    """

    def __init__(self, path: str, norm: nn.Module, original: nn.Module, prior: float = 0.0) -> None:
        self.path, self.norm, self.original = path, norm, original
        self._prior = prior
        self._source = [each.detach().cpu().double().view(-1).clone() for each in _statistics(norm)]
        self._positions = 1.0  # of a sample
        self.by_formula, self.channel_axis = False, 1
        self.input: Tensor | None = None
        mean, _ = _statistics(norm)
        self.seen = Moments(mean.numel())
        self.moments: tuple[Moments, ...] = (self.seen,)
        self.rounding = 4 * torch.finfo(mean.dtype).eps
        self._before: tuple[Tensor, Tensor] | None = None

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
        """Take the moments of `x`, and normalize with those of all that was seen."""
        if not x.numel():
            return
        try:
            self.seen.add(x, self.channel_axis)
        except FloatingPointError as error:
            raise NormswapError(
                f"{self.path!r}: the activations there are not finite; check weights and data"
            ) from error
        self._positions = x.numel() / (x.shape[0] * x.shape[self.channel_axis])
        self.store(self.norm)

    def store(self, norm: nn.Module) -> None:
        """Give `norm` the statistics."""
        count = self.seen.count
        variance = self.seen.variance * count / (count - 1).clamp(min=1)
        values = [self.seen.mean, variance]
        if self._prior:
            old = self._prior * self._positions
            pairs = zip(self._source, values, strict=True)
            values = [(old * source + count * value) / (old + count) for source, value in pairs]
        with torch.no_grad():
            for tensor, value in zip(_statistics(norm), values, strict=True):
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


def _statistics(norm: nn.Module) -> tuple[Tensor, Tensor]:
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
