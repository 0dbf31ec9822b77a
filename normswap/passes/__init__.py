"""Changing: a pass decides what to do, as a plan of edits; the plan does it.

To add a pass, write a class with `plan(model, inputs) -> Plan` in a file of its own.
"""

from normswap.passes.absorb_input import AbsorbInput
from normswap.passes.bake import Bake
from normswap.passes.center import Center
from normswap.passes.equalize import Equalize
from normswap.passes.fold import Fold
from normswap.passes.fold_affine import FoldAffine
from normswap.passes.freeze import Freeze, Unfreeze
from normswap.passes.parametrize import Parametrize
from normswap.passes.replace import Replace
from normswap.passes.rescale import Rescale
from normswap.passes.rotate import Rotate

__all__ = [
    "AbsorbInput",
    "Bake",
    "Center",
    "Equalize",
    "Fold",
    "FoldAffine",
    "Freeze",
    "Parametrize",
    "Replace",
    "Rescale",
    "Rotate",
    "Unfreeze",
]
