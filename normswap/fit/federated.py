"""BatchNorm statistics of several clients, whose data stay where they are.

A client sends how many values each of its BatchNorms saw, and their mean and variance per channel:
`client_statistics`. The server pools them: `pool_statistics`. What a BatchNorm is given depends on
those before it, so that it takes several rounds until all have the statistics of all clients' data
together, as `normswap.reestimate` gives them where one process can read all.

If each round took the statistics of the round before as they are, an error in one BatchNorm would
go on to the next one with each round, and grow with the depth. So a client takes from what changed
here, since the round before, how the pooled statistics will have changed: by the same affine map of
each channel. After k rounds the first k BatchNorms in dataflow order are exact, and few are enough
to come close.

Without further rounds, `average_clients` averages what clients have trained, as FedAvg does
(McMahan et al. 2017, arXiv 1602.05629), except for the variances of BatchNorms: the average of the
clients' lacks how far their means are apart.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import usual_settings
from normswap.core.errors import NormswapError, warn
from normswap.core.types import Batches
from normswap.fit.observed import (
    ObservedInputs,
    ObservedSite,
    is_running,
    observable,
    running_norms,
    statistics_of,
    statistics_of_domains,
)
from normswap.fit.site_moments import merged
from normswap.fit.sweeps import settle
from normswap.passes.selection import Globs, select_paths

_CHANGE = 0.01, 100.0  # of a variance from round to round; more is of a channel that was constant


@usual_settings()
def client_statistics(
    model: nn.Module,
    data: Batches,
    *,
    batches: int | None = None,
    previous: Mapping[str, Tensor] | None = None,
    include: Globs | None = None,
    exclude: Globs = (),
) -> dict[str, Tensor]:
    """What the BatchNorms of `model` normalize on a client's data, for `pool_statistics`.

    The model runs in eval mode, and is not changed.

    Args:
        model: as the server sent it.
        data: the client's batches, as for `normswap.reestimate`, which are read several times.
            Under torch.distributed the processes are one client, and each reads its own.
        batches: how many of them to read, by default all.
        previous: what this gave at this client in the round before, which went into the statistics
            that `model` has; None in the first round, which takes these as they are.
        include, exclude: globs on the names of the BatchNorms; by default all of them.

    Returns:
        For the name of each BatchNorm with running statistics (3, C) in float64: the number of
        values that each channel has, their mean and their variance, divided by that number. It is
        0 where the BatchNorm was not called.

    Raises:
        NormswapError: there is no such BatchNorm, a glob matches nothing, `data` is empty, an
            activation is not finite, the model rejects a batch or cannot be copied, what a
            BatchNorm normalizes cannot be seen, or `previous` is of another model.
    """
    norms = running_norms(model)
    selected = select_paths(list(norms), include, exclude)
    if previous is not None:
        _check_sent("this client", previous, dict.fromkeys(selected), norms)
    twin = observable(model)
    sites = [
        ClientSite(path, twin.get_submodule(path), None if previous is None else previous[path])
        for path in selected
    ]
    observed = ObservedInputs(sites)
    title = f"measuring {len(sites)} BatchNorms"
    settle(sites, data, batches, (twin,), lambda batch, _: observed.run(twin, batch), title)
    return {
        site.path: torch.stack([site.seen.count, site.seen.mean, site.seen.variance])
        for site in sites
    }


class ClientSite(ObservedSite):
    """One that normalizes with the pooled statistics, as far as they can be known here.

    Args:
        previous: count, mean and variance that went into the pooled statistics from here, (3, C).
    """

    def __init__(self, path: str, norm: nn.Module, previous: Tensor | None) -> None:
        super().__init__(path, norm)
        self._previous = None if previous is None else previous.cpu().double()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """What the pooled ones are where all clients' values changed as they did here."""
        if self._previous is None:
            return self.held
        (mean, variance), (_, old_mean, old_variance) = self.held, self._previous
        ratio = torch.where(old_variance > 0, self.seen.variance / old_variance, 1.0)
        scale = ratio.clamp(*_CHANGE).sqrt()
        return self.seen.mean + scale * (mean - old_mean), scale.square() * variance

    def end_sweep(self) -> float:
        """As of all; what does not follow what is seen has not moved."""
        return 0.0 if self._previous is None else super().end_sweep()


