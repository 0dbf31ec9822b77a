"""An edit that takes a matrix into a weight: the eval mode of a decorrelated batch norm."""

from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from normswap.graph.operators.rule import ChannelIndex
from normswap.norms.batch.whitening import DecorrelatedBatchNorm
from normswap.passes.edits.base import BaseEdit, inherit_hooks


class FoldWhitening(BaseEdit):
    """Let the layer before compute y = D (W x + b) + t, and put an Identity in the place of D.

    W' = D W and b' = D b + t, in float64.

    Attributes:
        aliases: the paths of the normalization.
        tensor, bias: the weight and bias of the layer at `path`, which has both.
        channel_index: where the output channels lie in the weight.
    """

    edit: Literal["fold_whitening"] = "fold_whitening"
    aliases: tuple[str, ...]
    tensor: str
    bias: str
    channel_index: ChannelIndex

    def apply(self, model: nn.Module) -> None:
        layer, norm = self.module(model), model.get_submodule(self.site)
        weight, bias = layer._parameters.get(self.tensor), layer._parameters.get(self.bias)
        self.require(isinstance(norm, DecorrelatedBatchNorm) and norm.running_mean is not None)
        self.require(weight is not None and bias is not None)
        assert isinstance(norm, DecorrelatedBatchNorm) and weight is not None and bias is not None
        channels, shape = norm.num_features, self.channel_index.shape
        self.require(bias.numel() == channels == prod(shape) and weight.dim() == len(shape))
        axes = [i for i, size in enumerate(shape) if size == weight.shape[i] == channels]
        self.require(bool(axes))
        axis = axes[0]
        with torch.no_grad():
            matrix, shift = norm.inference_matrix(torch.float64)
            mixed = torch.tensordot(matrix, weight.double(), dims=([1], [axis])).movedim(0, axis)
            self._set(layer, self.tensor, weight, mixed)
            self._set(layer, self.bias, bias, matrix @ bias.double() + shift)
        identity = nn.Identity()
        identity.training = norm.training
        inherit_hooks(norm, identity)
        self.put(model, self.aliases, norm, identity)

    def _set(self, layer: nn.Module, name: str, old: nn.Parameter, value: Tensor) -> None:
        new = torch.empty_like(old).copy_(value)  # in its dtype and memory format
        layer.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))

    def __str__(self) -> str:
        return f"into {self.path}.{self.tensor}"
