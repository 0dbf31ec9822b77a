"""Average ten clients that have two of ten digits each, with BatchNorm and without.

Each client trains the bundled model on, in batches of two, and the server averages what they send
(FedAvg, McMahan et al. 2017, arXiv 1602.05629). Three ways to average the statistics of BatchNorm,
and FedBN (Li et al. 2021, arXiv 2102.07623), which leaves BatchNorms at the clients, stand against
GroupNorm and frozen statistics.

    python examples/federated.py
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normswap
from normswap.demo.digits import digits, digits_data
from normswap.fit.evaluate import accuracy

CLASSES, ROUNDS, STEPS, BATCH, RATE = 10, 3, 10, 2, 0.01
State = dict[str, Tensor]
Images = tuple[Tensor, Tensor]


def of_client(k: int, images: Images) -> Images:
    """The images with label k or k + 1, modulo ten."""
    x, y = images
    has = (y == k) | (y == (k + 1) % CLASSES)
    return x[has], y[has]


TRAIN = [of_client(k, digits_data("train")) for k in range(CLASSES)]
TEST = [of_client(k, digits_data("test")) for k in range(CLASSES)]
SAMPLES = [len(y) for _, y in TRAIN]


def trained(model: nn.Module, x: Tensor, y: Tensor) -> State:
    """What a client sends after its local steps."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model.state_dict()


def averaged(sent: list[State]) -> State:
    """FedAvg by hand: of each entry the mean, weighted by the numbers of samples."""
    weights = torch.tensor(SAMPLES, dtype=torch.float64) / sum(SAMPLES)
    return {
        name: sum(w * state[name].double() for w, state in zip(weights, sent, strict=True))
        for name in sent[0]
    }


def federated(model: nn.Module) -> tuple[nn.Module, list[State]]:
    """The model after all rounds, and what the clients sent in the last one."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    for _ in range(ROUNDS):
        sent = [trained(model, *client) for client in TRAIN]
        model.load_state_dict(averaged(sent))
    return model, sent


def fedbn(model: nn.Module) -> list[nn.Module]:
    """The model of each client, with BatchNorms of its own."""
    torch.manual_seed(0)
    paths = {path for site in normswap.inspect(model).sites for path in site.paths}
    models = [copy.deepcopy(model) for _ in TRAIN]
    for _ in range(ROUNDS):
        sent = [trained(own, *client) for own, client in zip(models, TRAIN, strict=True)]
        shared = averaged(sent)
        for own, state in zip(models, sent, strict=True):
            kept = {name: v for name, v in state.items() if name.rpartition(".")[0] in paths}
            own.load_state_dict({**shared, **kept})
    return models


def show(name: str, models: list[nn.Module]) -> None:
    """Print how many test images of its client's digits each model has right, on average."""
    right = [accuracy(m.eval(), [own]) for m, own in zip(models, TEST, strict=True)]
    print(f"{name:31} {sum(right) / len(right):6.1%}")


def main() -> None:
    x, _ = digits_data("train")
    original = digits()
    show("before", [original] * CLASSES)

    model, sent = federated(original)
    show("BatchNorm, everything averaged", [model] * CLASSES)
    normswap.average_clients(model, sent, SAMPLES)
    show("BatchNorm, variances pooled", [model] * CLASSES)
    moments = [None] * CLASSES
    for _ in range(3):  # the clients measure, and send counts, means and variances
        moments = [
            normswap.client_statistics(model, [client], previous=previous)
            for client, previous in zip(TRAIN, moments, strict=True)
        ]
        normswap.pool_statistics(model, moments)
    show("BatchNorm, statistics measured", [model] * CLASSES)
    show("FedBN", fedbn(original))

    swapped = normswap.convert(original, "group_norm", data=x[:500].split(100))
    show("GroupNorm", [federated(swapped)[0]] * CLASSES)
    show("frozen BatchNorm", [federated(normswap.freeze(original))[0]] * CLASSES)


if __name__ == "__main__":
    main()
