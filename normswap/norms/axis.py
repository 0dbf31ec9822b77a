"""A normalization of channels at axis 1, put where they lie last."""

from torch import Tensor, nn


class ChannelsLast(nn.Module):
    """Apply `norm`, which takes (N, C, ...), to a value of shape (N, ..., C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.norm(input.movedim(-1, 1))
        return y.movedim(1, -1)
