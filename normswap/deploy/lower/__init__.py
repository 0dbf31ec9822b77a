"""Rewrite an exported graph for the runtime that is to run it.

`lower(model, target)` runs the target's rules, each an onnx_ir pass in a file of its own:

- `generic`: the standard operators that torch's exporter wrote, but for two: `LongMean` takes
  the mean of a normalization over many values, which ONNX Runtime sums too coarsely, off before it,
  and `RmsNorm` writes an RMSNorm as one operator, or so that ONNX Runtime makes one of it.
- `onnxruntime`: for ONNX Runtime's CPU, at the sizes the file declares,
  1. `GroupNormalization`: a normalization over groups of channels becomes dot products and one
     scale and shift for each channel where it is large, LayerNormalization where it is not.
  2. `MeanSquare`: a mean of squares, or a variance, over positions becomes a dot product.
  3. `AffineRule`: a constant gain and bias of the channels, on the way to a convolution, becomes
     a depthwise 1x1 convolution: the runtime merges the activation and the sum behind it into it.
  4. `LongMean` and `RmsNorm`, for the normalizations that are left.

A rule applies to float32 alone: a sum of squares overflows float16, and float64 is for checking. It
leaves what it does not know. What it writes keeps the name of the value that it computes and the
scope of the module it came from, so that validation can name the layer that is wrong.
"""

from collections.abc import Callable
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from normswap.core.errors import NormswapError
from normswap.deploy.lower.group_normalization import GroupNormalization
from normswap.deploy.lower.long_mean import LongMean
from normswap.deploy.lower.mul_add import AffineRule
from normswap.deploy.lower.rms_norm import RmsNorm
from normswap.deploy.lower.square import MeanSquare

Target = Literal["generic", "onnxruntime"]
TARGETS: dict[Target, tuple[Callable[[], ir.passes.InPlacePass], ...]] = {
    "generic": (LongMean, RmsNorm),
    "onnxruntime": (GroupNormalization, MeanSquare, AffineRule, LongMean, RmsNorm),
}
OLDEST_OPSET = 18  # in which reductions take their axes as an input


def target_named(name: str) -> Target:
    """The target of this name.

    Raises:
        NormswapError: there is none.
    """
    for target in TARGETS:
        if target == name:
            return target
    raise NormswapError(f"there is no target {name!r}; choose one of {', '.join(TARGETS)}")


def lower(model: ir.Model, target: Target) -> bool:
    """Rewrite `model` in place for `target`; whether anything was changed.

    Raises:
        NormswapError: the rules of the target are for a newer opset than the model's.
    """
    if target != "generic" and model.opset_imports[""] < OLDEST_OPSET:
        raise NormswapError(
            f"the target {target!r} takes opset {OLDEST_OPSET} or newer, not "
            f"{model.opset_imports['']}; leave the opset to torch, or the target generic"
        )
    passes = [rule() for rule in TARGETS[target]]
    changed = [rule(model).modified for rule in passes]
    if any(changed):
        RemoveUnusedNodesPass()(model)
    return any(changed)
