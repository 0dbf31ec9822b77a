"""The fused paths of torch's transformer layers, which read normalizations instead of calling them.

In eval mode, where no gradient is recorded, `nn.TransformerEncoderLayer` hands the weight, bias and
eps of `norm1` and `norm2` to one kernel, and `nn.TransformerEncoder` may hand that kernel nested
tensors. What stands in the place of such a LayerNorm would be taken for one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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


def call_layer_norms(model: nn.Module) -> None:
    """Leave every fused path that computes what its layer computes without it."""
    for layer in model.modules():
        if _is_as_built(layer):
            leave_fused_path(layer)


@contextmanager
def replaced_norms_called(model: nn.Module) -> Iterator[None]:
    """Leave the fused path of each layer in which another normalization is put inside."""
    layers = [each for each in model.modules() if _is_as_built(each)]
    yield
    for layer in layers:
        if not _is_as_built(layer):
            leave_fused_path(layer)


def taken_for_layer_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The normalizations that a fused path takes for LayerNorms, which they are not.

    Such a model computes one function with gradients and another without.
    """
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer) and _may_be_fused(layer):
            yield from (
                norm for norm in _norms(layer) if norm is not None and not _is_layer_norm(norm)
            )


def _may_be_fused(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether a layer hands the tensors of its normalizations to the kernel on some input."""
    attention, norms = layer.self_attn, _norms(layer)
    return bool(
        layer.activation_relu_or_gelu
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and all(map(_has_gain_and_bias, norms))
        and getattr(norms[0], "eps", None) == getattr(norms[1], "eps", None)
    )


def _is_as_built(layer: nn.Module) -> bool:
    """Whether all normalizations of a layer or encoder are LayerNorms with a gain and a bias."""
    if isinstance(layer, nn.TransformerEncoder):
        return all(map(_is_as_built, layer.layers))
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return False
    return all(_is_layer_norm(norm) and _has_gain_and_bias(norm) for norm in _norms(layer))


def _norms(layer: nn.TransformerEncoderLayer) -> tuple[nn.Module | None, nn.Module | None]:
    return getattr(layer, "norm1", None), getattr(layer, "norm2", None)


def _is_layer_norm(norm: nn.Module | None) -> bool:
    return getattr(type(norm), "forward", None) is nn.LayerNorm.forward


def _has_gain_and_bias(norm: nn.Module | None) -> bool:
    return all(getattr(norm, name, None) is not None for name in ("weight", "bias"))
