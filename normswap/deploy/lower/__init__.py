"""Rewrite an exported graph for the runtime that is to run it.

`lower(model, target)` runs the target's rules, each an onnx_ir pass in a file of its own:

- `generic`: the standard operators that torch's exporter wrote, but for three: `GroupedRows` writes
  a GroupNormalization of opset 21, which few runtimes have, as in older opsets, `LongMean` takes
  the mean of a normalization over many values, which ONNX Runtime sums too coarsely, off before it,
  and `RmsNorm` writes an RMSNorm as one operator, or so that ONNX Runtime makes one of it.
- `onnxruntime`: for ONNX Runtime's CPU, at the sizes the file declares,
  1. `GroupNormalization`: a normalization over groups of channels becomes dot products and one
     scale and shift for each channel where it is large, LayerNormalization where it is not.
  2. `MeanSquare`: a mean of squares, or a variance, over positions becomes a dot product.
  3. `AffineRule`: a constant gain and bias of the channels, on the way to a convolution, becomes
     a depthwise 1x1 convolution: the runtime merges the activation and the sum behind it into it.
  4. `LongMean` and `RmsNorm`, for the normalizations that are left.

  `GroupedRows` runs before them.
- `tensorrt`, `coreml` and `qnn`: as `generic`, of operators that these runtimes document. For
  `coreml` gains are initializers, and `Quotient` writes an inverse, which it computes otherwise
  than ONNX says, as a quotient.

A rule applies to float32 alone: a sum of squares overflows float16, and float64 is for checking. It
leaves what it does not know. What it writes keeps the name of the value that it computes and the
scope of the module it came from, so that validation can name the layer that is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from normswap.core.ambient import loggers_silent
from normswap.core.errors import NormswapError
from normswap.deploy.lower.group_normalization import GroupNormalization
from normswap.deploy.lower.grouped_rows import GroupedRows
from normswap.deploy.lower.long_mean import LongMean
from normswap.deploy.lower.mul_add import AffineRule
from normswap.deploy.lower.quotient import Quotient
from normswap.deploy.lower.rms_norm import RmsNorm
from normswap.deploy.lower.square import MeanSquare

Target = Literal["generic", "onnxruntime", "tensorrt", "coreml", "qnn"]


@dataclass(frozen=True)
class Form:
    """How the files for a target are written, and what its runtime does not take.

    Attributes:
        rules: in the order in which they run.
        precisions: in which it is written; None for all.
        fixed_sizes: whether the runtime takes no file that leaves a size open.
        without: operators that it does not take, each with the opset that brought it.
    """

    rules: tuple[Callable[[], ir.passes.InPlacePass], ...] = (GroupedRows, LongMean, RmsNorm)
    precisions: tuple[str, ...] | None = ("float32",)
    fixed_sizes: bool = False
    without: tuple[tuple[str, int], ...] = ()


_LONG_MEAN_OF_INITIALIZERS = partial(LongMean, gain_as_initializer=True)
# The sources of what the last three do not take are in docs/onnx.md.
TARGETS: dict[Target, Form] = {
    "generic": Form(precisions=None),
    "onnxruntime": Form(
        (GroupedRows, GroupNormalization, MeanSquare, AffineRule, LongMean, RmsNorm)
    ),
    "tensorrt": Form(precisions=("float32", "float16"), without=(("GroupNormalization", 21),)),
    "coreml": Form(
        (GroupedRows, _LONG_MEAN_OF_INITIALIZERS, RmsNorm, Quotient),
        without=(("RMSNormalization", 23),),
    ),
    "qnn": Form(fixed_sizes=True),
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
        NormswapError: the rules of the target are for a newer opset than the model's, or its
            runtime does not take an operator of it.
    """
    opset = model.opset_imports[""]
    if target != "generic" and opset < OLDEST_OPSET:
        raise NormswapError(
            f"the target {target!r} takes opset {OLDEST_OPSET} or newer, not "
            f"{opset}; leave the opset to torch, or the target generic"
        )
    form = TARGETS[target]
    changed = [rule()(model).modified for rule in form.rules]
    with loggers_silent("onnx_ir"):  # which says how many
        RemoveUnusedNodesPass()(model)  # an older opset leaves some too
    written = {node.op_type for node in model.graph.all_nodes() if node.domain == ""}
    for operator, since in form.without:
        if operator in written:
            raise NormswapError(
                f"the target {target!r} does not take the operator {operator} of opset {since}; "
                f"export with opset {since - 1} or older"
            )
    return any(changed)