@usual_settings()
def pool_statistics(model: nn.Module, clients: Sequence[Mapping[str, Tensor]]) -> float:
    """Give BatchNorms of `model` the statistics of all clients' data together, in place.

    Each client counts by the number of its values, and a variance has the distances between the
    clients' means in it. As torch has it, the running variance is that of a sample, divided by the
    count less one.

    Args:
        model: what the clients ran, with the statistics that it had then.
        clients: what `client_statistics` gave at each of them.

    Returns:
        How far a mean or a standard deviation was moved at most, in units of the typical standard
        deviation of its BatchNorm. Send the model to the clients and pool again until this is
        small, 0.05 say; after as many rounds as there are BatchNorms it is exact.

    Raises:
        NormswapError: there is no client, or what one sent does not fit the model or the others',
            or is not finite. The model is as before then.
    """
    norms = running_norms(model)
    if not clients:
        raise NormswapError("there are no clients; give what client_statistics gave at each")
    for number, sent in enumerate(clients):
        _check_sent(f"client {number}", sent, clients[0], norms)
    moved = 0.0
    for path in clients[0]:
        parts = []
        for sent in clients:
            count, mean, variance = sent[path].cpu().double()
            parts.append(torch.stack([count, mean, count * variance]))
        count, mean, squares = merged(parts)
        if count.any():
            moved = max(moved, _store(norms[path], mean, squares / (count - 1).clamp(min=1)))
        else:
            warn(f"pool_statistics: {path!r} was never called and is as it was", stacklevel=2)
    return moved


def _check_sent(
    client: str, sent: Mapping[str, Tensor], paths: Mapping[str, Any], norms: dict[str, nn.Module]
) -> None:
    """Refuse what is not from `client_statistics`, for the BatchNorms at `paths`."""
    if not isinstance(sent, Mapping) or not sent:
        raise NormswapError(
            f"{client} sent {sent!r:.40}; give what client_statistics returned there"
        )
    for path in sent.keys() - norms.keys():
        raise NormswapError(
            f"{client} sent the statistics of {path!r}, which is no BatchNorm of this model with "
            "running statistics; give the model that the clients ran"
        )
    for path in sent.keys() ^ paths.keys():
        raise NormswapError(
            f"{client} and others did not all send the statistics of {path!r}; call "
            "client_statistics with the same include and exclude at each and in each round"
        )
    for path, moments in sent.items():
        expected = (3, statistics_of(norms[path])[0].numel())
        if not isinstance(moments, Tensor) or moments.shape != expected:
            raise NormswapError(
                f"what {client} sent of {path!r} is no tensor of the shape {expected}; give what "
                "client_statistics returned there, with the model that it ran"
            )
        if not moments.isfinite().all() or (moments[::2] < 0).any():
            raise NormswapError(
                f"what {client} sent of {path!r} is not finite, or a count or a variance is "
                "negative; leave this client out, or let it send again"
            )


def _store(norm: nn.Module, mean: Tensor, variance: Tensor) -> float:
    """Give `norm` the statistics; how far that moved them, in typical standard deviations."""
    held = statistics_of(norm)
    old_mean, old_variance = (each.detach().cpu().double().flatten() for each in held)
    apart = (mean - old_mean).abs(), (variance.sqrt() - old_variance.sqrt()).abs()
    moved, unit = torch.maximum(*apart).nan_to_num(torch.inf).max(), variance.mean().sqrt()
    with torch.no_grad():
        for tensor, value in zip(held, (mean, variance), strict=True):
            tensor.copy_(value.view_as(tensor))
    return float(moved / unit) if moved else 0.0


