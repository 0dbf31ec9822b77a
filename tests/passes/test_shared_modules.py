"""Modules that are called twice, read elsewhere, tied or chosen come out right, or are refused.

The kinds of network that `tools/fuzz_networks.py` found to be wrong, each in a few variants.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten import Layers, assert_holds, image
from torch import Tensor, nn
from torch.nn.utils import prune

fold_and_tune = pytest.mark.parametrize("verb", ["fold", "tune"])


def conv(inputs: int = 4, outputs: int = 4) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


# --- called twice, beside other BatchNorms --------------------------------------------------------


CHAINS: dict[str, Callable[[Any, Tensor], Any]] = {
    "one call alone": lambda m, x: (m.a(x), m.b(m.a(x.relu()))),
    "one call behind": lambda m, x: (m.a(x), m.a(m.b(x))),
    "both behind": lambda m, x: (m.b(m.a(x)), m.b(m.a(x.relu()))),
    "between itself": lambda m, x: m.a(m.b(m.a(x))),
    "on itself": lambda m, x: m.a(m.a(x)),
    "both ways": lambda m, x: m.a(m.b(x)) + m.b(m.a(x)),
    "a third": lambda m, x: (m.a(m.c(x)), m.b(m.c(x)), m.a(m.b(x))),
    "a chain and one apart": lambda m, x: (m.a(m.b(m.c(x))), m.a(x.relu())),
    "behind a convolution": lambda m, x: (m.a(m.conv(x)), m.b(m.a(m.conv(x.relu())))),
    "one behind a convolution": lambda m, x: (m.a(m.conv(x)), m.b(m.a(x))),
    "in front of a convolution": lambda m, x: (m.conv(m.a(x)), m.b(m.a(x)), m.a(x)),
    "residual": lambda m, x: m.a(x) + m.a(m.conv(m.a(x)).relu()),
}


@fold_and_tune
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("chain", CHAINS)
def test_a_batch_norm_called_twice_beside_others(chain: str, affine: bool, verb: str) -> None:
    a, b, c = (nn.BatchNorm2d(4, affine=each) for each in (affine, True, False))
    assert_holds(Layers(CHAINS[chain], a=a, b=b, c=c, conv=conv()), verb, [(image(),)])


# --- read elsewhere -------------------------------------------------------------------------------

PER = (-1, 1, 1)
READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "running_mean": lambda a, x: x - a.running_mean.view(PER),
    "running_var": lambda a, x: x * a.running_var.view(PER).rsqrt(),
    "weight": lambda a, x: x if a.weight is None else x * a.weight.view(PER),
    "bias": lambda a, x: x if a.bias is None else x + a.bias.view(PER),
    "eps": lambda a, x: x + 1e3 * a.eps,
    "num_features": lambda a, x: x * a.num_features,
    "affine": lambda a, x: x * (2 if a.affine else 3),
    "momentum": lambda a, x: x * a.momentum,
    "dtype": lambda a, x: x.to(a.running_var.dtype),
    "device": lambda a, x: x.to(a.running_mean.device),
    "isinstance": lambda a, x: x.relu() if isinstance(a, nn.BatchNorm2d) else x,
    "hasattr": lambda a, x: x.relu() if hasattr(a, "running_mean") else x,
    "class name": lambda a, x: x.relu() if "BatchNorm" in type(a).__name__ else x,
    "parameters": lambda a, x: x * sum(each.mean() for each in a.parameters()),
    "state_dict": lambda a, x: x * len(a.state_dict()),
    "functional": lambda a, x: F.batch_norm(x, a.running_mean, a.running_var, a.weight, a.bias),
}


OF_THE_AFFINE = ("weight", "bias", "affine", "parameters", "state_dict", "functional")


@pytest.mark.parametrize(
    "read, place, affine, verb",
    [
        *((read, "between others", True, "fold") for read in READS),
        *((read, "between others", False, "fold") for read in OF_THE_AFFINE),
        *((read, "alone", True, "fold") for read in READS),
        *((read, "alone", True, "frozen") for read in READS),
    ],
)
def test_a_batch_norm_that_something_else_reads(
    read: str, affine: bool, place: str, verb: str
) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.b(m.a(m.c(m.conv(x)))) if place == "between others" else m.a(x)
        return y, READS[read](m.a, x)

    a, b, c = (nn.BatchNorm2d(4, affine=each) for each in (affine, True, True))
    assert_holds(Layers(forward, a=a, b=b, c=c, conv=conv()), verb, [(image(),)])


@pytest.mark.parametrize("verb", ["fold", "tune", "frozen"])
@pytest.mark.parametrize("how", ["pruned", "masked by a hook", "gain of the caller"])
def test_a_hook_that_needs_the_module_it_is_on(how: str, verb: str) -> None:
    norm = nn.BatchNorm2d(4)
    if how == "pruned":
        prune.l1_unstructured(norm, "weight", 0.4)
    elif how == "masked by a hook":
        norm.register_buffer("mask", torch.tensor([0.0, 1, 1, 0]))
        norm.register_forward_hook(lambda module, args, y: y * module.mask.view(PER))
    else:
        norm.register_forward_pre_hook(lambda module, args: (args[0] * module.weight.view(PER),))
    assert_holds(Layers(lambda m, x: m.norm(m.conv(x)), norm=norm, conv=conv()), verb, [(image(),)])


@fold_and_tune
@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_shifts_what_a_batch_norm_gives(before: bool, verb: str) -> None:
    norm = nn.BatchNorm2d(4)
    norm.register_forward_hook(lambda module, args, y: y + 0.3)
    model = Layers(
        lambda m, x: m.norm(m.conv(x)) if before else m.conv(m.norm(x)),
        norm=norm,
        conv=nn.Conv2d(4, 4, 3, bias=False),
    )
    assert_holds(model, verb, [(image(),)])


@fold_and_tune
@pytest.mark.parametrize(
    "read",
    [
        lambda c, x: x * 2 if c.bias is None else x,
        lambda c, x: F.conv2d(x, c.weight, padding=1),
        lambda c, x: x * c.weight.mean(),
        lambda c, x: x + (0 if c.bias is None else c.bias.view(PER)),
        lambda c, x: x * len(list(c.parameters())),
    ],
    ids=["bias is None", "called as a function", "mean", "bias", "count"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_that_something_else_reads(
    read: Callable[[Any, Tensor], Tensor], bias: bool, verb: str
) -> None:
    c = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
    model = Layers(lambda m, x: (m.a(m.c(x)), read(m.c, x)), a=nn.BatchNorm2d(4), c=c)
    assert_holds(model, verb, [(image(),)])


# --- tied -----------------------------------------------------------------------------------------


@fold_and_tune
@pytest.mark.parametrize("tensor", ["weight", "bias", "running_mean", "running_var"])
def test_batch_norms_that_share_a_tensor(tensor: str, verb: str) -> None:
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    setattr(b, tensor, getattr(a, tensor))
    forward = lambda m, x: (m.a(m.c(x)), m.b(x), m.b(m.a(x)))  # noqa: E731
    assert_holds(Layers(forward, a=a, b=b, c=conv()), verb, [(image(),)])


@fold_and_tune
@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_convolutions_that_share_a_tensor(tensor: str, verb: str) -> None:
    c, d = conv(), conv()
    setattr(d, tensor, getattr(c, tensor))
    forward = lambda m, x: (m.a(m.c(x)), m.b(m.d(x)))  # noqa: E731
    layers = {"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4), "c": c, "d": d}
    assert_holds(Layers(forward, **layers), verb, [(image(),)])


# --- chosen ---------------------------------------------------------------------------------------


def by_index(m: Any, x: Tensor, domain: int) -> Tensor:
    return m.out(m.norms[domain](m.conv(x)))


def by_name(m: Any, x: Tensor, mode: str) -> Tensor:
    return m.out({"a": m.norms[0], "b": m.norms[1]}[mode](m.conv(x)))


def by_flag(m: Any, x: Tensor, flag: bool) -> Any:
    y = m.conv(x)
    return m.out(m.norms[0](y)) if flag else (m.norms[1](y), y)


def whether(m: Any, x: Tensor, flag: bool) -> Tensor:
    y = m.conv(x)
    return m.norms[0](y) if flag else y


def features_too(m: Any, x: Tensor, features: bool) -> Any:
    y = m.conv(x)
    z = m.norms[0](y)
    return (m.out(z), y, z) if features else m.out(z)


def optional(m: Any, x: Tensor, extra: Tensor | None) -> Tensor:
    y = m.norms[0](m.conv(x))
    return m.out(y if extra is None else m.norms[1](y) + extra)


def behind(m: Any, x: Tensor, domain: int) -> Tensor:
    return m.norms[domain](m.norms[0](m.conv(x)).relu())


@fold_and_tune
@pytest.mark.parametrize(
    "forward, choices",
    [
        (by_index, (0, 1)),
        (by_index, (1, 0)),
        (by_name, ("a", "b")),
        (by_flag, (True, False)),
        (by_flag, (False, True)),
        (whether, (True, False)),
        (features_too, (False, True)),
        (optional, (None, torch.ones((), dtype=torch.float64))),
        (behind, (0, 1)),
        (behind, (1, 0)),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_an_argument_that_chooses_another_way_than_the_example_did(
    forward: Callable[..., Any], choices: tuple[Any, Any], verb: str
) -> None:
    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    model, x = Layers(forward, norms=norms, conv=conv(), out=conv()), image()
    assert_holds(model, verb, [(x, choice) for choice in choices])


@fold_and_tune
def test_an_attribute_that_chooses_another_way_than_the_example_did(verb: str) -> None:
    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    model = Layers(lambda m, x: by_index(m, x, m.domain), norms=norms, conv=conv(), out=conv())
    model.domain = 0
    assert_holds(model, verb, [(image(),)], domain=1)


@fold_and_tune
def test_a_size_that_chooses_another_way_than_the_example_did(verb: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.norms[0](y) if x.shape[-1] > 7 else m.norms[1](y)

    norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
    model = Layers(forward, norms=norms, conv=conv())
    assert_holds(model, verb, [(image(size=6),), (image(size=9),)])
