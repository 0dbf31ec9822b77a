"""The edits that a plan consists of: data that can be printed, stored and carried out.

Each names the site it concerns and the reason. `apply` changes one place of the module tree; it may
fail half-way, because the plan restores the model then.
"""

from typing import Annotated

from pydantic import Field

from normswap.passes.edits.affine import ResetGain, TakeRawInput
from normswap.passes.edits.branches import BypassOperators, MergeInto
from normswap.passes.edits.centering import CenterOutput, CenterTensor
from normswap.passes.edits.functional import GiveBias, ModularizeConv, ModularizeNorm
from normswap.passes.edits.memory_format import ToChannelsLast
from normswap.passes.edits.modules import Reduce, ReplaceModule, ReplaceRecurrentModule
from normswap.passes.edits.own_copies import DuplicateProducer, OwnCopy, PassInput
from normswap.passes.edits.padded_shift import AddPaddedShift
from normswap.passes.edits.parametrizations import (
    BakeTensor,
    FoldIntoTensor,
    FoldWhitening,
    ParametrizeTensor,
)
from normswap.passes.edits.rescaling import RescaleChannels, RescaleGroup
from normswap.passes.edits.rotation import RotateStream
from normswap.passes.edits.statistics import FreezeStatistics, StatisticsIntoAffine, ThawStatistics

Edit = Annotated[
    ReplaceModule
    | ReplaceRecurrentModule
    | Reduce
    | ModularizeNorm
    | ModularizeConv
    | FreezeStatistics
    | ThawStatistics
    | StatisticsIntoAffine
    | GiveBias
    | FoldIntoTensor
    | AddPaddedShift
    | FoldWhitening
    | ParametrizeTensor
    | BakeTensor
    | ResetGain
    | TakeRawInput
    | CenterTensor
    | CenterOutput
    | RotateStream
    | RescaleGroup
    | RescaleChannels
    | DuplicateProducer
    | OwnCopy
    | PassInput
    | MergeInto
    | BypassOperators
    | ToChannelsLast,
    Field(discriminator="edit"),
]

__all__ = [
    "AddPaddedShift",
    "BakeTensor",
    "BypassOperators",
    "CenterOutput",
    "CenterTensor",
    "DuplicateProducer",
    "Edit",
    "FoldIntoTensor",
    "FoldWhitening",
    "FreezeStatistics",
    "GiveBias",
    "MergeInto",
    "ModularizeConv",
    "ModularizeNorm",
    "OwnCopy",
    "ParametrizeTensor",
    "PassInput",
    "Reduce",
    "ReplaceModule",
    "ReplaceRecurrentModule",
    "RescaleChannels",
    "RescaleGroup",
    "ResetGain",
    "RotateStream",
    "StatisticsIntoAffine",
    "TakeRawInput",
    "ThawStatistics",
    "ToChannelsLast",
]
