"""The edits that a plan consists of: data that can be printed, stored and carried out.

Each names the site it concerns and the reason. `apply` changes one place of the module tree; it may
fail half-way, because the plan restores the model then.
"""

from typing import Annotated

from pydantic import Field

from normswap.passes.edits.affine import (
    DropGain,
    TakeRawInput,
)
from normswap.passes.edits.branches import BypassOperators, MergeInto
from normswap.passes.edits.centering import CenterOutput, CenterTensor, SetOnes
from normswap.passes.edits.functional import (
    GiveCallBias,
    ModularizeBatchNorm,
    ModularizeConv,
    ModularizeNorm,
)
from normswap.passes.edits.memory_format import ToChannelsLast
from normswap.passes.edits.modules import (
    ReplaceByCentering,
    ReplaceModule,
    ReplaceRecurrentModule,
    ToAffine,
    ToIdentity,
    ToShift,
)
from normswap.passes.edits.own_copies import DuplicateProducer, OwnCopy, PassInput
from normswap.passes.edits.padded_shift import AddPaddedShift
from normswap.passes.edits.parametrizations import (
    BakeHook,
    BakeTensor,
    FoldIntoTensor,
    FoldWhitening,
    GiveBias,
    ParametrizeTensor,
    ReleaseAffine,
)
from normswap.passes.edits.statistics import (
    FreezeStatistics,
    StatisticsIntoAffine,
    ThawStatistics,
)

Edit = Annotated[
    ReplaceModule
    | ReplaceByCentering
    | ReplaceRecurrentModule
    | CenterTensor
    | SetOnes
    | CenterOutput
    | FreezeStatistics
    | StatisticsIntoAffine
    | ThawStatistics
    | GiveBias
    | GiveCallBias
    | ModularizeBatchNorm
    | ModularizeNorm
    | ModularizeConv
    | FoldIntoTensor
    | AddPaddedShift
    | FoldWhitening
    | ReleaseAffine
    | BakeTensor
    | BakeHook
    | ParametrizeTensor
    | DropGain
    | TakeRawInput
    | ToAffine
    | ToChannelsLast
    | DuplicateProducer
    | OwnCopy
    | PassInput
    | MergeInto
    | BypassOperators
    | ToIdentity
    | ToShift,
    Field(discriminator="edit"),
]

__all__ = [
    "AddPaddedShift",
    "BakeHook",
    "BakeTensor",
    "BypassOperators",
    "CenterOutput",
    "CenterTensor",
    "DropGain",
    "DuplicateProducer",
    "Edit",
    "FoldIntoTensor",
    "FoldWhitening",
    "FreezeStatistics",
    "GiveBias",
    "GiveCallBias",
    "MergeInto",
    "ModularizeBatchNorm",
    "ModularizeConv",
    "ModularizeNorm",
    "OwnCopy",
    "ParametrizeTensor",
    "PassInput",
    "ReleaseAffine",
    "ReplaceByCentering",
    "ReplaceModule",
    "ReplaceRecurrentModule",
    "SetOnes",
    "StatisticsIntoAffine",
    "TakeRawInput",
    "ThawStatistics",
    "ToAffine",
    "ToChannelsLast",
    "ToIdentity",
    "ToShift",
]
