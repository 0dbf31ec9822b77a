"""Weight normalization: the length and the direction of each unit's weights, learned apart.

Salimans & Kingma 2016 (arXiv 1602.07868), eq. 2: w = g v / ||v||, and its data-dependent
initialization, eq. 5 and 6. The same function and state-dict keys as torch's own
(`torch.nn.utils.parametrizations.weight_norm`), which also loads those of its predecessor
(`torch.nn.utils.weight_norm`); besides for units of zeros, negative dims, and the groups of a
transposed convolution.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normswap.core.errors import NormswapError
from normswap.norms.kernels import statistics_dtype
from normswap.norms.registry import register
from normswap.norms.weight.units import Units, units_of


class WeightNorm(nn.Module):
    """w = g v / ||v|| for each unit.

    Args:
        units: what has a length of its own.
        eps: a length is at least this. That of a unit of zeros starts there, so that the unit is
            kept, and can still be learned.
    """

    def __init__(self, units: Units = Units(), eps: float = 1e-12) -> None:  # noqa: B008 - frozen
        super().__init__()
        self.units, self.eps = units, eps

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        split = self.units.split(v)
        scale = self.units.split(g) / self._norm(split)
        return self.units.join(split * scale).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """g and v. g has the shape of the weight with 1 on the axes that the norm is over."""
        g = self.units.join(self._norm(self.units.split(weight))).to(weight.dtype)
        return (g.reshape(()) if self.units.axis is None else g), weight

    def _norm(self, split: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(
            split, dim=tuple(range(2, split.dim())), keepdim=True, dtype=statistics_dtype(split)
        )
        return norm.clamp(min=self.eps)


def load_older_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a layer loads a state dict: weight_g and weight_v are what it holds as g and v.

    So `torch.nn.utils.weight_norm`, which came before the parametrization, named them.
    """
    for name, chain in _chains(module).items():
        older = f"{prefix}{name}_g", f"{prefix}{name}_v"
        if isinstance(chain[0], WeightNorm) and state.keys() >= {*older}:
            for number, each in enumerate(older):
                state[f"{prefix}parametrizations.{name}.original{number}"] = state.pop(each)


@torch.no_grad()
def data_dependent_init(model: nn.Module, batch: Any) -> None:
    """Scale and shift every layer with weight_norm so that its outputs on `batch` are normalized.

    One run of the model, in the mode it is in. Layer by layer, as they run for the first time, the
    outputs t of a layer are taken to mean 0 and variance 1 per unit, by g <- g / sigma[t] and
    b <- (b - mu[t]) / sigma[t] (eq. 5 and 6, where g is 1 and b is 0 before). A layer without bias
    keeps its mean, and a unit whose outputs are constant keeps its scale.

    Args:
        model: changed in place.
        batch: its input; a tuple holds several.

    Raises:
        NormswapError: no layer that ran has weight_norm, or one has not a length for each unit.
    """
    layers = {module for module in model.modules() if _is_normed(module)}
    todo = set(layers)

    def initialize(layer: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        if layer not in todo:
            return None
        todo.remove(layer)
        return _normalize_outputs(layer, output)

    handles = [layer.register_forward_hook(initialize) for layer in layers]
    try:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    if todo == layers:
        raise NormswapError("no layer with weight_norm ran; parametrize the model with it first")


def _is_normed(module: nn.Module) -> bool:
    return "weight" in (chains := _chains(module)) and isinstance(chains["weight"][0], WeightNorm)


def _chains(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrizations of each tensor of `module` that has some."""
    held: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    return dict(held.items())


def _normalize_outputs(layer: nn.Module, output: Tensor) -> Tensor:
    chain = _chains(layer)["weight"]
    norm, g, bias = chain[0], chain.original0, layer.bias
    assert isinstance(norm, WeightNorm)
    assert isinstance(g, Tensor)
    units = units_of(layer, "weight")
    if norm.units not in (units, Units()):
        raise NormswapError("data_dependent_init needs a length for each output unit (no dim)")
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    over = tuple(i for i in range(output.dim()) if i != axis)
    var, mean = torch.var_mean(output, over, correction=0, keepdim=True)
    deviation = torch.where(var > norm.eps, var.sqrt(), 1)
    if norm.units == units:
        g.div_(deviation.view_as(g))
    else:  # a transposed convolution with lengths along its other axis
        split = units.split(layer.weight)  # type: ignore[arg-type]
        shape = *split.shape[:2], *[1] * (split.dim() - 2)
        layer.weight = units.join(split / deviation.view(shape))
    if not isinstance(bias, Tensor):
        return output / deviation
    bias.sub_(mean.flatten()).div_(deviation.flatten())
    return (output - mean) / deviation


def _build(
    module: nn.Module,
    name: str,
    *,
    dim: int | Literal["output"] | None = 0,
    eps: float = 1e-12,
) -> nn.Module:
    """dim: the axis along which every index has its own length; None for one of the whole.

    torch's default, 0, is that of the output units but in a transposed convolution, where "output"
    is the paper's.
    """
    units = units_of(module, name)
    rank = getattr(module, name).dim()
    if dim is None:
        units = Units(None)
    elif dim != "output":
        if not isinstance(dim, int) or not -rank <= dim < rank:
            raise NormswapError(f"{name} has {rank} axes; dim={dim} is none of them")
        units = Units(dim % rank)
    return WeightNorm(units, eps)


register(
    "weight_norm",
    _build,
    kind="weight",
    keeps="exact",
    summary="length and direction of each unit's weights, learned apart",
    source="Salimans & Kingma 2016, arXiv 1602.07868",
    formula="g v / ||v||",
    statistics="weight",
    cost="2 passes over the weight",
    folds_scale=True,
)
