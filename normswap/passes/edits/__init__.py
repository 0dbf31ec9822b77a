"""The edits that a plan consists of: data that can be printed, stored and carried out.

Each names the site it concerns and the reason. `apply` changes one place of the module tree; it may
fail half-way, because the plan restores the model then.
"""

from typing import Annotated

from pydantic import Field

from normswap.passes.edits.modules import ReplaceByCentering, ReplaceModule, ToIdentity
from normswap.passes.edits.recurrent import ReplaceRecurrentModule
from normswap.passes.edits.statistics import FreezeStatistics, ThawStatistics
from normswap.passes.edits.tensors import (
    AbsorbAffine,
    BakeTensor,
    GiveBias,
    ParametrizeTensor,
    ReleaseAffine,
)

Edit = Annotated[
    ReplaceModule
    | ReplaceByCentering
    | ReplaceRecurrentModule
    | FreezeStatistics
    | ThawStatistics
    | GiveBias
    | AbsorbAffine
    | ReleaseAffine
    | BakeTensor
    | ParametrizeTensor
    | ToIdentity,
    Field(discriminator="edit"),
]

__all__ = [
    "AbsorbAffine",
    "BakeTensor",
    "Edit",
    "FreezeStatistics",
    "GiveBias",
    "ParametrizeTensor",
    "ReleaseAffine",
    "ReplaceByCentering",
    "ReplaceModule",
    "ReplaceRecurrentModule",
    "ThawStatistics",
    "ToIdentity",
]
