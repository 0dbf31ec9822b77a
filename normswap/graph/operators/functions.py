"""Functions of each element, which no shift passes; softmax, and what gives values of 0 to 1."""

import torch
from torch import fx

from normswap.core.errors import Unsupported
from normswap.graph.operators.layout import equal
from normswap.graph.operators.operator import define
from normswap.graph.operators.pointwise import Same
from normswap.graph.operators.rule import Constraints, Context, Layouts, no_shift, operands

aten = torch.ops.aten


class Homogeneous(Same):
    """f(s x) = s f(x) where s is positive: the scale passes, and no shift does."""

    def constraints(self, node: fx.Node, known: Layouts, context: Context) -> Constraints:
        source = operands(node)[0]
        if source not in known or node not in known or not equal(known[source], known[node]):
            raise Unsupported("only a part of it can be followed")
        why = "its shift meets a function that is not linear"
        return Constraints(no_shift(source, node, why=why), positive=[known[node]])


define(
    "function",
    aten.relu.default,
    aten.relu_.default,
    aten.leaky_relu.default,
    aten.leaky_relu_.default,
    aten.prelu.default,
    aten.abs.default,
    aten.abs_.default,
    scale_rule=Homogeneous(),
)
define(
    "function",
    *(
        aten.gelu.default,
        aten.silu.default,
        aten.silu_.default,
        aten.elu.default,
        aten.elu_.default,
    ),
    *(aten.tanh.default, aten.tanh_.default, aten.hardswish.default, aten.hardswish_.default),
    *(aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default, aten.mish.default),
    *(aten.softplus.default, aten.exp.default, aten.sqrt.default, aten.rsqrt.default),
    *(aten.clamp.default, aten.clamp_min.default, aten.pow.Tensor_Scalar),
)
define(
    "function",
    *(aten.sigmoid.default, aten.sigmoid_.default),
    *(aten.hardsigmoid.default, aten.hardsigmoid_.default),
    unit_interval=True,
)
define("softmax", aten.softmax.int)
define("log softmax", aten.log_softmax.int)
