"""Which changes of the weights and of the data a method does not see: computed, not quoted.

Ba et al. 2016 (arXiv 1607.06450), section 5.1 and Table 1. Of a layer of cases x_n and weight
vectors w_i of the hidden units, y = norm(X W^T), they ask whether y stays where the weights or the
cases are scaled or shifted. Here every method is asked in training mode, with the start values of
its parameters and running statistics, no bias, in float64 and with almost no eps. The factors are
positive. A weight method computes W; where it keeps a gain apart (weight_norm's g), the change is
one of the tensor that has the shape of the weight.

A case is a vector, as in the paper. Where a method objects to that, because its statistic would be
of a single value, a case is a few vectors, its positions, that are scaled and shifted together, as
they would be in an image before a 1x1 convolution. A recurrent network takes one step; what
normalizes inputs stands before the layer, fitted to the cases as they are.
"""

from collections.abc import Callable
from copy import deepcopy
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.core.ambient import alone, generators_kept
from normswap.core.errors import NormswapError, told
from normswap.norms.input_norm import InputNorm
from normswap.norms.registry import Method, MethodKind

CASES, POSITIONS, INPUTS, UNITS = 48, 5, 32, 128  # enough for a group of any method
EPS = 1e-30
FACTOR = 3.0
TOLERANCE = 1e-6

Change = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _scaled(tensor: Tensor) -> Tensor:
    return FACTOR * tensor


def _first_scaled(tensor: Tensor) -> Tensor:
    return torch.cat([FACTOR * tensor[:1], tensor[1:]])


def _shifted(tensor: Tensor) -> Tensor:
    """The same vector added to each: `tensor` is (..., INPUTS)."""
    return tensor + torch.linspace(-1, 2, INPUTS, dtype=tensor.dtype)


# name -> change of the weights W (UNITS, INPUTS), change of the cases X (CASES, ..., INPUTS).
CHANGES: dict[str, tuple[Change, Change]] = {
    "weight matrix re-scaling": (_scaled, _same),
    "weight matrix re-centering": (_shifted, _same),
    "weight vector re-scaling": (_first_scaled, _same),
    "dataset re-scaling": (_same, _scaled),
    "dataset re-centering": (_same, _shifted),
    "single training case re-scaling": (_same, _first_scaled),
}


def invariances(method: Method) -> dict[str, bool]:
    """Whether the outputs stay, for each of `CHANGES`.

    Raises:
        NormswapError: the method fails, or its outputs are no numbers to compare.
    """
    try:
        return _invariances(method)
    except NormswapError:
        raise
    except (Exception, SystemExit) as error:  # of a method of somebody else
        raise NormswapError(f"{method.name} fails: {told(error)}") from error


def _invariances(method: Method) -> dict[str, bool]:
    with torch.no_grad(), alone(), generators_kept():
        torch.manual_seed(0)
        layer, outputs = _LAYERS[method.kind](method)
        cases = torch.randn(CASES, INPUTS, dtype=torch.float64)
        try:
            before = _numbers(outputs(layer, cases))
        except ValueError:
            cases = torch.randn(CASES, POSITIONS, INPUTS, dtype=torch.float64)
            before = _numbers(outputs(layer, cases))
        stays = {}
        for name, (of_weights, of_cases) in CHANGES.items():
            after = _numbers(outputs(_with_weights(layer, of_weights), of_cases(cases)))
            stays[name] = bool((after - before).abs().max() <= TOLERANCE * before.abs().max())
    return stays


def _numbers(outputs: Tensor) -> Tensor:
    """`outputs`, which a method of somebody else may have made of anything."""
    if not isinstance(outputs, Tensor):
        raise TypeError(f"its output is {type(outputs).__name__}, no tensor")
    if outputs.numel() < CASES or not bool(outputs.isfinite().all()):
        raise ArithmeticError(f"its outputs are not finite numbers for each of {CASES} samples")
    return outputs


# What holds the weights W, and the function of it and the cases X that gives the outputs y. Copies
# do the work: a call moves running statistics and estimates.
_Layer = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]


def _linear() -> nn.Linear:
    return nn.Linear(INPUTS, UNITS, bias=False, dtype=torch.float64)


def _activation(method: Method) -> _Layer:
    norm = _built(method, UNITS).to(torch.float64).train()
    return _linear(), lambda layer, cases: deepcopy(norm)(layer(cases).movedim(-1, 1))


def _weight(method: Method) -> _Layer:
    layer = _linear()
    parametrize.register_parametrization(layer, "weight", _built(method, layer, "weight"))
    return layer, lambda layer, cases: deepcopy(layer)(cases)


def _input(method: Method) -> _Layer:
    """Fitted to all cases, as they are after the change."""
    norm = _built(method, INPUTS)
    assert isinstance(norm, InputNorm)
    return _linear(), lambda layer, cases: layer(deepcopy(norm).fit([cases])(cases))


def _recurrent(method: Method) -> _Layer:
    """One step from a state of zeros, the weights those of the input."""
    lstm = nn.LSTM(INPUTS, UNITS // 4, bias=False, dtype=torch.float64)
    network = _built(method, lstm).train()
    return network, lambda network, cases: deepcopy(network)(cases.unsqueeze(0))[0]


_LAYERS: dict[MethodKind, Callable[[Method], _Layer]] = {
    "activation": _activation,
    "weight": _weight,
    "recurrent": _recurrent,
    "input": _input,
}


def _built(method: Method, *args: object) -> nn.Module:
    eps = {"eps": EPS} if "eps" in signature(method.build).parameters else {}
    return method.made(*args, **eps)


def _with_weights(layer: nn.Module, change: Change) -> nn.Module:
    layer = deepcopy(layer)
    for name, weight in layer.named_parameters():
        if weight.shape == (UNITS, INPUTS) and not name.startswith("weight_hh"):
            weight.copy_(change(weight))
    return layer
