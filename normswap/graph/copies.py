"""A deep copy of a model that is the model."""

import copy
import warnings

from torch import Tensor, fx, nn


def copied(model: nn.Module, *, share_parameters: bool = False) -> nn.Module:
    """A deep copy of `model`, hooks and attributes included.

    torch's copy of a GraphModule leaves out its hooks on forward and backward, methods replaced on
    the instance, and every attribute that its graph does not read. And it refuses a tensor that was
    computed with gradients, as torch's older weight_norm leaves one on every layer.

    Args:
        share_parameters: the copy's parameters lie in the memory of those of `model`. What is given
            to them as a whole (a gradient, another device) stays theirs; what is written into them
            does not.
    """
    computed = (
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    )
    memo: dict[int, object] = {id(value): value.detach().clone() for value in computed}
    if share_parameters:
        memo |= {
            id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
            for parameter in model.parameters()
            if type(parameter) is nn.Parameter
        }
    with warnings.catch_warnings():  # torch's own, on how a program's inputs are described
        warnings.simplefilter("ignore", FutureWarning)
        result = copy.deepcopy(model, memo)
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            twin = memo[id(module)]
            lost = {
                name: value
                for name, value in vars(module).items()
                if name not in vars(twin) or "_hook" in name
            }
            vars(twin).update(copy.deepcopy(lost, memo))
    return result
