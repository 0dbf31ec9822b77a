"""The state of the random number generators, kept apart and written down as tensors."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Randomness:
    """Where torch's generators, numpy's and the standard library's were at one moment.

    Attributes:
        torch: of the CPU.
        cuda: of the current CUDA device, or None where CUDA is not in use.
        numpy: `numpy.random.get_state()`.
        python: `random.getstate()`.
    """

    torch: Tensor
    cuda: Tensor | None
    numpy: Any
    python: Any

    @staticmethod
    def now() -> "Randomness":
        cuda = torch.cuda.get_rng_state() if _cuda_in_use() else None
        return Randomness(torch.get_rng_state(), cuda, np.random.get_state(), random.getstate())

    def restore(self) -> None:
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def tensors(self) -> dict[str, Tensor]:
        """The same as tensors, of the same shapes at any time; `of` reads them."""
        _, keys, position, has_gauss, gauss = self.numpy
        version, words, next_gauss = self.python
        later = float("nan") if next_gauss is None else next_gauss
        return {
            "torch": self.torch,
            "cuda": torch.empty(0, dtype=torch.uint8) if self.cuda is None else self.cuda,
            "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
            "python": torch.tensor([version, *words]),
            "gauss": torch.tensor([gauss, later], dtype=torch.float64),
        }

    @staticmethod
    def of(tensors: dict[str, Tensor]) -> "Randomness":
        """What `tensors` gave.

        Raises:
            KeyError, ValueError: these are none that it gave.
        """
        now = Randomness.now()
        try:
            *keys, position, has_gauss = tensors["numpy"].tolist()
            version, *words = tensors["python"].tolist()
            gauss, later = tensors["gauss"].tolist()
            read = Randomness(
                tensors["torch"],
                tensors["cuda"] if tensors["cuda"].numel() else None,
                ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, gauss),
                (version, tuple(words), None if later != later else later),
            )
            read.restore()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError("no state of these generators") from error
        finally:
            now.restore()
        return read


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class Apart:
    """Random numbers of one's own: what is drawn inside `drawing` is not seen outside of it.

    Args:
        generators: of others, which are drawn from inside and are as before outside, too.

    Attributes:
        state: of the global generators, as it is inside.
        states: of the `generators`.
    """

    def __init__(self, generators: Sequence[torch.Generator] = ()) -> None:
        self.state = Randomness.now()
        self.states = [each.get_state() for each in generators]
        self._generators = generators

    @contextmanager
    def drawing(self) -> Iterator[None]:
        outside, others = Randomness.now(), [each.get_state() for each in self._generators]
        self.state.restore()
        self._set(self.states)
        try:
            yield
        finally:
            self.state = Randomness.now()
            self.states = [each.get_state() for each in self._generators]
            outside.restore()
            self._set(others)

    def _set(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)
