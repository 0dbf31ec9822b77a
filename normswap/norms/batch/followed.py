"""A BatchNorm that goes on with children of its own, as some libraries' classes do."""

from torch import Tensor

from normswap.norms.batch.plain import BatchNorm


class FollowedBatchNorm(BatchNorm):
    """Batch normalization, then the children named in `then`, in order.

    It takes the place of somebody else's class that applies a drop and an activation to the value
    it has normalized, where the class itself keeps its statistics in another way.
    """

    then: tuple[str, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        for name in self.then:
            y = getattr(self, name)(y)
        return y
