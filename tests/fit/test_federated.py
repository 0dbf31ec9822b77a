"""What a server makes of its clients' statistics is what it would make of all their data."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import ConvBN, Residual, batch_norms, randomise
from torch import Tensor, nn

import normswap as ns
from normswap.core.errors import NormswapError
from normswap.nn import domain


class Mean(nn.Module):
    """A BatchNorm of a textbook's, with names of its own (d2l.ai, section 8.5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("moving_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("moving_var", torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = (x - self.moving_mean) / torch.sqrt(self.moving_var + 1e-5)
        return self.gamma * y + self.beta


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Residual()).to(dtype)


def shifted(sizes: list[int], seed: int = 0) -> list[Tensor]:
    """Images of so many per client, of another brightness and contrast at each."""
    drawn = torch.Generator().manual_seed(seed)
    images = [torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=drawn) for n in sizes]
    return [(k + 1) * x + 3 * k for k, x in enumerate(images)]


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if "running_" in name}


def pooled(model: nn.Module, clients: list[Any], rounds: int, **selection: Any) -> list[float]:
    """How far each round moved the statistics."""
    sent: list[Any] = [None] * len(clients)
    moved = []
    for _ in range(rounds):
        sent = [
            ns.client_statistics(model, data, previous=previous, **selection)
            for data, previous in zip(clients, sent, strict=True)
        ]
        moved.append(ns.pool_statistics(model, sent))
    return moved


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    cut=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 99),
)
def test_one_batch_norm_gets_those_of_the_concatenated_data(
    sizes: list[int], cut: int, dtype: torch.dtype, seed: int
) -> None:
    clients, norm = shifted(sizes, seed), nn.BatchNorm2d(3).to(dtype)
    sent = [ns.client_statistics(norm, x.split(cut)) for x in clients]
    assert not norm.running_mean.any()  # a client changes nothing
    moved = ns.pool_statistics(norm, sent)
    values = torch.cat(clients).to(dtype).double().transpose(0, 1).flatten(1)
    rounding = 1e-10 if dtype == torch.float64 else 1e-5
    close = {"rtol": rounding, "atol": rounding}
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), **close)
    torch.testing.assert_close(norm.running_var.double(), values.var(1), **close)
    unit = values.var(1).mean().sqrt()
    expected = torch.maximum(values.mean(1).abs(), (values.std(1) - 1).abs()).max() / unit
    assert moved == pytest.approx(float(expected), rel=1e-4)


def test_as_many_rounds_as_batch_norms_give_what_one_process_with_all_data_gives() -> None:
    clients = [x.split(4) for x in shifted([5, 9, 2])]
    model, whole = network(), network()
    ns.reestimate(whole, [batch for data in clients for batch in data])
    moved = pooled(model, clients, len(batch_norms(model)) + 1)
    assert moved[0] > 0.1
    assert moved[-1] < 1e-12
    for name, value in statistics(model).items():
        torch.testing.assert_close(value, statistics(whole)[name], rtol=1e-6, atol=1e-6)


def test_a_few_rounds_come_close_in_a_deep_network() -> None:
    """Those that each round takes as they were in the one before would take twelve rounds."""
    torch.manual_seed(0)
    model = nn.Sequential(*(ConvBN(6 if k else 3, 6) for k in range(12))).double()
    clients = [x.split(4) for x in shifted([8, 8, 8])]
    whole = ns.reestimate(copy.deepcopy(model), [batch for data in clients for batch in data])

    assert pooled(model, clients, 6)[-1] < 0.2
    for name, value in statistics(model).items():
        expected = statistics(whole)[name]
        assert float((value - expected).norm() / expected.norm()) < 0.1


def test_frozen_in_tune_mode_they_are_the_same() -> None:
    clients, model = [[x] for x in shifted([5, 9])], network()
    tuned = ns.freeze(model, shifted([2])[0], mode="tune")
    pooled(model, clients, 3)
    pooled(tuned, clients, 3)
    for name, value in statistics(model).items():
        torch.testing.assert_close(statistics(tuned)[name], value)


