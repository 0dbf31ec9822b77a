"""Every method as a module, beside those of `torch.nn`: torch's argument order and state-dict keys.

    from normswap import nn

    norm = nn.SwitchableNorm(64)

A model that is already trained is given them by `normswap.convert` and `normswap.parametrize`.
Every name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.norms.batch.adaptive import AdaptiveBatchNorm as AdaptiveBatchNorm
    from normswap.norms.batch.adaptive import domain as domain
    from normswap.norms.batch.conditional import ConditionalBatchNorm as ConditionalBatchNorm
    from normswap.norms.batch.conditional import conditioned as conditioned
    from normswap.norms.batch.ghost import GhostBatchNorm as GhostBatchNorm
    from normswap.norms.batch.l1 import L1BatchNorm as L1BatchNorm
    from normswap.norms.batch.mean_only import MeanOnlyBatchNorm as MeanOnlyBatchNorm
    from normswap.norms.batch.plain import BatchNorm as BatchNorm
    from normswap.norms.batch.renorm import BatchRenorm as BatchRenorm
    from normswap.norms.batch.whitening import DecorrelatedBatchNorm as DecorrelatedBatchNorm
    from normswap.norms.input_norm import InputNorm as InputNorm
    from normswap.norms.mixed.batch_instance import BatchInstanceNorm as BatchInstanceNorm
    from normswap.norms.mixed.batch_instance import keep_gates as keep_gates
    from normswap.norms.mixed.evonorm import EvoNormB0 as EvoNormB0
    from normswap.norms.mixed.evonorm import EvoNormS0 as EvoNormS0
    from normswap.norms.mixed.switchable import SwitchableNorm as SwitchableNorm
    from normswap.norms.mixed.switchable import averaging as averaging
    from normswap.norms.pointwise.dynamic_tanh import DynamicTanh as DynamicTanh
    from normswap.norms.recurrent.batch_norm import BatchNormLSTM as BatchNormLSTM
    from normswap.norms.recurrent.layer_norm import LayerNormRecurrent as LayerNormRecurrent
    from normswap.norms.sample.filter_response import FilterResponseNorm as FilterResponseNorm
    from normswap.norms.sample.global_response import GlobalResponseNorm as GlobalResponseNorm
    from normswap.norms.sample.group import InstanceNorm as InstanceNorm
    from normswap.norms.sample.group import LayerNormPerPosition as LayerNormPerPosition
    from normswap.norms.sample.local_response import LocalResponseNorm as LocalResponseNorm
    from normswap.norms.sample.rms import RMSNorm as RMSNorm
    from normswap.norms.weight.spectral_norm import SpectralNorm as SpectralNorm
    from normswap.norms.weight.standardization import CenteredWeight as CenteredWeight
    from normswap.norms.weight.standardization import WeightStandardization as WeightStandardization
    from normswap.norms.weight.weight_norm import WeightNorm as WeightNorm
    from normswap.norms.weight.weight_norm import data_dependent_init as data_dependent_init

_HOME = {
    "AdaptiveBatchNorm": "normswap.norms.batch.adaptive",
    "BatchInstanceNorm": "normswap.norms.mixed.batch_instance",
    "BatchNorm": "normswap.norms.batch.plain",
    "BatchNormLSTM": "normswap.norms.recurrent.batch_norm",
    "BatchRenorm": "normswap.norms.batch.renorm",
    "CenteredWeight": "normswap.norms.weight.standardization",
    "ConditionalBatchNorm": "normswap.norms.batch.conditional",
    "DecorrelatedBatchNorm": "normswap.norms.batch.whitening",
    "DynamicTanh": "normswap.norms.pointwise.dynamic_tanh",
    "EvoNormB0": "normswap.norms.mixed.evonorm",
    "EvoNormS0": "normswap.norms.mixed.evonorm",
    "FilterResponseNorm": "normswap.norms.sample.filter_response",
    "GhostBatchNorm": "normswap.norms.batch.ghost",
    "GlobalResponseNorm": "normswap.norms.sample.global_response",
    "InputNorm": "normswap.norms.input_norm",
    "InstanceNorm": "normswap.norms.sample.group",
    "L1BatchNorm": "normswap.norms.batch.l1",
    "LayerNormPerPosition": "normswap.norms.sample.group",
    "LayerNormRecurrent": "normswap.norms.recurrent.layer_norm",
    "LocalResponseNorm": "normswap.norms.sample.local_response",
    "MeanOnlyBatchNorm": "normswap.norms.batch.mean_only",
    "RMSNorm": "normswap.norms.sample.rms",
    "SpectralNorm": "normswap.norms.weight.spectral_norm",
    "SwitchableNorm": "normswap.norms.mixed.switchable",
    "WeightNorm": "normswap.norms.weight.weight_norm",
    "WeightStandardization": "normswap.norms.weight.standardization",
    "averaging": "normswap.norms.mixed.switchable",
    "conditioned": "normswap.norms.batch.conditional",
    "data_dependent_init": "normswap.norms.weight.weight_norm",
    "domain": "normswap.norms.batch.adaptive",
    "keep_gates": "normswap.norms.mixed.batch_instance",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normswap.nn' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
