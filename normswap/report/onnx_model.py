"""An ONNX file as a module, so that whatever measures modules can measure it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from normswap.core.atomic import of_one_file
from normswap.core.compat import pytree
from normswap.core.errors import NormswapError
from normswap.deploy.diverge import one_line, open_session
from normswap.source import parse_input

_NUMPY = {"float": "float32", "double": "float64"}  # the others are called the same in both


class OnnxModel(nn.Module):
    """The file at `path` in ONNX Runtime on the CPU.

    Called with the tensors of its inputs in their order, converted to the file's types; returns its
    output, or a tuple of them. A file of a fixed batch size takes any number of samples: it is run
    on one batch after the other, and the last one is filled up.

    Raises:
        NormswapError: no such file, or none that ONNX Runtime's CPU can run.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.session = of_one_file(path, _session)
        self.declared = self.session.get_inputs()
        sizes = {each.shape[0] if each.shape else None for each in self.declared}
        self.batch = sizes.pop() if len(sizes) == 1 else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs of the file.

        Raises:
            NormswapError: it takes other inputs.
        """
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len(given) != len(self.declared):
            raise NormswapError(
                f"{str(self.path)!r} takes {len(self.declared)} inputs, and {len(given)} are given"
            )
        size = self.batch
        if not isinstance(size, int) or any(x.ndim == 0 or len(x) == size for x in given):
            outputs = self._run(given)
        else:
            count = len(given[0])
            parts = [self._run(_part(given, start, size)) for start in range(0, count, size)]
            outputs = [torch.cat(each)[:count] for each in zip(*parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def example(self) -> Any:
        """Inputs that it takes: of two samples where the batch size is open; None if more is."""
        texts = []
        for each in self.declared:
            shape = list(each.shape)
            if shape and not isinstance(shape[0], int):
                shape[0] = 2
            if not shape or not all(isinstance(size, int) and size for size in shape):
                return None
            texts.append(f"{_dtype(each.type)}:{'x'.join(map(str, shape))}")
        made = tuple(parse_input(text) for text in texts)
        return made if len(made) > 1 else made[0]

    def _run(self, given: Sequence[Tensor]) -> list[Tensor]:
        feed = {
            each.name: x.detach().cpu().numpy().astype(_dtype(each.type), copy=False)
            for each, x in zip(self.declared, given, strict=True)
        }
        try:
            found = self.session.run(None, feed)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            shapes = ", ".join("x".join(map(str, x.shape)) for x in given)
            raise NormswapError(
                f"{str(self.path)!r} rejects inputs of shape {shapes}: {one_line(error)}; "
                "give others"
            ) from error
        return [torch.from_numpy(np.array(each)) for each in found]


def _session(path: Path) -> InferenceSession:
    if not path.is_file():
        raise NormswapError(f"there is no ONNX file at {str(path)!r}; name one")
    return open_session(path, path.parent)


def _part(given: Sequence[Tensor], start: int, size: int) -> list[Tensor]:
    """`size` samples from `start` on, the last one as often as it takes."""
    chosen = torch.arange(start, start + size)
    return [x[chosen.clamp_max(len(x) - 1)] for x in given]


def _dtype(declared: str) -> str:
    name = declared.removeprefix("tensor(").removesuffix(")")
    return _NUMPY.get(name, name)