def test_each_client_may_keep_a_domain_of_its_own() -> None:
    clients = shifted([5, 9])
    model = ns.convert(nn.Sequential(nn.BatchNorm2d(3)).double(), "adaptive_batch_norm")
    for k, x in enumerate(clients):
        model[0].add_domain(f"client{k}")
        with domain(model, f"client{k}"):
            pooled(model, [[x]], 1)
        held = model[0].statistics(f"client{k}")
        torch.testing.assert_close(held.running_mean, x.mean((0, 2, 3)))
    assert not model[0].running_mean.any()


def test_a_batch_norm_that_is_not_selected_keeps_its_own() -> None:
    model = network()
    kept, before = batch_norms(model)[0], copy.deepcopy(statistics(model))
    pooled(model, [[x] for x in shifted([5, 9])], 1, exclude=kept)
    for name, value in statistics(model).items():
        assert torch.equal(value, before[name]) == name.startswith(f"{kept}.")


def test_one_that_a_client_does_not_call_gets_the_statistics_of_the_others() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.low(x) if x.mean() < 2 else self.high(x)

    model, (low, high) = Routed().double(), shifted([5, 9])
    pooled(model, [[low], [high]], 1)
    torch.testing.assert_close(model.low.running_mean, low.mean((0, 2, 3)))
    torch.testing.assert_close(model.high.running_mean, high.mean((0, 2, 3)))
    with pytest.warns(UserWarning, match="'high' was never called and is as it was"):
        pooled(model, [[low]], 1)


def test_statistics_that_were_not_finite_are_far_from_those_that_are() -> None:
    norm, (x,) = nn.BatchNorm2d(3).double(), shifted([4])
    norm.running_mean.fill_(torch.nan)
    sent = [ns.client_statistics(nn.BatchNorm2d(3).double(), [x])]
    assert ns.pool_statistics(norm, sent) == float("inf")
    torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))


def refused(model: nn.Module, call: Any, *words: str) -> None:
    """It raises, says so in these words, and leaves the model as it was."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NormswapError) as told:
        call()
    assert all(word in str(told.value) for word in words), told.value
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ([], "there are no clients"),
        ([torch.ones(3)], "client 0 sent tensor([1., 1., 1.])"),
        ([{}], "client 0 sent {}"),
        ([{"1": torch.ones(3, 3)}], "client 0 sent the statistics of '1', which is no BatchNorm"),
        (
            [{"0": torch.ones(3, 3)}, {"2": torch.ones(3, 4)}],
            "client 1 and others did not all send",
        ),
        ([{"0": torch.ones(3, 4)}], "no tensor of the shape (3, 3)"),
        ([{"0": torch.ones(3, 3)}, {"0": torch.full((3, 3), torch.nan)}], "client 1 sent of '0'"),
        ([{"0": -torch.ones(3, 3)}], "is negative"),
    ],
)
def test_what_cannot_be_pooled_is_refused(sent: list[Any], words: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(4))
    refused(model, lambda: ns.pool_statistics(model, sent), words)


def test_a_client_without_data_or_with_bad_data_says_so() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).double()
    (x,) = shifted([4])
    refused(model, lambda: ns.client_statistics(model, []), "there is no batch")
    refused(model, lambda: ns.client_statistics(model, [x, x * torch.nan]), "batch 2", "not finite")
    previous = {"0": torch.ones(3, 4)}
    refused(
        model, lambda: ns.client_statistics(model, [x], previous=previous), "what this client sent"
    )
    refused(nn.Sequential(), lambda: ns.client_statistics(nn.Sequential(), [x]), "no BatchNorm")


def averaged(model: nn.Module, clients: list[nn.Module], samples: list[float]) -> nn.Module:
    return ns.average_clients(model, [each.state_dict() for each in clients], samples)


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_trained_clients_are_averaged_and_their_statistics_pooled(
    sizes: list[int], dtype: torch.dtype, seed: int
) -> None:
    """The statistics of the concatenated data, where each client has those of its own."""
    clients = []
    for k, x in enumerate(shifted(sizes, seed)):
        client = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3)), k).double()
        mean, var = x.mean((0, 2, 3)), x.transpose(0, 1).flatten(1).var(1, unbiased=False)
        client[0].running_mean.copy_(mean), client[0].running_var.copy_(var)
        clients.append(client.to(dtype))
    model = averaged(copy.deepcopy(clients[0]), clients, sizes)
    values = torch.cat(shifted(sizes, seed)).transpose(0, 1).flatten(1)
    rounding = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    near = rounding | {"atol": 80 * torch.finfo(dtype).eps}  # of means that cancel
    torch.testing.assert_close(model[0].running_mean.double(), values.mean(1), **near)
    variance = values.var(1, unbiased=False)
    torch.testing.assert_close(model[0].running_var.double(), variance, **near)
    shares = [n / sum(sizes) for n in sizes]
    for name, value in model.named_parameters():
        terms = [s * c.get_parameter(name).double() for s, c in zip(shares, clients, strict=True)]
        torch.testing.assert_close(value.double(), torch.stack(terms).sum(0), **rounding)


def test_equal_clients_give_themselves() -> None:
    client = network()
    model = averaged(randomise(network(), 1), [client, client, client], [1, 2, 3])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, client.state_dict()[name])


@pytest.mark.parametrize("form", ["tied", "domains", "textbook", "instance"])
def test_each_form_of_statistics_is_pooled_or_averaged_as_it_is_meant(form: str) -> None:
    """Those of an InstanceNorm are averages of each sample's, and not of a population."""

    def made(mean: float) -> nn.Module:
        if form == "tied":
            norm = nn.BatchNorm2d(3)
            model = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm)
        elif form == "domains":
            model = nn.Sequential(ns.create("adaptive_batch_norm", 3, domains=("a", "b")))
        elif form == "textbook":
            model = nn.Sequential(Mean(3))
        else:
            model = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
        for name, buffer in model.named_buffers():
            if name.endswith("mean"):
                buffer.fill_(mean)
            elif name.endswith("var"):
                buffer.fill_(2.0)
        return model

    model = averaged(made(0.0), [made(1.0), made(5.0)], [3, 1])
    seen = 0
    for name, value in model.state_dict().items():
        if name.endswith("mean"):
            assert torch.equal(value, torch.full_like(value, 2.0))
        elif name.endswith("var"):  # 2 within, and 3/4 of 1 and 1/4 of 9 between
            expected = 2.0 if form == "instance" else 5.0
            assert torch.equal(value, torch.full_like(value, expected))
            seen += 1
    assert seen == {"tied": 2, "domains": 2}.get(form, 1)


