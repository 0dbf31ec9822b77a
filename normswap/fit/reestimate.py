"""The statistics that a model's BatchNorms have on other data, with the weights as they are.

The running statistics of training are a moving average of the last batches, under weights that were
moving; and data from elsewhere have others. The *population* statistics are those of all the data
at once, each BatchNorm seeing what those before it give with theirs. They depend neither on how the
data are cut into batches nor on their order.

Source: Ioffe & Szegedy 2015, arXiv 1502.03167, algorithm 2; Wu & Johnson 2021, "Rethinking 'Batch'
in BatchNorm", arXiv 2105.07576, sections 3 (population statistics) and 5 (domain shift).
"""

from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.calls import check_module
from normswap.core.errors import NormswapError, warn
from normswap.core.types import Batches
from normswap.fit.observed import (
    ObservedInputs,
    ObservedSite,
    observable,
    running_norms,
)
from normswap.fit.sweeps import settle
from normswap.passes.selection import Globs, select_paths


@usual_settings()
def reestimate(
    model: nn.Module,
    data: Batches,
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

    Examples:
        >>> import normswap
        >>> from normswap.demo.digits import digits, digits_data
        >>> model, images = digits(), digits_data("train")[0]
        >>> adapted = normswap.reestimate(model, images[:64].split(16))
    """
    check_module(model)
    if not 0 <= prior < float("inf"):
        raise NormswapError(f"prior is {prior}; give a number of samples, 0 or more")
    norms = running_norms(model)
    selected = select_paths(list(norms), include, exclude)
    twin = observable(model)  # what it sees changes no buffer of the model
    sites = [ReestimatedSite(path, twin.get_submodule(path), prior) for path in selected]
    observed = ObservedInputs(sites)
    title = f"re-estimating {len(sites)} BatchNorms"
    settle(sites, data, batches, (twin,), lambda batch, _: observed.run(twin, batch), title)
    for site in sites:
        if site.seen.seen:
            site.store(norms[site.path])
        else:
            warn(f"reestimate: {site.path!r} was never called and is as it was", stacklevel=2)
    return model


class ReestimatedSite(ObservedSite):
    """One that normalizes with the moments of what it has seen so far.

    Args:
        prior: the number of samples that the statistics that it had count as.
    """

    def __init__(self, path: str, norm: nn.Module, prior: float) -> None:
        super().__init__(path, norm)
        self._prior = prior

    def statistics(self) -> tuple[Tensor, Tensor]:
        count, mean = self.seen.count, self.seen.mean
        variance = self.seen.variance * count / (count - 1).clamp(min=1)
        if not self._prior:
            return mean, variance
        old = self._prior * self.positions
        held_mean, held_variance = self.held
        return (
            (old * held_mean + count * mean) / (old + count),
            (old * held_variance + count * variance) / (old + count),
        )
