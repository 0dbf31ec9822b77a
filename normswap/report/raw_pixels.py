"""A model that takes raw pixels is compared with the original on normalized ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normswap.core.compat import pytree
from normswap.passes.absorb_input import AbsorbInput


class Normalized(nn.Module):
    """`model`, and before it the normalization that `folded` would move into it."""

    def __init__(self, model: nn.Module, folded: AbsorbInput) -> None:
        super().__init__()
        self.model = model
        self.scale = folded.scale
        like = next(model.parameters())
        for name, numbers in (("mean", folded.mean), ("std", folded.std)):
            values = torch.tensor(numbers, dtype=torch.float64).to(like)
            self.register_buffer(name, values, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _first(lambda x: x.dtype == torch.uint8, self._normalize, (args, kwargs))
        return self.model(*args, **kwargs)

    def _normalize(self, raw: Tensor) -> Tensor:
        mean, std = (self.get_buffer(name) for name in ("mean", "std"))
        shape = (-1, *[1] * (raw.dim() - 2))
        return (raw.to(mean.dtype) / self.scale - mean.view(shape)) / std.view(shape)


def pixels(inputs: Any, folded: AbsorbInput) -> Any:
    """`inputs`, with integers from 0 to 255 for the first floating-point tensor."""

    def drawn(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        largest = int(min(folded.scale, 255)) + 1
        return torch.randint(largest, x.shape, dtype=torch.uint8, generator=generator).to(x.device)

    return _first(torch.is_floating_point, drawn, inputs)


def _first(fits: Callable[[Tensor], bool], change: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """`inputs` with the first tensor that fits changed."""
    leaves, structure = pytree.tree_flatten(inputs)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and fits(leaf):
            leaves[index] = change(leaf)
            break
    return pytree.tree_unflatten(leaves, structure)