def test_counted_batches_are_rounded_and_indices_have_to_agree() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.register_buffer("order", torch.tensor([2**60 + 1, 0]))
    clients = [copy.deepcopy(model) for _ in range(2)]
    for number, client in enumerate(clients):
        client[0].num_batches_tracked += 10 + number
    averaged(model, clients, [1, 2])
    assert int(model[0].num_batches_tracked) == 11
    assert int(model.order[0]) == 2**60 + 1
    clients[1].order.zero_()
    refused(model, lambda: averaged(model, clients, [1, 2]), "'order' of client 1", "no average")


@pytest.mark.parametrize(
    ("clients", "samples", "words"),
    [
        ([], [], "there are no clients"),
        ([nn.BatchNorm2d(3)], [1, 2], "there are 1 clients and 2 numbers of samples"),
        ([nn.BatchNorm2d(3)], [0], "client 0 has 0 samples"),
        ([nn.BatchNorm2d(3)] * 2, [1, -1], "client 1 has -1 samples"),
        ([nn.BatchNorm2d(3)], [float("nan")], "client 0 has nan samples"),
        ([nn.BatchNorm2d(4)], [1], "no tensor of the shape (3,)"),
        ([nn.BatchNorm2d(3).half()], [1], "and type torch.float32"),
        ([nn.BatchNorm2d(3, affine=False)], [1], "client 0 has no entry"),
    ],
)
def test_what_cannot_be_averaged_is_refused(
    clients: list[nn.Module], samples: list[float], words: str
) -> None:
    model = nn.BatchNorm2d(3)
    refused(model, lambda: averaged(model, clients, samples), words)


def test_a_client_that_diverged_is_refused() -> None:
    model, client = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    client.weight.data[1] = torch.inf
    refused(model, lambda: averaged(model, [model, client], [1, 1]), "'weight' of client 1")
    given: list[Any] = [client]
    refused(model, lambda: ns.average_clients(model, given, [1]), "is of type BatchNorm2d")
