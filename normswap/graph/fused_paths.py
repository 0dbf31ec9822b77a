"""The fused paths of torch's transformer layers, which read normalizations instead of calling them.

In eval mode, where no gradient is recorded, `nn.TransformerEncoderLayer` hands the weight, bias and
eps of `norm1` and `norm2` to one kernel, and `nn.TransformerEncoder` may hand that kernel nested
tensors. What stands in the place of such a LayerNorm would be taken for one.
"""

from collections.abc import Iterable

from torch import nn


def leave_fused_path(module: nn.Module) -> None:
    """Let `module`, in place, call its normalizations always, if it is a layer that may not.

    It computes the same function, to rounding. The attributes are those by which the layers
    themselves say that they are outside of what the kernel covers.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
    elif isinstance(module, nn.TransformerEncoder):
        module.use_nested_tensor = False


def call_replaced_norms(model: nn.Module, paths: Iterable[str]) -> None:
    """Leave the fused path of each layer around `paths` that has another normalization by now."""
    parts = [path.split(".") for path in dict.fromkeys(paths)]
    above = {".".join(each[:depth]) for each in parts for depth in range(len(each))}
    around = [module for path, module in model.named_modules() if path in above]
    for layer in around:
        if isinstance(layer, nn.TransformerEncoderLayer) and not _is_as_built(layer):
            leave_fused_path(layer)
    for encoder in around:
        if isinstance(encoder, nn.TransformerEncoder):
            layers = encoder.layers
            if not all(_is_as_built(layer) for layer in layers):
                leave_fused_path(encoder)


def _is_as_built(layer: nn.Module) -> bool:
    """Whether both normalizations of a layer are LayerNorms with a gain and a bias."""
    return all(
        getattr(type(norm), "forward", None) is nn.LayerNorm.forward
        and getattr(norm, "weight", None) is not None
        and getattr(norm, "bias", None) is not None
        for norm in (getattr(layer, "norm1", None), getattr(layer, "norm2", None))
    )
