"""A data set that goes wrong in the middle, in whichever process reads it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

AT = 9  # the sample


class FailingData(Dataset[Any]):
    """Labelled samples, at one of which whoever reads it does `then`."""

    def __init__(self, x: Tensor, y: Tensor, then: Callable[[], Any]) -> None:
        self.x, self.y, self.then = x, y, then

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        if index == AT:
            self.then()
        return self.x[index], self.y[index]
