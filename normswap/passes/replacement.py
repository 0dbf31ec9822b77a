"""The pass that puts a method into a model, by the method's kind."""

from typing import Any

from normswap.core.errors import NormswapError
from normswap.norms.registry import method_named
from normswap.passes.recurrent import ReplaceRecurrent
from normswap.passes.replace import Replace
from normswap.passes.reweight import Reweight

Replacement = Replace | Reweight | ReplaceRecurrent


def replacement(to: str, **options: Any) -> Replacement:
    """The pass for `convert(model, to)`; the arguments are those of the pass.

    Raises:
        NormswapError: an unknown method or option, or one that takes the place of nothing.
    """
    method = method_named(to)
    if method.folds_scale:
        return Reweight(to, **options)
    if method.kind == "recurrent":
        return ReplaceRecurrent(to, **options)
    if method.kind == "activation":
        return Replace(to, **options)
    remedy = (
        "use parametrize"
        if method.kind == "weight"
        else f"put create({to!r}, channels) before the model"
    )
    raise NormswapError(f"{to} takes the place of no normalization; {remedy}")
