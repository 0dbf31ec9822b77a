"""What a model returns on an example in eval mode, and how far that is from what another returns.

A run leaves no trace: modes, hooks, buffers, the arguments and the random number generators are as
before.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.ambient import alone
from normswap.core.compat import pytree
from normswap.core.interrupts import entered
from normswap.graph.exporting import Hidden, tensors_in
from normswap.graph.snapshot import contents_kept, untouched

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What one forward returned, or raised, and how often it called some modules."""

    outputs: list[Tensor] | None
    error: Exception | None
    calls: Counter[str]


def run(
    model: nn.Module,
    call: Call,
    *,
    gradients: bool = False,
    counted: Iterable[str] = (),
    forwards: Mapping[str, nn.Module] | None = None,
) -> Run:
    """One forward in eval mode, which leaves no trace.

    Args:
        gradients: whether they are recorded.
        counted: paths of the modules whose calls are counted.
        forwards: modules whose forward those at these paths compute meanwhile.
    """
    calls: Counter[str] = Counter()
    # All at once: a mode around each would be as many around each operator.
    all_of_them = nn.ModuleList([model, *(forwards or {}).values()])
    with (
        alone(),  # the random number generators have to be as they are seeded
        entered(torch.set_grad_enabled(gradients)),
        untouched(all_of_them, training=False),
        contents_kept(all_of_them),
    ):
        for path, other in (forwards or {}).items():
            vars(model.get_submodule(path))["forward"] = other.forward
        _count(model, counted, calls)
        torch.manual_seed(0)
        args, kwargs = pytree.tree_map_only(Tensor, _copy, call)
        try:
            output = model(*args, **kwargs)
            return Run([each.detach().clone() for each in _returned(output)], None, calls)
        except Exception as error:
            return Run(None, error, calls)


def as_parameters(model: nn.Module, call: Call) -> Call:
    """The arguments on the device, and of the floating-point type, of the model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return call

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(like.device, like.dtype if tensor.is_floating_point() else tensor.dtype)

    args, kwargs = pytree.tree_map_only(Tensor, moved, call)
    return args, kwargs


def in_double(example: Any) -> Any:
    """An example whose floating-point tensors are in float64."""
    return pytree.tree_map_only(
        Tensor, lambda each: each.double() if each.is_floating_point() else each, example
    )


def deviation(actual: Tensor, expected: Tensor, original: Tensor | None = None) -> float:
    """max |a - b| / max |b|; infinite where one is finite and the other is not.

    Args:
        original: what gives the largest value in the place of `expected`.
    """
    if not expected.is_floating_point() or not expected.numel():
        return 0.0
    original = expected if original is None else original
    actual, expected, original = actual.double(), expected.double(), original.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()):
        return float("inf")
    difference = torch.where(finite, actual - expected, 0.0).abs().max()
    largest = torch.where(original.isfinite(), original, 0.0).abs().max()
    return float(difference / largest.clamp_min(torch.finfo(torch.float32).tiny))


def largest_rounding(dtype: torch.dtype) -> float:
    """The deviation of an output beyond which it is no rounding error, as far as can be told."""
    limits = {torch.float64: 1e-6, torch.float16: 0.1, torch.bfloat16: 0.3}
    return limits.get(dtype, 1e-2)


def _returned(output: Any) -> list[Tensor]:
    """The tensors in what a model returns, as far as they can be seen."""
    try:
        return tensors_in(output)
    except Hidden:
        return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _copy(tensor: Tensor) -> Tensor:
    # A forward may write into its input, which must then not be a leaf that records gradients.
    return tensor.detach().clone()


def _count(model: nn.Module, paths: Iterable[str], calls: Counter[str]) -> None:
    """Let the modules at `paths` count their calls, until `untouched` undoes it.

    No hooks: torch's layers take no fused path where there is one, and are to be seen as they are.
    """
    for path in paths:
        module = model.get_submodule(path)
        vars(module)["forward"] = partial(_counting, module.forward, path, calls)


def _counting(
    forward: Callable[..., Any], path: str, calls: Counter[str], *args: Any, **kwargs: Any
) -> Any:
    calls[path] += 1
    return forward(*args, **kwargs)
