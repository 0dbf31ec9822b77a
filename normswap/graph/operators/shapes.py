"""Operators that look at the shape, dtype or device of a value alone, never at its numbers."""

import torch

from normswap.graph.operators.operator import define

aten = torch.ops.aten

define(
    "look",
    aten._assert_tensor_metadata.default,
    aten.sym_size.int,
    aten.sym_numel.default,
    aten.sym_stride.int,
    *("size", "dim", "ndimension", "numel", "stride"),
)
define("fill", aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, fills=0.0)
define("fill", aten.ones.default, aten.ones_like.default, aten.new_ones.default, fills=1.0)
define(
    "fill",
    aten.empty_like.default,
    aten.full_like.default,
    aten.new_empty.default,
    aten.new_full.default,
)