def average_clients(
    model: nn.Module, clients: Sequence[Mapping[str, Any]], samples: Sequence[float]
) -> nn.Module:
    """Give `model` the average of what clients have trained, in place: FedAvg.

    The running mean and variance of a BatchNorm become those of the clients' data pooled: to the
    average of the variances comes that of the squared distances between the clients' means (the
    law of total variance). All other parameters and statistics are averaged.

    Args:
        model: of the clients' architecture, for instance what they started from.
        clients: the state dict of each.
        samples: how many samples each client has, or another weight of it.

    Returns:
        `model`. A `num_batches_tracked` is rounded; other whole numbers and masks are those of all.

    Raises:
        NormswapError: there is no client, `samples` are not a positive number for each, or a state
            dict does not fit the model, is not finite, or has other whole numbers or masks than
            another client's. The model is as before then.
    """
    shares = _shares(clients, samples)
    own = model.state_dict()
    for number, state in enumerate(clients):
        _check_state(number, state, own, clients[0])
    averaged = {
        name: _average([state[name] for state in clients], shares)
        for name, value in clients[0].items()
        if isinstance(value, Tensor) and _has_an_average(name, value)
    }
    for mean, variance in _running_names(model):
        if mean in averaged:
            apart = [state[mean].cpu().double() - averaged[mean] for state in clients]
            averaged[variance] += _average([each.square() for each in apart], shares)
    for name, value in averaged.items():
        if not own[name].is_floating_point() and not own[name].is_complex():
            value.round_()
    model.load_state_dict({**clients[0], **averaged})
    return model


def _shares(clients: Sequence[Any], samples: Sequence[float]) -> list[float]:
    if not clients:
        raise NormswapError("there are no clients; give the state dict of each")
    if len(samples) != len(clients):
        raise NormswapError(
            f"there are {len(clients)} clients and {len(samples)} numbers of samples; give one each"
        )
    for number, count in enumerate(samples):
        if not 0 < count < float("inf"):
            raise NormswapError(
                f"client {number} has {count} samples; give a positive number, or leave it out"
            )
    return [float(count) / float(sum(samples)) for count in samples]


def _check_state(number: int, state: Any, own: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise NormswapError(
            f"client {number} is of type {type(state).__name__}; give its state dict"
        )
    for name in state.keys() ^ own.keys():
        without = "the model" if name in state else f"client {number}"
        raise NormswapError(
            f"{without} has no entry {name!r}; give state dicts of the model's architecture"
        )
    for name, value in own.items():
        if isinstance(value, Tensor):
            _check_entry(f"{name!r} of client {number}", name, state[name], value, first[name])


def _check_entry(shown: str, name: str, sent: Any, own: Tensor, first: Any) -> None:
    if not isinstance(sent, Tensor) or sent.shape != own.shape or sent.dtype != own.dtype:
        raise NormswapError(
            f"{shown} is no tensor of the shape {tuple(own.shape)} and type {own.dtype}, as the "
            "model's is; give state dicts of its architecture"
        )
    if not sent.isfinite().all():
        raise NormswapError(
            f"{shown} is not finite; leave this client out, or let it train again at a lower rate"
        )
    if not _has_an_average(name, sent) and not torch.equal(sent.cpu(), first.cpu()):
        raise NormswapError(
            f"{shown} is another than that of client 0, and numbers of type {sent.dtype} have no "
            "average; give both the same"
        )


def _has_an_average(name: str, value: Tensor) -> bool:
    """Whether `value` is measured, learned or counted, and not an index or a mask."""
    counted = name.rpartition(".")[2] == "num_batches_tracked"
    return counted or value.is_floating_point() or value.is_complex()


def _average(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The sum of `values` times `shares`, in float64 or complex128 on the CPU."""
    dtype = torch.promote_types(values[0].dtype, torch.float64)
    pairs = zip(values, shares, strict=True)
    return torch.stack([value.detach().cpu().to(dtype) * share for value, share in pairs]).sum(0)


def _running_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The names in the state dict of each BatchNorm's running mean and variance."""
    names: dict[int, list[str]] = defaultdict(list)  # several of one that is at several places
    for name, value in model.state_dict(keep_vars=True).items():
        names[id(value)].append(name)
    for norm in filter(is_running, model.modules()):
        for mean, variance in statistics_of_domains(norm):
            yield from zip(names[id(mean)], names[id(variance)], strict=True)
